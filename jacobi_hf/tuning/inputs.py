"""Prompts and arguments of `autotune`, checked and put into batches."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from jacobi_hf.config import KNOBS
from jacobi_hf.integration.compat import CACHE_NAMES
from jacobi_hf.integration.support import cannot_compile
from jacobi_hf.prompts import encode_messages

if TYPE_CHECKING:
    from transformers import CompileConfig, PreTrainedModel, PreTrainedTokenizerBase

_SET_BY_AUTOTUNE = ("attention_mask", "input_ids", "inputs", "inputs_embeds", *CACHE_NAMES, "position_ids", "streamer")


def check_arguments(
    generate_kwargs: dict[str, Any],
    seconds: float,
    max_new_tokens: int,
    batch_size: int,
    assistant_model: PreTrainedModel | None,
) -> None:
    """Raise `ValueError` for arguments of `autotune` that cannot be used."""
    if given := sorted(set(KNOBS) & set(generate_kwargs)):
        raise ValueError(f"autotune searches for the knobs, so it takes none; drop {', '.join(given)}.")
    if given := sorted(set(_SET_BY_AUTOTUNE) & set(generate_kwargs)):
        raise ValueError(
            f"autotune makes the inputs out of the prompts and times tokens itself; drop {', '.join(given)}."
        )
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} cannot be used; it must be at least 1.")
    if not seconds > 0 or math.isinf(seconds) or max_new_tokens < 2:
        raise ValueError(f"seconds={seconds} and max_new_tokens={max_new_tokens} leave nothing to measure.")
    if assistant_model is not None and batch_size > 1:
        raise ValueError("assisted decoding takes one row at a time: use batch_size=1, or no assistant_model.")


def prompt_rows(prompts: Any, tokenizer: PreTrainedTokenizerBase | None) -> list[list[int]]:
    """Return the token ids of each prompt.

    Args:
        prompts: strings, messages or token ids, as `autotune` takes them.
        tokenizer: tokenizer for strings and messages.

    Raises:
        ValueError: there are no prompts, a prompt is empty or no prompt, strings or messages come without a tokenizer,
            or the chat template refuses messages.
    """
    given = _not_a_list(prompts)
    prompts = [] if given else list(prompts)
    if not prompts:
        raise ValueError(
            f"autotune needs a list of prompts, a dozen of the kind that will be decoded; got {given or 'none'}."
        )
    return [_prompt_row(number, prompt, tokenizer) for number, prompt in enumerate(prompts)]


def _not_a_list(prompts: Any) -> str | None:
    """Return in words what was given instead of several prompts; None if it may be several prompts."""
    if isinstance(prompts, str):
        return "a string"
    if isinstance(prompts, Mapping):
        return "a mapping"
    if isinstance(prompts, torch.Tensor) and prompts.ndim != 2:
        return f"a tensor of {prompts.ndim} dimensions"
    return None


def _prompt_row(number: int, prompt: Any, tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    is_messages = isinstance(prompt, (list, tuple)) and bool(prompt) and isinstance(prompt[0], Mapping)
    if (is_messages or isinstance(prompt, str)) and tokenizer is None:
        given = "messages" if is_messages else "strings"
        raise ValueError(
            f"the prompts are {given}: give their tokenizer, autotune(model, prompts, tokenizer=tokenizer)."
        )
    ids: Any = prompt
    if tokenizer is not None and is_messages:
        ids = encode_messages(prompt, tokenizer, f"prompt {number}")
    elif tokenizer is not None and isinstance(prompt, str):
        ids = tokenizer(prompt)["input_ids"]
    ids = ids.tolist() if hasattr(ids, "tolist") else ids  # tensors of torch and arrays of numpy
    if not isinstance(ids, (list, tuple)) or any(isinstance(i, bool) or not hasattr(i, "__index__") for i in ids):
        raise ValueError(
            f"prompt {number} is neither a string nor messages nor a list or tensor (one-dimensional) of ids."
        )
    if not ids:
        raise ValueError(f"prompt {number} is empty.")
    return [int(i) for i in ids]


def batches_of(rows: list[list[int]], batch_size: int, device: torch.device) -> list[dict[str, torch.Tensor]]:
    """Return left-padded batches as `generate` takes them; a last batch that would not be full is left out.

    A smaller batch would have other prices.
    """
    batch_size = min(batch_size, len(rows))
    batches = []
    for first in range(0, len(rows) - batch_size + 1, batch_size):
        part = rows[first : first + batch_size]
        columns = max(map(len, part))
        ids_BP = torch.tensor([[0] * (columns - len(row)) + row for row in part], device=device)
        mask_BP = torch.tensor([[0] * (columns - len(row)) + [1] * len(row) for row in part], device=device)
        batches.append({"input_ids": ids_BP, "attention_mask": mask_BP})
    return batches


def take_compile_config(model: Any, arguments: dict[str, Any]) -> CompileConfig | None:
    """Remove the `compile_config` from the arguments of `generate` and return it; None if the calls run uncompiled."""
    options = arguments.get("generation_config") or model.generation_config
    given = arguments.pop("compile_config", None) or getattr(options, "compile_config", None)
    if given is None or arguments.get("disable_compile", getattr(options, "disable_compile", False)):
        return None
    if reason := cannot_compile(model):
        warnings.warn(
            f"compile_config is ignored: {reason}. All strategies run uncompiled.", UserWarning, stacklevel=3
        )
        return None
    config: Any = copy.copy(given)
    config._compile_all_devices = True  # without it transformers compiles ordinary decoding on accelerators alone
    return config
