"""Errors as OpenAI's clients know them."""

from typing import Any


class ApiError(Exception):
    """What a client is told instead of an answer.

    Attributes:
        status: of HTTP.
        message: for its reader.
        param: the field of the request that it is about.
        code: for programs.
        retry_after: seconds after which it may be tried again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after = retry_after

    @property
    def body(self) -> dict[str, Any]:
        kind = _KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        headers = {}
        if self.retry_after is not None:
            headers["Retry-After"] = str(max(1, -int(-self.retry_after // 1)))
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return headers


_KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


def invalid(param: str | None, message: str, *, code: str | None = None) -> ApiError:
    """Of a field that is wrong; the message names it."""
    return ApiError(400, message if param is None else f"{param}: {message}", param=param, code=code)
