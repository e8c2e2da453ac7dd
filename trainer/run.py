"""A training run from its arguments to the finished folder. Started again after an interruption, it goes on."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from jacobi_hf.io import read_jsonl
from jacobi_hf.prompts import encode_prompts, read_prompts_by_domain
from jacobi_hf.results.environment import Hardware
from jacobi_hf.trainer.data.loading import load_packed
from jacobi_hf.trainer.drafter.config import DrafterConfig
from jacobi_hf.trainer.drafter.trainer import DrafterTrainer
from jacobi_hf.trainer.forcing.config import JacobiForcingConfig
from jacobi_hf.trainer.forcing.trainer import JacobiForcingTrainer
from jacobi_hf.trainer.method_options import RunConfig, check_method
from jacobi_hf.trainer.run_checks import check_origin, check_space, check_use
from jacobi_hf.trainer.run_record import stages_of, training_facts
from jacobi_hf.trainer.run_state import RunState, decisive_arguments

if TYPE_CHECKING:
    from collections.abc import Mapping

    from jacobi_hf.results.training import Training
    from jacobi_hf.trainer.base import BaseTrainer
    from jacobi_hf.trainer.base_config import BaseConfig

CONFIGS: dict[str, type[BaseConfig]] = {kind.method: kind for kind in (JacobiForcingConfig, DrafterConfig)}
_DRAFTER_RANK = 64


@dataclass(frozen=True)
class FinishedRun:
    """Outcome of a run.

    Attributes:
        folder: the finished model or drafter.
        steps: optimizer steps of the whole run.
        minutes: time of the whole run, interruptions left out.
        was_finished: whether the run was finished before, so that nothing was done now.
    """

    folder: Path
    steps: int
    minutes: float
    was_finished: bool = False


def config_class(method: str) -> type[BaseConfig]:
    """Return the class of the arguments of a method.

    Raises:
        ValueError: there is no such method.
    """
    check_method(method)
    return CONFIGS[method]


def train(config: RunConfig, args: BaseConfig, command: str) -> FinishedRun:
    """Train, and save the result as `final` in `args.output_dir`, with a record of the run as `forcing.json`.

    Args:
        config: model, data and method.
        args: the arguments of that method, of the class `config_class(config.method)`.
        command: how the run was started, for its record.

    Raises:
        ValueError: data, folder or arguments cannot be used; raised before the first step.
        OSError: a file cannot be read, or a checkpoint cannot be written.
    """
    check_origin(config)
    check_use(config)
    arguments = decisive_arguments(config, args)
    state = RunState(args.output_dir, arguments)
    final = Path(args.output_dir) / "final"
    if (final / "forcing.json").is_file():
        former = json.loads((final / "forcing.json").read_text(encoding="utf-8"))
        return FinishedRun(final, former["steps"], former["minutes"], was_finished=True)
    set_seed(args.seed)
    trainer = build_trainer(config, args, state)
    dtype = getattr(torch, config.save_dtype)
    check_space(trainer, dtype)
    output = _train_or_explain(trainer)
    stage = _stage(config, trainer, arguments, command, state, output.training_loss)
    save_final(trainer, final, dtype, _report(config, trainer, arguments, stage, output.metrics))
    return FinishedRun(final, stage.steps, stage.minutes)


def _train_or_explain(trainer: BaseTrainer) -> Any:
    """Train from the last complete checkpoint on; turn torch's error of a failed write into one that says so."""
    try:
        return trainer.train(resume_from_checkpoint=True)
    except RuntimeError as error:
        if "inline_container" not in str(error):  # of torch.save, when a write failed
            raise
        raise OSError(
            f"a checkpoint could not be written to {trainer.args.output_dir}: is the disk full? "
            "The same command continues the run."
        ) from error


