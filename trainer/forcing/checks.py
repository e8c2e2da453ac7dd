"""Models and settings that `JacobiForcingTrainer` refuses, before any work."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

from jacobi_hf.attention.interface import attention_of
from jacobi_hf.trainer.base import vocabulary_size
from jacobi_hf.trainer.data.answers import base_of

if TYPE_CHECKING:
    from jacobi_hf.trainer.forcing.config import JacobiForcingConfig

logger = logging.getLogger(__name__)

# Config values with which the logits that reach the loss are not the LM head's output, and the value that changes
# nothing.
_LOGITS_CHANGED_BY = (
    ("final_logit_softcapping", None),
    ("logits_scaling", 1),
    ("logit_scale", 1),
    ("output_router_logits", False),
)


def check_model(model: Any, args: JacobiForcingConfig) -> None:
    """Check that the losses are right for a model, and warn about half-precision weights.

    Raises:
        ValueError: the model changes logits after the LM head, or its attention does not take the mask of packed rows.
    """
    config = base_of(model).config.get_text_config(decoder=True)
    for name, neutral in _LOGITS_CHANGED_BY:
        value = getattr(config, name, neutral)
        if value not in (neutral, None):
            raise ValueError(
                f"the model's {name}={value!r} changes logits or loss after the LM head, which JacobiForcingTrainer "
                "does not do: train a model without it."
            )
    if any(p.requires_grad and p.dtype in (torch.bfloat16, torch.float16) for p in base_of(model).parameters()):
        logger.warning(
            "the model's own weights are in half precision, so small updates are rounded away. Load the model with "
            "dtype=float32 and train with bf16=True. (Sharded training that keeps float32 copies is fine.)"
        )
    attention = attention_of(config)
    if args.layout == "packed" and "flash" in attention:
        raise ValueError(
            f"layout='packed' needs a mask of its own, which attn_implementation={attention!r} does not take: load "
            "the model with attn_implementation='sdpa' or 'flex_attention', or use layout='rows' with context='noisy' "
            "or 'window'."
        )


def check_reference(ref_model: Any, base: Any) -> None:
    """Check that the KL divergence from a frozen model can be computed.

    Raises:
        ValueError: it is the trained model itself, or has another vocabulary or attention implementation.
    """
    if ref_model is base:
        raise ValueError("ref_model is the model that is trained: give a copy of it, or leave ref_model out.")
    for what, of in (("vocabulary", vocabulary_size), ("attn_implementation", lambda m: attention_of(m.config))):
        if of(ref_model) != of(base):
            raise ValueError(
                f"ref_model's {what} is {of(ref_model)!r}, the model's {of(base)!r}: they have to be the same."
            )


def check_weights(args: JacobiForcingConfig, *, has_replay: bool, has_ref_model: bool) -> None:
    """Check that the weights of the losses leave something to learn.

    Raises:
        ValueError: no loss with a weight can change the model, or nothing would be learnt from the replay dataset.
    """
    # KL pulls the model towards another one. From the model itself, it starts at 0 and stays there.
    pulls = args.kl_loss_weight and has_ref_model
    if not (args.ar_loss_weight or args.consistency_loss_weight or (args.replay_loss_weight and has_replay) or pulls):
        raise ValueError(
            "ar_loss_weight, consistency_loss_weight and replay_loss_weight leave nothing to train on"
            + (" but the KL divergence, which starts at 0 and stays there" if args.kl_loss_weight else "")
            + ": give one of them a weight."
        )
    if has_replay and args.replay_ratio and not (args.replay_loss_weight or args.kl_loss_weight):
        raise ValueError(
            "replay_dataset is given, but replay_loss_weight=0 and kl_loss_weight=0: nothing would be learnt from it. "
            "Give one of them a weight, or leave the dataset out."
        )
