"""Transformers' OpenAI-compatible server for one model that decodes with jacobi_hf.

Requests are read, prompts built and answers written by transformers' own handlers. What is added: the model is there already and stays;
knobs, seeds and refusals per request (`serving_request`); a client that leaves ends its generation, streaming or not; stop strings are
cut off as the OpenAI API has it (`serving_text`); errors are OpenAI's JSON objects.
"""

from __future__ import annotations

import asyncio
import json
import logging
from contextlib import aclosing, suppress
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
import uvicorn
from fastapi import FastAPI, HTTPException
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from jinja2.exceptions import TemplateError
from starlette.exceptions import HTTPException as StarletteHTTPException
from transformers import CompileConfig, StoppingCriteria, StoppingCriteriaList
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import GenerateManager, GenerationState, get_response_template

from jacobi_hf.config import KNOBS
from jacobi_hf.serving.requests import SEED, ChatRequest, CompletionRequest, stop_strings, translate
from jacobi_hf.serving.text import cut_answer, cut_events, read_events

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from types import FrameType

    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/health")
PATIENCE = 5  # seconds that connections have to end when the server is told to stop
LEAST_DEFAULT = 1024  # new tokens where neither request nor model says more, as in `transformers serve`

_log = logging.getLogger(__name__)


def build_app(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, *, compiled: bool = False
) -> FastAPI:
    """The server as an ASGI application.

    Args:
        model: of a registered class, on its device, in eval mode; its generation config holds the decoding that requests get which do
            not ask for another.
        name: what the model is called in requests and answers.
        compiled: run compiled steps, on CUDA captured ones.
    """
    models = _OneModel(model, tokenizer, name)
    generations = _Generations(compiled=compiled)
    state = _OneQueue(generations)
    app: FastAPI = build_server(
        models,
        _Chat(models, state),
        completion_handler=_Completion(models, state),
        response_handler=None,
        transcription_handler=None,
        systemone_handler=None,
        generation_state=state,
    )
    app.router.routes = [route for route in app.router.routes if getattr(route, "path", None) in PATHS]
    app.state.generations = generations
    app.add_middleware(CancelOnDisconnect)
    app.add_exception_handler(StarletteHTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _not_an_object)
    app.add_exception_handler(Exception, _our_fault)
    return app


class Server(uvicorn.Server):
    """Uvicorn with what `build_app` returned; told to stop, it ends the answers that are being written."""

    def __init__(self, app: FastAPI) -> None:
        super().__init__(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=PATIENCE))
        self._generations: _Generations = app.state.generations

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """On SIGINT and SIGTERM."""
        self._generations.stop()
        super().handle_exit(sig, frame)


