"""Settings of Jacobi decoding (knobs): one dataclass, its validation, and its flat names in `GenerationConfig`."""

from __future__ import annotations

import difflib
import numbers
from dataclasses import Field, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from transformers import GenerationConfig, PreTrainedModel

JACOBI = "jacobi"
MULTIBLOCK = "jacobi_multiblock"
DECODINGS = (JACOBI, MULTIBLOCK)
ADAPTIVE = "adaptive"
CONSTANT = "constant"
SCHEDULES = (ADAPTIVE, CONSTANT)
_SAMPLING_FIELDS = ("temperature", "top_p", "top_k", "min_p", "typical_p")


def _knob(default: float, low: float, high: float, text: str) -> Any:
    """Return a field with its range, both ends included, and its help text."""
    return field(default=default, metadata={"low": low, "high": high, "help": text})


def _word(default: str, allowed: tuple[str, ...], text: str) -> Any:
    """Return a field with the words that it may be, and its help text."""
    return field(default=default, metadata={"allowed": allowed, "help": text})


@dataclass(frozen=True)
class JacobiConfig:
    """Settings of Jacobi decoding: how many guesses each forward verifies, and where the guesses come from.

    Every field is also an argument of `generate`, an attribute of `GenerationConfig` and an option of the command
    line. The fields decide how many forwards a text needs and what a forward costs. They never change the text,
    because the model verifies every guess.

    Each forward verifies a *window* and *branches*. The window is a chain of guesses for the next tokens. It consists
    of *blocks*, and after each forward the model's own answers replace the guesses in it. A branch is another
    continuation of the text. The longest run of accepted guesses becomes text.

    By default the numbers are upper limits. Before each forward, decoding chooses how many guesses to send from what a
    forward costs on this machine and from how many guesses were accepted lately.

    Args:
        decoding: `"jacobi_multiblock"` keeps several blocks in the window and adds branches. `"jacobi"` is the plain
            method to compare with: one block at a time, no branches; of the other fields it uses `jacobi_block_size`
            only.
        jacobi_schedule: `"adaptive"` chooses the guesses of each forward within the limits that the other fields set,
            down to none at all. `"constant"` sends as many as the fields say in every forward, as benchmarks of one
            setting need.
        jacobi_block_size: n, the number of guesses in a block.
        jacobi_max_blocks: K, the most blocks in the window. 0 means no window: the lookup branch alone is verified.
            The pool then stays empty, because it learns from the window.
        jacobi_activation_ratio: r, a share from 0 to 1. The next block joins the window when `ceil(r * n)` tokens of
            the newest block are settled, i.e. are text already or did not change in the last forward. 0 keeps K blocks
            in the window at all times, 1 waits until the newest block is settled as a whole.
        jacobi_pool_size: most branches per forward from the n-gram pool, a memory of rejected guesses and the model's
            answers after them. 0 switches the pool off.
        jacobi_lookup_tokens: most tokens of the lookup branch, which repeats what followed the last few tokens when
            they occurred before in prompt or output (prompt lookup). 0 switches lookup off.
        jacobi_branch_length: most tokens of a branch from the pool.
        jacobi_topk_branches: branches of two tokens that try the model's second or third choice in place of one of the
            window's first guesses; at most two for each guess of the window. 0 switches them off.
        jacobi_verify_width: with a drafter (`load_drafter`), how many guesses of the window the model verifies in one
            forward. 0 starts with half of the window and then follows how many are accepted. Without a drafter all
            guesses are verified.

    Raises:
        ValueError: a value has the wrong type, is unknown or is out of range; there is neither a window nor a lookup
            branch; or `jacobi_verify_width` is larger than the window. The message names the value and what is
            allowed.
    """

    decoding: str = MULTIBLOCK
    jacobi_schedule: str = _word(
        ADAPTIVE, SCHEDULES, "adaptive: other knobs are limits, a forward sends what pays; constant: it sends them all"
    )
    jacobi_block_size: int = _knob(16, 2, 1024, "guesses in a block of the window (n)")
    jacobi_max_blocks: int = _knob(2, 0, 64, "most blocks of guesses in the window (K), 0 = no window, lookup alone")
    jacobi_activation_ratio: float = _knob(
        0.0, 0.0, 1.0, "share of the newest block that must be settled before the next block starts (r)"
    )
    jacobi_pool_size: int = _knob(2, 0, 64, "most branches from the pool of n-grams around rejected guesses, 0 = off")
    jacobi_lookup_tokens: int = _knob(
        16, 0, 1024, "most tokens copied from an earlier occurrence of the last tokens (prompt lookup), 0 = off"
    )
    jacobi_branch_length: int = _knob(8, 1, 256, "most tokens of a branch from the pool")
    jacobi_topk_branches: int = _knob(
        0, 0, 32, "branches of two tokens that try the model's second or third choice, 0 = off"
    )
    jacobi_verify_width: int = _knob(
        0, 0, 65_536, "with a drafter, guesses of the window verified in one forward, 0 = as many as get accepted"
    )

    def __post_init__(self) -> None:
        """Raise `ValueError` for a field, or a combination of fields, that cannot be used."""
        if self.decoding not in DECODINGS:
            raise ValueError(
                f"decoding={self.decoding!r} is not known{_nearest(self.decoding, DECODINGS)}; "
                f"allowed: None, {', '.join(map(repr, DECODINGS))}."
            )
        for knob in fields(self)[1:]:
            object.__setattr__(self, knob.name, _checked(knob, getattr(self, knob.name)))
        if self.decoding == MULTIBLOCK and not self.jacobi_max_blocks and not self.jacobi_lookup_tokens:
            raise ValueError(
                "jacobi_max_blocks=0 with jacobi_lookup_tokens=0 leaves nothing to guess from: raise one of them, "
                "or use decoding=None for ordinary decoding."
            )
        if self.jacobi_verify_width > self.window_width:
            raise ValueError(
                f"jacobi_verify_width={self.jacobi_verify_width} is more than the window's {self.window_width} "
                "guesses (jacobi_block_size times jacobi_max_blocks)."
            )

    @property
    def window_width(self) -> int:
        """Most guesses in the window, `n * K`."""
        return self.jacobi_block_size * (1 if self.decoding == JACOBI else self.jacobi_max_blocks)

    @property
    def is_adaptive(self) -> bool:
        """Whether decoding chooses the guesses of each forward. The plain method never does."""
        return self.decoding == MULTIBLOCK and self.jacobi_schedule == ADAPTIVE

    @classmethod
    def paper(cls) -> Self:
        """Return the setting that arXiv 2512.14681 recommends: n=64, K=2, r=0.85, a pool of 4, no lookup."""
        return cls(
            jacobi_schedule=CONSTANT,
            jacobi_block_size=64,
            jacobi_max_blocks=2,
            jacobi_activation_ratio=0.85,
            jacobi_pool_size=4,
            jacobi_lookup_tokens=0,
        )

    @classmethod
    def from_knobs(cls, knobs: Mapping[str, Any]) -> Self | None:
        """Return the config for the names and values in `knobs`, or None if `decoding` is missing or None.

        Knobs that are missing or None have their defaults. With `decoding="jacobi"`, all knobs but the block size are
        ignored.
        """
        if knobs.get("decoding") is None:
            return None
        used = _knobs_of(knobs["decoding"])
        return cls(**{name: value for name, value in knobs.items() if name in used and value is not None})

    @classmethod
    def from_generation_config(cls, generation_config: GenerationConfig) -> Self | None:
        """Return the config that a `GenerationConfig` carries, or None if it does not ask for Jacobi decoding."""
        return cls.from_knobs({name: getattr(generation_config, name, None) for name in KNOBS})

    def to_knobs(self) -> dict[str, Any]:
        """Return names and values as `generate` and `GenerationConfig` take them, `decoding` first."""
        return {name: getattr(self, name) for name in _knobs_of(self.decoding)}

    def save_defaults(self, model: PreTrainedModel) -> None:
        """Make this the default of `model.generate`, now and after a `save_pretrained` and a reload.

        The reloaded model has the default wherever jacobi_hf is imported.

        Two things in the model's generation config would lose the knobs, so they are cleared. The first is the mark of
        a config that was derived from the model config: such a config drops additional fields on reload. The second is
        sampling fields in a greedy config, which `save_pretrained` refuses. A later `generate(do_sample=True)` then
        samples with transformers' defaults, unless the call says otherwise.

        Args:
            model: its `generation_config` is replaced.
        """
        kept = {k: v for k, v in model.generation_config.to_dict().items() if not k.startswith("_") and k not in KNOBS}
        kept.pop("transformers_version", None)
        if not kept.get("do_sample"):
            kept |= dict.fromkeys(_SAMPLING_FIELDS)
        model.generation_config = type(model.generation_config)(**kept, **self.to_knobs())


