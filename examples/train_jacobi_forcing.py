# /// script
# requires-python = ">=3.11"
# dependencies = ["jacobi-hf[train]"]
# ///
"""Jacobi Forcing from prompts to a measured model, one command a stage, all of them from one recipe.

    python examples/train_jacobi_forcing.py collect  --config examples/recipes/tiny_qwen3_cpu.yaml
    python examples/train_jacobi_forcing.py pack     --config examples/recipes/tiny_qwen3_cpu.yaml
    python examples/train_jacobi_forcing.py train    --config examples/recipes/tiny_qwen3_cpu.yaml --learning_rate 3e-4
    python examples/train_jacobi_forcing.py evaluate --config examples/recipes/tiny_qwen3_cpu.yaml

A recipe has a section per stage with the names that `--help` of the stage lists; what follows on the command line comes before it.
`collect` may hold `sets`, a section of its own per set of prompts. Interrupted, `collect`, `pack` and `train` go on when they are
run again (`train` from its last checkpoint). On several GPUs, one process each:
`accelerate launch [--config_file examples/accelerate/fsdp.yaml] examples/train_jacobi_forcing.py ...`.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets.exceptions import DatasetGenerationError
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, TrainerCallback, set_seed

import jacobi_hf
from jacobi_hf.config import reject_misspelt
from jacobi_hf.results import Decoder, Measurement, Prompts, Results
from jacobi_hf.trainer import JacobiForcingConfig, JacobiForcingTrainer, load_packed
from jacobi_hf.trainer.collection import CollectConfig, collect
from jacobi_hf.trainer.evaluation import held_out_loss, measurements, prompt_ids, right_answers
from jacobi_hf.trainer.packing import PackConfig, pack_trajectories
from jacobi_hf.trainer.shards import ManifestError, differences, processes
from jacobi_hf.trainer.trainer import last_finished_checkpoint


@dataclass
class TrainData:
    """The model and the data of the training stage."""

    model: str = field(default="", metadata={"help": "Model name or path."})
    dtype: str = field(default="float32", metadata={"help": "dtype of the master weights."})
    attn_implementation: str | None = field(default=None, metadata={"help": "sdpa, flex_attention, ..."})
    train_dataset: str = field(default="", metadata={"help": "Packed records: folder, JSONL or parquet file, or Hub dataset."})
    streaming: bool = field(default=False, metadata={"help": "Read train_dataset while training."})
    eval_dataset: str | None = field(default=None, metadata={"help": "Packed records for evaluation."})
    replay_dataset: str | None = field(default=None, metadata={"help": "JSONL with text, messages or input_ids."})
    eval_prompts: str | None = field(default=None, metadata={"help": "JSON with prompts by domain, decoded at each evaluation."})
    ref_model: str | None = field(default=None, metadata={"help": "The frozen model of kl_loss_weight; model, if not given."})
    off_policy: bool = field(default=False, metadata={"help": "Train on trajectories of another model than `model`."})
    lora_r: int = field(
        default=0, metadata={"help": "Rank of a LoRA on all linear layers; 0 trains the model itself, or a drafter of rank 64."}
    )
    save_dtype: str = field(default="bfloat16", metadata={"help": "dtype of the finished model."})


@dataclass
class Evaluation:
    """What is measured of a model."""

    model: str = field(default="", metadata={"help": "Model name or path."})
    drafter: str | None = field(default=None, metadata={"help": "Folder or Hub repository of a drafter to decode with."})
    name: str | None = field(default=None, metadata={"help": "What the results call the model."})
    dtype: str = field(default="float32", metadata={"help": "dtype of the model; texts are compared token for token in float32."})
    output: str = field(default="", metadata={"help": "JSON file of the results."})
    prompts: str = field(default="", metadata={"help": "JSON with prompts by domain."})
    domains: str | None = field(default=None, metadata={"help": "Domains to measure, separated by commas."})
    prompt_count: int = field(default=64, metadata={"help": "Prompts of each domain."})
    max_new_tokens: int = field(default=128, metadata={"help": "New tokens per prompt."})
    decoders: dict[str, Any] = field(default_factory=dict, metadata={"help": "Knobs of each decoder, by name; in the recipe only."})
    held_out: str | None = field(default=None, metadata={"help": "JSONL with domain and text, for the held-out loss."})
    held_out_tokens: int = field(default=120_000, metadata={"help": "Tokens of each domain for that loss."})
    problems: str | None = field(default=None, metadata={"help": "JSONL with prompt and answer."})
    problem_domain: str = field(default="arithmetic", metadata={"help": "Domain that the problems belong to."})
    problem_count: int = field(default=1000, metadata={"help": "Problems to solve."})
    answer_pattern: str = field(default=r"The answer is (-?\d+)", metadata={"help": "Regular expression; group 1 is the answer."})


def parse(kinds: tuple[type, ...], section: dict[str, Any], arguments: list[str], stage: str) -> tuple[Any, ...]:
    """Dataclasses from a recipe's section and the command line, which comes first."""
    known = {f.name for kind in kinds for f in fields(kind)}
    unknown = sorted(section.keys() - known)
    if unknown:
        raise ValueError(f"the recipe's section {stage!r} has {', '.join(unknown)}, which {stage} does not know.")
    parser: Any = HfArgumentParser(kinds, prog=f"train_jacobi_forcing.py {stage}")
    parser.set_defaults(**section)
    for action in parser._actions:
        action.required = action.required and action.dest not in section
    return tuple(parser.parse_args_into_dataclasses(args=arguments))


def load(name: str, dtype: str, revision: str | None = None, **options: Any) -> tuple[Any, Any]:
    """Model and tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, revision=revision, **options)
    return model.eval(), tokenizer


def on_device(model: Any) -> Any:
    """The model on this process's GPU, where there is one."""
    return model.to(processes().device) if torch.cuda.is_available() else model


def run_collect(section: dict[str, Any], arguments: list[str]) -> None:
    sets = section.pop("sets", None) or {None: {}}
    if len(sets) > 1 and {"--output_dir", "--dataset", "--name"}.intersection(arguments):
        raise ValueError("the recipe has several sets, each with its own dataset, name and output_dir: change those in the recipe.")
    for name, own in sets.items():
        merged = {**section, **({"name": name} if name else {}), **own}
        (config,) = parse((CollectConfig,), merged, arguments, "collect")
        demand(config, "collect", "model", "dataset", "output_dir")
        model, tokenizer = load(config.model, config.dtype, config.revision)
        counts = collect(on_device(model), tokenizer, config)
        print(json.dumps({"set": config.name, **counts}))


def run_pack(section: dict[str, Any], arguments: list[str]) -> None:
    (config,) = parse((PackConfig,), section, arguments, "pack")
    demand(config, "pack", "sources", "output_dir")
    if processes().is_main_process:
        print(json.dumps(pack_trajectories(config)))


