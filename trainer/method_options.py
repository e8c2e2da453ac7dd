"""Options of `jacobi-hf train`, without those of `TrainingArguments` and without checks of their values.

The configs of the two methods derive from these classes. Neither torch nor transformers is imported here, so that help
texts and errors in the names of options need not wait for them.
"""

from __future__ import annotations

from dataclasses import dataclass

from jacobi_hf.config import MULTIBLOCK
from jacobi_hf.trainer.options import option

_RENAMED_METHODS = {"full": "finetune", "gated": "drafter"}


@dataclass
class RunConfig:
    """What a run trains, on which data, and how it saves the result. The method's own config holds all else."""

    method: str = option("finetune", "What is trained: finetune (the model) or drafter (a drafter for it).")
    model: str = option("", "Model name or path.")
    dtype: str = option("float32", "dtype of the weights while training.")
    attn_implementation: str | None = option(None, "Attention of the model: sdpa, flex_attention and others.")
    train_dataset: str = option("", "Packed records: folder, JSONL or parquet file, or dataset of the Hub.")
    streaming: bool = option(False, "Read train_dataset while training.")
    eval_dataset: str | None = option(None, "Packed records for evaluation.")
    replay_dataset: str | None = option(None, "JSONL with text, messages or input_ids; finetune only.")
    eval_prompts: str | None = option(None, "File of prompts, or JSON with prompts by domain; decoded in evaluations.")
    ref_model: str | None = option(None, "Frozen model of kl_loss_weight, model if not given; finetune only.")
    off_policy: bool = option(False, "Train on trajectories of another model than `model`.")
    lora_r: int = option(
        0, "Rank of the LoRA on all linear layers; 0: train the model itself, or a drafter of rank 64."
    )
    save_dtype: str = option("bfloat16", "dtype of the finished model.")


@dataclass
class BaseOptions:
    """Options of all methods."""

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


@dataclass
class ForcingOptions(BaseOptions):
    """Options of `JacobiForcingConfig`, whose docstring describes each."""

    block_size: int = option(16, "Tokens of a block (n).")
    too_long: str = option("drop", "What to do with samples longer than max_length: drop or truncate.")
    context: str = option("clean", "What noisy blocks attend to: clean, noisy or window.")
    context_window: int | None = option(None, "Blocks of a window with context=window.")
    layout: str = option("packed", "How samples are laid out: packed or rows.")
    ar_loss_weight: float = option(0.0, "Factor of the AR loss.")
    consistency_loss_weight: float = option(1.0, "Factor of the consistency loss.")
    replay_loss_weight: float = option(0.0, "Factor of the AR loss on replay.")
    kl_loss_weight: float = option(4.0, "Factor of the KL divergence from the frozen model.")
    replay_ratio: float = option(0.5, "Replay rows for each row of trajectories.")
    distill_temperature: float = option(1.0, "Temperature of the consistency loss.")
    consistency_reduction: str = option("mean", "mean, block_sum or reference.")
    prompt_loss: bool = option(True, "Whether the AR loss covers prompts.")


@dataclass
class DrafterOptions(BaseOptions):
    """Options of `DrafterConfig`, whose docstring describes each."""

    window_width: int = option(16, "Draft tokens of a training window (W).")
    windows_per_text: int = option(4, "Windows of each text in a training step.")
    steps_per_window: int = option(3, "Decoding steps of each window in a training step.")
    position_decay: float = option(1.0, "Weight of a slot over that of the slot before it.")
    targets: str = option("hard", "What the drafter learns: hard (the model's choice) or soft (its distribution).")
    constant_draft: int | None = option(None, "An id that replaces every draft token, for comparison.")


METHODS: dict[str, type[BaseOptions]] = {"finetune": ForcingOptions, "drafter": DrafterOptions}


def check_method(method: str) -> None:
    """Raise `ValueError` if there is no such method."""
    if method in _RENAMED_METHODS:
        raise ValueError(f"method={method!r} is now method={_RENAMED_METHODS[method]!r}.")
    if method not in METHODS:
        raise ValueError(f"method={method!r} must be one of {', '.join(map(repr, METHODS))}.")
