"""API errors in OpenAI's format: `{"error": {"message", "type", "param", "code"}}`."""

from typing import Any

from gptoss_jax.terminal import printable

# `type` by HTTP status; others are `invalid_request_error` or, from 500 up, `server_error`.
TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "unavailable_error",
}


MAX_MESSAGE = 1000


class ApiError(Exception):
    """An error response to the client.

    Args:
      status: HTTP status.
      message: one sentence for the user; whitespace is normalized and control characters are escaped.
      param: path of the request field, such as `messages[2].content`.
      code: machine-readable code, such as `context_length_exceeded`.
      retry_after: seconds after which the client should retry.
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
        # Messages may quote the request, and those from libraries may have several lines.
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
    """Returns an ApiError 400."""
    return ApiError(400, message, param=param, code=code)


def context_length_exceeded(message: str, param: str) -> ApiError:
    """Returns the ApiError 400 for a request that does not fit in the context."""
    return bad_request(message, param, "context_length_exceeded")


def internal_error() -> ApiError:
    """Returns the ApiError 500 for an internal error; the details are only logged."""
    return ApiError(500, "The server had an error while processing the request; see its log for details.")
