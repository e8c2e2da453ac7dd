"""Loading of models by name: for the command line, the demo and programs of users that want the same checks."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from jacobi_hf.drafts.loading import load_drafter
from jacobi_hf.integration.registry import register
from jacobi_hf.integration.support import fixed_positions

if TYPE_CHECKING:
    from collections.abc import Iterator

# Kinds of rotary embeddings that reach `factor` times as far as the original ones.
_STRETCHED = ("yarn", "linear", "dynamic")


def load(name: str, dtype: str = "auto", drafter: str | None = None) -> tuple[Any, Any]:
    """Return a model and its tokenizer. The model is in eval mode, on the accelerator if there is one.

    Args:
        name: Folder, or name on the Hub.
        dtype: Name of a torch dtype; "auto" keeps the dtype of the weights.
        drafter: Folder or Hub repository of a drafter, which is loaded with the model.

    Raises:
        ValueError: There is no such model or dtype, the model's class cannot decode with Jacobi, or the drafter does
        not fit.
    """
    check_dtype(dtype)
    with reading(name, "loaded as a causal language model"):
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype).eval()
    try:
        register(type(model))
    except TypeError as error:
        raise ValueError(f"{name} cannot decode with Jacobi: {error}") from None
    if torch.accelerator.is_available():
        model = model.to(torch.accelerator.current_accelerator())
    if drafter is not None:
        load_drafter(model, drafter)
    return model, tokenizer


@contextlib.contextmanager
def reading(name: str, action: str = "read as a model") -> Iterator[None]:
    """Raise `ValueError` with the model's name for any error inside, because a checkpoint can be broken in any way.

    Args:
        name: Folder, or name on the Hub. It is checked first.
        action: What happens inside, as in "NAME cannot be ACTION".
    """
    _check_name(name)
    try:
        yield
    except Exception as error:
        raise ValueError(f"{name} cannot be {action}: {error or type(error).__name__}") from error


def check_config(name: str, revision: str | None = None) -> None:
    """Raise `ValueError` if there is no such model, or its configuration cannot be read."""
    with reading(name):
        AutoConfig.from_pretrained(name, revision=revision)


def _check_name(name: str) -> None:
    """Raise `ValueError` for a name whose error in transformers would mislead."""
    path = Path(name)
    if path.is_file():
        raise ValueError(f"{name} is a file; a model is a folder, or a name on the Hub.")
    if not path.is_dir():
        if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
            raise ValueError(
                f"{name} is no model: there is no such folder, and names on the Hub have the form user/name."
            )
    elif (path / "drafter_config.json").is_file():
        raise ValueError(f"{name} is a drafter: name the model that it is for, and this folder with --drafter.")
    elif not any((path / file).is_file() for file in ("config.json", "adapter_config.json")):
        raise ValueError(f"{name} is a folder without config.json: it holds no model.")


def check_dtype(dtype: str) -> None:
    """Raise `ValueError` if `dtype` is neither "auto" nor the name of a torch dtype."""
    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"dtype {dtype!r} is not known; there are auto, float32, bfloat16 and float16.")


def positions_of(model: Any) -> float:
    """Return the number of positions that a model is made for, or infinity if its config names no limit.

    Rotary embeddings that are stretched by a factor (YaRN and others) have that many times the positions, although
    model cards leave `max_position_embeddings` alone.
    """
    config = model.config.get_text_config(decoder=True)
    positions: float = getattr(config, "max_position_embeddings", None) or math.inf
    declared = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    for rope in (declared, *declared.values()):  # one for each type of layer, or one for all
        if isinstance(rope, dict) and rope.get("rope_type", rope.get("type")) in _STRETCHED:
            unstretched = rope.get("original_max_position_embeddings") or config.max_position_embeddings
            positions = max(positions, int(unstretched * (rope.get("factor") or 1)))
    return positions


def check_table(model: Any, prompt_tokens: int, max_new_tokens: int) -> None:
    """Raise `ValueError` if a prompt and the text after it may leave a model's table of positions.

    Rotary embeddings have no end, and `generate` goes on beyond what the model is made for.
    """
    needed = prompt_tokens + max_new_tokens - 1  # the last token is not read again
    positions = fixed_positions(model, needed)
    if positions is not None:
        raise ValueError(
            f"{prompt_tokens} tokens of prompt and max_new_tokens={max_new_tokens} may need {needed} positions, and "
            f"the model has a table of {positions}: give fewer --max-new-tokens."
        )


def check_length(model: Any, prompt_tokens: int, max_new_tokens: int) -> None:
    """Raise `ValueError` if a prompt and the text after it need more positions than the model is made for."""
    positions = positions_of(model)
    if prompt_tokens >= positions:
        raise ValueError(f"the prompt has {prompt_tokens} tokens; the model has {positions} positions.")
    if prompt_tokens + max_new_tokens > positions:
        raise ValueError(
            f"{prompt_tokens} tokens of prompt and max_new_tokens={max_new_tokens} are more than the model's "
            f"{positions} positions: give fewer --max-new-tokens."
        )
