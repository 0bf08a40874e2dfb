"""Who may use the routes, and the headers that every answer of them has."""

import base64
import binascii
import hashlib
import secrets
from argparse import Namespace
from collections.abc import Callable, Coroutine, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
OWN_SITES = ("same-origin", "none")  # of Sec-Fetch-Site; browsers send it, programs do not


def api_keys(args: Namespace) -> tuple[str, ...]:
    """The keys that vLLM was given: those of --api-key, else that of VLLM_API_KEY."""
    from vllm import envs

    return tuple(key for key in (args.api_key or [envs.VLLM_API_KEY]) if key)


def given_key(request: Request) -> str | None:
    """The key in a request: a bearer token, or the password a browser asks its user for."""
    scheme, _, value = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return value
    if scheme.lower() != "basic":
        return None
    try:
        return base64.b64decode(value, validate=True).decode().partition(":")[2]
    except (binascii.Error, UnicodeDecodeError):
        return None


class StrictRoute(APIRoute):
    """A route whose every answer has the strict headers, refusals included.

    vLLM's handlers of exceptions would drop the headers of a refusal, and with them the challenge
    by which a browser asks its user for the key.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's handler of the route, with refusals made into answers."""
        handler = super().get_route_handler()

        async def strict(request: Request) -> Response:
            try:
                answer = await handler(request)
            except HTTPException as error:
                answer = _refusal(error.status_code, str(error.detail))
                answer.headers.update(error.headers or {})
            except RequestValidationError as error:
                first = error.errors()[0]
                where = ".".join(map(str, first["loc"]))
                answer = _refusal(422, f"{where}: {first['msg']}")
            answer.headers.update(HEADERS)
            return answer

        return strict


def _refusal(code: int, message: str) -> Response:
    """In the form of vLLM's own errors."""
    error = {"message": message, "type": HTTPStatus(code).phrase, "code": code}
    return JSONResponse({"error": error}, code)


def strict_refusal(code: int, message: str) -> Response:
    """A refusal with the strict headers, for an answer that refuses when it begins."""
    answer = _refusal(code, message)
    answer.headers.update(HEADERS)
    return answer


def check(request: Request) -> None:
    """Dependency of every route: vLLM's API key, and no other site's page.

    Raises HTTPException 401, 403, or 503 while the server starts.
    """
    if request.headers.get("Sec-Fetch-Site", "none") not in OWN_SITES and not _is_navigation(
        request
    ):
        raise HTTPException(403, "Pages of other sites may not use this.")
    model = getattr(request.app.state, "precalib", None)
    if model is None:
        raise HTTPException(503, "The server is not ready.")
    if model.api_keys and not _is_one_of(given_key(request), model.api_keys):
        challenge = {"WWW-Authenticate": 'Basic realm="vLLM API key as password", charset="UTF-8"'}
        raise HTTPException(401, "Unauthorized", challenge)


def _is_navigation(request: Request) -> bool:
    """Whether a link of another page is followed, which shows the page to its user alone."""
    return request.method == "GET" and request.headers.get("Sec-Fetch-Mode") == "navigate"


def _is_one_of(given: str | None, keys: Sequence[str]) -> bool:
    """In a time that does not tell how much of a key is right."""
    if given is None:
        return False
    digest = hashlib.sha256(given.encode()).digest()
    found = False
    for key in keys:
        found |= secrets.compare_digest(digest, hashlib.sha256(key.encode()).digest())
    return found
