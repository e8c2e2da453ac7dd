"""Handlers of requests: transformers' own, with checked requests, and answers that are cut before stop strings."""

from __future__ import annotations

import json
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from fastapi import HTTPException
from fastapi.responses import JSONResponse, StreamingResponse
from jinja2.exceptions import TemplateError
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler

from jacobi_hf.serving.errors import FailedError, error_object
from jacobi_hf.serving.requests import ChatRequest, CompletionRequest, stop_strings, translate
from jacobi_hf.serving.text import cut_answer, cut_events, read_events

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


class _Checked:
    """Checks a request, lets transformers' handler answer it, and cuts the answer before the first stop string."""

    kind: Any
    model_manager: Any

    async def handle_request(self, body: dict[str, Any], request_id: str) -> JSONResponse | StreamingResponse:
        """Return the answer to one request.

        Raises:
            HTTPException: the request cannot be answered; the error has the status and the message for the client.
        """
        self._check_model(body)
        try:
            return await self._answer(body, request_id)
        except FailedError as error:
            raise HTTPException(error.status, error.message) from None
        except (ValueError, TemplateError) as error:
            raise HTTPException(400, str(error)) from None

    def _check_model(self, body: dict[str, Any]) -> None:
        name = self.model_manager.force_model
        if body.get("model") not in (None, name):
            raise HTTPException(404, f"the model {body['model']!r} is not served here; {name!r} is.")
        if self.kind is ChatRequest and self.model_manager.tokenizer.chat_template is None:
            raise HTTPException(400, f"{name} has no chat template: send the prompt as plain text to /v1/completions.")

    async def _answer(self, body: dict[str, Any], request_id: str) -> JSONResponse | StreamingResponse:
        request = translate(self.kind, body, self.model_manager.model.generation_config)
        stops = stop_strings(request)
        response = await super().handle_request(request, request_id)  # type: ignore[misc]
        if not isinstance(response, StreamingResponse):
            return JSONResponse(cut_answer(json.loads(bytes(response.body)), stops))
        events = cut_events(read_events(response.body_iterator), stops)
        first = [event async for event in _first_events(events)]
        return StreamingResponse(_stream(first, events, response.body_iterator), media_type="text/event-stream")


class Chat(_Checked, ChatCompletionHandler):
    """Handler of `/v1/chat/completions`."""

    kind = ChatRequest


class Completion(_Checked, CompletionHandler):
    """Handler of `/v1/completions`."""

    kind = CompletionRequest


async def _first_events(events: AsyncIterator[dict[str, Any]]) -> AsyncIterator[dict[str, Any]]:
    """Yield the events up to the first one with text, so that a refused request fails before its answer starts.

    Raises:
        FailedError: the generation failed before its first token.
    """
    async for event in events:
        if "error" in event:
            raise FailedError.read(event["error"])
        yield event
        if not event["choices"][0].get("delta", {}).get("role"):
            return


async def _stream(
    first: list[dict[str, Any]], events: AsyncIterator[dict[str, Any]], source: Any
) -> AsyncIterator[str]:
    """Yield a streamed answer as server-sent events.

    Args:
        first: events that were read already.
        events: all further events.
        source: stream that the events come from; closing it ends its generation.
    """
    async with aclosing(source):
        for event in first:
            yield f"data: {json.dumps(event)}\n\n"
        async for event in events:
            failed = FailedError.read(event["error"]) if "error" in event else None
            yield f"data: {json.dumps(error_object(failed.status, failed.message) if failed else event)}\n\n"
        yield "data: [DONE]\n\n"