KNOBS: tuple[str, ...] = tuple(knob.name for knob in fields(JacobiConfig))


def reject_misspelt(names: Iterable[str]) -> None:
    """Raise `ValueError` for a name that is no knob but starts with `jacobi_`, or is nearly the name of a knob."""
    for name in names:
        close = difflib.get_close_matches(name, KNOBS, 1, cutoff=0.9)
        if name not in KNOBS and (name.startswith("jacobi_") or close):
            raise ValueError(
                f"{name!r} is not a knob of Jacobi decoding{_nearest(name, KNOBS)}; the knobs are {', '.join(KNOBS)}."
            )


def reject_pointless(given: Mapping[str, Any], config: JacobiConfig | None) -> None:
    """Raise `ValueError` for knobs that have no effect in their call.

    Args:
        given: knobs that the call names itself, None for those that it does not.
        config: the config that the call decodes with; None for ordinary decoding.
    """
    set_knobs = [name for name in given if name != "decoding" and given[name] is not None]
    if config is None and set_knobs:
        raise ValueError(
            f"{', '.join(set_knobs)} given without decoding: add decoding='jacobi_multiblock' or drop it."
        )
    if config is not None:
        idle = [name for name in set_knobs if name not in _knobs_of(config.decoding)]
        if idle:
            raise ValueError(
                f"{', '.join(idle)} has no meaning with decoding='jacobi', which uses jacobi_block_size only: "
                "drop it, or use decoding='jacobi_multiblock'."
            )


