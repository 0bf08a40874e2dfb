"""Who may use the routes, and the headers that every answer of them has."""

import base64
import binascii
import hashlib
import secrets
from argparse import Namespace
from collections.abc import Sequence

from fastapi import HTTPException, Request, Response

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


def check(request: Request, response: Response) -> None:
    """Dependency of every route: vLLM's API key, no other site's page, strict headers.

    Raises HTTPException 401, 403, or 503 while the server starts.
    """
    response.headers.update(HEADERS)
    if request.headers.get("Sec-Fetch-Site", "none") not in OWN_SITES and not _is_navigation(
        request
    ):
        raise HTTPException(403, "Pages of other sites may not use this.", HEADERS)
    model = getattr(request.app.state, "precalib", None)
    if model is None:
        raise HTTPException(503, "The server is not ready.", HEADERS)
    if model.api_keys and not _is_one_of(given_key(request), model.api_keys):
        challenge = {"WWW-Authenticate": 'Basic realm="vLLM API key as password", charset="UTF-8"'}
        raise HTTPException(401, "Unauthorized", HEADERS | challenge)


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
