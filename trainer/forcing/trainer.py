"""`JacobiForcingTrainer`: transformers' `Trainer` with the losses of Jacobi Forcing."""

from __future__ import annotations

import copy
import json
import logging
import resource
import time
from collections.abc import Sized
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer, TrainerCallback

from jacobi_hf.attention.interface import MaskBuilder, attention_of
from jacobi_hf.evaluation.decoding import measure_decoding, ordinary_outputs
from jacobi_hf.trainer.data.answers import base_of, special_ids
from jacobi_hf.trainer.data.collator import COUNTS, JacobiForcingCollator, clean_part, counts_of
from jacobi_hf.trainer.data.loading import StreamedRecords, TrainingRecords, checked, tokenized_replay
from jacobi_hf.trainer.forcing.config import JacobiForcingConfig
from jacobi_hf.trainer.forcing.losses import Losses, Reference, Targets, chunked_losses
from jacobi_hf.trainer.forcing.mask import PADDING, Slots, dense_mask, mask_mod
from jacobi_hf.trainer.head_hook import AtHead
from jacobi_hf.trainer.optimizer import muon_and_adamw
from jacobi_hf.trainer.publishing import Publishing

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from peft import PeftConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# Which of the collator's counts a reduction divides by.
_AVERAGED_OVER = {
    "mean": COUNTS.index("pairs"),
    "block_sum": COUNTS.index("blocks"),
    "reference": COUNTS.index("samples"),
}
_LAYOUT_TENSORS = ("input_ids", "position_ids", "attention_mask")


