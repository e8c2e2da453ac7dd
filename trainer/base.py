"""What `JacobiForcingTrainer` and `DrafterTrainer` share: optimizer, gradient check, logging, evaluation, resuming."""

from __future__ import annotations

import resource
import time
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback

from jacobi_hf.trainer.base_config import BaseConfig
from jacobi_hf.trainer.checkpoints import last_finished_checkpoint
from jacobi_hf.trainer.evaluation import DecodingEvaluation
from jacobi_hf.trainer.optimizer import muon_and_adamw
from jacobi_hf.trainer.publishing import Publishing

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from contextlib import AbstractContextManager

    from transformers import PreTrainedModel, PreTrainedTokenizerBase


Config = TypeVar("Config", bound=BaseConfig)


class BaseTrainer(Publishing, Trainer):
    """transformers' `Trainer` with what both training methods need.

    Subclasses give `compute_loss`, and may override the methods of the section "for subclasses".

    Args:
        model: the module that is trained.
        args: its arguments.
        records: the prepared training set, whose `name(index)` names a record in errors; None for evaluation only.
        eval_records: the prepared evaluation set, or a dict of them.
        eval_prompts: lists of token ids, by name of their set, that an evaluation decodes.
        label_name: a tensor that each batch has, by which `Trainer` knows that a batch has labels.
        kwargs: go to `Trainer`.
    """

    # compute_loss divides by the counts of the whole accumulated batch itself.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: torch.nn.Module,
        args: BaseConfig,
        *,
        records: Any,
        eval_records: Any,
        eval_prompts: Mapping[str, Sequence[Sequence[int]]] | None,
        label_name: str,
        data_collator: Any,
        processing_class: PreTrainedTokenizerBase | None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=records,
            eval_dataset=eval_records,
            processing_class=processing_class,
            **kwargs,
        )
        self.add_callback(_GradientCheck(self))
        self.label_names = [label_name]
        self._records = records
        self._samples_of_step: list[torch.Tensor] = []
        self._decoding = DecodingEvaluation(eval_prompts, args)
        self._logged_at = time.perf_counter()

    def _summed(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the sum of a tensor over all processes."""
        return self.accelerator.reduce(tensor, "sum") if self.args.world_size > 1 else tensor

    # --- for subclasses ---

    def _outside_of_muon(self) -> list[torch.nn.Module]:
        """Return the modules whose matrices AdamW trains even with `muon_learning_rate`."""
        return []

    def _training_metrics(self) -> dict[str, float]:
        """Return the metrics since the last call, over all processes; `slots` is one of them."""
        return {}

    def _held_out_metrics(self, dataloader: Any) -> dict[str, float]:
        """Return metrics of an evaluation set besides its loss, over all processes."""
        return {}

    def _ready_to_decode(self) -> AbstractContextManager[PreTrainedModel]:
        """Return a context whose value is the model that decodes the evaluation prompts."""
        raise NotImplementedError

    # --- what Trainer calls ---

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Create `Trainer`'s optimizer, or Muon and AdamW if `muon_learning_rate` is given."""
        rate = self.args.muon_learning_rate
        if rate is not None and self.optimizer is None:  # type: ignore[has-type]
            if self.is_fsdp_enabled or self.is_deepspeed_enabled:
                raise ValueError(
                    f"muon_learning_rate={rate} needs whole matrices, which FSDP and DeepSpeed split: leave it out "
                    "with them."
                )
            trained = model or self.model
            decayed = self.get_decay_parameter_names(trained)
            self.optimizer = muon_and_adamw(trained, self.args, rate, decayed, self._outside_of_muon())
        return super().create_optimizer(model)

    def check_finite(self, loss: torch.Tensor, index: torch.Tensor) -> None:
        """Raise a FloatingPointError that names the batch's records if the loss is not finite."""
        if not bool(torch.isfinite(loss.detach())):
            raise FloatingPointError(self._blame("loss", [index]))

    def check_gradients(self) -> None:
        """Raise a FloatingPointError that names the step's records if a gradient is not finite."""
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        indices, self._samples_of_step = self._samples_of_step, []
        norms = [g.to_local() if hasattr(g, "to_local") else g for g in gradients]
        if norms and not bool(torch.stack([n.float() for n in torch._foreach_norm(norms)]).isfinite().all()):
            raise FloatingPointError(self._blame("gradient", indices))

    def _blame(self, what: str, indices: list[torch.Tensor]) -> str:
        used = torch.cat([index.flatten() for index in indices])
        found = used[used >= 0].unique().tolist()
        is_named = self._records is not None and self.model.training
        names = [self._records.name(index) if is_named else str(index) for index in found]
        return (
            f"the {what} of step {self.state.global_step} is not finite; its batch held {', '.join(names)}. "
            "The weights are those before this step: lower the learning rate, look at these samples, or resume from "
            "the last checkpoint."
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log what `Trainer` logs, the method's own metrics, `slots_per_second` and `peak_memory_gib`."""
        if "loss" in logs:
            metrics = self._training_metrics()
            now = time.perf_counter()
            seconds = now - self._logged_at
            self._logged_at = now
            if metrics:
                metrics["slots_per_second"] = metrics["slots"] / seconds
            metrics["peak_memory_gib"] = _peak_memory_bytes() / 2**30
            logs = {**logs, **{name: round(value, 6) for name, value in metrics.items()}}
        super().log(logs, start_time)

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        """Evaluate as `Trainer` does, and add the method's own metrics and those of decoding `eval_prompts`."""
        output = super().evaluation_loop(dataloader, *args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        own = self._held_out_metrics(dataloader)
        output.metrics.update({f"{prefix}_{name}": value for name, value in own.items()})
        output.metrics.update({f"eval_{name}": value for name, value in self._decoding_metrics().items()})
        return output

    def _decoding_metrics(self) -> dict[str, float]:
        """Decode the evaluation prompts on every process, since sharded weights need all of them."""
        if not self._decoding:
            return {}
        # Fused optimizers do not count up the versions of the weights, so the step counts as well.
        version = (self.state.global_step, sum(parameter._version for parameter in self.model.parameters()))
        with self._ready_to_decode() as model:
            return self._decoding.metrics(model, version)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as `Trainer` does.

        Args:
            resume_from_checkpoint: a checkpoint to resume from. True takes the last complete one of `args.output_dir`,
                or starts anew if there is none.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_finished_checkpoint(self.args.output_dir)
        self._logged_at = time.perf_counter()
        return super().train(resume_from_checkpoint, *args, **kwargs)


class _GradientCheck(TrainerCallback):
    """Callback that checks the gradients of a trainer before each optimizer step."""

    def __init__(self, trainer: BaseTrainer) -> None:
        self._trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.check_gradients()


def _peak_memory_bytes() -> int:
    """Return the most bytes that were allocated on the GPU, or resident in memory without a GPU."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def checked_arguments(args: Any, kind: type[Config], model: Any, trainer: str) -> Config:
    """Return the arguments of a trainer, checked.

    Args:
        args: the arguments that were given. None takes the defaults, and an output folder named after the model.
        kind: the class that they must have.
        model: the model, or its name or path.
        trainer: the trainer's name, for errors.

    Raises:
        TypeError: `args` is of another class.
        ValueError: one process sees several GPUs, for which `Trainer` would use DataParallel.
    """
    if args is None:
        name = model if isinstance(model, str) else str(getattr(model.config, "_name_or_path", "") or "model")
        args = kind(output_dir=f"{name.rstrip('/').rpartition('/')[2]}-{kind.method}")
    if not isinstance(args, kind):
        raise TypeError(f"args is a {type(args).__name__}; {trainer} takes a {kind.__name__}.")
    if args.n_gpu > 1:
        raise ValueError(
            f"one process sees {args.n_gpu} GPUs: start one process for each GPU with `accelerate launch`, or let it "
            "see one GPU."
        )
    return args


def check_eval_prompts(eval_prompts: Any, eval_dataset: Any) -> None:
    """Raise a ValueError for evaluation prompts without an evaluation set, since nothing would decode them."""
    if eval_prompts and eval_dataset is None:
        raise ValueError("eval_prompts are decoded when eval_dataset is evaluated, and there is none: give one.")


def loaded(model: Any, dtype: Any) -> Any:
    """Return the model, loaded in `dtype` if it is given by name or path."""
    return AutoModelForCausalLM.from_pretrained(model, dtype=dtype) if isinstance(model, str) else model


def evaluation_sets(eval_dataset: Any, prepare: Callable[[Any, str], Any]) -> Any:
    """Return the prepared evaluation set, or a dict of prepared sets if `eval_dataset` is a dict."""
    if not isinstance(eval_dataset, dict):
        return None if eval_dataset is None else prepare(eval_dataset, "eval_dataset")
    sets = {name: prepare(data, f"eval_dataset {name}") for name, data in eval_dataset.items() if data is not None}
    return sets or None


def output_head(model: Any) -> torch.nn.Module:
    """Return the LM head of a model.

    Raises:
        ValueError: the model has none.
    """
    head: torch.nn.Module | None = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"{type(model).__name__} has no output embeddings: give a causal language model.")
    return head


def vocabulary_size(model: Any) -> int:
    """Return the number of ids that a model's embedding has rows for."""
    return int(model.config.get_text_config(decoder=True).vocab_size)
