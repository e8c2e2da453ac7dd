"""Losses at a model's LM head, inside its forward."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable


class AtHead:
    """Computes something from a model's hidden states inside its forward, in place of the logits.

    A hook on the LM head takes the hidden states, and lets the model's call continue with no rows at all, so that no
    logits are computed. The function that gets the hidden states may call the head itself. Since it runs inside the
    model's forward, sharding (FSDP, ZeRO-3), adapters and quantisation work as usual.

    Args:
        head: the model's output embeddings.
    """

    def __init__(self, head: torch.nn.Module) -> None:
        self.head = head
        self._use: Callable[[torch.Tensor], Any] | None = None
        self._result: Any = None

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _intercept(self, head: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        if self._use is None:
            return None
        use, self._use = self._use, None
        self._result = use(args[0].flatten(0, 1))
        return (args[0][:, :0], *args[1:])

    def __call__(self, forward: Callable[[], Any], use: Callable[[torch.Tensor], Any]) -> tuple[Any, torch.Tensor]:
        """Run a model, and use its hidden states at the LM head.

        Args:
            forward: calls the model.
            use: gets the hidden states `(R, H)`, R being all slots of the batch.

        Returns:
            what `use` returned, and a zero to add to a loss: it ties the loss to the forward's output, from which
            sharded modules start their backward.

        Raises:
            RuntimeError: the model did not call its LM head.
        """
        self._use = use
        hook = self.head.register_forward_pre_hook(self._intercept)
        try:
            outputs = forward()
            called = self._use is None
        finally:
            self._use = None
            hook.remove()
        if not called:
            raise RuntimeError("the model's forward did not call its output embeddings, so there are no losses")
        result, self._result = self._result, None
        return result, outputs.logits.float().sum()
