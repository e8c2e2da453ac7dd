"""`DrafterTrainer`: transformers' `Trainer` for a drafter of a frozen model."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer

from jacobi_hf.attention.interface import LAYER_TYPES, TAKES_MASK, attention_of, layer_types
from jacobi_hf.drafts.loading import using
from jacobi_hf.drafts.lora import LoraDrafter
from jacobi_hf.trainer.base import (
    BaseTrainer,
    check_eval_prompts,
    checked_arguments,
    evaluation_sets,
    loaded,
    output_head,
    vocabulary_size,
)
from jacobi_hf.trainer.data.answers import special_ids
from jacobi_hf.trainer.drafter.answers import Answers, checked_answers, collate
from jacobi_hf.trainer.drafter.config import DrafterConfig
from jacobi_hf.trainer.drafter.model import ModelWithDrafter

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from peft import LoraConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Options of a LoraConfig that a drafter follows or that do not change it. Any other must have PEFT's default.
_LORA_OPTIONS = {
    "r",
    "lora_alpha",
    "target_modules",
    "task_type",
    "base_model_name_or_path",
    "inference_mode",
    "peft_type",
    "peft_version",
}
_TEXT_TENSORS = ("input_ids", "prompt_length", "length")


class DrafterTrainer(BaseTrainer):
    """Trainer of a LoRA drafter for a frozen causal language model, from that model's own answers.

    The model itself does not change. `save_model` writes a folder that `jacobi_hf.load_drafter` loads. It is
    transformers' `Trainer`, so arguments that are not listed here go to that class.

    Example:
    ```python
    from jacobi_hf.trainer import DrafterConfig, DrafterTrainer, load_packed

    trainer = DrafterTrainer(
        model="Qwen/Qwen3-1.7B",
        args=DrafterConfig(output_dir="drafter", learning_rate=1e-3),
        train_dataset=load_packed("build/packed"),
    )
    trainer.train()
    trainer.save_model("drafter/final")
    ```

    Args:
        model: a causal language model with sdpa or eager attention, or the name or path of one.
        args: a `DrafterConfig`; without it, one with the defaults and an output folder named after the model.
        train_dataset: the model's own answers, as a `datasets.Dataset` or a list: packed records (see `load_packed`),
            or rows with `prompt_ids` and `answer_ids`.
        eval_dataset: the model's own greedy answers, in the same form, for loss and tokens per forward of an
            evaluation; or a dict of them by name.
        eval_prompts: lists of token ids, by name of their set. Each evaluation of `eval_dataset` decodes them, and
            reports tokens per forward and identity with ordinary decoding.
        processing_class: the tokenizer, which is saved beside the drafter.
        peft_config: a `LoraConfig` with rank, scale and target modules of the drafter; by default rank 64 on all
            linear layers.
        kwargs: go to `Trainer`: `callbacks`, `optimizers` and others.

    Raises:
        TypeError: `args` is no `DrafterConfig`, or a dataset is streamed.
        ValueError: no drafter can be trained for the model, no answer can be learnt from, `peft_config` asks for what
            a drafter does not have, or `eval_prompts` are given without an `eval_dataset`.
        FloatingPointError: while training, a loss or gradient is not finite; the message names the batch's samples.
            The weights are those before the step.
    """

    def __init__(
        self,
        model: PreTrainedModel | str,
        args: DrafterConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        eval_prompts: Mapping[str, Sequence[Sequence[int]]] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: LoraConfig | None = None,
        **kwargs: Any,
    ) -> None:
        args = checked_arguments(args, DrafterConfig, model, "DrafterTrainer")
        model = loaded(model, "auto")
        _check_model(model)
        check_eval_prompts(eval_prompts, eval_dataset)
        ends = special_ids(model.generation_config, "eos_token_id") or special_ids(processing_class, "eos_token_id")
        vocab_size = vocabulary_size(model)

        def answers(data: Any, name: str) -> Answers:
            return checked_answers(
                data,
                name,
                ends=ends,
                max_length=args.max_length,
                on_bad_row=args.on_bad_row,
                vocab_size=vocab_size,
            )

        eval_records = evaluation_sets(eval_dataset, answers)
        records = None if train_dataset is None else answers(train_dataset, "train_dataset")
        drafter = _new_drafter(model, peft_config, args.constant_draft)
        if not hasattr(model, "hf_device_map"):
            model.to(args.device)  # type: ignore[arg-type]  # Trainer moves what it trains, which is the drafter
        super().__init__(
            ModelWithDrafter(model, drafter, args.targets, args.position_decay, args.loss_chunk_numbers),
            args,
            records=records,
            eval_records=eval_records,
            eval_prompts=eval_prompts,
            label_name="length",
            data_collator=collate,
            processing_class=processing_class,
            **kwargs,
        )
        drafter.place(model, torch.float32)  # Trainer has moved all of it to one device
        self._totals: torch.Tensor | None = None

    def _get_num_items_in_batch(
        self, batch_samples: list[dict[str, torch.Tensor]], device: torch.device
    ) -> torch.Tensor | None:
        """Return None, since the number of slots that carry a loss is known only after the steps of the windows."""
        return None

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        """Return the mean cross entropy over the slots that the drafter learns from.

        Over an accumulated batch, the loss is the mean of these means.

        Args:
            model: the `ModelWithDrafter` as the trainer wraps it.
            inputs: a batch of texts, as `collate` gives it.
            return_outputs: whether to return a pair of the loss and a dict with it.
            num_items_in_batch: not used.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        args = self.args
        loss, totals = model(
            **{name: inputs[name] for name in _TEXT_TENSORS},
            windows_per_text=args.windows_per_text,
            window_width=args.window_width,
            steps_per_window=args.steps_per_window,
        )
        if model.training:
            self._samples_of_step.append(inputs["index"])
            # Trainer leaves the division to us (loss_is_scaled_for_ga). An epoch's last step may have fewer batches.
            loss = loss / self.current_gradient_accumulation_steps
            slots = len(inputs["length"]) * args.windows_per_text * args.window_width * args.steps_per_window
            counts = torch.cat([totals, totals.new_tensor([slots])]).double()
            self._totals = counts if self._totals is None else self._totals + counts
        self.check_finite(loss, inputs["index"])
        return (loss, {"loss": loss.detach()}) if return_outputs else loss

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save a drafter's folder, and in checkpoints also what resuming needs; push it if the arguments say so."""
        if _internal_call:
            Trainer.save_model(self, output_dir, _internal_call)
        self._save_for_others(Path(output_dir or self.args.output_dir))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save")

    def _save_for_others(self, folder: Path) -> None:
        if self.args.should_save:
            self._trained_model().drafter.save_pretrained(folder)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)

    def _base(self) -> Any:
        return self._trained_model().base

    def _training_metrics(self) -> dict[str, float]:
        if self._totals is None:
            return {}
        totals = self._summed(self._totals)
        self._totals = None
        kept, agreeing, accepted, steps, slots = totals.tolist()
        return {
            "agreement": agreeing / max(1, kept),
            "accepted_per_step": accepted / max(1, steps),
            "kept_positions": kept,
            "slots": slots,
        }

    def _held_out_metrics(self, dataloader: Any) -> dict[str, float]:
        """Return the tokens per forward of the held-out answers, decoded greedily with a window alone."""
        trained = self._trained_model()
        counts = torch.zeros(2, device=self.args.device, dtype=torch.double)
        for batch in dataloader:
            texts = {name: batch[name].to(self.args.device) for name in _TEXT_TENSORS}
            with self.accelerator.autocast():
                decoded = trained.decode_answers(**texts, window_width=self.args.window_width)
            counts += torch.tensor(decoded, device=counts.device)
        tokens, forwards = self._summed(counts).tolist()
        return {"tokens_per_forward": tokens / forwards}

    @contextmanager
    def _ready_to_decode(self) -> Iterator[PreTrainedModel]:
        """Yield the model with a copy of the drafter as it is now."""
        trained = self._trained_model()
        with using(trained.base, trained.drafter.copied()):
            yield trained.base


