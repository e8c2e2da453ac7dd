"""`JacobiForcingTrainer` with `method="drafter"`: the model is frozen, a drafter is trained (`jacobi_hf.drafts.lora`)."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import Trainer

from jacobi_hf.attention.interface import LAYER_TYPES, TAKES_MASK, attention_of, layer_types
from jacobi_hf.drafts.loading import using
from jacobi_hf.drafts.lora import LoraDrafter
from jacobi_hf.trainer.data.answers import special_ids
from jacobi_hf.trainer.data.loading import checked
from jacobi_hf.trainer.data.record import PackedRecord
from jacobi_hf.trainer.drafter.model import DraftedModel
from jacobi_hf.trainer.forcing.trainer import (
    JacobiForcingTrainer,
    _GradientGuard,
    _head_of,
    _vocabulary,
    check_devices,
)

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from jacobi_hf.trainer.forcing.config import JacobiForcingConfig

# Options of a LoraConfig that a drafter has; any other has to be as PEFT sets it by default.
_TAKEN = {
    "r",
    "lora_alpha",
    "target_modules",
    "task_type",
    "base_model_name_or_path",
    "inference_mode",
    "peft_type",
    "peft_version",
}


class Answers(torch.utils.data.Dataset[dict[str, Any]]):
    """Prompts with the model's own answers, from packed records (whose clean blocks they are) or from rows with `answer_ids`.

    Args:
        records: checked packed records, or rows with `prompt_ids` and `answer_ids`.
        max_length: longest text; answers are cut there.
        ends: ids that end an answer.

    Raises:
        ValueError: no answer of at least two tokens fits.
    """

    def __init__(self, records: Any, max_length: int, ends: Sequence[int]) -> None:
        self._records, self._max_length, self._ends = records, max_length, ends
        self._kept = [index for index in range(len(records)) if self._long_enough(records[index])]
        if not self._kept:
            raise ValueError(
                f"none of {len(records)} records has an answer of at least two tokens within max_length={max_length}: raise max_length."
            )

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> dict[str, Any]:
        prompt, answer = self._text(self._records[self._kept[index]])
        return {"prompt_ids": prompt, "answer_ids": answer, "index": index}

    def name(self, index: int) -> str:
        """What an error calls the record."""
        return str(self._records[self._kept[index]].get("data_id", f"record {index}"))

    def _long_enough(self, record: Mapping[str, Any]) -> bool:
        return len(self._text(record)[1]) > 1

    def _text(self, record: Mapping[str, Any]) -> tuple[list[int], list[int]]:
        prompt = np.asarray(record["prompt_ids"]).reshape(-1).tolist()
        is_packed = record.get("answer_ids") is None
        answer = PackedRecord.from_row(record).answer.tolist() if is_packed else list(record["answer_ids"])
        end = next((i for i, token in enumerate(answer) if token in self._ends), len(answer) - 1)
        return prompt, answer[: min(end + 1, max(0, self._max_length - len(prompt)))]


def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch padded on the right: `input_ids` `(B, L)`, `prompt_length`, `length` and `index` `(B,)`."""
    texts = [[*row["prompt_ids"], *row["answer_ids"]] for row in rows]
    columns = max(map(len, texts))
    return {
        "input_ids": torch.tensor([text + [0] * (columns - len(text)) for text in texts]),
        "prompt_length": torch.tensor([len(row["prompt_ids"]) for row in rows]),
        "length": torch.tensor([len(text) for text in texts]),
        "index": torch.tensor([row["index"] for row in rows]),
    }


