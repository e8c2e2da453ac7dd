"""How a loaded model decodes: knobs of the command line and of recipes come before the model's own."""

from __future__ import annotations

from dataclasses import asdict, fields, make_dataclass
from typing import TYPE_CHECKING, Any

from jacobi_hf.cli._options import option
from jacobi_hf.config import DECODINGS, KNOBS, MULTIBLOCK, JacobiConfig, reject_misspelt, reject_pointless

if TYPE_CHECKING:
    from collections.abc import Mapping


def _knob_options() -> list[tuple[str, Any, Any]]:
    allowed = ", ".join((*DECODINGS, "none"))
    text = f"{allowed}. The default is that of the model's generation config, or {MULTIBLOCK}."
    options: list[tuple[str, Any, Any]] = [("decoding", str | None, option(None, text))]
    for knob in fields(JacobiConfig)[1:]:
        text = f"{knob.metadata['help']} (default {knob.default})."
        options.append((knob.name, type(knob.default) | None, option(None, text[0].upper() + text[1:])))
    return options


# An option for each knob of `JacobiConfig`; None is a knob that was not given.
KnobOptions = make_dataclass("KnobOptions", _knob_options())


def given_knobs(options: Any) -> dict[str, Any]:
    """Return the knobs of a `KnobOptions` that were given, as `check_knobs` takes them."""
    return {name: value for name, value in asdict(options).items() if value is not None}


def check_knobs(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return knobs as `generate` takes them. Only what depends on no model is checked.

    Args:
        given: Knobs by name. `decoding` may be "none"; other knobs that are None count as not given.

    Raises:
        ValueError: A knob is unknown or out of range.
    """
    knobs = {name: value for name, value in given.items() if value is not None}
    if knobs.get("decoding") == "none":
        knobs["decoding"] = None
    reject_misspelt(knobs)
    if unknown := [name for name in knobs if name not in KNOBS]:
        raise ValueError(f"{', '.join(unknown)} is no knob of Jacobi decoding; the knobs are {', '.join(KNOBS)}.")
    # The range of jacobi_verify_width depends on the model's window.
    checked = {name: value for name, value in knobs.items() if name != "jacobi_verify_width"}
    JacobiConfig.from_knobs({"decoding": MULTIBLOCK} | checked)
    return knobs


def check_decoder(name: str, knobs: Any) -> None:
    """Raise `ValueError` unless a recipe's decoder has knobs by name, and a decoding other than the ordinary one."""
    if name == "generate":
        raise ValueError(
            "'generate' is the name of ordinary decoding, which is always measured: give the decoder another name."
        )
    if not isinstance(knobs, dict):
        raise ValueError(f"the decoder {name!r} must hold knobs by name; it is {knobs!r}.")  # noqa: TRY004
    if check_knobs(knobs).get("decoding", knobs.get("decoding", "")) is None:
        raise ValueError(f"the decoder {name!r} decodes ordinarily, which is always measured: leave it out.")


def decoding_of(model: Any, given: Mapping[str, Any]) -> JacobiConfig | None:
    """Return how a model decodes, or None for ordinary decoding.

    Given knobs come before the model's own, and those before the defaults.

    Args:
        model: A loaded model.
        given: Knobs, as `check_knobs` takes them.

    Raises:
        ValueError: A knob is out of range, or has no effect on this decoding.
    """
    from jacobi_hf.drafts.loading import drafter_of

    knobs = check_knobs(given)
    saved = {name: getattr(model.generation_config, name, None) for name in KNOBS}
    if saved["decoding"] is None:
        saved["decoding"] = MULTIBLOCK
    config = JacobiConfig.from_knobs(saved | knobs)
    reject_pointless(knobs, config)
    if knobs.get("jacobi_verify_width") and drafter_of(model) is None:
        raise ValueError(
            "jacobi_verify_width is for drafters, and none is in use: name one with --drafter, or leave it out."
        )
    return config


def arguments_of(config: JacobiConfig | None) -> dict[str, Any]:
    """Return the arguments of `generate` that decode as a config says; None is ordinary decoding."""
    return config.to_knobs() if config else {"decoding": None}


def make_default(model: Any, config: JacobiConfig | None) -> None:
    """Set how a loaded model decodes in calls without knobs. Its sampling does not change.

    Args:
        model: A loaded model.
        config: Knobs; None is ordinary decoding.
    """
    knobs = config.to_knobs() if config else {}
    for name in KNOBS:
        setattr(model.generation_config, name, knobs.get(name))


def placement_of(model: Any) -> dict[str, Any]:
    """Return where a model computes: its device, its dtype and torch's threads on the CPU."""
    import torch

    return {
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }
