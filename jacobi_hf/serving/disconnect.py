"""Cancel the request of a client that has left."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any


class CancelOnDisconnect:
    """ASGI middleware that cancels a request when its client disconnects.

    Args:
        app: the ASGI application that answers requests.
    """

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        messages = await _body(receive)
        gone = asyncio.ensure_future(_disconnect(receive))

        async def replay() -> Any:
            return messages.pop(0) if messages else await asyncio.shield(gone)

        answer = asyncio.ensure_future(self._app(scope, replay, send))
        try:
            await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            is_cancelled = not answer.done() and answer.cancel()
            gone.cancel()
        with suppress(*([asyncio.CancelledError] if is_cancelled else [])):
            await answer


async def _body(receive: Any) -> list[Any]:
    """Return the messages that hold the body of a request."""
    messages = [await receive()]
    while messages[-1].get("more_body"):
        messages.append(await receive())
    return messages


async def _disconnect(receive: Any) -> Any:
    """Return the message that the client has disconnected, as soon as it arrives."""
    while (message := await receive())["type"] != "http.disconnect":
        pass
    return message