def _check_model(model: Any) -> None:
    """Raise a ValueError for a model that no drafter can be trained for."""
    if hasattr(model, "get_base_model"):
        raise ValueError(
            "the model has a PEFT adapter: merge it first (merge_and_unload), so that the drafter is made for one "
            "model."
        )
    output_head(model)
    config = model.config.get_text_config(decoder=True)
    if attention_of(config) not in TAKES_MASK:
        raise ValueError(
            f"attn_implementation={attention_of(config)!r} does not take the mask of the windows: load the model "
            "with 'sdpa'."
        )
    if unknown := set(layer_types(config)) - LAYER_TYPES:
        raise ValueError(
            f"the model has layers of type {', '.join(sorted(unknown))}: a drafter can be trained for full and "
            "sliding attention only."
        )


def _new_drafter(model: Any, peft_config: Any, constant_draft: int | None) -> LoraDrafter:
    """Return an untrained drafter in float32, with the options of a `LoraConfig` or rank 64 on all linear layers."""
    if peft_config is None:
        return LoraDrafter.new(model, constant_draft=constant_draft).place(model, torch.float32)
    from peft import LoraConfig

    if type(peft_config) is not LoraConfig:
        raise ValueError(f"peft_config is a {type(peft_config).__name__}; a drafter is a LoRA: give a LoraConfig.")
    default = LoraConfig()
    differing = [
        name
        for name, value in vars(peft_config).items()
        if name not in _LORA_OPTIONS and value != getattr(default, name, None) and value
    ]
    if differing:
        raise ValueError(
            f"peft_config sets {', '.join(sorted(differing))}, which a drafter does not have: leave it out."
        )
    modules = "all-linear" if peft_config.target_modules is None else peft_config.target_modules
    drafter = LoraDrafter.new(model, peft_config.r, peft_config.lora_alpha, modules, constant_draft)
    return drafter.place(model, torch.float32)