def read_jsonl(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").split("\n") if line]


class Run(TrainerCallback):
    """`run.json` beside the checkpoints: what the run was started with, and how long it has taken, interruptions left out.

    Raises:
        ValueError: the folder holds a run under other arguments.
    """

    def __init__(self, folder: str, started_with: dict[str, Any]) -> None:
        self._file, self._began = Path(folder) / "run.json", time.perf_counter()
        self.minutes_before = 0.0
        if self._file.is_file():
            former = json.loads(self._file.read_text(encoding="utf-8"))
            if differing := differences(former["started_with"], started_with):
                raise ValueError(
                    f"{folder} holds a run under other arguments ({'; '.join(differing)}): choose another output_dir, or delete that one."
                )
            self.minutes_before = former["minutes"]
        elif last_finished_checkpoint(folder):
            raise ValueError(f"{folder} holds checkpoints of another program: choose another output_dir.")
        self._started_with = started_with

    @property
    def minutes(self) -> float:
        """Since the run was first started."""
        return self.minutes_before + (time.perf_counter() - self._began) / 60

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The file is there before any checkpoint is."""
        if state.is_world_process_zero and not self._file.is_file():
            self._write()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the time with the checkpoint that it belongs to."""
        if state.is_world_process_zero:
            self._write()

    def _write(self) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        part = self._file.with_suffix(".part")
        part.write_text(json.dumps({"started_with": self._started_with, "minutes": self.minutes}, indent=1), encoding="utf-8")
        part.replace(self._file)


def same_model(name: str, other: str) -> bool:
    """Whether two names or paths mean one model."""
    return name == other or (Path(name).is_dir() and Path(other).is_dir() and Path(name).samefile(other))


def check_origin(data: TrainData) -> None:
    """A model is trained on its own trajectories, unless the caller says otherwise. Models are told apart by name or path.

    Raises:
        ValueError: packed records that were collected from another model; trajectories that are not packed yet.
    """
    manifest = Path(data.train_dataset) / "manifest.json"
    if data.off_policy or not manifest.is_file():
        return
    collected = json.loads(manifest.read_text(encoding="utf-8"))["settings"].get("of")
    if collected is None:
        raise ValueError(f"{data.train_dataset} holds trajectories: pack them first, and train on the folder that pack wrote.")
    others = sorted({one["model"] for one in collected.values() if not same_model(one["model"], data.model)})
    if others:
        raise ValueError(
            f"{data.train_dataset} was collected from {', '.join(others)}, and {data.model} is to be trained: collect and pack its own "
            "trajectories, or train on these all the same with --off_policy true."
        )


def started_with(data: TrainData, args: JacobiForcingConfig) -> dict[str, Any]:
    """Everything that decides what a run comes to, but for rounding."""
    other = (
        "per_device_train_batch_size", "gradient_accumulation_steps", "world_size", "max_steps", "num_train_epochs", "seed", "data_seed",
        "learning_rate", "warmup_steps", "optim", "optim_args", "weight_decay", "adam_beta1", "adam_epsilon", "max_grad_norm",
        "bf16", "fp16",
    )  # fmt: skip
    mine = {name: getattr(args, name) for name in (*JacobiForcingConfig.__annotations__, *other)}
    manifest = Path(data.train_dataset) / "manifest.json"
    packed = json.loads(manifest.read_text(encoding="utf-8"))["settings"] if manifest.is_file() else None
    return json.loads(json.dumps({**asdict(data), **mine, "packed": packed}, default=str))


def demand(config: Any, stage: str, *names: str) -> None:
    """Fail before any work where a field is missing that the stage cannot do without."""
    if missing := [name for name in names if not getattr(config, name)]:
        raise ValueError(
            f"{', '.join(missing)} missing: give {'it' if len(missing) == 1 else 'them'} in the recipe's section {stage!r} "
            f"or on the command line (--{missing[0]} ..)."
        )


def run_train(section: dict[str, Any], arguments: list[str]) -> None:
    data, args = parse((TrainData, JacobiForcingConfig), section, arguments, "train")
    demand(data, "train", "model", "train_dataset")
    check_origin(data)
    started = started_with(data, args)
    run, final = Run(args.output_dir, started), Path(args.output_dir) / "final"
    if (final / "forcing.json").is_file():
        print(f"{final} is finished already.")
        return
    set_seed(args.seed)
    options = {"attn_implementation": data.attn_implementation} if data.attn_implementation else {}
    model, tokenizer = load(data.model, data.dtype, **options)
    checks = {"block_size": args.block_size, "tokenizer": tokenizer, "on_bad_row": args.on_bad_row}
    prompts = {}
    if data.eval_prompts:
        by_domain = json.loads(Path(data.eval_prompts).read_text(encoding="utf-8"))["prompts"]
        prompts = {domain: [prompt_ids(tokenizer, text) for text in texts] for domain, texts in by_domain.items()}
    holds = args.kl_loss_weight and args.method == "full"
    ref_model = load(data.ref_model, data.dtype, **options)[0] if data.ref_model and holds else None
    peft_config = None
    if data.lora_r:
        from peft import LoraConfig

        alpha = data.lora_r if args.method == "gated" else 2 * data.lora_r
        peft_config = LoraConfig(r=data.lora_r, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = JacobiForcingTrainer(
        model=model, args=args, train_dataset=load_packed(data.train_dataset, streaming=data.streaming, **checks),
        eval_dataset=load_packed(data.eval_dataset, **checks) if data.eval_dataset else None, eval_prompts=prompts,
        replay_dataset=read_jsonl(data.replay_dataset) if data.replay_dataset else None, processing_class=tokenizer,
        peft_config=peft_config, ref_model=ref_model, callbacks=[run],
    )  # fmt: skip
    output = trainer.train(resume_from_checkpoint=True)
    report = {
        "command": " ".join(["train_jacobi_forcing.py", "train", *sys.argv[2:]]),
        "data": asdict(data),
        "arguments": {name: value for name, value in started.items() if name not in {*asdict(data), "packed"}},
        "packed": started["packed"],
        "batch": {"per_device": args.per_device_train_batch_size, "accumulation": args.gradient_accumulation_steps, "seed": args.seed},
        "slots": sum(entry.get("slots", 0) for entry in trainer.state.log_history),
        "minutes": round(run.minutes, 2), "threads": torch.get_num_threads(), "steps": trainer.state.global_step,
        "train_metrics": output.metrics, "log": trainer.state.log_history,
    }  # fmt: skip
    save_final(trainer, final, getattr(torch, data.save_dtype), report)
    if trainer.is_world_process_zero():
        print(json.dumps({"minutes": report["minutes"], "steps": report["steps"], "saved": str(final)}))


def save_final(trainer: JacobiForcingTrainer, final: Path, dtype: torch.dtype, report: dict[str, Any]) -> None:
    """The finished model, whole or not at all; an adapter is merged into its base. Of gated training, the drafter."""
    part = final.with_name("final.part")
    if trainer.args.method == "gated":
        trainer.save_model(str(part))
        return finish(trainer, part, final, report)
    if isinstance(trainer.model, PeftModel):
        trainer.model = trainer.model.merge_and_unload()
    trainer.model.to(dtype)  # on every process: a sharded model is gathered from all of them
    trainer.model.config.dtype = dtype
    trainer.save_model(str(part))
    return finish(trainer, part, final, report)


def finish(trainer: JacobiForcingTrainer, part: Path, final: Path, report: dict[str, Any]) -> None:
    """Give the finished folder its name."""
    if trainer.is_world_process_zero():
        (part / "forcing.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        shutil.rmtree(final, ignore_errors=True)
        part.rename(final)


def run_evaluate(section: dict[str, Any], arguments: list[str]) -> None:
    (config,) = parse((Evaluation,), section, arguments, "evaluate")
    demand(config, "evaluate", "model", "prompts", "output")
    by_domain = json.loads(Path(config.prompts).read_text(encoding="utf-8"))["prompts"]
    domains = config.domains.split(",") if config.domains else list(by_domain)
    if unknown := [domain for domain in domains if domain not in by_domain]:
        raise ValueError(f"{config.prompts} has no domain {', '.join(unknown)}; it has {', '.join(by_domain)}.")
    prompts = {domain: by_domain[domain][: config.prompt_count] for domain in domains}
    for knobs in config.decoders.values():
        reject_misspelt(knobs)
    decoders = {name: jacobi_hf.JacobiConfig(**knobs) for name, knobs in config.decoders.items()}
    model, tokenizer = load(config.model, config.dtype)
    model = on_device(model)
    if config.drafter:
        jacobi_hf.load_drafter(model, config.drafter)
    ordinary, measured = Decoder(name="generate", kind="generate"), []
    if config.held_out:
        texts = read_jsonl(config.held_out)
        for domain in domains:
            loss, tokens = held_out_loss(model, tokenizer, [t["text"] for t in texts if t["domain"] == domain], config.held_out_tokens)
            described = Prompts(domain=domain, source="held-out text", count=tokens, max_new_tokens=0)
            measured.append(Measurement(decoder=ordinary, prompts=described, held_out_loss=loss))
    if config.problems:
        problems = read_jsonl(config.problems)[: config.problem_count]
        quality = right_answers(model, tokenizer, problems, config.answer_pattern, config.max_new_tokens)
        described = Prompts(
            domain=config.problem_domain, source="held-out problems", count=len(problems), max_new_tokens=config.max_new_tokens
        )
        measured.append(Measurement(decoder=ordinary, prompts=described, quality=quality))
    measured += measurements(model, tokenizer, prompts, decoders, config.max_new_tokens, config.drafter)
    results = Results.start("Tokens per forward, held-out loss, right answers", model, config.name or config.model)
    trained = Path(config.drafter or config.model) / "forcing.json"
    report = json.loads(trained.read_text(encoding="utf-8")) if trained.is_file() else None
    training = None if report is None else {key: value for key, value in report.items() if key != "log"}
    results.model_copy(update={"measurements": measured, "training": training}).write(Path(config.output))
    for m in measured:
        tpf = (
            f" TPF {m.tokens_per_forward:.3f} (loop-free {m.tokens_per_forward_loop_free}) slots {m.mean_slots:.1f}"
            if m.tokens_per_forward
            else ""
        )
        equal = f" identical {m.agreement.identical}/{m.agreement.total}" if m.agreement else ""
        loss = f" loss {m.held_out_loss:.4f}" if m.held_out_loss is not None else ""
        right = f" exact match {m.quality.value:.3f} [{m.quality.low:.3f}, {m.quality.high:.3f}]" if m.quality else ""
        print(f"{m.prompts.domain:11s} {m.decoder.name:16s}{tpf}{equal}{loss}{right}")
    print(config.output)


STAGES = {"collect": run_collect, "pack": run_pack, "train": run_train, "evaluate": run_evaluate}


def main() -> None:
    arguments = sys.argv[1:]
    if not arguments or arguments[0] not in STAGES:
        sys.exit(f"usage: train_jacobi_forcing.py {{{','.join(STAGES)}}} [--config RECIPE.yaml] [--name value ...]")
    stage, rest = arguments[0], arguments[1:]
    recipe: dict[str, Any] = {}
    if rest[-1:] == ["--config"]:
        sys.exit("train_jacobi_forcing.py: --config needs the path of a recipe.")
    try:
        if "--config" in rest:
            at = rest.index("--config")
            recipe = yaml.safe_load(Path(rest[at + 1]).read_text(encoding="utf-8"))
            del rest[at : at + 2]
        STAGES[stage](dict(recipe.get(stage) or {}), rest)
    except (OSError, ManifestError, ValueError, DatasetGenerationError, yaml.YAMLError) as error:
        cause = f" ({error.__cause__})" if isinstance(error, DatasetGenerationError) else ""
        sys.exit(f"train_jacobi_forcing.py {stage}: {error}{cause}")
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # a process that leaves while another still sends makes that one abort
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
