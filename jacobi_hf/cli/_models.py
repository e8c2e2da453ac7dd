"""How a loaded model decodes: knobs of the command line and of recipes before the model's own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jacobi_hf.config import KNOBS, MULTIBLOCK, JacobiConfig, reject_misspelt, reject_pointless
from jacobi_hf.drafts.loading import drafter_of

if TYPE_CHECKING:
    from collections.abc import Mapping


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