class DrafterTrainer(JacobiForcingTrainer):
    """What `JacobiForcingTrainer(args=JacobiForcingConfig(method="drafter"))` is; arguments as there.

    `train_dataset` and `eval_dataset` hold answers of the very model that is given; replay and `ref_model` have no meaning, since it is
    not changed. `peft_config` is a `LoraConfig` with rank, scale and target modules; by default rank 64 on all linear layers.
    """

    def __init__(
        self,
        model: PreTrainedModel | str,
        args: JacobiForcingConfig,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        eval_prompts: Mapping[str, Sequence[Sequence[int]]] | None = None,
        replay_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: LoraConfig | None = None,
        ref_model: PreTrainedModel | None = None,
        **kwargs: Any,
    ) -> None:
        for name, value in (("replay_dataset", replay_dataset), ("ref_model", ref_model)):
            if value is not None:
                raise ValueError(
                    f"{name} has no meaning with method='drafter': the model itself is not trained, so it cannot drift."
                )
        if isinstance(model, str):
            from transformers import AutoModelForCausalLM

            model = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
        _check_frozen(model, args)
        if eval_prompts and eval_dataset is None:
            raise ValueError("eval_prompts are decoded when eval_dataset is evaluated, and there is none: give one.")
        ends = next(
            filter(
                None, (special_ids(holder, "eos_token_id") for holder in (model.generation_config, processing_class))
            ),
            (),
        )
        sets = eval_dataset if isinstance(eval_dataset, dict) else {"": eval_dataset}
        evaluated = {
            name: _answers(model, args, data, f"eval_dataset {name}".strip(), ends)
            for name, data in sets.items()
            if data is not None
        }
        self._records: Any = (
            None if train_dataset is None else _answers(model, args, train_dataset, "train_dataset", ends)
        )
        self._eval_prompts = dict(eval_prompts or {})
        drafter = _new_drafter(model, peft_config, args.constant_draft)
        if not hasattr(model, "hf_device_map"):
            model.to(args.device)  # type: ignore[arg-type]  # the trainer moves what it trains, which is the drafter
        Trainer.__init__(
            self,
            model=DraftedModel(model, drafter, args.targets, args.position_decay, args.loss_chunk_numbers),
            args=args,
            data_collator=collate,
            train_dataset=self._records,
            eval_dataset=evaluated[""] if set(evaluated) == {""} else evaluated or None,
            processing_class=processing_class,
            **kwargs,
        )
        drafter.place(model, torch.float32)  # the trainer has moved all of it to one device
        self.add_callback(_GradientGuard(self))
        self.label_names = ["length"]
        self._samples_of_step: list[torch.Tensor] = []
        self._decoded: tuple[tuple[int, int], dict[str, float]] | None = None
        self._totals: torch.Tensor | None = None
        self._logged_at = time.perf_counter()

    @property
    def _trained(self) -> DraftedModel:
        trained: DraftedModel = self.accelerator.unwrap_model(self.model)
        return trained

    def _outside_of_muon(self) -> list[torch.nn.Module]:
        return []

    def _get_num_items_in_batch(
        self, batch_samples: list[dict[str, torch.Tensor]], device: torch.device
    ) -> torch.Tensor | None:
        """What the losses are averaged over is known only when the drafts are."""
        return None

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        """Mean cross entropy over the slots that the visits learn from; the mean of these means over the accumulated batch."""
        args: JacobiForcingConfig = self.args
        loss, totals = model(
            **{name: inputs[name] for name in ("input_ids", "prompt_length", "length")},
            windows=args.windows_per_text,
            width=args.window_width,
            visits=args.steps_per_window,
        )
        if model.training:
            self._samples_of_step.append(inputs["index"])
            # Trainer leaves the division to us (loss_is_scaled_for_ga); an epoch's last step may have fewer batches.
            loss = loss / self.current_gradient_accumulation_steps
            slots = totals.new_tensor(
                [len(inputs["length"]) * args.windows_per_text * args.window_width * args.steps_per_window]
            )
            former = self._totals if self._totals is not None else 0
            self._totals = former + torch.cat([totals, slots]).double()
        if not bool(torch.isfinite(loss.detach())):
            raise FloatingPointError(self._blame("loss", [inputs["index"]]))
        return (loss, {"loss": loss.detach()}) if return_outputs else loss

    def _metrics(self, training: bool) -> dict[str, float]:
        if not training or self._totals is None:
            return {}
        totals, self._totals = self._totals, None
        if self.args.world_size > 1:
            totals = self.accelerator.reduce(totals, "sum")
        kept, agreeing, accepted, steps, slots = totals.tolist()
        return {
            "agreement": agreeing / max(1, kept),
            "accepted_per_visit": accepted / max(1, steps),
            "kept_positions": kept,
            "slots": slots,
        }

    def evaluation_loop(self, dataloader: Any, description: str, *args: Any, **kwargs: Any) -> Any:
        """Adds the tokens per forward of the held-out answers (greedy ones, windows alone), and what decoding the prompts takes."""
        output = Trainer.evaluation_loop(self, dataloader, description, *args, **kwargs)
        prefix, trained, width = kwargs.get("metric_key_prefix", "eval"), self._trained, self.args.window_width
        counts = torch.zeros(2, device=self.args.device, dtype=torch.double)
        for batch in dataloader:
            inputs = {name: batch[name].to(self.args.device) for name in ("input_ids", "prompt_length", "length")}
            with self.accelerator.autocast():
                counts += torch.tensor(trained.tokens_per_forward(**inputs, width=width), device=counts.device)
        if self.args.world_size > 1:
            counts = self.accelerator.reduce(counts, "sum")
        output.metrics[f"{prefix}_tokens_per_forward"] = float(counts[0] / counts[1])
        output.metrics.update({f"eval_{name}": value for name, value in self._decoding_metrics().items()})
        return output

    def _decoding_metrics(self) -> dict[str, float]:
        """With the drafter as it is now."""
        if self.args.decoding_config() is None or not self._eval_prompts:
            return {}
        with using(self._trained.base, self._trained.drafter.copied()):
            return self._measured(self._trained.base)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """A drafter's folder; in checkpoints, what resuming needs as well. Pushes where the arguments say so, as `Trainer` does."""
        if _internal_call:
            Trainer.save_model(self, output_dir, _internal_call)
        self._save_for_others(Path(output_dir or self.args.output_dir))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save")

    def _save_for_others(self, folder: Path) -> None:
        if self.args.should_save:
            self._trained.drafter.save_pretrained(folder)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)


