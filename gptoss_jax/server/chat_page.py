"""`GET /`: the chat page, one HTML file, with a content security policy for its own script and style."""

import base64
import functools
import hashlib
import importlib.resources
import re

from starlette.requests import Request
from starlette.responses import Response


async def chat_page(request: Request) -> Response:
    """`GET /`."""
    return page_response()


@functools.cache
def page_response() -> Response:
    """Reads the page and returns its response."""
    file = importlib.resources.files("gptoss_jax.server") / "page" / "index.html"
    html = file.read_text(encoding="utf-8")
    headers = {
        "Content-Security-Policy": content_security_policy(html),
        "Cross-Origin-Opener-Policy": "same-origin",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    return Response(html, headers=headers, media_type="text/html")


def content_security_policy(html: str) -> str:
    """Returns a policy that allows the script and the style in a page, and requests to its own server."""
    policy = {
        "default-src": "'none'",
        "script-src": _hash_of("script", html),
        "style-src": _hash_of("style", html),
        "connect-src": "'self'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        # Assignments to innerHTML and the like fail.
        "require-trusted-types-for": "'script'",
    }
    return "; ".join(f"{name} {value}" for name, value in policy.items())


def _hash_of(tag: str, html: str) -> str:
    """Returns the source expression of the only element of this name; https://www.w3.org/TR/CSP3."""
    (content,) = re.findall(f"<{tag}[^>]*>(.*?)</{tag}>", html, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
