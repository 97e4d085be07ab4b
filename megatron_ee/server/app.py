"""The routes of the server: who asks, what for, and what is answered."""

from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

from megatron_ee import __version__
from megatron_ee.config import ServingConfig
from megatron_ee.server.generation import Generation, chat_of, completion_of, new_identity
from megatron_ee.server.guard.keys import Client
from megatron_ee.server.metrics import CONTENT_TYPE
from megatron_ee.server.protocol.errors import ApiError
from megatron_ee.server.protocol.requests import ChatCompletionRequest, CompletionRequest, GenerationRequest
from megatron_ee.server.service import Service, State
from megatron_ee.server.streams import EventStream, unless_gone
from megatron_ee.server.transport import Bounded
from megatron_ee.server.watchers import Watcher


def create_app(service: Service, watcher: Watcher, serving: ServingConfig) -> ASGIApp:
    """
    Args:
        service: may still be loading its model.
    """
    app = FastAPI(title="megatron_ee", version=__version__, docs_url=None, redoc_url=None)
    _add_error_handlers(app, watcher)
    routes = _Routes(service, watcher, serving)
    app.add_api_route("/v1/completions", routes.completions, methods=["POST"], responses=_ERRORS)
    app.add_api_route("/v1/chat/completions", routes.chat_completions, methods=["POST"], responses=_ERRORS)
    app.add_api_route("/v1/models", routes.models, responses=_ERRORS)
    app.add_api_route("/v1/models/{name:path}", routes.model, responses=_ERRORS)
    app.add_api_route("/health", routes.health)
    app.add_api_route("/ready", routes.ready, responses={503: {"description": "not yet, or no more"}})
    app.add_api_route("/metrics", routes.metrics)
    app.mount("/", StaticFiles(directory=_PAGE, html=True))
    most, seconds = serving.bounds.body_bytes, serving.read_timeout
    return Bounded(
        app,
        most_bytes=most,
        seconds=seconds,
        admit=watcher.client_of,
        refused=lambda error: watcher.refused(None, error),
    )


class _Routes:
    def __init__(self, service: Service, watcher: Watcher, serving: ServingConfig) -> None:
        self._service, self._watcher, self._serving = service, watcher, serving

    async def completions(self, body: CompletionRequest, request: Request) -> Response:
        """Continue prompts."""
        identity, client = self._begin(request, "cmpl")
        return await self._answer(request, client, await completion_of(body, self._service.offered, identity), body)

    async def chat_completions(self, body: ChatCompletionRequest, request: Request) -> Response:
        """Answer a conversation."""
        identity, client = self._begin(request, "chatcmpl")
        return await self._answer(request, client, await chat_of(body, self._service.offered, identity), body)

    async def models(self, request: Request) -> dict[str, Any]:
        """The model that is served, its exits, and what may be asked of it."""
        self._begin(request, "models")
        return {"object": "list", "data": [self._service.offered.described()]}

    async def model(self, name: str, request: Request) -> dict[str, Any]:
        """One model."""
        self._begin(request, "models")
        self._service.offered.check_name(name)
        return self._service.offered.described()

    async def health(self) -> dict[str, str]:
        """Whether the process is alive."""
        return {"status": "ok"}

    async def ready(self) -> JSONResponse:
        """Whether requests are taken in."""
        state = self._service.state
        return JSONResponse({"status": state}, 200 if state is State.READY else 503)

    async def metrics(self) -> Response:
        """For Prometheus."""
        service, watcher = self._service, self._watcher
        watcher.look(num_running=service.num_running, num_waiting=service.num_waiting)
        return Response(watcher.metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    def _begin(self, request: Request, kind: str) -> tuple[str, Client]:
        """A name for the request, and who asks.

        Raises:
            ApiError: 401.
        """
        request.state.identity = new_identity(kind)
        request.state.client = self._watcher.client_of(request.headers.get("authorization"))
        return request.state.identity, request.state.client

    async def _answer(
        self, request: Request, client: Client, generation: Generation, body: GenerationRequest
    ) -> Response:
        service = self._service
        asking = service.submit(generation.answer.identity, client, generation.requests)
        request.state.is_taken_in = True

        def leave() -> None:
            service.leave(asking)

        if body.stream:
            return EventStream(generation.pieces(asking), timeout=self._serving.read_timeout, leave=leave)
        whole = await unless_gone(request, generation.whole(asking), leave)
        return Response(status_code=_GONE) if whole is None else JSONResponse(whole)


_PAGE = Path(__file__).parent / "page"
_GONE = 499
"""What others say of a client that did not wait; nobody hears it."""
_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"description": "something in the request is wrong, or out of bounds: `error.param` names the field"},
    401: {"description": "no key, or one that nobody has"},
    404: {"description": "there is no such model"},
    408: {"description": "the request did not arrive in time"},
    413: {"description": "the request is too long"},
    429: {"description": "too many wait already, or a budget is used up; see Retry-After"},
    503: {"description": "not ready, or no more"},
}


def _add_error_handlers(app: FastAPI, watcher: Watcher) -> None:
    def answer(request: Request, error: ApiError) -> JSONResponse:
        watcher.refused(request.state, error)
        return JSONResponse(error.body, error.status, headers=error.headers)

    @app.exception_handler(ApiError)
    async def told(request: Request, error: ApiError) -> JSONResponse:
        return answer(request, error)

    @app.exception_handler(RequestValidationError)
    async def invalid_fields(request: Request, error: RequestValidationError) -> JSONResponse:
        return answer(request, _explained(error))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        return answer(request, ApiError(error.status_code, str(error.detail)))

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        return answer(request, ApiError(500, "something went wrong here; the server's log has it"))


def _explained(error: RequestValidationError) -> ApiError:
    """Of the first field that is wrong; of several branches of one, the one that came furthest."""
    first, *_ = error.errors()
    parts = [str(part) for part in first["loc"][1:]]
    fields = {*CompletionRequest.model_fields, *ChatCompletionRequest.model_fields}
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is no JSON: {first['ctx']['error']}")
    if not parts:
        return ApiError(400, f"the body: {first['msg']}")
    if first["type"] == "extra_forbidden" and parts[0] not in fields:
        return ApiError(400, f"{parts[0][:100]}: unknown field", param=parts[0][:100])
    param = parts[0][:100]
    return ApiError(400, f"{param}: {first['msg']}", param=param)