class _OneModel(ModelManager):
    """A model that is loaded already, and no other."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
        super().__init__()
        self.force_model, self.model, self.tokenizer = name, model, tokenizer
        if tokenizer.chat_template and not _has_anchor(tokenizer, get_response_template(tokenizer, model)):
            ends = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
            content = {"content": "text", "content_args": {"strip": False}, "close": ends}
            tokenizer.response_template = {
                "start_anchor_pattern": r"\Z",
                "defaults": {"role": "assistant"},
                "fields": {"content": content},
            }

    def load_model_and_processor(self, model_id_and_revision: str, *args: Any, **kwargs: Any) -> Any:
        return self.model, self.tokenizer

    @staticmethod
    def process_model_name(model_id: str) -> str:
        return model_id

    def get_gen_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:  # type: ignore[override]
        return [{"id": self.force_model, "object": "model", "created": 0, "owned_by": ""}]


def _has_anchor(tokenizer: PreTrainedTokenizerBase, template: dict[str, Any] | None) -> bool:
    """Whether answers can be parsed by a response template: transformers has one for each kind of model, whatever the chat template is,
    and where its anchor is not in the prompt the prompt is taken for a part of the answer.
    """
    if template is None or "start_anchor" not in template:
        return True
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": ""}], add_generation_prompt=True, tokenize=False
    )
    anchors = template["start_anchor"]
    return any(anchor in prompt for anchor in ([anchors] if isinstance(anchors, str) else anchors))


class _OneQueue(GenerationState):
    """All requests wait for one thread, which generates for one at a time."""

    def __init__(self, generations: _Generations) -> None:
        super().__init__()
        self._generations = generations

    def get_manager(self, model_id: str, use_cb: bool = False) -> _Generations:
        return self._generations


class _Generations(GenerateManager):
    """Generation for a request, by transformers' manager; its model is one request's `_Call`."""

    def __init__(self, *, compiled: bool) -> None:
        super().__init__()
        self._compiled, self._calls, self._stopped = compiled, WeakSet(), False  # type: ignore[var-annotated]

    def stop(self) -> None:
        """End all calls, those to come too."""
        self._stopped = True
        for call in list(self._calls):
            call.cancel(503, "the server is stopping")

    def generate_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str, **options: Any
    ) -> Any:
        call = self._prepare(model, inputs, gen_config)
        queue, call.streamer = super().generate_streaming(call, processor, inputs, gen_config, request_id, **options)
        return queue, call

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str
    ) -> Any:
        call = self._prepare(model, inputs, gen_config)
        generation = asyncio.ensure_future(
            super().generate_non_streaming(call, processor, inputs, gen_config, request_id)
        )
        try:
            return await asyncio.shield(generation)
        except asyncio.CancelledError:
            call.cancel()
            generation.add_done_callback(lambda done: done.exception())  # nobody waits for it any more
            raise

    def _prepare(self, model: Any, inputs: Any, gen_config: GenerationConfig) -> _Call:
        tokens, room = (
            inputs["input_ids"].shape[-1],
            getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None),
        )
        if gen_config.max_new_tokens is None:
            wanted = max(LEAST_DEFAULT, model.generation_config.max_new_tokens or 0)
            gen_config.max_new_tokens = wanted if room is None else max(1, min(wanted, room - tokens))
        if room is not None and tokens >= room:
            raise ValueError(
                f"the prompt has {tokens} tokens; the model has {room} positions for prompt and answer together."
            )
        if room is not None and tokens + gen_config.max_new_tokens > room:
            raise ValueError(
                f"the prompt has {tokens} tokens and up to {gen_config.max_new_tokens} new ones are asked for, "
                f"together more than the model's {room} positions: shorten the prompt or ask for fewer (max_tokens)."
            )
        call = _Call(model, gen_config, compiled=self._compiled)
        self._calls.add(call)
        if self._stopped:
            self.stop()
        return call


class _Call:
    """The model as one request sees it: `generate` with the request's seed and knobs, until it is cancelled."""

    def __init__(self, model: Any, generation_config: GenerationConfig, *, compiled: bool) -> None:
        self._model, self.streamer = model, None
        self._cancelled: FailedError | None = None
        self._knobs = {name: getattr(generation_config, name) for name in KNOBS if hasattr(generation_config, name)}
        self._seed: int | None = vars(generation_config).pop(SEED, None)
        if compiled:
            generation_config.compile_config = CompileConfig()

    @property
    def total_tokens(self) -> int:
        """New tokens that were streamed."""
        return 0 if self.streamer is None else self.streamer.total_tokens

    def cancel(self, status: int = 400, reason: str = "the client has left") -> None:
        """Let the generation fail at the token that it is at, or before it begins."""
        self._cancelled = FailedError(status, reason)

    def generate(self, **arguments: Any) -> torch.Tensor:
        """As the model's; runs in the one thread that generates, so a seed holds for this call alone.

        Raises:
            FailedError: with what the client is told.
        """
        self._check()
        if self._seed is not None:
            torch.manual_seed(self._seed)
        try:
            criteria = StoppingCriteriaList([_EachToken(self._check)])
            ids: torch.Tensor = self._model.generate(**arguments, **self._knobs, stopping_criteria=criteria)
        except FailedError:
            raise
        except ValueError as error:
            raise FailedError(400, str(error)) from error
        except Exception as error:
            _log.exception("generation failed")
            raise FailedError(500, f"generation failed: {type(error).__name__}: {error}") from error
        return ids

    def _check(self) -> None:
        if self._cancelled is not None:
            raise self._cancelled


