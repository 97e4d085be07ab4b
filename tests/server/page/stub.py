"""A server of the page with answers by script, which the prompt names: what a real model does not say on demand."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse

import megatron_ee

PAGE = Path(megatron_ee.__file__).parent / "server/page"
EXITS, NUM_LAYERS = [3, 6, 9], 12
POLICY = "default-src 'self'"
DEFAULTS = {"mode": "early_exit", "threshold": 0.9, "thresholds": {}, "min_exit": 3, "kv_policy": "recompute"}
BOUNDS = {"modes": ["early_exit", "speculative"], "kv_policies": ["recompute"], "threshold": 0.57, "min_exit": 3}
STORY = "The ladder has twelve rungs , and most words leave it early .\n Some climb to the top , 数 é 🙂 !"


def token(text: str, layer: int = NUM_LAYERS, *, confidence: float | None = 0.5, drafted: bool = False) -> dict:
    return {"text": text, "exit_layer": layer, "confidence": confidence, "drafted": drafted}


def story(mode: str) -> list[dict]:
    """The same for every mode up to a place, where full depth says something else."""
    depths = [12, 3, 9, 3, 6, 3, 3, 12, 6, 3, 9] if mode == "early_exit" else [12]
    words = [" " * (number > 0) + word for number, word in enumerate(STORY.split(" "))]
    tokens = [
        token(
            word,
            depths[number % len(depths)],
            confidence=0.99 - number / 100,
            drafted=mode == "speculative" and number % 3 > 0,
        )
        for number, word in enumerate(words)
    ]
    return [*tokens[:7], token(" though", 12), *tokens[8:12]] if mode == "full" else tokens


HOSTILE = [
    "<script>window.harmed = 1</script>",
    "<img src=x onerror='window.harmed = 1'>",
    "&lt;b&gt;",
    "\u202e",
    "\n",
    "",
]


class Stub:
    """Remembers what it was asked; `key` is what it wants to see, `facts` what it tells of its model."""

    def __init__(self) -> None:
        self.key: str | None = None
        self.asked: list[dict] = []
        self.ended: list[str] = []  # answers whose reader went away
        self.breaks_off = False  # what has arrived has been seen: answers that break off may do so
        self.facts = self.usual_facts()
        self.app = FastAPI(openapi_url=None)
        self.app.add_api_route("/v1/models", self._models)
        self.app.add_api_route("/v1/{kind:path}", self._answer, methods=["POST"])
        self.app.add_api_route("/", self._file)
        self.app.add_api_route("/{name}", self._file)

    @staticmethod
    def usual_facts() -> dict:
        return {
            "num_layers": NUM_LAYERS,
            "exits": EXITS,
            "measures": ["max_probability"],
            "max_model_len": 2048,
            "has_chat_template": True,
            "defaults": dict(DEFAULTS),
            "sampling": {"max_new_tokens": 128, "temperature": 0.0},
            "bounds": {**BOUNDS, "new_tokens": 100},
        }

    async def _file(self, name: str = "index.html") -> Response:
        path = PAGE / name
        if not path.is_file():
            return refused(404, "no such file")
        return FileResponse(path, headers={"Content-Security-Policy": POLICY})

    async def _models(self, request: Request) -> Response:
        if not self._lets_in(request):
            return refused(401, "no key, or one that is not known", code="invalid_api_key")
        return JSONResponse({"object": "list", "data": [{"id": "tiny", "early_exit": self.facts}]})

    async def _answer(self, request: Request, kind: str) -> Response:
        body = await request.json()
        self.asked.append({"path": kind, **body})
        prompt = body["prompt"] if "prompt" in body else body["messages"][-1]["content"]
        if not self._lets_in(request):
            return refused(401, "no key, or one that is not known", code="invalid_api_key")
        if prompt == "queue":
            return refused(429, "64 requests wait already", code="queue_full", headers={"Retry-After": "7"})
        if prompt == "bounds":
            return refused(400, "early_exit.threshold: 0.10 is below this server's 0.57", code="out_of_bounds")
        if prompt == "proxy":
            return Response("<h1>Bad gateway</h1>", status_code=502)
        mode = body["early_exit"].get("mode", self.facts["defaults"]["mode"])
        return StreamingResponse(self._stream(prompt, mode, "chat" in kind), media_type="text/event-stream")

    def _lets_in(self, request: Request) -> bool:
        return self.key is None or request.headers.get("Authorization") == f"Bearer {self.key}"

    async def _stream(self, prompt: str, mode: str, chat: bool) -> AsyncIterator[bytes]:
        if prompt == "slow":
            try:
                for number in range(10_000):
                    yield event([token(f" {number}", 6)], chat)
                    await asyncio.sleep(0.02)
            except asyncio.CancelledError:
                self.ended.append(prompt)
                raise
        tokens = [token(text, 3) for text in HOSTILE] if prompt == "hostile" else story(mode)
        if prompt in ("error", "lost", "short", "nonsense"):
            for each in tokens[:3]:
                yield event([each], chat)
            while not self.breaks_off:
                await asyncio.sleep(0.01)
            if prompt == "lost":
                raise ConnectionError("the stub lets go")
            if prompt == "nonsense":
                yield b"data: {]\n\n"
            if prompt == "error":
                yield b'data: {"error": {"message": "a stage was lost <b>", "type": "server_error"}}\n\n'
            return
        whole = [event(tokens[start : start + 2], chat) for start in range(0, len(tokens), 2)]
        whole.append(
            event(
                [],
                chat,
                finish="stop",
                mean_depth=sum(each["exit_layer"] for each in tokens) / len(tokens),
                acceptance=0.75 if mode == "speculative" else None,
            )
        )
        whole.append(b'data: {"choices": []}\n\ndata: [DONE]\n\n')
        size = 7 if prompt == "cut" else 10**6
        for piece in whole:
            for start in range(0, len(piece), size):
                yield piece[start : start + size]
                await asyncio.sleep(0)
            await asyncio.sleep(0.01)


def event(tokens: list[dict], chat: bool, *, finish: str | None = None, **figures: float | None) -> bytes:
    text = "".join(each["text"] for each in tokens)
    said: dict = {"delta": {"content": text}} if chat else {"text": text}
    choice = {"index": 0, **said, "finish_reason": finish, "early_exit": {"tokens": tokens, **figures}}
    return f"data: {json.dumps({'choices': [choice]}, ensure_ascii=False)}\n\n".encode()


def refused(status: int, message: str, *, code: str | None = None, headers: dict[str, str] | None = None) -> Response:
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    return JSONResponse({"error": error}, status_code=status, headers=headers)


class Served:
    """An app at a free port of this machine, in a thread."""

    def __init__(self, app: FastAPI) -> None:
        self._server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical", lifespan="off"))
        self._thread = threading.Thread(target=self._server.run)
        self._thread.start()
        while not self._server.started:
            self._thread.join(0.01)
            assert self._thread.is_alive()
        (listening,) = self._server.servers
        self.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"

    def close(self) -> None:
        self._server.should_exit = self._server.force_exit = True
        self._thread.join()
