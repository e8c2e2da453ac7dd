"""A LoRA drafter as a draft source."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

from jacobi_hf.drafts.base import SourceShape
from jacobi_hf.drafts.loading import drafter_of
from jacobi_hf.drafts.window import JacobiWindow

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from jacobi_hf.config import JacobiConfig
    from jacobi_hf.decoding.layout import Layout
    from jacobi_hf.drafts.lora import LoraDrafter


class LoraDraftSource(JacobiWindow):
    """A Jacobi window whose guesses come from draft slots, in which a LoRA drafter acts on the model.

    The window goes into the forward twice: in verified slots, which run with the model's own weights, and in draft
    slots, which run with the drafter's LoRA and whose choices are the next guesses.

    Args:
        config: the knobs of the call.
        drafter: the LoRA, loaded into the model.
    """

    name = "drafter"

    def __init__(self, config: JacobiConfig, drafter: LoraDrafter) -> None:
        super().__init__(config)
        width = config.window_width
        self.shape = SourceShape(lengths=(width,), is_backbone=True, draft_slots=width)
        self._drafter = drafter

    @classmethod
    def for_call(cls, config: JacobiConfig, model: Any) -> Self | None:
        """Return the drafter that is in use for the model, if there is one and the config has a window."""
        drafter = drafter_of(model)
        return cls(config, drafter) if drafter is not None and config.window_width else None

    def during_call(self, model: Any) -> AbstractContextManager[None]:
        """Return a context in which the drafter's hooks are attached to the model."""
        return self._drafter.attached(model)

    def during_forward(self, layout: Layout, rows: int) -> AbstractContextManager[None]:
        """Return a context in which the LoRA acts on the draft slots of this thread's forward."""
        return self._drafter.drafting(layout.slots - layout.draft_slots, layout.slots, rows)