def _knobs_of(decoding: str) -> tuple[str, ...]:
    """Return the names of the knobs that a kind of decoding uses, `decoding` included."""
    return ("decoding", "jacobi_block_size") if decoding == JACOBI else KNOBS


def _checked(knob: Field[Any], value: Any) -> int | float | str:
    """Return the value as a Python number or string, which GenerationConfig can save (numpy's numbers it cannot).

    Raises:
        ValueError: the value has the wrong type, is not one of the knob's words, or is out of its range.
    """
    if "allowed" in knob.metadata:
        return _checked_word(knob, value)
    is_integral = isinstance(knob.default, int)
    low = knob.metadata["low"]
    high = knob.metadata["high"]
    kind = numbers.Integral if is_integral else numbers.Real
    is_allowed = isinstance(value, kind) and not isinstance(value, bool) and low <= value <= high
    if not is_allowed:
        wanted = f"{'an integer' if is_integral else 'a number'} from {low} to {high}"
        raise ValueError(f"{knob.name}={value!r} cannot be used; it must be {wanted}.")
    return int(value) if is_integral else float(value)


def _checked_word(knob: Field[Any], value: Any) -> str:
    allowed = knob.metadata["allowed"]
    if value not in allowed:
        raise ValueError(
            f"{knob.name}={value!r} is not known{_nearest(value, allowed)}; allowed: {', '.join(map(repr, allowed))}."
        )
    return str(value)


def _nearest(name: object, allowed: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(name), list(allowed), 1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""
