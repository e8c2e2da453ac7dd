"""Forward passes of one batch: the trained model's losses, and the frozen model's hidden states for the KL loss."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch

from jacobi_hf.attention.interface import MaskBuilder, attention_of
from jacobi_hf.trainer.base import output_head, vocabulary_size
from jacobi_hf.trainer.data.answers import base_of
from jacobi_hf.trainer.data.batch import clean_part
from jacobi_hf.trainer.forcing.losses import Losses, Reference, Targets, chunked_losses
from jacobi_hf.trainer.forcing.mask import Slots, dense_mask, mask_mod
from jacobi_hf.trainer.head_hook import AtHead

if TYPE_CHECKING:
    from collections.abc import Mapping

    from accelerate import Accelerator
    from transformers import PreTrainedModel

    from jacobi_hf.trainer.forcing.config import JacobiForcingConfig

_LAYOUT_TENSORS = ("input_ids", "position_ids", "attention_mask")


class ForcingForward:
    """Forward of a batch through the trained model up to its losses, and through the frozen model for the KL loss.

    Args:
        model: the model that is trained, or an adapter on it.
        args: the trainer's arguments.
        accelerator: that of the trainer, for autocast and for the model inside its wrappers.
        ref_model: the frozen model; None with an adapter, where the model without it is the frozen one.
    """

    def __init__(
        self, model: Any, args: JacobiForcingConfig, accelerator: Accelerator, ref_model: PreTrainedModel | None
    ) -> None:
        base = base_of(model)
        self.ref_model = ref_model
        self._base = base
        self._args = args
        self._accelerator = accelerator
        self._vocab_size = vocabulary_size(base)
        self._at_head = AtHead(output_head(base))
        self._at_ref_head = None if ref_model is None else AtHead(output_head(ref_model))
        self._masks = MaskBuilder(base.config, base.dtype)

    def losses(
        self, model: torch.nn.Module, inputs: Mapping[str, torch.Tensor], counts: torch.Tensor
    ) -> tuple[Losses, torch.Tensor]:
        """Return the losses of a batch, and a zero that ties them to the model's output (see `AtHead`).

        Args:
            model: the trained model as the trainer wraps it.
            inputs: a batch of `JacobiForcingCollator`.
            counts: what each loss is averaged over, int `(5,)` in the order of `collator.COUNTS`.
        """
        args = self._args
        targets = batch_targets(inputs, counts, args)
        reference = self._reference(model, inputs) if args.kl_loss_weight else None
        losses: Losses
        losses, zero = self._at_head(
            lambda: model(**self._arguments(inputs), use_cache=False),
            lambda hidden_RH: chunked_losses(
                self._at_head.head,
                hidden_RH,
                targets,
                self._vocab_size,
                args.distill_temperature,
                args.loss_chunk_numbers,
                reference,
            ),
        )
        return losses, zero

    def attention_mask(self, inputs: Mapping[str, torch.Tensor]) -> Any:
        """Return the mask of a packed batch for the model's attention, by kind of layer if there are several kinds."""
        slots = Slots.of(inputs)
        context = self._args.context
        window = self._args.context_window
        if self._takes_block_masks():
            return self._block_masks(slots, context, window)
        return self._masks(lambda sliding: dense_mask(slots, context, window, sliding), slots.sample.device)

    def _takes_block_masks(self) -> bool:
        return attention_of(self._base.config) == "flex_attention"

    def _block_masks(self, slots: Slots, context: str, window: int | None) -> Any:
        """Return FlexAttention's masks, by kind of layer if there are several kinds."""
        from torch.nn.attention.flex_attention import create_block_mask

        rows, length = slots.sample.shape
        masks = {
            kind: create_block_mask(
                mask_mod(slots, context, window, sliding), rows, None, length, length, device=slots.sample.device
            )
            for kind, sliding in self._masks.windows.items()
        }
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def _arguments(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """Return the part of a batch that the model's forward takes, with its mask."""
        arguments: dict[str, Any] = {name: inputs[name] for name in _LAYOUT_TENSORS if name in inputs}
        if "attention_mask" not in inputs:
            arguments["attention_mask"] = self.attention_mask(inputs)
        return arguments

    def _reference(self, model: Any, inputs: Mapping[str, torch.Tensor]) -> Reference:
        """Return the frozen model's hidden states at the clean slots, which hold all labels of the AR loss."""
        clean, home_R = clean_part(inputs, 128 if self._takes_block_masks() else 1)
        if self.ref_model is None:
            frozen = model
            at_head = self._at_head
            without_adapter = self._accelerator.unwrap_model(model).disable_adapter
        else:
            assert self._at_ref_head is not None
            frozen = self.ref_model
            at_head = self._at_ref_head
            without_adapter = nullcontext
        was_training = frozen.training
        frozen.eval()
        with torch.no_grad(), without_adapter(), self._accelerator.autocast():
            clean_RH, _ = at_head(
                lambda: frozen(**self._arguments(clean), use_cache=False), lambda hidden_RH: hidden_RH
            )
        frozen.train(was_training)

        def head(hidden_RH: torch.Tensor) -> torch.Tensor:
            with without_adapter():
                return at_head.head(hidden_RH)

        is_slot_R = home_R >= 0
        hidden_RH = clean_RH.new_zeros(inputs["input_ids"].numel(), clean_RH.shape[-1])
        return Reference(head, hidden_RH.index_copy(0, home_R[is_slot_R], clean_RH[is_slot_R]))


def batch_targets(inputs: Mapping[str, torch.Tensor], counts: torch.Tensor, args: JacobiForcingConfig) -> Targets:
    """Return labels, teachers, and the weights with which each loss is a mean over the accumulated batch.

    Args:
        inputs: a batch of `JacobiForcingCollator`.
        counts: what each loss is averaged over, int `(5,)` in the order of `collator.COUNTS`.
        args: the trainer's arguments.
    """
    labels, replayed, pairs, blocks, samples = counts.clamp(min=1).float()
    is_replay_R = inputs["replay"].flatten() != 0
    label_weight_RG = torch.stack([(~is_replay_R) / labels, is_replay_R / replayed], 1)
    teacher_R = inputs["teacher"].flatten()
    if args.consistency_reduction == "reference":
        pair_weight_R = args.distill_temperature**2 / samples / inputs["divisor"].flatten()
    else:
        pair_weight_R = (1 / (pairs if args.consistency_reduction == "mean" else blocks)).expand(len(teacher_R))
    if args.consistency_loss_weight == 0:
        teacher_R = torch.full_like(teacher_R, -1)
    kl_weight = 1 / counts[:2].sum().clamp(min=1).float()
    return Targets(inputs["labels"].flatten(), label_weight_RG, teacher_R, pair_weight_R, kl_weight)
