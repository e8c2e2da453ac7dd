"""Text of answers: events of a stream, parsed, and text cut before the first stop string.

transformers leaves the stop string at the end of the text; the OpenAI API leaves it out.
"""

from __future__ import annotations

import copy
import json
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence


class StopCutter:
    """Cuts a text that arrives piece by piece before its first stop string.

    Args:
        stops: the stop strings.

    Attributes:
        stopped: whether the text had a stop string so far.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""
        self.stopped = False

    def feed(self, piece: str) -> str:
        """Take the next piece; return the text that cannot be part of a stop string any more."""
        if self.stopped:
            return ""
        text = self._held + piece
        ends = [at + len(stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:  # the stop string that is complete first ends the text, though another one may begin before it
            self.stopped = True
            self._held = ""
            done = text[: min(ends)]
            return done[: min(at for stop in self._stops if (at := done.find(stop)) >= 0)]
        certain = len(text) - self._longest_beginning(text)
        self._held = text[certain:]
        return text[:certain]

    def _longest_beginning(self, text: str) -> int:
        """Return the length of the longest beginning of a stop string that the text ends with."""
        return max(
            (n for stop in self._stops for n in range(1, min(len(stop), len(text) + 1)) if text.endswith(stop[:n])),
            default=0,
        )

    def rest(self) -> str:
        """Return the text that is still held back; call it after the last piece."""
        held = self._held
        self._held = ""
        return held


async def read_events(parts: AsyncIterator[str | bytes | memoryview]) -> AsyncIterator[dict[str, Any]]:
    """Yield the JSON objects of a stream of server-sent events; closing this iterator closes the stream."""
    async with aclosing(parts):  # type: ignore[type-var]
        async for part in parts:
            text = part if isinstance(part, str) else bytes(part).decode()
            for event in text.split("\n\n"):
                if event:
                    yield json.loads(event.removeprefix("data: "))


async def cut_events(events: AsyncIterator[dict[str, Any]], stops: Sequence[str]) -> AsyncIterator[dict[str, Any]]:
    """Yield the events of a streamed answer, with its text cut before the first stop string."""
    cutter = StopCutter(stops)
    async for event in events:
        if "error" in event or not stops:
            yield event
            continue
        choice = event["choices"][0]
        if choice.get("finish_reason"):
            if rest := cutter.rest():
                yield with_text(event, rest)
            if cutter.stopped:
                choice["finish_reason"] = "stop"
            yield event
        elif piece := _holder(choice)[0].get(_holder(choice)[1]):
            if piece := cutter.feed(piece):
                _set_text(choice, piece)
                yield event
        else:
            yield event


def cut_answer(answer: dict[str, Any], stops: Sequence[str]) -> dict[str, Any]:
    """Return a whole answer, with its text cut before the first stop string."""
    for choice in answer["choices"]:
        holder, key = _holder(choice)
        cutter = StopCutter(stops)
        if holder.get(key):
            holder[key] = cutter.feed(holder[key]) + cutter.rest()
        if cutter.stopped:
            choice["finish_reason"] = "stop"
    return answer


def _holder(choice: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Return the object that holds the text of a choice, and the key: for a chat its `delta` or `message`."""
    for name in ("delta", "message"):
        if name in choice:
            return choice[name], "content"
    return choice, "text"


def _set_text(choice: dict[str, Any], text: str) -> None:
    holder, key = _holder(choice)
    holder[key] = text


def with_text(other: dict[str, Any], text: str) -> dict[str, Any]:
    """Return an event with text alone, made from another event of the same stream."""
    event = copy.deepcopy(other)
    event.pop("usage", None)
    event["choices"][0].pop("finish_reason", None)
    _set_text(event["choices"][0], text)
    return event
