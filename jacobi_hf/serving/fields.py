"""Fields of the OpenAI API and of vLLM that requests do not have here: neutral ones, and refused ones with a sentence.

Each field that a client may send is in one of three places: a served field is a field of `ChatRequest` or
`CompletionRequest`, a neutral one has its reason in `NEUTRAL`, a refused one its sentence in `REFUSED`. Any other name
is refused too. `tests/field/test_server_fields.py` compares the three with the types of the `openai` package and with
docs/serving.md.
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping


class Refusal(NamedTuple):
    """Why a field is refused.

    Attributes:
        reason: end of the sentence, after the field's name and value.
        harmless: values that ask for nothing and are accepted; null always is.
    """

    reason: str
    harmless: tuple[Any, ...] = ()


# Fields without effect on the answer. Any value is accepted.
NEUTRAL = {
    "cache_salt": "the server keeps no cache from one request to the next",
    "include_reasoning": "reasoning is always part of the answer, as `reasoning_content`",
    "metadata": "no answer is stored",
    "prediction": "guesses come from the knobs; the text never depends on them",
    "priority": "requests are answered in their order",
    "prompt_cache_key": "the server keeps no cache from one request to the next",
    "prompt_cache_options": "the server keeps no cache from one request to the next",
    "prompt_cache_retention": "the server keeps no cache from one request to the next",
    "request_id": "the header x-request-id has the request's id",
    "safety_identifier": "the server does not distinguish users",
    "service_tier": "all requests are of one tier",
    "spaces_between_special_tokens": "special tokens are not part of the text",
    "store": "no answer is stored",
    "user": "the server does not distinguish users",
}

_LOGPROBS = "log-probabilities are not computed; generate(..., output_logits=True) returns the logits."
_GRAMMAR = (
    "the form of answers is not constrained; generate(..., logits_processor=...) takes the processor of a grammar."
)
_TEMPLATE = "only the model's own chat template is used; chat_template_kwargs holds its options."
_TOOLS = "functions are given as tools."
_IDS = "token ids are not taken from requests; stop takes strings, and logit_bias takes ids."
_TEXT_ONLY = "models here read and write text alone."

_ELSEWHERE = "is for the other endpoint of /v1/chat/completions and /v1/completions: leave it out."

# Fields that would change the answer, which the server cannot do.
REFUSED = {
    "add_generation_prompt": Refusal("an answer is always a new turn.", (True,)),
    "add_special_tokens": Refusal("special tokens are those of the model's tokenizer."),
    "allowed_token_ids": Refusal(_IDS, ([],)),
    "audio": Refusal(_TEXT_ONLY),
    "bad_words": Refusal("words cannot be forbidden; logit_bias makes tokens unlikely.", ([],)),
    "chat_template": Refusal(_TEMPLATE),
    "continue_final_message": Refusal("an answer is always a new turn.", (False,)),
    "detokenize": Refusal("answers are text.", (True,)),
    "documents": Refusal("documents are an option of a chat template: put them into chat_template_kwargs.", ([],)),
    "early_stopping": Refusal("there are no beams.", (False,)),
    "function_call": Refusal(_TOOLS, ("none", "auto")),
    "functions": Refusal(_TOOLS, ([],)),
    "guided_choice": Refusal(_GRAMMAR),
    "guided_decoding_backend": Refusal(_GRAMMAR),
    "guided_grammar": Refusal(_GRAMMAR),
    "guided_json": Refusal(_GRAMMAR),
    "guided_regex": Refusal(_GRAMMAR),
    "guided_whitespace_pattern": Refusal(_GRAMMAR),
    "ignore_eos": Refusal("an end token ends the answer; min_tokens sets how long it is at least.", (False,)),
    "include_stop_str_in_output": Refusal("a stop string is never part of the answer.", (False,)),
    "kv_transfer_params": Refusal("keys and values stay on this server."),
    "length_penalty": Refusal("there are no beams.", (1, 0)),
    "logits_processors": Refusal(
        "requests hold no code; generate(..., logits_processor=...) takes processors.", ([],)
    ),
    "logprobs": Refusal(_LOGPROBS, (False,)),
    "media_io_kwargs": Refusal(_TEXT_ONLY),
    "mm_processor_kwargs": Refusal(_TEXT_ONLY),
    "modalities": Refusal(_TEXT_ONLY, (["text"],)),
    "moderation": Refusal("texts are not moderated."),
    "prompt_embeds": Refusal("the prompt is text or token ids."),
    "prompt_logprobs": Refusal(_LOGPROBS, (0, False)),
    "reasoning_effort": Refusal(
        'a chat template may have an option for it: chat_template_kwargs={"enable_thinking": false}, for example.'
    ),
    "response_format": Refusal(_GRAMMAR, ({"type": "text"},)),
    "return_token_ids": Refusal("answers are text.", (False,)),
    "return_tokens_as_token_ids": Refusal("answers are text.", (False,)),
    "skip_special_tokens": Refusal("special tokens are not part of the text.", (True,)),
    "stop_token_ids": Refusal(_IDS, ([],)),
    "structured_outputs": Refusal(_GRAMMAR),
    "suffix": Refusal("text cannot be inserted before other text.", ("",)),
    "thinking_token_budget": Refusal("reasoning has no limit of its own; max_tokens limits the answer."),
    "top_logprobs": Refusal(_LOGPROBS, (0,)),
    "truncate_prompt_tokens": Refusal("prompts are not cut: send a shorter one."),
    "use_beam_search": Refusal("there are no beams.", (False,)),
    "verbosity": Refusal("say in the prompt how long the answer should be.", ("medium",)),
    "vllm_xargs": Refusal("there are no engines with arguments of their own.", ({},)),
    "web_search_options": Refusal("there is no search.", ({},)),
}


def reject_refused(body: Mapping[str, Any], served: Collection[str], elsewhere: Collection[str]) -> None:
    """Raise `ValueError` if a request asks for something that the server does not do.

    Args:
        body: the request.
        served: names of the fields that its endpoint serves.
        elsewhere: names of the fields that another endpoint serves.
    """
    for name, value in body.items():
        if name in served or name in NEUTRAL:
            continue
        if name in elsewhere:
            if not _is_one_of(value, (None, False, [])):
                raise ValueError(f"{name}={short(value)} {_ELSEWHERE}")
        elif name not in REFUSED:
            raise ValueError(f"{name} {_unknown(name, served)}")
        elif not _is_one_of(value, (None, *REFUSED[name].harmless)):
            raise ValueError(f"{name}={short(value)} is not served: {REFUSED[name].reason}")


def _unknown(name: str, served: Collection[str]) -> str:
    close = difflib.get_close_matches(name, [*served, *NEUTRAL, *REFUSED], 1)
    return (
        f"is no field of a request; did you mean {close[0]}?" if close else "is no field of a request: leave it out."
    )


def _is_one_of(value: Any, harmless: tuple[Any, ...]) -> bool:
    """Return whether a value is one of others; unlike ==, tell 0 and 1 from false and true."""
    return any(value == other and isinstance(value, bool) is isinstance(other, bool) for other in harmless)


def short(value: Any) -> str:
    """Return a value as errors show it."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
