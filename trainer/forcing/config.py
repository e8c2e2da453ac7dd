"""Arguments of `JacobiForcingTrainer`."""

from __future__ import annotations

import math
from dataclasses import dataclass

from transformers import TrainingArguments

from jacobi_hf.config import MULTIBLOCK, JacobiConfig
from jacobi_hf.integration.compat import MUON, CheckpointingArguments
from jacobi_hf.trainer.data.collator import LAYOUTS
from jacobi_hf.trainer.data.loading import ON_BAD_ROW, TOO_LONG
from jacobi_hf.trainer.drafter.model import TARGETS
from jacobi_hf.trainer.forcing.losses import REDUCTIONS
from jacobi_hf.trainer.forcing.mask import window_of
from jacobi_hf.trainer.optimizer import NO_MUON
from jacobi_hf.trainer.options import option

METHODS = ("finetune", "drafter")
RENAMED_METHODS = {"full": "finetune", "gated": "drafter"}


@dataclass
class JacobiForcingConfig(CheckpointingArguments, TrainingArguments):
    """`TrainingArguments` for Jacobi Forcing (arXiv 2512.14681).

    Losses, context and replay default to one consistent set, that of the tiny model's recipe, which its ablations led to
    (docs/results/forcing.md); optimizer and schedule to what suits models of a billion parameters and more. The paper's, the reference
    code's and the published Qwen3-1.7B run's sets are in examples/recipes.

    Parameters that choose what is trained:
        method: `"finetune"`, the model (or an adapter that acts everywhere); `"drafter"`, a drafter (`jacobi_hf.load_drafter`) that acts on
            draft positions alone, while the model stays as it is. Of the options below, drafter training knows max_length (its texts
            are cut there), loss_chunk_numbers, those of decoding and its own.
        window_width: W, drafts of a training window.
        windows_per_text: windows at random places of each text.
        steps_per_window: decoding steps that each window makes in a training step, every one learnt from.
        position_decay: weight of a slot over that of the one before it, from the first wrong draft on.
        targets: `"hard"`, the model's choice; `"soft"`, its distribution.
        constant_draft: an id that the drafter is given in place of every draft, here and when it decodes. A control: what is
            learnt then is plain multi-token prediction.

    Parameters that describe the data:
        block_size: n of the trajectories.
        max_length: slots of a packed row; short samples of a batch share rows. A sample counts as P + 2nT (another nT for each
            further noisy view), also where clean context leaves most of its noisy slots out.
        too_long: what happens to a sample that does not fit, `"drop"` or `"truncate"` (its last blocks).
        on_bad_row: what happens to a malformed record, `"raise"` or `"skip"`.

    Parameters that control what noisy blocks see:
        context: `"clean"`, `"noisy"` (noise-conditioned) or `"window"` (see `jacobi_hf.trainer.forcing.mask`).
        context_window: blocks per window of `context="window"`.
        layout: `"packed"` (one row, a mask of our own) or `"rows"` (plain causal rows, any attention).

    Parameters that control the loss:
        ar_loss_weight, consistency_loss_weight, replay_loss_weight: factors of the three terms, each a mean over its tokens in
            the whole accumulated batch over all processes.
        kl_loss_weight: factor of the KL divergence from a frozen model (`ref_model` of the trainer, by default the model before
            training), a mean over the tokens that AR and replay loss cover, whatever their weights. It holds the model where it
            was, and needs memory for a second copy (none with LoRA) and a forward of the clean tokens. Where there is no room for
            it: `kl_loss_weight=0` with `ar_loss_weight=1` and `replay_loss_weight=4`, which holds the model less well.
        replay_ratio: replay rows per trajectory row, where a `replay_dataset` is given.
        distill_temperature: tau of the consistency loss.
        consistency_reduction: `"mean"` over kept slots; `"block_sum"`, mean over blocks of per-block sums (paper, eq. 8);
            `"reference"`, per sample the mean over kept slots times `tau^2 / T` (the reference code).
        prompt_loss: whether the AR loss covers prompts.
        loss_chunk_numbers: numbers in a vocabulary-sized tensor of the loss; lower is less memory.

    Parameters that control the optimizer:
        muon_learning_rate: when given, the matrices inside the layers are trained by Muon at this peak learning rate (several times
            `learning_rate`, which stays that of embeddings, LM head, norms and biases); the schedule is one.

    Parameters that control decoding:
        decoding, jacobi_block_size, jacobi_max_blocks, jacobi_activation_ratio, jacobi_pool_size, jacobi_lookup_tokens: saved in the
            checkpoint's generation config and used to measure tokens per forward. With `decoding=None`, the config stays as it was.
        eval_max_new_tokens, eval_prompt_count: of the decoding part of an evaluation.

    Raises:
        ValueError: a value out of range or a combination that cannot be, named.
    """

    learning_rate: float = option(5e-6, "Peak learning rate.")
    lr_scheduler_type: str = option("cosine", "Learning-rate schedule.")
    adam_beta2: float = option(0.95, "Second beta of AdamW.")
    muon_learning_rate: float | None = option(
        None, "Peak learning rate of Muon for the matrices inside the layers; AdamW trains all else."
    )
    remove_unused_columns: bool = option(False, "The collator needs the raw columns.")
    method: str = option("finetune", "finetune trains the model, drafter a drafter.")
    window_width: int = option(16, "Drafts of a training window (W).")
    windows_per_text: int = option(4, "Training windows of each text.")
    steps_per_window: int = option(3, "Decoding steps of each window in a training step.")
    position_decay: float = option(1.0, "Weight of a slot over that of the one before it.")
    targets: str = option("hard", "hard or soft.")
    constant_draft: int | None = option(None, "An id that stands in for all drafts, as a control.")
    block_size: int = option(16, "Tokens of a block (n).")
    max_length: int = option(2048, "Slots of a packed row.")
    too_long: str = option("drop", "Samples longer than max_length: drop or truncate.")
    on_bad_row: str = option("raise", "Malformed records: raise or skip.")
    context: str = option("clean", "What noisy blocks see: clean, noisy or window.")
    context_window: int | None = option(None, "Blocks per window of context=window.")
    layout: str = option("packed", "packed or rows.")
    ar_loss_weight: float = option(0.0, "Factor of the AR loss.")
    consistency_loss_weight: float = option(1.0, "Factor of the consistency loss.")
    replay_loss_weight: float = option(0.0, "Factor of the AR loss on replay.")
    kl_loss_weight: float = option(4.0, "Factor of the KL divergence from the model before training.")
    replay_ratio: float = option(0.5, "Replay rows per trajectory row.")
    distill_temperature: float = option(1.0, "Temperature of the consistency loss.")
    consistency_reduction: str = option("mean", "mean, block_sum or reference.")
    prompt_loss: bool = option(True, "Whether the AR loss covers prompts.")
    loss_chunk_numbers: int = option(2**24, "Numbers in a vocabulary-sized tensor of the loss.")
    decoding: str | None = option(
        MULTIBLOCK, "Decoding saved with the model and measured: jacobi, jacobi_multiblock or none."
    )
    jacobi_block_size: int | None = option(None, "n of that decoding; block_size when not given.")
    jacobi_max_blocks: int = option(2, "K of that decoding.")
    jacobi_activation_ratio: float = option(0.0, "r of that decoding.")
    jacobi_pool_size: int = option(2, "Pool branches of that decoding.")
    jacobi_lookup_tokens: int = option(16, "Lookup branch of that decoding.")
    eval_max_new_tokens: int = option(128, "New tokens per prompt when decoding is measured.")
    eval_prompt_count: int = option(16, "Prompts decoded per evaluation.")

    def __post_init__(self) -> None:  # noqa: C901  (one branch a check)
        super().__post_init__()
        if self.accelerator_config.dispatch_batches is None:
            # The collator's rows refer to each other: a batch must not be cut up between processes.
            self.accelerator_config.dispatch_batches = False
        if self.method in RENAMED_METHODS:
            raise ValueError(f"method={self.method!r} is now method={RENAMED_METHODS[self.method]!r}.")
        for name, allowed in (
            ("layout", LAYOUTS),
            ("too_long", TOO_LONG),
            ("on_bad_row", ON_BAD_ROW),
            ("consistency_reduction", REDUCTIONS),
            ("method", METHODS),
            ("targets", TARGETS),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {', '.join(map(repr, allowed))}.")
        if self.block_size < 2:
            raise ValueError(f"block_size={self.block_size} must be at least 2.")
        if not 0 < self.position_decay <= 1:
            raise ValueError(f"position_decay={self.position_decay} must be above 0 and at most 1.")
        if self.context_window is not None and self.context_window < 1:
            raise ValueError(f"context_window={self.context_window} must be at least 1.")
        window_of(self.context, self.context_window)
        if self.layout == "rows" and self.context == "clean":
            raise ValueError(
                "layout='rows' has no clean context (see jacobi_hf.trainer.data.collator): use layout='packed' or another context."
            )
        for name in (
            "ar_loss_weight",
            "consistency_loss_weight",
            "replay_loss_weight",
            "kl_loss_weight",
            "replay_ratio",
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative.")
        if self.muon_learning_rate is not None and self.muon_learning_rate < 0:
            raise ValueError(f"muon_learning_rate={self.muon_learning_rate} must not be negative.")
        if self.muon_learning_rate is not None and MUON is None:
            raise ValueError(NO_MUON)
        for name in (
            "loss_chunk_numbers",
            "eval_max_new_tokens",
            "eval_prompt_count",
            "window_width",
            "windows_per_text",
            "steps_per_window",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.fp16:
            raise ValueError(
                "fp16=True: its loss scaling counts on gradients that overflow, and here they stop the run. Use bf16=True."
            )
        if not 0 < self.distill_temperature < math.inf:
            raise ValueError(f"distill_temperature={self.distill_temperature} must be above 0.")
        if self.remove_unused_columns:
            raise ValueError(
                "remove_unused_columns=True would drop the columns that the collator reads; leave it False."
            )
        self.decoding_config()

    def decoding_config(self) -> JacobiConfig | None:
        """The decoding that is saved with the model."""
        if self.decoding is None or self.decoding == "none":
            return None
        return JacobiConfig(
            decoding=self.decoding,
            jacobi_block_size=self.block_size if self.jacobi_block_size is None else self.jacobi_block_size,
            jacobi_max_blocks=self.jacobi_max_blocks,
            jacobi_activation_ratio=self.jacobi_activation_ratio,
            jacobi_pool_size=self.jacobi_pool_size,
            jacobi_lookup_tokens=self.jacobi_lookup_tokens,
        )
