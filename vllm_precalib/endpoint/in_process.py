"""Requests from a route to other routes of the same application, without a socket."""

import asyncio
import contextlib
import dataclasses
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

from starlette.types import ASGIApp, Message

AHEAD = 64  # pieces of an answer that may wait to be read


@dataclasses.dataclass(frozen=True)
class Answer:
    """An answer that has begun: its status, and the pieces of its body as they come."""

    status: int
    pieces: AsyncIterator[bytes]

    async def body(self) -> bytes:
        """All of it."""
        return b"".join([piece async for piece in self.pieces])

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """The JSON values of server-sent events, as OpenAI's routes stream them."""
        rest = b""
        async for piece in self.pieces:
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                if line.startswith(b"data: ") and (data := line[6:].strip()) != b"[DONE]":
                    yield json.loads(data)


@contextlib.asynccontextmanager
async def post(
    app: ASGIApp, path: str, value: Mapping[str, Any], key: str | None
) -> AsyncIterator[Answer]:
    """POST a JSON value to `path`; leaving the context ends the request, as a client that goes.

    key: API key, None if the server wants none.

    Raises RuntimeError when the application fails before it answers.
    """
    body = json.dumps(value).encode()
    waiting: asyncio.Queue[Message | None] = asyncio.Queue(AHEAD)
    gone, sent = asyncio.Event(), False

    async def receive() -> Message:
        nonlocal sent
        if not sent:
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def run() -> None:
        try:
            await app(_scope(path, len(body), key), receive, waiting.put)
        finally:
            if not gone.is_set():  # somebody still reads
                await waiting.put(None)

    async def pieces() -> AsyncIterator[bytes]:
        while (message := await waiting.get()) is not None:
            if piece := message.get("body"):
                yield piece
            if not message.get("more_body"):
                return

    task = asyncio.create_task(run())
    try:
        begun = await waiting.get()
        if begun is None:
            raise RuntimeError(f"{path} did not answer") from _failure(task)
        yield Answer(begun["status"], pieces())
    finally:
        gone.set()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await task


def _failure(task: asyncio.Task[None]) -> BaseException | None:
    return task.exception() if task.done() and not task.cancelled() else None


def _scope(path: str, length: int, key: str | None) -> dict[str, Any]:
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % length)]
    if key is not None:
        headers.append((b"authorization", b"Bearer " + key.encode()))
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": headers,
        "client": ("127.0.0.1", 0),
        "server": ("127.0.0.1", 0),
        "state": {},
    }
