"""The routes: the page and its files, and the API that it and others use."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from importlib.metadata import version
from importlib.resources import files
from typing import Annotated, Any

from fastapi import APIRouter, Depends, HTTPException, Request, Response
from fastapi.openapi.utils import get_openapi
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from vllm_precalib.endpoint.generation import generate
from vllm_precalib.endpoint.metrics import Sample
from vllm_precalib.endpoint.schemas import About, Backends, Event, Live, Prompt, Report
from vllm_precalib.endpoint.security import StrictRoute, check, given_key
from vllm_precalib.endpoint.served_model import ServedModel, served

API = "/precalib/api/v1"
SECONDS_BETWEEN = 1.0
MOST_WATCHERS = 32
MOST_PROMPTS = 8
MEDIA_TYPES = {"html": "text/html; charset=utf-8", "css": "text/css", "js": "text/javascript"}
NOT_PACKED = "This model has no manifest of precalib, or one that this version cannot read."

router = APIRouter(dependencies=[Depends(check)], tags=["precalib"], route_class=StrictRoute)


class Places:
    """A limited number of places, for streams that cost something as long as they are open."""

    def __init__(self, number: int) -> None:
        self.free = number

    @contextlib.contextmanager
    def one(self) -> Any:
        """Take a place and give it back."""
        self.free -= 1
        try:
            yield
        finally:
            self.free += 1

    def check(self) -> None:
        """Raise HTTPException 503 if none is free."""
        if self.free <= 0:
            raise HTTPException(503, "Too many of these at once; try again.")


def _model(request: Request) -> ServedModel:
    return served(request.app.state)


Model = Annotated[ServedModel, Depends(_model)]


def _places(request: Request, kind: str, number: int) -> Places:
    """The places of one kind in this application."""
    kept = request.app.state
    if not hasattr(kept, kind):
        setattr(kept, kind, Places(number))
    places: Places = getattr(kept, kind)
    return places


@router.get("/precalib", include_in_schema=False)
def page() -> Response:
    """The page."""
    return _file("page.html")


@router.get("/precalib/{name}", include_in_schema=False)
def page_file(name: str) -> Response:
    """Style and script of the page."""
    if name not in ("page.css", "page.js"):
        raise HTTPException(404, "Not Found")
    return _file(name)


def _file(name: str) -> Response:
    data = files("vllm_precalib.endpoint").joinpath(name).read_bytes()
    return Response(data, media_type=MEDIA_TYPES[name.rpartition(".")[2]])


@router.get(f"{API}/openapi.json", include_in_schema=False)
def openapi() -> dict[str, Any]:
    """The schema of these routes alone."""
    return get_openapi(title="precalib", version=version("vllm-precalib"), routes=router.routes)


@router.get(f"{API}/about")
def about(model: Model) -> About:
    """What is served, and by which versions."""
    return About(
        model=model.name,
        precalib=version("vllm-precalib"),
        vllm=version("vllm"),
        against=model.options.against,
    )


@router.get(f"{API}/report", responses={404: {"description": NOT_PACKED}})
def report(model: Model) -> Report:
    """Size, effective bits and error of the model and of every packed weight."""
    found = model.report()
    if found is None:
        raise HTTPException(404, NOT_PACKED)
    return found


@router.get(f"{API}/backends")
def backends(model: Model) -> Backends:
    """Which backend computes each packed layer, and why none of the others."""
    return model.backends()


@router.get(f"{API}/metrics")
def metrics() -> Live:
    """The engine's metrics now."""
    return Sample.take().live()


@router.get(
    f"{API}/events",
    response_class=StreamingResponse,
    responses={200: {"content": {"text/event-stream": {}}, "description": "`Live` as JSON"}},
)
def events(request: Request, model: Model) -> StreamingResponse:
    """The engine's metrics every second, as server-sent events, until the client goes."""
    places = _places(request, "precalib_watchers", MOST_WATCHERS)
    places.check()

    async def stream() -> AsyncIterator[Live]:
        with places.one():
            before = None
            while model.running:
                now = Sample.take()
                yield now.live(before)
                before = now
                await asyncio.sleep(SECONDS_BETWEEN)

    return _stream(stream())


@router.post(
    f"{API}/generate",
    response_class=StreamingResponse,
    responses={
        200: {
            "content": {"text/event-stream": {}},
            "description": "`Token`s as JSON, a `Comparison` if there is another server, then "
            "`Done`; or a `Problem`",
            "model": Event,
        }
    },
)
def answer(request: Request, model: Model, prompt: Prompt) -> StreamingResponse:
    """An answer token by token with probabilities, as server-sent events."""
    places = _places(request, "precalib_prompts", MOST_PROMPTS)
    places.check()
    key = given_key(request) if model.api_keys else None

    async def stream() -> AsyncIterator[Event]:
        with places.one():
            async for event in generate(request.app, model, prompt, key):
                yield event

    return _stream(stream())


def _stream(values: AsyncIterator[BaseModel]) -> StreamingResponse:
    async def lines() -> AsyncIterator[str]:
        async for value in values:
            yield f"data: {value.model_dump_json()}\n\n"

    return StreamingResponse(lines(), media_type="text/event-stream")
