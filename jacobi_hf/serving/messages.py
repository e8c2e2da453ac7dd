"""Messages and tools of a chat request, checked, and messages as chat templates read them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from jacobi_hf.io import parse_json_object

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Role = Literal["system", "developer", "user", "assistant", "tool"]


class Checked(BaseModel):
    """Base class of the checked parts of a request; unknown fields are refused."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class _TextPart(Checked):
    model_config = ConfigDict(extra="ignore")  # such as cache_control, which some clients add

    type: Literal["text"]
    text: str


class _Function(Checked):
    name: str
    arguments: str | dict[str, Any]


class _ToolCall(Checked):
    id: str | None = None
    type: Literal["function"] = "function"
    index: int | None = None  # a tool call of a stream has it
    function: _Function


class Message(Checked):
    """Message of a chat."""

    role: Role
    content: str | list[_TextPart] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[_ToolCall] | None = None
    tool_call_id: str | None = None
    # An answer of the openai client has these, and clients send it back as it is.
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None
    refusal: None = None


class _Definition(Checked):
    name: str = Field(min_length=1)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Literal[False] | None = None


class Tool(Checked):
    """Function that the model may call."""

    type: Literal["function"]
    function: _Definition


def for_template(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return checked messages as chat templates read them.

    Parts of a text are joined with a space, as in transformers' own server. The arguments of a tool call become an
    object. A developer's message becomes a system message, since templates know no developer.

    Raises:
        ValueError: the arguments of a tool call are no JSON object.
    """
    return [_for_template(message, f"messages.{number}") for number, message in enumerate(messages)]


def _for_template(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    content = message.get("content") or ""
    role = message["role"]
    read = {
        "role": "system" if role == "developer" else role,
        "content": content if isinstance(content, str) else " ".join(part["text"] for part in content),
        "name": message.get("name"),
        "tool_call_id": message.get("tool_call_id"),
        "reasoning_content": message.get("reasoning_content") or message.get("reasoning"),
    }
    if calls := message.get("tool_calls"):
        read["tool_calls"] = [_call(call, f"{where}.tool_calls.{number}") for number, call in enumerate(calls)]
    return {name: value for name, value in read.items() if value is not None}


def _call(call: Mapping[str, Any], where: str) -> dict[str, Any]:
    arguments = call["function"]["arguments"]
    if isinstance(arguments, str):
        arguments = parse_json_object(arguments or "{}", f"{where}.function.arguments")
    return {**call, "type": "function", "function": {"name": call["function"]["name"], "arguments": arguments}}


# Arguments of apply_chat_template that are no options of the template.
_RESERVED = {
    "add_generation_prompt",
    "chat_template",
    "continue_final_message",
    "max_length",
    "padding",
    "processor_kwargs",
    "return_assistant_tokens_mask",
    "return_dict",
    "return_tensors",
    "tokenize",
    "tokenizer_kwargs",
    "tools",
    "truncation",
}


def check_template(request: Mapping[str, Any], tokenizer: Any) -> None:
    """Raise `ValueError` if a chat template would ignore the tools or an option of a request.

    Args:
        request: the request, checked.
        tokenizer: it has the chat template.
    """
    template = str(tokenizer.chat_template)
    for name in request.get("chat_template_kwargs") or ():
        if name in _RESERVED:
            raise ValueError(f"chat_template_kwargs.{name} is not served: it is no option of a chat template.")
        if name not in template:
            raise ValueError(f"chat_template_kwargs.{name}: the model's chat template has no such option.")
    if request.get("tools") and "tools" not in template:
        raise ValueError("tools: the model's chat template has no place for tools.")
