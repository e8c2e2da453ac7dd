"""The model's forward over the slots of a layout, and the switch to our attention."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch

from jacobi_hf.attention.interface import OURS, StepMasks, attention_of
from jacobi_hf.decoding.step import ForwardInputs, ForwardOutput
from jacobi_hf.integration.compat import CACHE, kept_logits, logits_to_keep
from jacobi_hf.shared_change import SharedChange

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from jacobi_hf.decoding.cache import JacobiStaticCache
    from jacobi_hf.drafts.sources import Sources


class ModelForward:
    """The forward of a transformers model over the slots of a layout, with our cache, positions and masks.

    Args:
        model: the model.
        cache: what it reads and writes.
        sources: the draft sources of the call.
        last_position: the last position at which the call may need the model's choice, of each row `(B, 1)` or of all.
            Slots after it belong to rows that need fewer slots than others, and nothing reads their outcome.
    """

    def __init__(self, model: Any, cache: JacobiStaticCache, sources: Sources, last_position: torch.Tensor) -> None:
        self._model = model
        self._cache = cache
        self._backbone = sources.backbone
        self._last_position = last_position
        # With offloaded weights the model has no device of its own, and accelerate's hooks move the inputs.
        self._device = cache.lengths_B.device if model.device.type == "meta" else model.device
        self._masks = StepMasks(model, self._device)
        self._taps = sources.taps
        self._tapped: dict[int, torch.Tensor] = {}

    def __call__(self, inputs: ForwardInputs) -> ForwardOutput:
        """Return logits and features; see `jacobi_hf.decoding.step.Forward`."""
        layout = inputs.layout
        self._cache.open_step(layout.slots, inputs.key_column_K, layout.draft_slots)
        arguments = self.arguments(inputs)
        if layout.draft_slots and self._backbone is not None:
            with self._backbone.during_forward(layout, len(self._cache.lengths_B)):
                outputs = self._model(**arguments)
            # A drafter that returns NaN must not make a processor fail.
            outputs.logits[:, -layout.draft_slots :].nan_to_num_()
        else:
            outputs = self._model(**arguments)
        logits = outputs.logits.to(self._cache.lengths_B.device)
        features = [self._tapped.pop(tap) for tap in self._taps if tap in self._tapped]
        features_BQF = torch.cat(features, -1) if features else None
        return ForwardOutput(kept_logits(logits, inputs.keep_BN, layout.slots), features_BQF)

    def needs_mask(self, slots: int, *, without_past: bool) -> bool:
        """Return whether a chain of `slots` slots needs a mask; see `StepMasks.is_causal`."""
        return not (without_past and self._masks.is_causal(slots))

    def arguments(self, inputs: ForwardInputs) -> dict[str, Any]:
        """Return the arguments of the model; the cache must be open for the step."""
        layout = inputs.layout
        lengths_B = self._cache.lengths_B
        position_BQ = self._cache.slot_BQ if layout.is_chain else lengths_B[:, None] + layout.depth_Q
        keep_BN = None if inputs.keep_BN is None else inputs.keep_BN.to(self._device)
        return {
            "input_ids": None if inputs.token_BQ is None else inputs.token_BQ.to(self._device),
            "inputs_embeds": inputs.embeds_BQH,
            "attention_mask": self._masks.of_step(layout, lengths_B, inputs.key_column_K),
            "position_ids": position_BQ.clamp(max=self._last_position).to(self._device),
            CACHE: self._cache,
            "use_cache": True,
            "logits_to_keep": logits_to_keep(keep_BN, layout.slots),
            "return_dict": True,
        }

    @contextlib.contextmanager
    def tapping(self) -> Iterator[None]:
        """Read the outputs of the tapped layers while the context is open, by hooks that are removed afterwards.

        `output_hidden_states` will not do: it leaves hooks on every layer, and it returns the last layer after the
        norm.
        """
        layers = self._model.base_model.layers if self._taps else []
        handles = [layers[tap].register_forward_hook(self._tap_hook(tap)) for tap in self._taps]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _tap_hook(self, tap: int) -> Callable[[torch.nn.Module, Any, Any], None]:
        def keep(_: torch.nn.Module, __: Any, output: Any) -> None:
            self._tapped[tap] = output if isinstance(output, torch.Tensor) else output[0]

        return keep


_attention_of_calls = SharedChange()


def jacobi_attention(model: Any) -> AbstractContextManager[None]:
    """Return a context in which the model runs our version of its attention implementation.

    To other forwards of the same model, our version is the implementation that the model was loaded with. The name is
    changed in the config, because that is where attention modules look it up. Two models may share a config.
    """
    config = model.config.get_text_config(decoder=True)

    def switch() -> Callable[[], None]:
        own = attention_of(config)
        config._attn_implementation = OURS.get(own, own)
        return lambda: setattr(config, "_attn_implementation", own)

    return _attention_of_calls.made(config, switch)