def _answers(model: Any, args: JacobiForcingConfig, data: Any, name: str, ends: Sequence[int]) -> Answers:
    if not isinstance(data, Sized):
        raise TypeError(
            f"{name} is streamed; method='drafter' takes records with a length (datasets.Dataset or a list)."
        )
    if not len(data):
        raise ValueError(f"{name} is empty.")
    raw = "answer_ids" in (getattr(data, "column_names", None) or data[0])  # type: ignore[index]
    vocabulary = _vocabulary(model)
    if raw:
        for index in range(len(data)):
            ids = [*data[index]["prompt_ids"], *data[index]["answer_ids"]]  # type: ignore[index]
            if not ids or min(ids) < 0 or max(ids) >= vocabulary:
                raise ValueError(
                    f"row {index} of {name} is empty or has ids outside the model's vocabulary of {vocabulary}."
                )
        return Answers(data, args.max_length, ends)
    return Answers(checked(data, name, on_bad_row=args.on_bad_row, vocab_size=vocabulary), args.max_length, ends)


def _check_frozen(model: Any, args: JacobiForcingConfig) -> None:
    """What a drafter could not be trained for."""
    check_devices(args)
    if hasattr(model, "get_base_model"):
        raise ValueError(
            "the model has an adapter of PEFT's: merge it first, so that the drafter is made for one model."
        )
    _head_of(model)
    config = model.config.get_text_config(decoder=True)
    if attention_of(config) not in TAKES_MASK:
        raise ValueError(
            f"attn_implementation={attention_of(config)!r} takes no mask of our own: load the model with 'sdpa'."
        )
    if unknown := set(layer_types(config)) - LAYER_TYPES:
        raise ValueError(
            f"layers of type {', '.join(sorted(unknown))} are not known; only full and sliding attention are."
        )
    if args.activation_checkpointing or args.gradient_checkpointing:
        raise ValueError(
            "checkpointing of activations drops the keys and values that windows stand on: leave it off with method='drafter'."
        )


def _new_drafter(model: Any, peft_config: Any, constant_draft: int | None) -> LoraDrafter:
    if peft_config is None:
        return LoraDrafter.new(model, constant_draft=constant_draft).place(model, torch.float32)
    from peft import LoraConfig

    if type(peft_config) is not LoraConfig:
        raise ValueError(f"peft_config is a {type(peft_config).__name__}; a drafter is a LoRA: give a LoraConfig.")
    default = LoraConfig()
    differing = [
        name
        for name, value in vars(peft_config).items()
        if name not in _TAKEN and value != getattr(default, name, None) and value
    ]
    if differing:
        raise ValueError(f"peft_config sets {', '.join(sorted(differing))}, which a drafter does not have.")
    modules = "all-linear" if peft_config.target_modules is None else peft_config.target_modules
    return LoraDrafter.new(model, peft_config.r, peft_config.lora_alpha, modules, constant_draft).place(
        model, torch.float32
    )
