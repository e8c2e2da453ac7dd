"""Fields of a request, checked, and translated for transformers' handlers.

Fields that change the text are checked here, so that a bad field is refused before anything is generated. All other
fields go to transformers' handlers unchanged, which refuse the fields that they do not know. Knobs and seed travel
inside the request's `generation_config`, a field that the handlers read.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from jacobi_hf.config import KNOBS, JacobiConfig, reject_misspelt, reject_pointless
from jacobi_hf.io import parse_json_object

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import GenerationConfig

SEED = "request_seed"
# Fields that transformers' handlers ignore. Only values that ask for nothing are accepted.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (None, 1),
    "best_of": (None, 1),
    "echo": (None, False),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "presence_penalty": (None, 0),
    "response_format": (None, {"type": "text"}),
}

_Stop = Annotated[str, Field(min_length=1)]
_TokenId = Annotated[str, Field(pattern="^[0-9]+$")]
_Model = TypeVar("_Model", bound=BaseModel)


class _Checked(BaseModel):
    """Base class of the checked parts of a request; unknown fields are kept."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class _Request(_Checked):
    """Fields that chat and completion requests share."""

    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0)
    top_p: float | None = Field(default=None, gt=0, le=1)
    frequency_penalty: float | None = Field(default=None, gt=-1)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: _Stop | list[_Stop] | None = None
    stream: bool | None = None
    generation_config: str | None = None


class _TextPart(_Checked):
    type: Literal["text"]
    text: str


class _Function(_Checked):
    name: str
    arguments: str | dict[str, Any]


class _ToolCall(_Checked):
    function: _Function


class _Message(_Checked):
    role: str
    content: str | list[_TextPart] | None = None
    tool_calls: list[_ToolCall] | None = None


class _GenerationOptions(_Checked):
    """Fields of a request's `generation_config` that are served: those that change the text of one answer.

    All others are refused. They would change what `generate` returns to the server, or they hold token ids: an id
    outside of the vocabulary makes a GPU unusable until the server restarts.
    """

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

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


class ChatRequest(_Request):
    """Request to `/v1/chat/completions`."""

    messages: list[_Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logit_bias: dict[_TokenId, float] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class CompletionRequest(_Request):
    """Request to `/v1/completions`."""

    prompt: str = Field(min_length=1)


def translate(kind: type[_Request], body: Mapping[str, Any], defaults: GenerationConfig) -> dict[str, Any]:
    """Return a checked request as transformers' handlers take it, with knobs and seed inside its `generation_config`.

    Args:
        kind: class of the request: `ChatRequest` or `CompletionRequest`.
        body: the request's JSON object.
        defaults: the model's generation config; it decides what the request leaves open.

    Raises:
        ValueError: a field cannot be served; the error has its name, its value and what is allowed.
    """
    request = _read(kind, body)
    _check_neutral(body)
    own = (
        {} if request.generation_config is None else parse_json_object(request.generation_config, "generation_config")
    )
    knobs = _knobs(body, own, defaults)
    options = {**_options(request, own, defaults), **knobs, SEED: request.seed}
    return {**_other_fields(request, body), "generation_config": json.dumps(options)}


def _check_neutral(body: Mapping[str, Any]) -> None:
    """Raise `ValueError` if a request asks for something that transformers' handlers would ignore."""
    for name, neutral in _NEUTRAL.items():
        if name in body and body[name] not in neutral:
            raise ValueError(f"{name}={_short(body[name])} is not served: leave {name} out.")


def _knobs(body: Mapping[str, Any], own: Mapping[str, Any], defaults: GenerationConfig) -> dict[str, Any]:
    """Return the knobs of a request; those of the body override those of its own generation config.

    Raises:
        ValueError: a knob is misspelt, out of range, or without effect.
    """
    reject_misspelt([*body, *own])
    given = {name: source[name] for source in (own, body) for name in KNOBS if name in source}
    decoding = JacobiConfig.from_knobs({name: getattr(defaults, name, None) for name in KNOBS} | given)
    reject_pointless(given, decoding)
    return given


def _options(request: _Request, own: Mapping[str, Any], defaults: GenerationConfig) -> dict[str, Any]:
    """Return the generation config of a request, without knobs: the model's, overridden by the request's own."""
    config = {**_without_knobs(json.loads(defaults.to_json_string())), "max_new_tokens": None}
    config |= _read(_GenerationOptions, _without_knobs(own), "generation_config").model_dump(exclude_unset=True)
    if request.temperature is not None or request.top_p is not None:
        config["do_sample"] = request.temperature != 0
    return config


def _other_fields(request: _Request, body: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that transformers' handlers read themselves."""
    dropped = {*KNOBS, "seed"}
    if request.temperature == 0:
        dropped.add("temperature")
    if not body.get("stop"):
        dropped.add("stop")
    rest = {name: value for name, value in body.items() if name not in dropped}
    if body.get("logit_bias"):  # transformers' processor takes floats only, and JSON may have integers
        rest["logit_bias"] = request.model_dump()["logit_bias"]
    return rest


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
        raise ValueError(
            f"{where} is not served; {within} may hold {', '.join(kind.model_fields)} and the knobs of decoding."
        )
    raise ValueError(f"{where}: {deepest['msg'][:1].lower()}{deepest['msg'][1:]}; it is {_short(deepest['input'])}.")


def stop_strings(body: Mapping[str, Any]) -> list[str]:
    """Return the stop strings of a request that `translate` returned."""
    stops = body.get("stop") or []
    return [stops] if isinstance(stops, str) else list(stops)


def _without_knobs(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in KNOBS and not name.startswith("_")}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
