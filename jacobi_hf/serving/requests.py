"""Fields of a request, checked, and translated for transformers' handlers.

A field that is not served is refused before anything is generated, unless it has no effect on the answer
(`jacobi_hf.serving.fields`). transformers' handlers get the fields that they serve as the OpenAI API defines them. All
else, knobs and seed among it, travels inside the request's `generation_config`, a field that the handlers read.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError

from jacobi_hf.config import KNOBS, JacobiConfig, reject_misspelt, reject_pointless
from jacobi_hf.io import parse_json_object
from jacobi_hf.serving.fields import reject_refused, short
from jacobi_hf.serving.messages import Checked, Message, Tool
from jacobi_hf.serving.several import Form, Part

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import GenerationConfig, PreTrainedModel

SEED = "request_seed"
PENALTIES = "request_penalties"
TOKEN_IDS = "request_token_ids"  # noqa: S105  (no password)
# Sampling options of vLLM and of GenerationConfig. A request with one of them samples, as with a temperature.
_SAMPLING = ("top_k", "min_p")
_OPTIONS = {"min_tokens": "min_new_tokens", "repetition_penalty": "repetition_penalty"}
# Fields that transformers' handlers read themselves.
_FORWARDED = (
    "model",
    "messages",
    "tools",
    "chat_template_kwargs",
    "stream",
    "temperature",
    "top_p",
    "stop",
    "max_tokens",
    "max_completion_tokens",
)
_MOST_CHOICES = 128  # as in the OpenAI API

_Stop = Annotated[str, Field(min_length=1)]
_TokenId = Annotated[str, Field(pattern="^[0-9]+$")]
_Model = TypeVar("_Model", bound=BaseModel)


class _StreamOptions(Checked):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # without effect: the server listens to this machine, not to a network
    continuous_usage_stats: Literal[False] | None = None


class Request(Checked):
    """Fields that chat and completion requests share, without the knobs."""

    model: Any = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    n: int | None = Field(default=None, ge=1, le=_MOST_CHOICES)
    max_tokens: int | None = Field(default=None, ge=1)
    min_tokens: int | None = Field(default=None, ge=0)
    temperature: float | None = Field(default=None, ge=0)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    repetition_penalty: float | None = Field(default=None, gt=0)
    logit_bias: dict[_TokenId, float] | None = None
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: _Stop | list[_Stop] | None = None
    generation_config: str | None = None


class _GenerationOptions(Checked):
    """Fields of a request's `generation_config` that are served: those that change the text of one answer.

    All others are refused. They would change what `generate` returns to the server, or they hold token ids: an id
    outside of the vocabulary makes a GPU unusable until the server restarts.
    """

    do_sample: bool | None = None
    temperature: float | None = Field(default=None, gt=0)
    top_k: int | None = Field(default=None, ge=0)
    top_p: float | None = Field(default=None, gt=0, le=1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    typical_p: float | None = Field(default=None, gt=0, le=1)
    repetition_penalty: float | None = Field(default=None, gt=0)
    no_repeat_ngram_size: int | None = Field(default=None, ge=0)
    min_new_tokens: int | None = Field(default=None, ge=0)
    max_new_tokens: int | None = Field(default=None, ge=1)


class ChatRequest(Request):
    """Request to `/v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    tools: list[Tool] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class CompletionRequest(Request):
    """Request to `/v1/completions`."""

    prompt: Any
    echo: bool | None = None
    best_of: int | None = None


def served_fields(kind: type[Request]) -> set[str]:
    """Return the names of all fields that a kind of request may have, knobs included."""
    return {*kind.model_fields, *KNOBS}


def translate(
    kind: type[Request], body: Mapping[str, Any], model: PreTrainedModel, tokenizer: Any
) -> tuple[list[Part], Form]:
    """Return the generations that a checked request asks for, and the form of its answer.

    Args:
        kind: class of the request: `ChatRequest` or `CompletionRequest`.
        body: the request's JSON object.
        model: the model that answers. Its generation config decides what the request leaves open.
        tokenizer: the model's tokenizer.

    Raises:
        ValueError: a field cannot be served; the error has its name, its value and what is allowed.
    """
    reject_misspelt(body)
    other = CompletionRequest if kind is ChatRequest else ChatRequest
    reject_refused(body, served_fields(kind), served_fields(other))
    fields = {name: value for name, value in body.items() if name in kind.model_fields}
    request = _read(kind, fields)
    _check_together(request)
    given = {name: value for name, value in fields.items() if value is not None}
    own = (
        {} if request.generation_config is None else parse_json_object(request.generation_config, "generation_config")
    )
    knobs = _knobs(body, own, model.generation_config)
    options = {**_options(request, own, model.generation_config), **knobs}
    prompts = prompts_of(request.prompt, model) if isinstance(request, CompletionRequest) else [None]
    parts = [
        _part(request, given, options, prompt, copy, tokenizer) for prompt in prompts for copy in range(request.n or 1)
    ]
    stops = [request.stop] if isinstance(request.stop, str) else request.stop or []
    return parts, Form(
        stops,
        one_tool_call=isinstance(request, ChatRequest) and request.parallel_tool_calls is False,
        include_usage=request.stream_options.include_usage if request.stream_options else None,
    )


def _check_together(request: Request) -> None:
    """Raise `ValueError` if fields do not fit together, or ask for a choice of tools that cannot be enforced."""
    if request.stream_options and not request.stream:
        raise ValueError("stream_options is for streams: add stream=true, or leave stream_options out.")
    if isinstance(request, CompletionRequest) and request.best_of not in (None, request.n or 1):
        raise ValueError(f"best_of={request.best_of} is not served: answers are not ranked; set n alone.")
    choice = getattr(request, "tool_choice", None)
    if choice not in (None, "auto", "none"):
        raise ValueError(
            f"tool_choice={short(choice)} is not served: the model cannot be made to call a tool; "
            "'auto' lets it choose, 'none' hides the tools from it."
        )


def _part(
    request: Request,
    given: Mapping[str, Any],
    options: Mapping[str, Any],
    prompt: str | list[int] | None,
    copy: int,
    tokenizer: Any,
) -> Part:
    """Return one generation.

    Args:
        request: the checked request.
        given: its fields with a value.
        options: its generation config, with knobs.
        prompt: text or token ids of the prompt; None for a chat.
        copy: number of the answer among those to the same prompt.
        tokenizer: decodes a prompt of token ids.
    """
    options = {
        **options,
        SEED: None if request.seed is None else request.seed + copy,
        PENALTIES: (request.frequency_penalty or 0, request.presence_penalty or 0),
        TOKEN_IDS: prompt if isinstance(prompt, list) else None,
    }
    forwarded = {name: given[name] for name in _FORWARDED if given.get(name) not in (None, [])}
    if request.temperature == 0:
        forwarded.pop("temperature")
    if given.get("tool_choice") == "none":
        forwarded.pop("tools", None)
    forwarded["generation_config"] = json.dumps(options)
    if prompt is None:
        return Part(forwarded, counts_prompt=copy == 0)
    text = prompt if isinstance(prompt, str) else str(tokenizer.decode(prompt))
    return Part({**forwarded, "prompt": text}, copy == 0, text if given.get("echo") else "")


def prompts_of(prompt: Any, model: PreTrainedModel) -> list[str | list[int]]:
    """Return the prompts of a completion request, each as text or token ids.

    Args:
        prompt: a text, a list of texts, token ids, or a list of lists of token ids.
        model: the model that answers.

    Raises:
        ValueError: it is none of these, a prompt is empty, or the model has no embedding for a token id.
    """
    alone = isinstance(prompt, str) or (isinstance(prompt, list) and bool(prompt) and _is_id(prompt[0]))
    prompts = [prompt] if alone else prompt
    if not isinstance(prompts, list) or not prompts or not all(map(_is_prompt, prompts)):
        raise ValueError(
            "prompt must be a text, a list of texts, a list of token ids, or a list of such lists, none of them "
            f"empty; it is {short(prompt)}."
        )
    size = model.get_input_embeddings().num_embeddings
    ids = (token for one in prompts if isinstance(one, list) for token in one)
    if outside := next((token for token in ids if not 0 <= token < size), None):
        raise ValueError(f"prompt: {outside} is no token id of the model, whose ids are 0 to {size - 1}.")
    return prompts


def _is_prompt(prompt: Any) -> bool:
    return bool(prompt) and (isinstance(prompt, str) or (isinstance(prompt, list) and all(map(_is_id, prompt))))


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _knobs(body: Mapping[str, Any], own: Mapping[str, Any], defaults: GenerationConfig) -> dict[str, Any]:
    """Return the knobs of a request; those of the body override those of its own generation config.

    Raises:
        ValueError: a knob is misspelt, out of range, or without effect.
    """
    reject_misspelt(own)
    given = {name: source[name] for source in (own, body) for name in KNOBS if name in source}
    decoding = JacobiConfig.from_knobs({name: getattr(defaults, name, None) for name in KNOBS} | given)
    reject_pointless(given, decoding)
    return given


def _options(request: Request, own: Mapping[str, Any], defaults: GenerationConfig) -> dict[str, Any]:
    """Return the generation config of a request, without knobs: the model's, overridden by the request's own."""
    config = {**_without_knobs(json.loads(defaults.to_json_string())), "max_new_tokens": None}
    config |= _read(_GenerationOptions, _without_knobs(own), "generation_config").model_dump(exclude_unset=True)
    given = request.model_dump(exclude_none=True)
    if {"temperature", "top_p", *_SAMPLING} & given.keys():
        config["do_sample"] = request.temperature != 0
    config |= {name: given[name] for name in _SAMPLING if name in given}
    config |= {option: given[name] for name, option in _OPTIONS.items() if name in given}
    if request.top_k == -1:  # vLLM's word for all tokens
        config["top_k"] = 0
    if request.logit_bias:
        config["sequence_bias"] = [[[int(token)], bias] for token, bias in request.logit_bias.items()]
    return config


def _read(kind: type[_Model], body: Mapping[str, Any], within: str = "") -> _Model:
    """Return a checked part of a request.

    Args:
        kind: class of the part.
        body: the part's JSON object.
        within: name of the field that holds the part; empty for the request itself.

    Raises:
        ValueError: a field is missing, unknown, or has a value that is not allowed.
    """
    try:
        return kind.model_validate(dict(body))
    except ValidationError as error:
        # A union reports an error of each alternative. The deepest one belongs to the alternative that fits best.
        deepest = max(error.errors(), key=lambda one: len(one["loc"]))
    parts = [str(part) for part in (within, *deepest["loc"])]
    where = ".".join(part for part in parts if part not in ("str", "") and "[" not in part)
    if deepest["type"] == "missing":
        raise ValueError(f"{where} is missing.")
    if deepest["type"] == "extra_forbidden":
        allowed = f"; {within} may hold {', '.join(kind.model_fields)} and the knobs of decoding." if within else "."
        raise ValueError(f"{where} is not served{allowed}")
    raise ValueError(f"{where}: {deepest['msg'][:1].lower()}{deepest['msg'][1:]}; it is {short(deepest['input'])}.")


def _without_knobs(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in KNOBS and not name.startswith("_")}
