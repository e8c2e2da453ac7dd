"""A training run from its arguments to the finished folder; interrupted, it goes on when it is started again."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, set_seed

from jacobi_hf.evaluation.decoding import prompt_ids
from jacobi_hf.io import read_jsonl, read_prompts_by_domain
from jacobi_hf.results.environment import Hardware
from jacobi_hf.resume import Progress
from jacobi_hf.trainer.data.loading import load_packed
from jacobi_hf.trainer.data.shards import MANIFEST, read_manifest
from jacobi_hf.trainer.forcing.config import JacobiForcingConfig
from jacobi_hf.trainer.forcing.trainer import JacobiForcingTrainer, last_finished_checkpoint
from jacobi_hf.trainer.options import option
from jacobi_hf.trainer.run_record import stages_of, training_facts

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass
class TrainData:
    """The model and the data of a run."""

    model: str = option("", "Model name or path.")
    dtype: str = option("float32", "dtype of the master weights.")
    attn_implementation: str | None = option(None, "sdpa, flex_attention, ...")
    train_dataset: str = option("", "Packed records: folder, JSONL or parquet file, or Hub dataset.")
    streaming: bool = option(False, "Read train_dataset while training.")
    eval_dataset: str | None = option(None, "Packed records for evaluation.")
    replay_dataset: str | None = option(None, "JSONL with text, messages or input_ids.")
    eval_prompts: str | None = option(None, "JSON with prompts by domain, decoded at each evaluation.")
    ref_model: str | None = option(None, "The frozen model of kl_loss_weight; model, if not given.")
    off_policy: bool = option(False, "Train on trajectories of another model than `model`.")
    lora_r: int = option(0, "Rank of a LoRA on all linear layers; 0 trains the model itself, or a drafter of rank 64.")
    save_dtype: str = option("bfloat16", "dtype of the finished model.")


@dataclass(frozen=True)
class Finished:
    """What became of a run.

    Attributes:
        folder: the finished model or drafter.
        steps, minutes: of the whole run, interruptions left out.
        before: it was finished already, and nothing was done.
    """

    folder: Path
    steps: int
    minutes: float
    before: bool = False


def train(data: TrainData, args: JacobiForcingConfig, command: str) -> Finished:
    """Train, and save what came of it as `final` in `args.output_dir`, with `forcing.json`: command, arguments, time and log.

    Args:
        command: how the run was started, for its record.

    Raises:
        ValueError, OSError: data, folder or arguments cannot be used, said before a step is made; a checkpoint could not be written.
    """
    check_origin(data)
    started, final = started_with(data, args), Path(args.output_dir) / "final"
    run = Run(args.output_dir, started)
    if (final / "forcing.json").is_file():
        former = json.loads((final / "forcing.json").read_text(encoding="utf-8"))
        return Finished(final, former["steps"], former["minutes"], before=True)
    set_seed(args.seed)
    trainer = _trainer(data, args, run)
    check_space(trainer, getattr(torch, data.save_dtype))
    try:
        output = trainer.train(resume_from_checkpoint=True)
    except RuntimeError as error:
        if "inline_container" not in str(error):  # of torch.save, where a write failed
            raise
        raise OSError(
            f"a checkpoint could not be written to {args.output_dir}: is the disk full? The same command goes on."
        ) from error
    arguments = {name: value for name, value in started.items() if name not in {*asdict(data), "packed"}}
    slots = sum(entry.get("slots", 0) for entry in trainer.state.log_history)
    stage = training_facts(
        args,
        base_model=data.model,
        train_dataset=data.train_dataset,
        packed=started["packed"],
        replay_dataset=data.replay_dataset,
        arguments=arguments,
        command=command,
        reference_model=data.ref_model,
        steps=trainer.state.global_step,
        epochs=trainer.state.epoch or 0.0,
        slots=slots,
        minutes=round(run.minutes, 2),
        weights_dtype=data.dtype,
        lora_rank=data.lora_r or (64 if args.method == "drafter" else None),
        threads=torch.get_num_threads(),
        hardware=Hardware.of(args.device),
        loss=output.training_loss,
    )
    report = {
        "training": [one.model_dump(exclude_none=True) for one in (*stages_of(data.model), stage)],
        "command": command,
        "data": asdict(data),
        "arguments": arguments,
        "packed": started["packed"],
        "batch": {
            "per_device": args.per_device_train_batch_size,
            "accumulation": args.gradient_accumulation_steps,
            "seed": args.seed,
        },
        "slots": slots,
        "minutes": stage.minutes,
        "threads": torch.get_num_threads(),
        "steps": stage.steps,
        "train_metrics": output.metrics,
        "log": trainer.state.log_history,
    }
    save_final(trainer, final, getattr(torch, data.save_dtype), report)
    return Finished(final, stage.steps, stage.minutes)


def _trainer(data: TrainData, args: JacobiForcingConfig, run: Run) -> JacobiForcingTrainer:
    """Files are read before weights are, so that what is wrong with them is said at once."""
    tokenizer = AutoTokenizer.from_pretrained(data.model)
    checks: dict[str, Any] = {"block_size": args.block_size, "tokenizer": tokenizer, "on_bad_row": args.on_bad_row}
    by_domain = read_prompts_by_domain(data.eval_prompts) if data.eval_prompts else {}
    prompts = {domain: [prompt_ids(tokenizer, text) for text in texts] for domain, texts in by_domain.items()}
    replay = read_jsonl(data.replay_dataset) if data.replay_dataset else None
    train_dataset = load_packed(data.train_dataset, streaming=data.streaming, **checks)
    eval_dataset = load_packed(data.eval_dataset, **checks) if data.eval_dataset else None
    peft_config = None
    if data.lora_r:
        from peft import LoraConfig

        alpha = data.lora_r if args.method == "drafter" else 2 * data.lora_r
        peft_config = LoraConfig(r=data.lora_r, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    options: dict[str, Any] = {"dtype": data.dtype}
    if data.attn_implementation:
        options["attn_implementation"] = data.attn_implementation
    holds = args.kl_loss_weight and args.method == "finetune"
    return JacobiForcingTrainer(
        model=AutoModelForCausalLM.from_pretrained(data.model, **options).eval(),
        args=args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        eval_prompts=prompts,
        replay_dataset=replay,
        processing_class=tokenizer,
        peft_config=peft_config,
        ref_model=AutoModelForCausalLM.from_pretrained(data.ref_model, **options).eval()
        if data.ref_model and holds
        else None,
        callbacks=[run],
    )


class Run(TrainerCallback):
    """The record of a training run, in `run.json` beside its checkpoints: its arguments, and its minutes at each checkpoint.

    Args:
        folder: the run's output_dir.
        started_with: arguments and data of the run, as plain JSON values.

    Raises:
        ValueError: the folder holds a run under other arguments, or checkpoints of another program.
    """

    def __init__(self, folder: str, started_with: Mapping[str, Any]) -> None:
        self._began = time.perf_counter()
        self._progress = Progress(Path(folder) / "run.json", started_with, place=folder, option="output_dir")
        if not self._progress.file.is_file() and last_finished_checkpoint(folder):
            raise ValueError(f"{folder} holds checkpoints of another program: choose another output_dir.")
        self._minutes_before = max((part["minutes"] for part in self._progress.parts.values()), default=0.0)

    @property
    def minutes(self) -> float:
        """Minutes that the run has taken, interruptions left out."""
        return self._minutes_before + (time.perf_counter() - self._began) / 60

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the file before there is any checkpoint."""
        if state.is_world_process_zero:
            self._progress.begin()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add a checkpoint, with the minutes up to it."""
        if state.is_world_process_zero:
            self._progress.add(f"checkpoint-{state.global_step}", {"minutes": self.minutes})


def same_model(name: str, other: str) -> bool:
    """Whether two names or paths mean one model."""
    return name == other or (Path(name).is_dir() and Path(other).is_dir() and Path(name).samefile(other))


def check_origin(data: TrainData) -> None:
    """A model is trained on its own trajectories, unless the caller says otherwise. Models are told apart by name or path.

    Raises:
        ValueError: packed records that were collected from another model; trajectories that are not packed yet.
    """
    packed = _packed_settings(data)
    if data.off_policy or packed is None:
        return
    collected = packed.get("of")
    if collected is None:
        raise ValueError(
            f"{data.train_dataset} holds trajectories: pack them first, and train on the folder that pack wrote."
        )
    others = sorted({one["model"] for one in collected.values() if not same_model(one["model"], data.model)})
    if others:
        raise ValueError(
            f"{data.train_dataset} was collected from {', '.join(others)}, and {data.model} is to be trained: collect and pack its own "
            "trajectories, or train on these all the same with --off_policy true."
        )


def started_with(data: TrainData, args: JacobiForcingConfig) -> dict[str, Any]:
    """Everything that decides what a run comes to, but for rounding."""
    other = (
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "world_size",
        "max_steps",
        "num_train_epochs",
        "seed",
        "data_seed",
        "learning_rate",
        "warmup_steps",
        "optim",
        "optim_args",
        "weight_decay",
        "adam_beta1",
        "adam_epsilon",
        "max_grad_norm",
        "bf16",
        "fp16",
    )
    mine = {name: getattr(args, name) for name in (*JacobiForcingConfig.__annotations__, *other)}
    plain: dict[str, Any] = json.loads(
        json.dumps({**asdict(data), **mine, "packed": _packed_settings(data)}, default=str)
    )
    return plain


def _packed_settings(data: TrainData) -> dict[str, Any] | None:
    """Return the settings of the folder that `pack` wrote, or None if the records have no manifest."""
    if not (Path(data.train_dataset) / MANIFEST).is_file():
        return None
    settings: dict[str, Any] = read_manifest(data.train_dataset)["settings"]
    return settings


def check_space(trainer: JacobiForcingTrainer, dtype: torch.dtype) -> None:
    """The disk has to hold a checkpoint (trained weights and two moments of each) and the finished model.

    Raises:
        ValueError: it does not.
    """
    parameters = list(trainer.model.parameters())
    trained = sum(p.numel() * p.element_size() for p in parameters if p.requires_grad)
    final = trained if trainer.args.method == "drafter" else sum(p.numel() for p in parameters) * dtype.itemsize
    needed = final + (0 if trainer.args.save_strategy == "no" else 3 * trained)
    folder = Path(trainer.args.output_dir).resolve()
    free = shutil.disk_usage(next(f for f in (folder, *folder.parents) if f.exists())).free
    if free < needed:
        raise ValueError(
            f"{trainer.args.output_dir} has room for {free / 1e9:.2f} GB, and a checkpoint and the finished model take "
            f"{needed / 1e9:.2f} GB: make room, or choose another output_dir."
        )


def save_final(trainer: JacobiForcingTrainer, final: Path, dtype: torch.dtype, report: Mapping[str, Any]) -> None:
    """The finished model, whole or not at all; an adapter is merged into its base. With method="drafter", the drafter."""
    part = final.with_name("final.part")
    if trainer.args.method != "drafter":
        if hasattr(trainer.model, "merge_and_unload"):
            trainer.model = trainer.model.merge_and_unload()
        trainer.model.to(dtype)  # on every process: a sharded model is gathered from all of them
        trainer.model.config.dtype = dtype
    trainer.save_model(str(part))
    if trainer.is_world_process_zero():
        (part / "forcing.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        shutil.rmtree(final, ignore_errors=True)
        part.rename(final)
