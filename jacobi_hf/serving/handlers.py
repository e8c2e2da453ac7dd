"""Handlers of requests: transformers' own, with checked requests, several choices, and answers that are cut."""

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
from jacobi_hf.serving.messages import check_template, for_template
from jacobi_hf.serving.requests import ChatRequest, CompletionRequest, translate
from jacobi_hf.serving.several import all_events, whole_answer
from jacobi_hf.serving.text import read_events

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence

    from jacobi_hf.serving.several import Part


class _Checked:
    """Checks a request, lets transformers' handler answer each of its parts, and puts the answers together."""

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
        if body.get("model") is not None:
            self.model_manager.check_name(body["model"])
        if self.kind is ChatRequest and self.model_manager.tokenizer.chat_template is None:
            raise HTTPException(400, f"{name} has no chat template: send the prompt as plain text to /v1/completions.")

    async def _answer(self, body: dict[str, Any], request_id: str) -> JSONResponse | StreamingResponse:
        models = self.model_manager
        parts, form = translate(self.kind, body, models.model, models.tokenizer)
        if self.kind is ChatRequest:
            check_template(parts[0].request, models.tokenizer)
        if not body.get("stream"):
            return JSONResponse(await whole_answer(parts, lambda number: self._whole(parts, number, request_id), form))
        events = all_events(parts, lambda number: self._events(parts, number, request_id), form)
        first = [event async for event in _first_events(events)]
        return StreamingResponse(_stream(first, events), media_type="text/event-stream")

    async def _whole(self, parts: Sequence[Part], number: int, request_id: str) -> dict[str, Any]:
        """Return transformers' answer to one part."""
        response = await self._of_transformers(parts, number, request_id)
        answer: dict[str, Any] = json.loads(bytes(response.body))
        return answer

    async def _events(self, parts: Sequence[Part], number: int, request_id: str) -> AsyncIterator[dict[str, Any]]:
        """Return the events of transformers' streamed answer to one part."""
        response: Any = await self._of_transformers(parts, number, request_id)
        return read_events(response.body_iterator)

    async def _of_transformers(self, parts: Sequence[Part], number: int, request_id: str) -> Any:
        own_id = f"{request_id}-{number}" if number else request_id  # ids of tool calls begin with it
        return await super().handle_request(parts[number].request, own_id)  # type: ignore[misc]


class Chat(_Checked, ChatCompletionHandler):
    """Handler of `/v1/chat/completions`."""

    kind = ChatRequest

    @staticmethod
    def get_processor_inputs_from_messages(messages: Sequence[Mapping[str, Any]], _: Any) -> list[Any]:
        """Return the messages as the chat template reads them; transformers' own method leaves fields out."""
        return for_template(messages)


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


async def _stream(first: list[dict[str, Any]], events: AsyncIterator[dict[str, Any]]) -> AsyncIterator[str]:
    """Yield a streamed answer as server-sent events.

    Args:
        first: events that were read already.
        events: all further events; closing them ends their generation.
    """
    async with aclosing(events):  # type: ignore[type-var]
        for event in first:
            yield f"data: {json.dumps(event)}\n\n"
        async for event in events:
            failed = FailedError.read(event["error"]) if "error" in event else None
            yield f"data: {json.dumps(error_object(failed.status, failed.message) if failed else event)}\n\n"
        yield "data: [DONE]\n\n"
