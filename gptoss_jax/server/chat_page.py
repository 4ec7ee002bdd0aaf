"""`GET /`: the chat page, a single HTML file, and its content security policy."""

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
    """Returns the response with the page and its headers."""
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
    """Returns a policy that allows only the page's inline script and style and same-origin requests."""
    policy = {
        "default-src": "'none'",
        "script-src": _hash_of("script", html),
        "style-src": _hash_of("style", html),
        "connect-src": "'self'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        # Makes assignments to innerHTML and similar sinks fail.
        "require-trusted-types-for": "'script'",
    }
    return "; ".join(f"{name} {value}" for name, value in policy.items())


def _hash_of(tag: str, html: str) -> str:
    """Returns the CSP hash source of the page's only element with this tag; https://www.w3.org/TR/CSP3."""
    (content,) = re.findall(f"<{tag}[^>]*>(.*?)</{tag}>", html, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
