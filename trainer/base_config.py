"""Arguments that `JacobiForcingTrainer` and `DrafterTrainer` share."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar

from transformers import TrainingArguments

from jacobi_hf.config import JacobiConfig
from jacobi_hf.integration.compat import MUON, CheckpointingArguments
from jacobi_hf.trainer.data.loading import ON_BAD_ROW
from jacobi_hf.trainer.method_options import BaseOptions
from jacobi_hf.trainer.optimizer import NO_MUON
from jacobi_hf.trainer.options import check_at_least, check_choice


@dataclass
class BaseConfig(BaseOptions, CheckpointingArguments, TrainingArguments):
    """`TrainingArguments` with the arguments that both trainers of this package share.

    `JacobiForcingConfig` and `DrafterConfig` derive from it, and their docstrings describe each argument.
    """

    method: ClassVar[str]

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
        declared = {name for kind in cls.__mro__ if issubclass(kind, BaseOptions) for name in kind.__annotations__}
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
