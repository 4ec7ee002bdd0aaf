"""Errors of the API, in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`."""

from typing import Any

from gptoss_jax.terminal import printable

# `type` of the error body by HTTP status; others have `invalid_request_error` or, from 500, `server_error`.
TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "unavailable_error",
}


MAX_MESSAGE = 1000


class ApiError(Exception):
    """An error that is sent to the client.

    Args:
      status: of the HTTP response.
      message: one sentence for the client's user; made one line that is safe to print.
      param: the request's field, such as `messages[2].content`.
      code: machine-readable, such as `context_length_exceeded`.
      retry_after: seconds after which the client should try again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str | None = None,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        # Messages may quote the request, and those of libraries have several lines.
        message = printable(" ".join(message.split()))[:MAX_MESSAGE]
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.type = type or TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
        self.headers = {} if retry_after is None else {"Retry-After": str(retry_after)}

    def body(self) -> dict[str, Any]:
        """Returns the JSON body of the response."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": error}


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """Returns a 400."""
    return ApiError(400, message, param=param, code=code)


def context_length_exceeded(message: str, param: str) -> ApiError:
    """Returns the 400 for a prompt that does not fit."""
    return bad_request(message, param, "context_length_exceeded")


def internal_error() -> ApiError:
    """Returns the 500 for a fault of the server; the details are in its log only."""
    return ApiError(500, "The server had an error while processing the request; its log has the details.")