class JacobiForcingTrainer(Publishing, Trainer):
    """Finetunes a causal LM on its own Jacobi trajectories (arXiv 2512.14681).

    Args:
        model: a causal LM, or the name or path of one.
        args: a `JacobiForcingConfig`.
        train_dataset: packed records (`jacobi_hf.trainer.data.loading`), as a `datasets.Dataset`, an `IterableDataset` or a list.
        eval_dataset: packed records for the losses, or a dict of them.
        eval_prompts: prompts (ids) decoded at each evaluation of `eval_dataset`, by name of their set: tokens per forward and identity.
        replay_dataset: ordinary text (`text`, `messages` or `input_ids`) mixed in against drift.
        processing_class: the tokenizer.
        peft_config: trains an adapter instead of the model; with `args.method="drafter"`, rank and layers of the drafter.
        ref_model: the frozen model of `kl_loss_weight`; when not given, a copy of `model`, or with an adapter the model without it.
            Each process holds it whole.

    Raises:
        ValueError: data of another block size or vocabulary, `layout="packed"` with flash attention, nothing to train on,
            replay without a weight, eval_prompts without an eval_dataset.
        FloatingPointError: a loss that is not finite, with the samples it came from; the weights are still those before it.
    """

    # compute_loss divides by the counts of the whole accumulated batch itself.
    loss_is_scaled_for_ga = True

    def __new__(cls, model: Any = None, args: Any = None, *_: Any, **__: Any) -> Any:  # noqa: ARG004  (__init__ has its say)
        """With `method="drafter"`, the subclass that trains a drafter."""
        if cls is JacobiForcingTrainer and getattr(args, "method", None) == "drafter":
            from jacobi_hf.trainer.drafter.trainer import DrafterTrainer

            return super().__new__(DrafterTrainer)
        return super().__new__(cls)

    def __init__(
        self,
        model: PreTrainedModel | str,
        args: JacobiForcingConfig,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        eval_prompts: Mapping[str, Sequence[Sequence[int]]] | None = None,
        replay_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        ref_model: PreTrainedModel | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(args, JacobiForcingConfig):
            raise TypeError(f"args is a {type(args).__name__}; JacobiForcingTrainer takes a JacobiForcingConfig.")
        if args.method == "drafter":
            raise TypeError(
                "method='drafter' in a subclass of JacobiForcingTrainer: derive it from trainer.drafter.trainer.DrafterTrainer."
            )
        check_devices(args)
        if isinstance(model, str):
            from transformers import AutoModelForCausalLM

            model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        _check_model(model, args)
        _check_use(args, replay_dataset, ref_model, eval_prompts, eval_dataset)
        model = _with_adapter(model, args, peft_config)
        base = base_of(model)
        if ref_model is not None:
            _check_reference(ref_model, base)
        elif args.kl_loss_weight and base is model:
            ref_model = copy.deepcopy(model)
        replay = (
            None
            if replay_dataset is None
            else tokenized_replay(replay_dataset, processing_class, args.max_length, _vocabulary(base))
        )
        self._records = (
            None if train_dataset is None else self._prepare(base, args, train_dataset, "train_dataset", replay)
        )
        self._eval_prompts = dict(eval_prompts or {})
        sets = eval_dataset if isinstance(eval_dataset, dict) else {"": eval_dataset}
        evaluated = {
            name: self._prepare(base, args, data, f"eval_dataset {name}".strip())
            for name, data in sets.items()
            if data is not None
        }
        if streamed := [name for name, data in evaluated.items() if isinstance(data, StreamedRecords)]:
            raise ValueError(
                f"eval_dataset {streamed[0]} is streamed; give one with a length (datasets.Dataset or a list of records)."
            )
        super().__init__(
            model=model,
            args=args,
            data_collator=_collator(base, args, processing_class),
            train_dataset=self._records,
            eval_dataset=evaluated[""] if set(evaluated) == {""} else evaluated or None,
            processing_class=processing_class,
            **kwargs,
        )
        self.add_callback(_GradientGuard(self))
        self._samples_of_step: list[torch.Tensor] = []
        self._decoded: tuple[tuple[int, int], dict[str, float]] | None = None
        self.label_names = ["labels"]
        self._at_head = AtHead(_head_of(base))
        self._ref_model = (
            None if ref_model is None else ref_model.eval().requires_grad_(requires_grad=False).to(args.device)
        )
        self._at_ref_head = None if ref_model is None else AtHead(_head_of(ref_model))
        if args.torch_compile:
            # Each batch has a length of its own: compiled for the first one's, the model would be compiled again at the second.
            self.accelerator.state.dynamo_plugin.dynamic = True
            if ref_model is not None:
                ref_model.compile(backend=args.torch_compile_backend, mode=args.torch_compile_mode, dynamic=True)
        self._vocab_size = _vocabulary(base)
        self._masks = MaskBuilder(base.config, base.dtype)
        self._sums: dict[bool, torch.Tensor | None] = {True: None, False: None}
        self._logged_at = time.perf_counter()
        config = args.decoding_config()
        if config is not None and base.generation_config is not None:
            config.save_defaults(base)

    @staticmethod
    def _prepare(
        base: PreTrainedModel,
        args: JacobiForcingConfig,
        dataset: Any,
        name: str,
        replay: list[dict[str, list[int]]] | None = None,
    ) -> TrainingRecords | StreamedRecords:
        """Records checked, fitted and mixed with replay."""
        records = checked(
            dataset, name, on_bad_row=args.on_bad_row, block_size=args.block_size, vocab_size=_vocabulary(base)
        )
        kind = TrainingRecords if isinstance(records, Sized) else StreamedRecords
        return kind(records, args.max_length, args.too_long, replay, args.replay_ratio)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """As `Trainer`'s, or with `muon_learning_rate` Muon for the matrices inside the layers and AdamW for the rest."""
        rate = self.args.muon_learning_rate
        if rate is not None and self.optimizer is None:  # type: ignore[has-type]
            if self.is_fsdp_enabled or self.is_deepspeed_enabled:
                raise ValueError(
                    "muon_learning_rate needs whole matrices, which FSDP and DeepSpeed do not keep: leave it out with them."
                )
            trained = model or self.model
            decayed = self.get_decay_parameter_names(trained)
            self.optimizer = muon_and_adamw(trained, self.args, rate, decayed, self._outside_of_muon())
        return super().create_optimizer(model)

    def _outside_of_muon(self) -> list[torch.nn.Module]:
        base = base_of(self.model)
        return [base.get_input_embeddings(), _head_of(base)]

    def _get_num_items_in_batch(
        self, batch_samples: list[dict[str, torch.Tensor]], device: torch.device
    ) -> torch.Tensor | None:
        """What each loss of the accumulated batch is averaged over (`collator.COUNTS`), summed over the processes."""
        if not batch_samples:
            return None
        counts = torch.stack([counts_of(batch) for batch in batch_samples]).sum(0).to(device)
        return self.accelerator.reduce(counts, "sum") if self.args.world_size > 1 else counts

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        """The weighted sum of AR, replay, consistency and KL loss of one batch, normalised over the accumulated one."""
        args: JacobiForcingConfig = self.args
        own = counts_of(inputs)
        counts = own if num_items_in_batch is None else num_items_in_batch
        targets = _targets(inputs, counts, args)
        reference = self._reference(model, inputs) if args.kl_loss_weight else None
        losses: Losses
        losses, nothing = self._at_head(
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
        weights = losses.ar_G.new_tensor([args.ar_loss_weight, args.replay_loss_weight])
        loss = (
            losses.ar_G @ weights
            + args.consistency_loss_weight * losses.consistency
            + args.kl_loss_weight * losses.kl
            + nothing
        )
        if model.training:
            self._samples_of_step.append(inputs["index"])
        if not bool(torch.isfinite(loss.detach())):
            raise FloatingPointError(self._blame("loss", [inputs["index"]]))
        self._accumulate(model.training, losses, own, counts, inputs)
        # The processes' gradients are averaged; what was divided by the sum over all of them has to be summed.
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        return (loss, {"loss": loss.detach()}) if return_outputs else loss

    def _arguments(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """What the model's forward takes of a batch."""
        arguments: dict[str, Any] = {name: inputs[name] for name in _LAYOUT_TENSORS if name in inputs}
        if "attention_mask" not in inputs:
            arguments["attention_mask"] = self._mask(inputs)
        return arguments

    def _reference(self, model: Any, inputs: Mapping[str, torch.Tensor]) -> Reference:
        """The frozen model's hidden states where the AR loss has labels, which no noisy slot has a part in."""
        clean, home_R = clean_part(inputs, 128 if attention_of(base_of(self.model).config) == "flex_attention" else 1)
        if self._ref_model is not None:
            assert self._at_ref_head is not None
            at_head, frozen, off = self._at_ref_head, self._ref_model, nullcontext
        else:
            at_head, frozen, off = self._at_head, model, self.accelerator.unwrap_model(model).disable_adapter
        was_training = frozen.training
        frozen.eval()
        with torch.no_grad(), off(), self.accelerator.autocast():
            hidden_CH, _ = at_head(
                lambda: frozen(**self._arguments(clean), use_cache=False), lambda hidden_CH: hidden_CH
            )
        frozen.train(was_training)

        def head(hidden_NH: torch.Tensor) -> torch.Tensor:
            with off():
                return at_head.head(hidden_NH)

        hidden_RH = hidden_CH.new_zeros(inputs["input_ids"].numel(), hidden_CH.shape[-1])
        return Reference(head, hidden_RH.index_copy(0, home_R[home_R >= 0], hidden_CH[home_R >= 0]))

    def _mask(self, inputs: Mapping[str, torch.Tensor]) -> Any:
        args: JacobiForcingConfig = self.args
        slots = Slots.of(inputs)
        if attention_of(base_of(self.model).config) == "flex_attention":
            return self._block_masks(slots)
        return self._masks(
            lambda sliding: dense_mask(slots, args.context, args.context_window, sliding), slots.sample.device
        )

    def _block_masks(self, slots: Slots) -> Any:
        """FlexAttention's masks, one per kind of layer where there are several."""
        from torch.nn.attention.flex_attention import create_block_mask

        args: JacobiForcingConfig = self.args
        batch, length = slots.sample.shape
        masks = {
            kind: create_block_mask(
                mask_mod(slots, args.context, args.context_window, sliding),
                batch,
                None,
                length,
                length,
                device=slots.sample.device,
            )
            for kind, sliding in self._masks.windows.items()
        }
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def _blame(self, what: str, indices: list[torch.Tensor]) -> str:
        used = torch.cat([index.flatten() for index in indices])
        found = used[used >= 0].unique().tolist()
        names = [
            self._records.name(index) if self._records is not None and self.model.training else str(index)
            for index in found
        ]
        return (
            f"the {what} of step {self.state.global_step} is not finite; its batch held {', '.join(names)}. The weights are those before "
            "this step: lower the learning rate, look at these samples, or resume from the last checkpoint."
        )

    def check_gradients(self) -> None:
        """Called before each optimizer step.

        Raises:
            FloatingPointError: a gradient that is not finite, with the samples of the step.
        """
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        indices, self._samples_of_step = self._samples_of_step, []
        norms = [g.to_local() if hasattr(g, "to_local") else g for g in gradients]
        if norms and not bool(torch.stack([n.float() for n in torch._foreach_norm(norms)]).isfinite().all()):
            raise FloatingPointError(self._blame("gradient", indices))

    def _accumulate(
        self, training: bool, losses: Losses, own: torch.Tensor, counts: torch.Tensor, inputs: dict[str, torch.Tensor]
    ) -> None:
        """Keep the detached sums that the log is made of. Losses come as shares of means: undo that with the counts."""
        averaged = [0, 1, _AVERAGED_OVER[self.args.consistency_reduction]]
        labelled = counts[:2].sum(0, keepdim=True)
        per_loss = torch.stack([*losses.ar_G, losses.consistency, losses.kl]).detach() * torch.cat(
            [counts[averaged], labelled]
        )
        slots = (inputs["attention_mask"] > 0) if "attention_mask" in inputs else inputs["sample"] != PADDING
        others = torch.stack(
            [losses.agreeing, losses.judged, *own[averaged].float(), own[2].float(), slots.sum().float()]
        )
        values = torch.cat([per_loss, others.to(per_loss.dtype)]).double()
        former = self._sums[training]
        self._sums[training] = values if former is None else former + values

    def _metrics(self, training: bool) -> dict[str, float]:
        """Means since the last call, over all processes."""
        sums, self._sums[training] = self._sums[training], None
        if sums is None:
            return {}
        if self.args.world_size > 1:
            sums = self.accelerator.reduce(sums, "sum")
        ar, replay, consistency, kl, agreeing, judged, labels, replayed, averaged, pairs, slots = sums.tolist()
        parts = {
            "ar_loss": (ar, labels),
            **({"kl_loss": (kl, labels + replayed)} if self.args.kl_loss_weight else {}),
            "consistency_loss": (consistency, averaged),
            "agreement": (agreeing, judged),
            "replay_loss": (replay, replayed),
        }
        metrics = {name: value / count for name, (value, count) in parts.items() if count}
        metrics |= {"kept_positions": pairs, "slots": slots}
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds ar_loss, consistency_loss, replay_loss, kl_loss, agreement, kept positions, slots per second and peak memory."""
        if "loss" in logs:
            metrics = self._metrics(training=True)
            now = time.perf_counter()
            seconds, self._logged_at = now - self._logged_at, now
            if metrics:
                metrics["slots_per_second"] = metrics["slots"] / seconds
            metrics["peak_memory_gib"] = _peak_memory() / 2**30
            logs = {**logs, **{name: round(value, 6) for name, value in metrics.items()}}
        super().log(logs, start_time)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Adds the losses by name, and what decoding the evaluation prompts takes."""
        self._sums[False] = None
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        metrics = self._metrics(training=False)
        for name in ("ar_loss", "consistency_loss", "kl_loss", "agreement"):
            if name in metrics:
                output.metrics[f"{prefix}_{name}"] = metrics[name]
        output.metrics.update({f"eval_{name}": value for name, value in self._decoding_metrics().items()})
        return output

    def _decoding_metrics(self) -> dict[str, float]:
        """On every process, since sharded weights need them all; once, where several sets are evaluated with the same weights."""
        if self.args.decoding_config() is None or not self._eval_prompts:
            return {}
        return self._measured(self.accelerator.unwrap_model(self.model))

    def _measured(self, model: Any) -> dict[str, float]:
        config = self.args.decoding_config()
        # Fused optimizers do not count up the versions.
        weights = (self.state.global_step, sum(parameter._version for parameter in self.model.parameters()))
        if self._decoded is not None and self._decoded[0] == weights:
            return self._decoded[1]
        was_training, limit = model.training, self.args.eval_max_new_tokens
        model.eval()
        metrics = {}
        for name, prompts in self._eval_prompts.items():
            chosen = list(prompts)[: self.args.eval_prompt_count]
            report = measure_decoding(model, chosen, config, limit)
            same = [a == b for a, b in zip(report.outputs, ordinary_outputs(model, chosen, limit), strict=True)]
            label = f"{name}_" if name else ""
            metrics[f"{label}tokens_per_forward"] = report.tokens_per_forward
            metrics[f"{label}identical"] = sum(same) / len(chosen)
        model.train(was_training)
        self._decoded = (weights, metrics)
        return metrics

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`; `resume_from_checkpoint=True` takes the last checkpoint that was finished, and none is no error."""
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_finished_checkpoint(self.args.output_dir)
        self._logged_at = time.perf_counter()
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """A plain checkpoint whose generation config carries the decoding knobs, with the key/value cache switched on again."""
        base = base_of(self.accelerator.unwrap_model(self.model))
        training, base.config.use_cache = base.config.use_cache, True
        try:
            super().save_model(output_dir, _internal_call)
        finally:
            base.config.use_cache = training
        if (
            base is not self.model and self.args.should_save
        ):  # an adapter is saved without its model's generation config
            base.generation_config.save_pretrained(output_dir or self.args.output_dir)


def _peak_memory() -> int:
    """Bytes: allocated on the device, or resident where there is none."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _targets(inputs: dict[str, torch.Tensor], counts: torch.Tensor, args: JacobiForcingConfig) -> Targets:
    """Labels, teachers, and weights that make each loss a mean over the accumulated batch."""
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


class _GradientGuard(TrainerCallback):
    def __init__(self, trainer: JacobiForcingTrainer) -> None:
        self._trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.check_gradients()


def last_finished_checkpoint(output_dir: str | Path) -> str | None:
    """The newest `checkpoint-N` of a folder whose last file, the trainer's state, is there and whole."""
    finished = {}
    for folder in Path(output_dir).glob("checkpoint-*"):
        try:
            json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
            finished[int(folder.name.removeprefix("checkpoint-"))] = str(folder)
        except (ValueError, OSError):
            logger.warning("%s is not a finished checkpoint: it is passed over", folder)
    return finished[max(finished)] if finished else None


def check_devices(args: JacobiForcingConfig) -> None:
    """One GPU for each process: what `Trainer` would do with more (DataParallel) is not served."""
    if args.n_gpu > 1:
        raise ValueError(
            f"one process sees {args.n_gpu} GPUs: start one process per GPU with `accelerate launch`, or show it one GPU."
        )


def _collator(
    base: PreTrainedModel, args: JacobiForcingConfig, tokenizer: PreTrainedTokenizerBase | None
) -> JacobiForcingCollator:
    """The collator that the config and the special ids of model or tokenizer ask for."""
    ends, pad = (
        special_ids(base.generation_config, name) or special_ids(tokenizer, name)
        for name in ("eos_token_id", "pad_token_id")
    )
    if not ends:
        logger.warning(
            "neither model nor tokenizer has an eos_token_id: answers are taken to end with their last block."
        )
    return JacobiForcingCollator(
        block_size=args.block_size,
        eos_token_ids=ends,
        pad_token_id=(pad or ends or (0,))[0],
        layout=args.layout,
        context=args.context,
        window=args.context_window,
        max_length=args.max_length,
        prompt_loss=args.prompt_loss,
        noisy=args.consistency_loss_weight > 0,
        pad_to_multiple_of=128 if attention_of(base.config) == "flex_attention" else None,
    )


def _check_use(
    args: JacobiForcingConfig, replay_dataset: Any, ref_model: Any, eval_prompts: Any, eval_dataset: Any
) -> None:
    """Settings and data of which nothing would come."""
    has_replay = replay_dataset is not None
    pulls = args.kl_loss_weight and ref_model is not None  # towards another model; towards itself it only holds
    if eval_prompts and eval_dataset is None:
        raise ValueError("eval_prompts are decoded when eval_dataset is evaluated, and there is none: give one.")
    if not (args.ar_loss_weight or args.consistency_loss_weight or (args.replay_loss_weight and has_replay) or pulls):
        raise ValueError(
            "ar_loss_weight, consistency_loss_weight and replay_loss_weight leave nothing to train on"
            + (" but the KL divergence, which starts at 0 and stays there." if args.kl_loss_weight else ".")
        )
    if has_replay and args.replay_ratio and not (args.replay_loss_weight or args.kl_loss_weight):
        raise ValueError(
            "replay_dataset is given, but replay_loss_weight=0 and kl_loss_weight=0: nothing would be learnt from it. "
            "Give one of them a weight, or leave the dataset out."
        )


def _check_model(model: Any, args: JacobiForcingConfig) -> None:
    """What the losses could not be right for."""
    config = base_of(model).config.get_text_config(decoder=True)
    for name, neutral in (
        ("final_logit_softcapping", None),
        ("logits_scaling", 1),
        ("logit_scale", 1),
        ("output_router_logits", False),
    ):
        value = getattr(config, name, neutral)
        if value not in (neutral, None):
            raise ValueError(
                f"the model's {name}={value!r} changes logits or loss behind the LM head, which JacobiForcingTrainer does not do."
            )
    if any(p.requires_grad and p.dtype in (torch.bfloat16, torch.float16) for p in base_of(model).parameters()):
        logger.warning(
            "the model's own weights are in half precision: small updates are rounded away. Load it with dtype=float32 and train with "
            "bf16=True (sharded training that keeps float32 copies is fine)."
        )
    attention = attention_of(config)
    if args.layout == "packed" and "flash" in attention:
        raise ValueError(
            f"layout='packed' needs a mask of its own, which attn_implementation={attention!r} does not take: load the model with "
            "attn_implementation='sdpa' or 'flex_attention', or use layout='rows' with context='noisy' or 'window'."
        )


def _check_reference(ref_model: Any, base: Any) -> None:
    """What KL could not be measured from."""
    if ref_model is base:
        raise ValueError("ref_model is the model that is trained; give a copy of it, or leave ref_model out.")
    for what, of in (("vocabulary", _vocabulary), ("attn_implementation", lambda m: attention_of(m.config))):
        if of(ref_model) != of(base):
            raise ValueError(
                f"ref_model's {what} is {of(ref_model)!r}, the model's {of(base)!r}: they have to be the same."
            )


def _with_adapter(model: Any, args: JacobiForcingConfig, peft_config: PeftConfig | None) -> Any:
    if peft_config is None:
        return model
    from peft import get_peft_model, prepare_model_for_kbit_training

    if getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False):
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=bool(args.activation_checkpointing))
    elif args.activation_checkpointing:
        model.enable_input_require_grads()
    return get_peft_model(model, peft_config)


def _head_of(base: Any) -> torch.nn.Module:
    head = base.get_output_embeddings()
    if head is None:
        raise ValueError(
            f"{type(base).__name__} has no output embeddings: Jacobi Forcing trains causal language models."
        )
    return head


def _vocabulary(base: Any) -> int:
    return int(base.config.get_text_config(decoder=True).vocab_size)
