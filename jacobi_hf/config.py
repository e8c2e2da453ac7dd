"""The knobs of Jacobi decoding: one dataclass, its validation, and its flat names in `GenerationConfig`."""

from __future__ import annotations

import difflib
import numbers
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Self

from transformers import GenerationConfig

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from transformers import PreTrainedModel

JACOBI, MULTIBLOCK = "jacobi", "jacobi_multiblock"
DECODINGS = (JACOBI, MULTIBLOCK)
_SAMPLING_FIELDS = ("temperature", "top_p", "top_k", "min_p", "typical_p")


def _knob(default: float, low: float, high: float, text: str) -> Any:
    return field(default=default, metadata={"low": low, "high": high, "help": text})


@dataclass(frozen=True)
class JacobiConfig:
    """How `generate` drafts and verifies.

    Parameters:
        decoding: `"jacobi"`, one block at a time, each new block from random ids; or `"jacobi_multiblock"`, a rolling
            window of blocks with candidate branches.
        jacobi_block_size: n, the positions of a block.
        jacobi_max_blocks: K, the blocks in flight; 0 for no window, so that the lookup branch alone is verified (the pool
            learns from the window, so it stays empty).
        jacobi_activation_ratio: r; a block is appended when the newest one has `ceil(r * n)` agreed tokens. 0 keeps K
            blocks in flight at all times, 1 waits for a block to finish.
        jacobi_pool_size: branches per forward from recycled n-grams; 0 switches the pool off.
        jacobi_lookup_tokens: length of the branch from n-gram lookup in prompt and output; 0 switches it off.
        jacobi_branch_length: tokens of a pool branch.
        jacobi_topk_branches: branches of two tokens, each with the model's second or third choice in place of one of the window's first
            guesses: at most two for each guess of the window; 0 switches them off.
        jacobi_verify_width: with a drafter (`load_drafter`), guesses of the window that the model verifies in one forward; 0
            begins with half the window and then follows what is accepted. Without a drafter all are verified.

    The tokens do not depend on any of these, only the number of forwards does. With `"jacobi"` only the block size applies.

    Raises:
        ValueError: a value out of range, or of the wrong type, named with what is allowed; neither window nor lookup; more guesses to
            verify than the window has.
    """

    decoding: str = MULTIBLOCK
    jacobi_block_size: int = _knob(16, 2, 1024, "positions of a block (n)")
    jacobi_max_blocks: int = _knob(2, 0, 64, "blocks in flight (K), 0 = lookup alone")
    jacobi_activation_ratio: float = _knob(
        0.0, 0.0, 1.0, "share of a block that must agree before the next one starts (r)"
    )
    jacobi_pool_size: int = _knob(2, 0, 64, "branches from recycled n-grams, 0 = off")
    jacobi_lookup_tokens: int = _knob(16, 0, 1024, "length of the n-gram lookup branch, 0 = off")
    jacobi_branch_length: int = _knob(8, 1, 256, "tokens of a branch from the pool")
    jacobi_topk_branches: int = _knob(0, 0, 32, "branches from the model's second and third choices, 0 = off")
    jacobi_verify_width: int = _knob(
        0, 0, 65_536, "guesses that are verified at a time beside a drafter, 0 = as acceptance suggests"
    )

    def __post_init__(self) -> None:
        if self.decoding not in DECODINGS:
            raise ValueError(
                f"decoding={self.decoding!r} is not known{_nearest(self.decoding, DECODINGS)}; "
                f"allowed: None, {', '.join(map(repr, DECODINGS))}."
            )
        for knob in fields(self)[1:]:
            value: Any = getattr(self, knob.name)
            integral = isinstance(knob.default, int)
            low, high = knob.metadata["low"], knob.metadata["high"]
            wanted = f"{'an integer' if integral else 'a number'} from {low} to {high}"
            kind = numbers.Integral if integral else numbers.Real
            if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high:
                raise ValueError(f"{knob.name}={value!r} cannot be used; it must be {wanted}.")
            plain: Any = value
            object.__setattr__(
                self, knob.name, int(plain) if integral else float(plain)
            )  # numpy's numbers do not serialise
        if self.decoding == MULTIBLOCK and not self.jacobi_max_blocks and not self.jacobi_lookup_tokens:
            raise ValueError(
                "jacobi_max_blocks=0 with jacobi_lookup_tokens=0 leaves nothing to draft from; that is decoding=None."
            )
        if self.jacobi_verify_width > self.window_width:
            raise ValueError(
                f"jacobi_verify_width={self.jacobi_verify_width} is more than the window's {self.window_width} guesses "
                "(jacobi_block_size times jacobi_max_blocks)."
            )

    @property
    def window_width(self) -> int:
        """Most guesses in flight, `n * K`."""
        return self.jacobi_block_size * (1 if self.decoding == JACOBI else self.jacobi_max_blocks)

    @classmethod
    def paper(cls) -> Self:
        """The setting that arXiv 2512.14681 recommends: n=64, K=2, r=0.85, a pool of 4, no lookup."""
        return cls(
            jacobi_block_size=64,
            jacobi_max_blocks=2,
            jacobi_activation_ratio=0.85,
            jacobi_pool_size=4,
            jacobi_lookup_tokens=0,
        )

    @classmethod
    def from_knobs(cls, knobs: Mapping[str, Any]) -> Self | None:
        """The config that flat `knobs` describe (missing ones and None take the defaults); None when `decoding` is None."""
        if knobs.get("decoding") is None:
            return None
        listens = ("decoding", "jacobi_block_size") if knobs["decoding"] == JACOBI else KNOBS
        return cls(**{name: value for name, value in knobs.items() if name in listens and value is not None})

    @classmethod
    def from_generation_config(cls, generation_config: GenerationConfig) -> Self | None:
        """The config that a `GenerationConfig` carries, or None when it does not ask for Jacobi decoding."""
        return cls.from_knobs({name: getattr(generation_config, name, None) for name in KNOBS})

    def to_knobs(self) -> dict[str, Any]:
        """The flat names and values, as `generate` and `GenerationConfig` take them."""
        names = KNOBS if self.decoding == MULTIBLOCK else ("decoding", "jacobi_block_size")
        return {name: getattr(self, name) for name in names}

    def save_defaults(self, model: PreTrainedModel) -> None:
        """Make this the way `model` decodes, now and after `save_pretrained` and a reload in which jacobi_hf is imported.

        Clears what would lose the knobs on the way: the mark of a config derived from the model config (on reload it drops
        additional fields) and, for a greedy config, left-over sampling fields (with them `save_pretrained` refuses; a later
        `generate(do_sample=True)` then samples with transformers' defaults unless the call says otherwise).
        """
        kept = {k: v for k, v in model.generation_config.to_dict().items() if not k.startswith("_") and k not in KNOBS}
        kept.pop("transformers_version", None)
        if not kept.get("do_sample"):
            kept |= dict.fromkeys(_SAMPLING_FIELDS)
        model.generation_config = GenerationConfig(**kept, **self.to_knobs())


