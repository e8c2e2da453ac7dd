"""Models for the verbs that generate."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import jacobi_hf
from jacobi_hf.config import KNOBS, MULTIBLOCK, JacobiConfig, reject_misspelt, reject_pointless
from jacobi_hf.drafts.loading import drafter_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


def load(name: str, dtype: str = "auto", drafter: str | None = None) -> tuple[Any, Any]:
    """A model in eval mode on the machine's accelerator, with its drafter, and its tokenizer.

    Raises:
        ValueError: there is no such model, the dtype is none, the model's class cannot decode with Jacobi, or the drafter does not fit.
    """
    check_dtype(dtype)
    with reading(name, "loaded as a causal language model"):
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype).eval()
    try:
        jacobi_hf.register(type(model))
    except TypeError as error:
        raise ValueError(f"{name} cannot decode with Jacobi: {error}") from None
    if torch.accelerator.is_available():
        model = model.to(torch.accelerator.current_accelerator())
    if drafter is not None:
        jacobi_hf.load_drafter(model, drafter)
    return model, tokenizer


@contextlib.contextmanager
def reading(name: str, how: str = "read as a model") -> Iterator[None]:
    """Whatever goes wrong inside, since a checkpoint can be broken in any way, is a `ValueError` that names the model."""
    _check_model(name)
    try:
        yield
    except Exception as error:
        raise ValueError(f"{name} cannot be {how}: {error or type(error).__name__}") from error


def check_config(name: str, revision: str | None = None) -> None:
    """Raise `ValueError` where there is no such model, before anything else is done."""
    with reading(name):
        AutoConfig.from_pretrained(name, revision=revision)


def _check_model(name: str) -> None:
    """What transformers would call a wrong name of a repository, or a missing tokenizer."""
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
    """Raise `ValueError` for what is no dtype of torch, nor "auto"."""
    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"dtype {dtype!r} is not known; there are auto, float32, bfloat16 and float16.")


def check_knobs(given: Mapping[str, Any]) -> dict[str, Any]:
    """Knobs as `generate` takes them, as far as they can be checked without a model.

    Args:
        given: `decoding` may be "none"; None is a knob that is not given.

    Raises:
        ValueError: a knob is unknown or out of range.
    """
    knobs = {name: value for name, value in given.items() if value is not None}
    if knobs.get("decoding") == "none":
        knobs["decoding"] = None
    reject_misspelt(knobs)
    if unknown := [name for name in knobs if name not in KNOBS]:
        raise ValueError(f"{', '.join(unknown)} is no knob of Jacobi decoding; the knobs are {', '.join(KNOBS)}.")
    alone = {
        name: value for name, value in knobs.items() if name != "jacobi_verify_width"
    }  # its range depends on the model's window
    JacobiConfig.from_knobs({"decoding": MULTIBLOCK} | alone)
    return knobs


def check_decoder(name: str, knobs: Any) -> None:
    """Raise `ValueError` where a recipe's decoder is none: `knobs` by name, of a decoding other than the ordinary one."""
    if name == "generate":
        raise ValueError(
            "'generate' is the name of ordinary decoding, which is always measured: give the decoder another name."
        )
    if not isinstance(knobs, dict):
        raise ValueError(f"the decoder {name!r} has to hold knobs by name; it is {knobs!r}.")  # noqa: TRY004  (of a recipe)
    if check_knobs(knobs).get("decoding", knobs.get("decoding", "")) is None:
        raise ValueError(f"the decoder {name!r} decodes ordinarily, which is always measured: leave it out.")


def decoding_of(model: Any, given: Mapping[str, Any]) -> JacobiConfig | None:
    """How a model decodes: `given` knobs, as `check_knobs` takes them, before the model's own, before the defaults.

    Raises:
        ValueError: a knob is out of range, or nothing would listen to it.
    """
    knobs = check_knobs(given)
    persisted = {name: getattr(model.generation_config, name, None) for name in KNOBS}
    if persisted["decoding"] is None:
        persisted["decoding"] = MULTIBLOCK
    config = JacobiConfig.from_knobs(persisted | knobs)
    reject_pointless(knobs, config)
    if knobs.get("jacobi_verify_width") and drafter_of(model) is None:
        raise ValueError(
            "jacobi_verify_width is for drafters, and none is in use: name one with --drafter, or leave it out."
        )
    return config
