"""The routes: the page and its files, and the API that it and others use."""

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Iterator
from importlib.metadata import version
from importlib.resources import files
from typing import Annotated, Any

from fastapi import APIRouter, Depends, HTTPException, Request, Response
from fastapi.openapi.utils import get_openapi
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from vllm_precalib.endpoint.generation import generate
from vllm_precalib.endpoint.metrics import Sample
from vllm_precalib.endpoint.schemas import About, Backends, Event, Live, Prompt, Report
from vllm_precalib.endpoint.security import StrictRoute, check, given_key, strict_refusal
from vllm_precalib.endpoint.served_model import ServedModel, served

API = "/precalib/api/v1"
SECONDS_BETWEEN = 1.0
MOST_WATCHERS = 32
MOST_PROMPTS = 8
MEDIA_TYPES = {"html": "text/html; charset=utf-8", "css": "text/css", "js": "text/javascript"}
NOT_PACKED = "This model has no manifest of precalib, or one that this version cannot read."

router = APIRouter(dependencies=[Depends(check)], tags=["precalib"], route_class=StrictRoute)


class Places:
    """A limited number of places, for answers that cost something as long as they are sent.

    Used in the event loop alone, where nothing comes between looking and taking.
    """

    def __init__(self, number: int) -> None:
        self.free = number

    @contextlib.contextmanager
    def one(self) -> Iterator[bool]:
        """Take a place and give it back; False if none is free, and then none is taken."""
        taken = self.free > 0
        self.free -= taken
        try:
            yield taken
        finally:
            self.free += taken


@dataclasses.dataclass(frozen=True)
class Limits:
    """The places of one application: for pages that watch, and for prompts."""

    watchers: Places = dataclasses.field(default_factory=lambda: Places(MOST_WATCHERS))
    prompts: Places = dataclasses.field(default_factory=lambda: Places(MOST_PROMPTS))


class LimitedStream(StreamingResponse):
    """Server-sent events that hold a place from their headers to their end.

    A place is looked for and taken in one step, when the answer begins, and given back however it
    ends, also if its client has gone before the first event. Without one the answer is 503.
    """

    def __init__(self, values: AsyncIterator[BaseModel], places: Places) -> None:
        super().__init__(_lines(values), media_type="text/event-stream")
        self.places = places

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events, or the refusal."""
        with self.places.one() as taken:
            if taken:
                await super().__call__(scope, receive, send)
            else:
                await strict_refusal(503, "Too many of these at once; try again.")(
                    scope, receive, send
                )


async def _lines(values: AsyncIterator[BaseModel]) -> AsyncIterator[str]:
    async for value in values:
        yield f"data: {value.model_dump_json()}\n\n"


def _model(request: Request) -> ServedModel:
    return served(request.app.state)


Model = Annotated[ServedModel, Depends(_model)]


def _limits(request: Request) -> Limits:
    limits: Limits = request.app.state.precalib_limits
    return limits


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

    async def stream() -> AsyncIterator[Live]:
        before = None
        while model.running:
            now = Sample.take()
            yield now.live(before)
            before = now
            await asyncio.sleep(SECONDS_BETWEEN)

    return LimitedStream(stream(), _limits(request).watchers)


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
    key = given_key(request) if model.api_keys else None
    return LimitedStream(generate(request.app, model, prompt, key), _limits(request).prompts)
