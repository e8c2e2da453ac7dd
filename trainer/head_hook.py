"""Losses at a model's LM head, inside its forward."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable


class AtHead:
    """Hands a model's hidden states to a function inside the model's forward, where the LM head is called, and spares the logits.

    A pre-hook on the head takes the hidden states, and lets the outer call go on with no rows at all. What the function does with the
    head so runs within the top-level forward, as sharding (FSDP, ZeRO-3), adapters and quantisation need it.

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
        """Run `forward`, a call of the model.

        Args:
            use: gets the hidden states `(R, H)`, R the slots of the batch.

        Returns:
            what `use` returned, and a zero that ties it to the forward's output, which sharded modules watch.
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
            raise RuntimeError("the model's forward never called its output embeddings, so there are no losses")
        result, self._result = self._result, None
        return result, outputs.logits.float().sum()
