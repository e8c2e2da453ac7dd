"""Arguments of `DrafterTrainer`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jacobi_hf.trainer.base_config import BaseConfig
from jacobi_hf.trainer.method_options import DrafterOptions
from jacobi_hf.trainer.options import check_at_least, check_choice

TARGETS = ("hard", "soft")


@dataclass
class DrafterConfig(DrafterOptions, BaseConfig):
    """Arguments of `DrafterTrainer`: `TrainingArguments` and those of training a LoRA drafter.

    The defaults of optimizer and schedule suit models of a billion parameters and more. The recipes `*_drafter.yaml`
    in examples/recipes hold other values; those of the tiny model have been run.

    Parameters that describe the data:
        max_length: most tokens of a text, prompt and answer together; longer answers are cut.
        on_bad_row: what happens to a malformed record: `"raise"`, or `"skip"` with a warning.

    Parameters that control the windows of draft tokens:
        window_width: W, draft tokens of a window.
        windows_per_text: windows at random places of each text in a training step.
        steps_per_window: decoding steps that each window makes in a training step. The drafter learns from all of
            them.
        constant_draft: if given, this id replaces every draft token that the drafter reads, in training and in
            decoding. What the drafter then learns is plain multi-token prediction, for comparison.

    Parameters that control the loss:
        targets: what the drafter learns at a slot: `"hard"`, the model's choice, or `"soft"`, the model's
            distribution.
        position_decay: weight of a slot over that of the slot before it, from the first wrong draft token on; above 0
            and at most 1. Below 1, slots that are verified sooner weigh more.
        loss_chunk_numbers: most numbers in a vocabulary-sized tensor of the loss. A lower value takes less memory.

    Parameters that control the optimizer:
        learning_rate, lr_scheduler_type, adam_beta2: as in `TrainingArguments`, with other defaults.
        muon_learning_rate: if given, Muon trains the LoRA's matrices at this peak learning rate, and AdamW the other
            weights at `learning_rate`. Both follow one schedule.
        remove_unused_columns: must stay False, because the collator reads the raw columns.

    Parameters that control decoding:
        decoding: how evaluations decode: `"jacobi_multiblock"`, `"jacobi"`, or None to decode nothing.
        jacobi_block_size, jacobi_max_blocks, jacobi_activation_ratio, jacobi_pool_size, jacobi_lookup_tokens: knobs of
            that decoding. `jacobi_block_size=None` takes 16.
        eval_max_new_tokens: new tokens of each prompt that an evaluation decodes.
        eval_prompt_count: most prompts of each set that an evaluation decodes.

    Raises:
        ValueError: a value is out of range, or an argument has no use here.
    """

    method: ClassVar[str] = "drafter"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "targets", TARGETS)
        check_at_least(self, 1, "window_width", "windows_per_text", "steps_per_window")
        check_at_least(self, 0, "constant_draft")
        if not 0 < self.position_decay <= 1:
            raise ValueError(f"position_decay={self.position_decay} must be above 0 and at most 1.")
        if self.activation_checkpointing:
            raise ValueError(
                "activation_checkpointing=True would drop the keys and values that the windows attend to: leave it "
                "off."
            )
        self.decoding_config()
