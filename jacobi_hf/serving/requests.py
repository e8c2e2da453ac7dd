"""What a request to the server may hold, and how it is said to transformers' handlers.

Fields that decide over the text are checked here, so that a bad one is refused before anything is generated; all others go on to the
handlers, which name the fields that they do not know. Knobs and seed travel in the request's `generation_config`, a field that the
handlers read.
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
# What transformers' handlers read past: here only the values that mean "not asked for" are served.
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
    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class _Request(_Checked):
    """What chat and completion requests have in common."""

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
    """The fields of a request's `generation_config` that are served: those that decide over the text of one answer.

    Others are refused: they would change what the server is asked to return, or hold ids that are out of the vocabulary, with which a
    GPU stops working.
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
    """A request for `/v1/chat/completions`."""

    messages: list[_Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logit_bias: dict[_TokenId, float] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class CompletionRequest(_Request):
    """A request for `/v1/completions`."""

    prompt: str = Field(min_length=1)


def translate(kind: type[_Request], body: Mapping[str, Any], defaults: GenerationConfig) -> dict[str, Any]:
    """The request as transformers' handlers take it: checked, with knobs and seed inside `generation_config`.

    Args:
        kind: what the request is checked as.
        body: the request.
        defaults: the model's generation config, which decides what the request leaves open.

    Raises:
        ValueError: something cannot be served; says what, with its value and what is allowed.
    """
    request = _read(kind, body)
    for name, neutral in _NEUTRAL.items():
        if name in body and body[name] not in neutral:
            raise ValueError(f"{name}={_short(body[name])} is not served: leave {name} out.")
    own = (
        {} if request.generation_config is None else parse_json_object(request.generation_config, "generation_config")
    )
    reject_misspelt([*body, *own])
    given = {name: source[name] for source in (own, body) for name in KNOBS if name in source}
    decoding = JacobiConfig.from_knobs({name: getattr(defaults, name, None) for name in KNOBS} | given)
    reject_pointless(given, decoding)
    config = {**_without_knobs(json.loads(defaults.to_json_string())), "max_new_tokens": None}
    config |= _read(_GenerationOptions, _without_knobs(own), "generation_config").model_dump(exclude_unset=True)
    if request.temperature is not None or request.top_p is not None:
        config["do_sample"] = request.temperature != 0
    dropped = {
        *KNOBS,
        "seed",
        *(["temperature"] if request.temperature == 0 else []),
        *([] if body.get("stop") else ["stop"]),
    }
    rest = {name: value for name, value in body.items() if name not in dropped}
    if body.get("logit_bias"):
        rest["logit_bias"] = request.model_dump()[
            "logit_bias"
        ]  # integers in JSON are numbers to transformers' processor only as floats
    return {**rest, "generation_config": json.dumps({**config, **given, SEED: request.seed})}


def _read(kind: type[_Model], body: Mapping[str, Any], within: str = "") -> _Model:
    try:
        return kind.model_validate(dict(body))
    except ValidationError as error:
        deepest = max(
            error.errors(), key=lambda one: len(one["loc"])
        )  # of the alternatives of a union, the one that fits best
    where = ".".join(
        str(part) for part in (within, *deepest["loc"]) if part not in ("str", "") and "[" not in str(part)
    )
    if deepest["type"] == "missing":
        raise ValueError(f"{where} is missing.")
    if deepest["type"] == "extra_forbidden":
        raise ValueError(
            f"{where} is not served; {within} may hold {', '.join(kind.model_fields)} and the knobs of decoding."
        )
    raise ValueError(f"{where}: {deepest['msg'][:1].lower()}{deepest['msg'][1:]}; it is {_short(deepest['input'])}.")


def stop_strings(body: Mapping[str, Any]) -> list[str]:
    """The stop strings of a request that `translate` has let through."""
    stops = body.get("stop") or []
    return [stops] if isinstance(stops, str) else list(stops)


def _without_knobs(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in KNOBS and not name.startswith("_")}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
