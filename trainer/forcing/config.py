"""Arguments of `JacobiForcingTrainer`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from jacobi_hf.trainer.base_config import BaseConfig
from jacobi_hf.trainer.data.collator import LAYOUTS
from jacobi_hf.trainer.data.loading import TOO_LONG
from jacobi_hf.trainer.forcing.losses import REDUCTIONS
from jacobi_hf.trainer.forcing.mask import blocks_per_window
from jacobi_hf.trainer.method_options import ForcingOptions
from jacobi_hf.trainer.options import check_at_least, check_choice


@dataclass
class JacobiForcingConfig(ForcingOptions, BaseConfig):
    """Arguments of `JacobiForcingTrainer`: `TrainingArguments` and those of Jacobi Forcing (arXiv 2512.14681).

    The defaults of losses, context and replay are those of the tiny model's recipe, which its ablations led to
    (docs/results/forcing.md). The defaults of optimizer and schedule suit models of a billion parameters and more.
    The recipes in examples/recipes hold the values of the paper, of its code and of a published Qwen3-1.7B run.

    Parameters that describe the data:
        block_size: n of the trajectories, the tokens of a block.
        max_length: most slots of a packed row; short samples of a batch share rows. A sample counts as P + 2nT slots,
            and another nT for each further noisy view, even where clean context leaves most of its noisy slots out.
        too_long: what happens to a sample of more than `max_length` slots: `"drop"`, or `"truncate"` its last blocks.
        on_bad_row: what happens to a malformed record: `"raise"`, or `"skip"` with a warning.

    Parameters that control what noisy blocks attend to:
        context: `"clean"` blocks, `"noisy"` blocks, or noisy blocks within a `"window"` and clean ones before it. The
            module `jacobi_hf.trainer.forcing.mask` defines the three.
        context_window: blocks of a window with `context="window"`.
        layout: `"packed"` lays a sample out in one row, with a mask that sdpa, eager and FlexAttention take. `"rows"`
            lays it out in plain causal rows, for any attention.

    Parameters that control the losses:
        ar_loss_weight, consistency_loss_weight, replay_loss_weight: factors of three losses. Each loss is a mean over
            its tokens in the whole accumulated batch, over all processes.
        kl_loss_weight: factor of the KL divergence from a frozen model (the trainer's `ref_model`). It is a mean over
            the tokens that AR and replay loss cover, whatever their weights, and keeps the model close to the frozen
            one. It needs memory for a second model (none with LoRA) and a forward of the clean tokens. Without that
            memory, set `kl_loss_weight=0`, `ar_loss_weight=1` and `replay_loss_weight=4`, which keep the model less
            close.
        replay_ratio: replay rows for each row of trajectories, if the trainer has a `replay_dataset`.
        distill_temperature: temperature tau of the consistency loss.
        consistency_reduction: `"mean"` over kept slots; `"block_sum"`, the mean over blocks of sums over slots (paper,
            eq. 8); `"reference"`, for each sample the mean over kept slots times `tau^2 / T` (the paper's code).
        prompt_loss: whether the AR loss covers prompts.
        loss_chunk_numbers: most numbers in a vocabulary-sized tensor of the loss. A lower value takes less memory.

    Parameters that control the optimizer:
        learning_rate, lr_scheduler_type, adam_beta2: as in `TrainingArguments`, with other defaults.
        muon_learning_rate: if given, Muon trains the matrices inside the layers at this peak learning rate, several
            times `learning_rate`. AdamW trains embeddings, LM head, norms and biases at `learning_rate`. Both follow
            one schedule.
        remove_unused_columns: must stay False, because the collator reads the raw columns.

    Parameters that control decoding:
        decoding: `"jacobi_multiblock"` or `"jacobi"`, saved in the checkpoint's generation config and used by
            evaluations. With None the generation config stays as it was, and evaluations decode nothing.
        jacobi_block_size, jacobi_max_blocks, jacobi_activation_ratio, jacobi_pool_size, jacobi_lookup_tokens: knobs of
            that decoding. `jacobi_block_size=None` takes `block_size`.
        eval_max_new_tokens: new tokens of each prompt that an evaluation decodes.
        eval_prompt_count: most prompts of each set that an evaluation decodes.

    Raises:
        ValueError: a value is out of range, or two values exclude each other.
    """

    method: ClassVar[str] = "finetune"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.accelerator_config.dispatch_batches is None:
            # The collator's rows refer to each other: a batch must not be cut up between processes.
            self.accelerator_config.dispatch_batches = False
        check_choice(self, "layout", LAYOUTS)
        check_choice(self, "too_long", TOO_LONG)
        check_choice(self, "consistency_reduction", REDUCTIONS)
        check_at_least(self, 2, "block_size")
        check_at_least(self, 1, "context_window")
        check_at_least(self, 0, "ar_loss_weight", "consistency_loss_weight", "replay_loss_weight", "kl_loss_weight")
        check_at_least(self, 0, "replay_ratio")
        blocks_per_window(self.context, self.context_window)
        if self.layout == "rows" and self.context == "clean":
            raise ValueError(
                "layout='rows' has no clean context (see jacobi_hf.trainer.data.collator): use layout='packed', or "
                "context='noisy' or 'window'."
            )
        if not 0 < self.distill_temperature < math.inf:
            raise ValueError(f"distill_temperature={self.distill_temperature} must be above 0.")
        self.decoding_config()

    def _decoding_block_size(self) -> int:
        return self.block_size if self.jacobi_block_size is None else self.jacobi_block_size