KNOBS: tuple[str, ...] = tuple(knob.name for knob in fields(JacobiConfig))


def reject_misspelt(names: Iterable[str]) -> None:
    """Raise `ValueError` for a name that starts like a knob, or nearly is one, and is none."""
    for name in names:
        close = difflib.get_close_matches(name, KNOBS, 1, cutoff=0.9)
        if name not in KNOBS and (name.startswith("jacobi_") or close):
            raise ValueError(
                f"{name!r} is not a knob of Jacobi decoding{_nearest(name, KNOBS)}; the knobs are {', '.join(KNOBS)}."
            )


def reject_pointless(given: Mapping[str, Any], config: JacobiConfig | None) -> None:
    """Raise `ValueError` for `given` knobs of a call that nothing would listen to; `config` is what the call comes to."""
    set_knobs = [name for name in given if name != "decoding" and given[name] is not None]
    if config is None and set_knobs:
        raise ValueError(
            f"{', '.join(set_knobs)} given without decoding: add decoding='jacobi_multiblock' or drop it."
        )
    if config is not None and config.decoding == JACOBI:
        idle = [name for name in set_knobs if name != "jacobi_block_size"]
        if idle:
            raise ValueError(
                f"{', '.join(idle)} has no meaning with decoding='jacobi', which knows jacobi_block_size only; use 'jacobi_multiblock'."
            )


def _nearest(name: object, allowed: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(name), list(allowed), 1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""