def build_trainer(config: RunConfig, args: BaseConfig, state: RunState) -> BaseTrainer:
    """Return the trainer of a run. Data are read before the model's weights, so that errors in them come at once."""
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    checks: dict[str, Any] = {
        "block_size": getattr(args, "block_size", None),
        "tokenizer": tokenizer,
        "on_bad_row": args.on_bad_row,
    }
    by_domain = read_prompts_by_domain(config.eval_prompts) if config.eval_prompts else {}
    replay = read_jsonl(config.replay_dataset) if config.replay_dataset else None
    options: dict[str, Any] = {
        "args": args,
        "eval_prompts": {
            domain: encode_prompts(texts, tokenizer, config.model) for domain, texts in by_domain.items()
        },
        "train_dataset": load_packed(config.train_dataset, streaming=config.streaming, **checks),
        "eval_dataset": load_packed(config.eval_dataset, **checks) if config.eval_dataset else None,
        "processing_class": tokenizer,
        "peft_config": _lora(config),
        "callbacks": [state],
        "model": _load(config, config.model),
    }
    if not isinstance(args, JacobiForcingConfig):
        return DrafterTrainer(**options)
    ref_model = _load(config, config.ref_model) if config.ref_model and args.kl_loss_weight else None
    return JacobiForcingTrainer(replay_dataset=replay, ref_model=ref_model, **options)


def _load(config: RunConfig, name: str) -> Any:
    attention = {"attn_implementation": config.attn_implementation} if config.attn_implementation else {}
    return AutoModelForCausalLM.from_pretrained(name, dtype=config.dtype, **attention).eval()


def _lora(config: RunConfig) -> Any:
    """Return the LoRA that is trained, with the usual scale of the method; None for the trainer's default."""
    if not config.lora_r:
        return None
    from peft import LoraConfig

    alpha = config.lora_r if config.method == "drafter" else 2 * config.lora_r
    return LoraConfig(r=config.lora_r, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")


def _stage(
    config: RunConfig,
    trainer: BaseTrainer,
    arguments: Mapping[str, Any],
    command: str,
    state: RunState,
    loss: float,
) -> Training:
    """Return what the run was, for results and model cards."""
    return training_facts(
        trainer.args,
        base_model=config.model,
        train_dataset=config.train_dataset,
        packed=arguments["packed"],
        replay_dataset=config.replay_dataset,
        arguments=_of_method(arguments),
        command=command,
        reference_model=config.ref_model,
        steps=trainer.state.global_step,
        epochs=trainer.state.epoch or 0.0,
        slots=_slots(trainer),
        minutes=round(state.minutes, 2),
        weights_dtype=config.dtype,
        lora_rank=config.lora_r or (_DRAFTER_RANK if config.method == "drafter" else None),
        threads=torch.get_num_threads(),
        hardware=Hardware.of(trainer.args.device),
        loss=loss,
    )


def _report(
    config: RunConfig,
    trainer: BaseTrainer,
    arguments: Mapping[str, Any],
    stage: Training,
    metrics: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the content of `forcing.json`: all stages of the model's training, and the record of this run."""
    args = trainer.args
    return {
        "training": [one.model_dump(exclude_none=True) for one in (*stages_of(config.model), stage)],
        "command": stage.command,
        "data": asdict(config),
        "arguments": _of_method(arguments),
        "packed": arguments["packed"],
        "batch": {
            "per_device": args.per_device_train_batch_size,
            "accumulation": args.gradient_accumulation_steps,
            "seed": args.seed,
        },
        "slots": _slots(trainer),
        "minutes": stage.minutes,
        "threads": torch.get_num_threads(),
        "steps": stage.steps,
        "train_metrics": metrics,
        "log": trainer.state.log_history,
    }


def _of_method(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a run without those of its `RunConfig`."""
    others = {*RunConfig.__dataclass_fields__, "packed"}
    return {name: value for name, value in arguments.items() if name not in others}


def _slots(trainer: BaseTrainer) -> Any:
    """Return the noisy slots, or draft slots, that the run has trained on."""
    return sum(entry.get("slots", 0) for entry in trainer.state.log_history)


def save_final(trainer: BaseTrainer, final: Path, dtype: torch.dtype, report: Mapping[str, Any]) -> None:
    """Save the finished model, or the drafter, completely or not at all. An adapter is merged into its model.

    Args:
        trainer: the trainer of the finished run.
        final: the folder to write.
        dtype: dtype of the model's weights.
        report: the content of `forcing.json`.
    """
    part = final.with_name("final.part")
    if trainer.args.method == "finetune":
        if hasattr(trainer.model, "merge_and_unload"):
            trainer.model = trainer.model.merge_and_unload()
        trainer.model.to(dtype)  # on every process: a sharded model is gathered from all of them
        trainer.model.config.dtype = dtype
    trainer.save_model(str(part))
    if trainer.is_world_process_zero():
        (part / "forcing.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        shutil.rmtree(final, ignore_errors=True)
        part.rename(final)
