"""`JacobiForcingTrainer`: transformers' `Trainer` with the losses of Jacobi Forcing."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sized
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch

from jacobi_hf.attention.interface import attention_of
from jacobi_hf.trainer.base import (
    BaseTrainer,
    check_eval_prompts,
    checked_arguments,
    evaluation_sets,
    loaded,
    output_head,
    vocabulary_size,
)
from jacobi_hf.trainer.data.answers import base_of, special_ids
from jacobi_hf.trainer.data.batch import counts_of
from jacobi_hf.trainer.data.collator import JacobiForcingCollator
from jacobi_hf.trainer.data.loading import StreamedRecords, TrainingRecords, checked
from jacobi_hf.trainer.data.replay import tokenized_replay
from jacobi_hf.trainer.forcing.checks import check_model, check_reference, check_weights
from jacobi_hf.trainer.forcing.config import JacobiForcingConfig
from jacobi_hf.trainer.forcing.forward import ForcingForward
from jacobi_hf.trainer.forcing.metrics import LossSums

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from contextlib import AbstractContextManager

    from peft import PeftConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


class JacobiForcingTrainer(BaseTrainer):
    """Trainer that finetunes a causal language model on its own Jacobi trajectories (arXiv 2512.14681).

    It is transformers' `Trainer`, so arguments that are not listed here go to that class.

    Example:
    ```python
    from jacobi_hf.trainer import JacobiForcingConfig, JacobiForcingTrainer, load_packed

    trainer = JacobiForcingTrainer(
        model="Qwen/Qwen3-1.7B",
        args=JacobiForcingConfig(output_dir="forced"),
        train_dataset=load_packed("build/packed"),
    )
    trainer.train()
    ```

    Args:
        model: a causal language model, or the name or path of one, which is then loaded in float32.
        args: a `JacobiForcingConfig`; without it, one with the defaults and an output folder named after the model.
        train_dataset: packed records, as a `datasets.Dataset`, an `IterableDataset` or a list (see `load_packed`).
        eval_dataset: packed records for the losses of an evaluation, or a dict of them by name.
        eval_prompts: lists of token ids, by name of their set. Each evaluation of `eval_dataset` decodes them, and
            reports tokens per forward and identity with ordinary decoding.
        replay_dataset: ordinary texts (`text`, `messages` or `input_ids`) that are mixed in against drift.
        processing_class: the tokenizer.
        peft_config: if given, an adapter is trained instead of the model.
        ref_model: the frozen model of the KL loss. Without it, the frozen model is a copy of `model`, or with an
            adapter the model without it. Each process holds all of it.
        kwargs: go to `Trainer`: `callbacks`, `optimizers`, `compute_metrics` and others.

    Raises:
        TypeError: `args` is no `JacobiForcingConfig`.
        ValueError: the data have another block size or vocabulary, the model cannot be trained this way, nothing would
            be learnt, or `eval_prompts` are given without an `eval_dataset`.
        FloatingPointError: while training, a loss or gradient is not finite; the message names the batch's samples.
            The weights are those before the step.
    """

    def __init__(
        self,
        model: PreTrainedModel | str,
        args: JacobiForcingConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        eval_prompts: Mapping[str, Sequence[Sequence[int]]] | None = None,
        replay_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        ref_model: PreTrainedModel | None = None,
        **kwargs: Any,
    ) -> None:
        args = checked_arguments(args, JacobiForcingConfig, model, "JacobiForcingTrainer")
        model = loaded(model, torch.float32)
        check_model(model, args)
        check_eval_prompts(eval_prompts, eval_dataset)
        check_weights(args, has_replay=replay_dataset is not None, has_ref_model=ref_model is not None)
        model = _with_adapter(model, args, peft_config)
        base = base_of(model)
        if ref_model is not None:
            check_reference(ref_model, base)
        elif args.kl_loss_weight and base is model:
            ref_model = copy.deepcopy(model)
        replay = None
        if replay_dataset is not None:
            replay = tokenized_replay(replay_dataset, processing_class, args.max_length, vocabulary_size(base))

        def for_evaluation(data: Any, name: str) -> TrainingRecords:
            records = _prepared(data, name, base, args)
            if not isinstance(records, TrainingRecords):
                raise ValueError(  # noqa: TRY004  (as for all data that cannot be used)
                    f"{name} is streamed; give one with a length (datasets.Dataset or a list of records)."
                )
            return records

        super().__init__(
            model,
            args,
            records=None if train_dataset is None else _prepared(train_dataset, "train_dataset", base, args, replay),
            eval_records=evaluation_sets(eval_dataset, for_evaluation),
            eval_prompts=eval_prompts,
            label_name="labels",
            data_collator=_collator(base, args, processing_class),
            processing_class=processing_class,
            **kwargs,
        )
        if ref_model is not None:
            ref_model.eval().requires_grad_(requires_grad=False).to(args.device)  # type: ignore[arg-type]
        if args.torch_compile:
            # Each batch has a length of its own. Compiled for the first one, the model would be compiled again for the
            # second.
            self.accelerator.state.dynamo_plugin.dynamic = True
            if ref_model is not None:
                ref_model.compile(backend=args.torch_compile_backend, mode=args.torch_compile_mode, dynamic=True)
        self._forward = ForcingForward(model, args, self.accelerator, ref_model)
        with_kl = bool(args.kl_loss_weight)
        self._training_sums = LossSums(args.consistency_reduction, with_kl=with_kl)
        self._evaluation_sums = LossSums(args.consistency_reduction, with_kl=with_kl)
        config = args.decoding_config()
        if config is not None and base.generation_config is not None:
            config.save_defaults(base)

    def _get_num_items_in_batch(
        self, batch_samples: list[dict[str, torch.Tensor]], device: torch.device
    ) -> torch.Tensor | None:
        """Return what each loss of the accumulated batch is averaged over (`batch.COUNTS`), over all processes."""
        if not batch_samples:
            return None
        return self._summed(torch.stack([counts_of(batch) for batch in batch_samples]).sum(0).to(device))

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        """Return the weighted sum of AR, replay, consistency and KL loss of a batch.

        Args:
            model: the model as the trainer wraps it.
            inputs: a batch of `JacobiForcingCollator`.
            return_outputs: whether to return a pair of the loss and a dict with it.
            num_items_in_batch: the counts of the accumulated batch, by which the losses are divided; those of this
                batch if None.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        args = self.args
        own = counts_of(inputs)
        counts = own if num_items_in_batch is None else num_items_in_batch
        losses, zero = self._forward.losses(model, inputs, counts)
        weight_G = losses.ar_G.new_tensor([args.ar_loss_weight, args.replay_loss_weight])
        loss = (
            losses.ar_G @ weight_G
            + args.consistency_loss_weight * losses.consistency
            + args.kl_loss_weight * losses.kl
            + zero
        )
        if model.training:
            self._samples_of_step.append(inputs["index"])
        self.check_finite(loss, inputs["index"])
        sums = self._training_sums if model.training else self._evaluation_sums
        sums.add(losses, own, counts, inputs)
        # The processes' gradients are averaged. What was divided by a count over all processes has to be summed.
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        return (loss, {"loss": loss.detach()}) if return_outputs else loss

    def attention_mask(self, inputs: Mapping[str, torch.Tensor]) -> Any:
        """Return the mask of a packed batch as the model's attention takes it."""
        return self._forward.attention_mask(inputs)

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        """Evaluate as `Trainer` does, and add the losses by name and the metrics of decoding `eval_prompts`."""
        self._evaluation_sums.clear()
        return super().evaluation_loop(dataloader, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save a plain checkpoint: its generation config has the decoding knobs, and its config asks for a cache."""
        base = self._base()
        training = base.config.use_cache
        base.config.use_cache = True
        try:
            super().save_model(output_dir, _internal_call)
        finally:
            base.config.use_cache = training
        is_adapter = base is not self.model  # it is saved without its model's generation config
        if is_adapter and self.args.should_save:
            base.generation_config.save_pretrained(output_dir or self.args.output_dir)

    def _base(self) -> Any:
        return base_of(self._trained_model())

    def _outside_of_muon(self) -> list[torch.nn.Module]:
        base = base_of(self.model)
        return [base.get_input_embeddings(), output_head(base)]

    def _training_metrics(self) -> dict[str, float]:
        return self._training_sums.means(self._summed)

    def _held_out_metrics(self, dataloader: Any) -> dict[str, float]:
        metrics = self._evaluation_sums.means(self._summed)
        logged = ("ar_loss", "consistency_loss", "kl_loss", "agreement")
        return {name: metrics[name] for name in logged if name in metrics}

    def _ready_to_decode(self) -> AbstractContextManager[PreTrainedModel]:
        return nullcontext(self._trained_model())


def _prepared(
    dataset: Any,
    name: str,
    base: PreTrainedModel,
    args: JacobiForcingConfig,
    replay: list[dict[str, list[int]]] | None = None,
) -> TrainingRecords | StreamedRecords:
    """Return records that are checked, fitted to `max_length` and mixed with replay."""
    records = checked(
        dataset, name, on_bad_row=args.on_bad_row, block_size=args.block_size, vocab_size=vocabulary_size(base)
    )
    kind = TrainingRecords if isinstance(records, Sized) else StreamedRecords
    return kind(records, args.max_length, args.too_long, replay, args.replay_ratio)


def _collator(
    base: PreTrainedModel, args: JacobiForcingConfig, tokenizer: PreTrainedTokenizerBase | None
) -> JacobiForcingCollator:
    """Return the collator, with the special ids of the model, or of the tokenizer if the model has none."""
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
        context_window=args.context_window,
        max_length=args.max_length,
        prompt_loss=args.prompt_loss,
        noisy=args.consistency_loss_weight > 0,
        pad_to_multiple_of=128 if attention_of(base.config) == "flex_attention" else None,
    )


def _with_adapter(model: Any, args: JacobiForcingConfig, peft_config: PeftConfig | None) -> Any:
    """Return the model with a new adapter on it, or the model itself without a `peft_config`."""
    if peft_config is None:
        return model
    from peft import get_peft_model, prepare_model_for_kbit_training

    if getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False):
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=bool(args.activation_checkpointing))
    elif args.activation_checkpointing:
        model.enable_input_require_grads()
    return get_peft_model(model, peft_config)
