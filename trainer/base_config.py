"""Arguments that `JacobiForcingTrainer` and `DrafterTrainer` share."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar

from transformers import TrainingArguments

from jacobi_hf.config import MULTIBLOCK, JacobiConfig
from jacobi_hf.integration.compat import MUON, CheckpointingArguments
from jacobi_hf.trainer.data.loading import ON_BAD_ROW
from jacobi_hf.trainer.optimizer import NO_MUON
from jacobi_hf.trainer.options import check_at_least, check_choice, option


@dataclass
class BaseConfig(CheckpointingArguments, TrainingArguments):
    """`TrainingArguments` with the arguments that both trainers of this package share.

    `JacobiForcingConfig` and `DrafterConfig` derive from it, and their docstrings describe each argument.
    """

    method: ClassVar[str]

    learning_rate: float = option(5e-6, "Peak learning rate.")
    lr_scheduler_type: str = option("cosine", "Learning-rate schedule.")
    adam_beta2: float = option(0.95, "Second beta of AdamW.")
    muon_learning_rate: float | None = option(
        None, "Peak learning rate of Muon for the matrices inside the layers; AdamW trains all other weights."
    )
    remove_unused_columns: bool = option(False, "Must stay false, because the collator reads the raw columns.")
    max_length: int = option(2048, "Most tokens of a training row.")
    on_bad_row: str = option("raise", "What to do with a malformed record: raise or skip.")
    loss_chunk_numbers: int = option(2**24, "Most numbers in a vocabulary-sized tensor of the loss.")
    decoding: str | None = option(
        MULTIBLOCK, "Decoding of evaluations, saved with a finetuned model: jacobi, jacobi_multiblock or none."
    )
    jacobi_block_size: int | None = option(None, "n of that decoding.")
    jacobi_max_blocks: int = option(2, "K of that decoding.")
    jacobi_activation_ratio: float = option(0.0, "r of that decoding.")
    jacobi_pool_size: int = option(2, "Pool branches of that decoding.")
    jacobi_lookup_tokens: int = option(16, "Length of the lookup branch of that decoding.")
    eval_max_new_tokens: int = option(128, "New tokens of each prompt that an evaluation decodes.")
    eval_prompt_count: int = option(16, "Most prompts of each set that an evaluation decodes.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "on_bad_row", ON_BAD_ROW)
        check_at_least(self, 0, "muon_learning_rate")
        check_at_least(self, 1, "loss_chunk_numbers", "eval_max_new_tokens", "eval_prompt_count")
        if self.muon_learning_rate is not None and MUON is None:
            raise ValueError(NO_MUON)
        if self.fp16:
            raise ValueError(
                "fp16=True relies on gradients that overflow, and the trainer stops at a gradient that is not finite: "
                "use bf16=True."
            )
        if self.remove_unused_columns:
            raise ValueError(
                "remove_unused_columns=True would drop the columns that the collator reads: leave it False."
            )

    @classmethod
    def own_arguments(cls) -> list[str]:
        """Return the names of the arguments that this package defines or gives another default."""
        declared = {name for kind in cls.__mro__ if issubclass(kind, BaseConfig) for name in kind.__annotations__}
        return [field.name for field in fields(cls) if field.name in declared]

    def decoding_config(self) -> JacobiConfig | None:
        """Return the knobs that evaluations decode with, or None with `decoding=None` or `"none"`."""
        if self.decoding is None or self.decoding == "none":
            return None
        return JacobiConfig(
            decoding=self.decoding,
            jacobi_block_size=self._decoding_block_size(),
            jacobi_max_blocks=self.jacobi_max_blocks,
            jacobi_activation_ratio=self.jacobi_activation_ratio,
            jacobi_pool_size=self.jacobi_pool_size,
            jacobi_lookup_tokens=self.jacobi_lookup_tokens,
        )

    def _decoding_block_size(self) -> int:
        """Return n of the decoding: `jacobi_block_size`, or the default of `JacobiConfig` if it is None."""
        return JacobiConfig.jacobi_block_size if self.jacobi_block_size is None else self.jacobi_block_size