class _EachToken(StoppingCriteria):
    """Does something at each token, and never stops."""

    def __init__(self, action: Callable[[], None]) -> None:
        self._action = action

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self._action()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class FailedError(Exception):
    """A generation that failed, with the status and the message for the client.

    Its text goes into a JSON string unescaped when a stream breaks off, so it is written as the inside of one; `read` undoes that.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(json.dumps(f"{status} {message}")[1:-1])
        self.status, self.message = status, message

    @classmethod
    def read(cls, text: str) -> FailedError:
        """The failure whose text a stream broke off with."""
        status, _, message = text.partition(" ")
        return cls(int(status), message) if status.isdigit() else cls(500, text)


class _Checked:
    """What both handlers do around transformers' own handling of a request."""

    kind: Any
    model_manager: _OneModel

    async def handle_request(self, body: dict[str, Any], request_id: str) -> JSONResponse | StreamingResponse:
        name = self.model_manager.force_model
        if body.get("model") not in (None, name):
            raise HTTPException(404, f"the model {body['model']!r} is not served here; {name!r} is.")
        if self.kind is ChatRequest and self.model_manager.tokenizer.chat_template is None:
            raise HTTPException(
                400, f"{name} has no chat template: ask /v1/completions, with the prompt as the model reads it."
            )
        try:
            request = translate(self.kind, body, self.model_manager.model.generation_config)
            stops = stop_strings(request)
            response = await super().handle_request(request, request_id)  # type: ignore[misc]
            if not isinstance(response, StreamingResponse):
                return JSONResponse(cut_answer(json.loads(bytes(response.body)), stops))
            events = cut_events(read_events(response.body_iterator), stops)
            begun = [event async for event in _beginning(events)]
        except FailedError as error:
            raise HTTPException(error.status, error.message) from None
        except (ValueError, TemplateError) as error:
            raise HTTPException(400, str(error)) from None
        return StreamingResponse(_written(begun, events, response.body_iterator), media_type="text/event-stream")


class _Chat(_Checked, ChatCompletionHandler):
    kind = ChatRequest


class _Completion(_Checked, CompletionHandler):
    kind = CompletionRequest


async def _beginning(events: AsyncIterator[dict[str, Any]]) -> AsyncIterator[dict[str, Any]]:
    """The events up to the first that comes out of the generation: what is refused there is refused before an answer begins.

    Raises:
        FailedError: the generation failed at once.
    """
    async for event in events:
        if "error" in event:
            raise FailedError.read(event["error"])
        yield event
        if not event["choices"][0].get("delta", {}).get("role"):
            return


async def _written(
    begun: list[dict[str, Any]], events: AsyncIterator[dict[str, Any]], source: Any
) -> AsyncIterator[str]:
    """The stream as it is sent; `source`, where the events come from, ends its generation when it is closed."""
    async with aclosing(source):
        for event in begun:
            yield f"data: {json.dumps(event)}\n\n"
        async for event in events:
            failed = FailedError.read(event["error"]) if "error" in event else None
            yield f"data: {json.dumps(_error(failed.status, failed.message) if failed else event)}\n\n"
        yield "data: [DONE]\n\n"


class CancelOnDisconnect:
    """ASGI middleware: a request whose client has gone is cancelled."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        messages = [await receive()]
        while messages[-1].get("more_body"):
            messages.append(await receive())
        gone = asyncio.ensure_future(_disconnect(receive))

        async def replay() -> Any:
            return messages.pop(0) if messages else await asyncio.shield(gone)

        answer = asyncio.ensure_future(self._app(scope, replay, send))
        try:
            await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            left = not answer.done() and answer.cancel()
            gone.cancel()
        with suppress(*([asyncio.CancelledError] if left else [])):
            await answer
        return None


async def _disconnect(receive: Any) -> Any:
    while (message := await receive())["type"] != "http.disconnect":
        pass
    return message


def _error(status: int, message: str) -> dict[str, Any]:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


async def _http_error(_: Any, error: Any) -> JSONResponse:
    return JSONResponse(_error(error.status_code, str(error.detail)), error.status_code, headers=error.headers)


async def _not_an_object(_: Any, error: Any) -> JSONResponse:
    first = error.errors()[0]
    return JSONResponse(_error(400, f"the body is no JSON object: {first['msg']}."), 400)


async def _our_fault(_: Any, error: Exception) -> JSONResponse:
    return JSONResponse(_error(500, f"the server failed: {type(error).__name__}."), 500)
