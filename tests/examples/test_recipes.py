"""Every recipe and accelerate config parses."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import yaml

from jacobi_hf import JacobiConfig
from jacobi_hf.cli._models import check_decoder
from jacobi_hf.cli._recipes import parse
from jacobi_hf.cli.bench import BenchConfig
from jacobi_hf.cli.card import CardOptions
from jacobi_hf.cli.eval import Evaluation
from jacobi_hf.trainer import DrafterConfig, JacobiForcingConfig
from jacobi_hf.trainer.data.collect_options import CollectConfig
from jacobi_hf.trainer.data.pack_options import PackConfig
from jacobi_hf.trainer.method_options import RunConfig
from jacobi_hf.trainer.run import config_class

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "examples" / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_section_of_a_recipe_parses(path):
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert recipe.keys() - {"eval", "card"} == {"collect", "pack", "train", "bench"}
    common = {k: v for k, v in recipe["collect"].items() if k != "sets"}
    folders = set()
    for name, own in recipe["collect"].get("sets", {"": {}}).items():
        (collected,) = parse((CollectConfig,), {**common, "name": name, **own}, [], "collect")
        folders.add(collected.output_dir)
    (packed,) = parse((PackConfig,), recipe["pack"], [], "pack")
    assert {source.split("=")[0] for source in packed.sources} == folders or "sets" not in recipe["collect"]
    section = {**recipe["train"], "use_cpu": True, "bf16": False}
    kind = config_class(section.get("method", "finetune"))
    run, args = parse((RunConfig, kind), section, [], "train")
    assert kind is DrafterConfig or args.block_size == collected.block_size
    assert run.train_dataset == packed.output_dir
    assert run.model == collected.model
    (evaluation,) = parse((BenchConfig,), recipe["bench"], [], "bench")
    assert (evaluation.drafter if kind is DrafterConfig else evaluation.model) == f"{args.output_dir}/final"
    assert kind is JacobiForcingConfig or evaluation.model == run.model
    assert {name: JacobiConfig(**knobs) for name, knobs in evaluation.decoders.items()}


def test_the_newcomers_recipe_evaluates_what_it_trains():
    path = ROOT / "examples" / "recipes" / "tiny_newcomer.yaml"
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    (evaluation,) = parse((Evaluation,), recipe["eval"], [], "eval")
    assert (evaluation.model, evaluation.drafter) == (recipe["bench"]["model"], recipe["bench"]["drafter"])
    assert all((ROOT / file).is_file() for file in (*evaluation.task_file, recipe["collect"]["dataset"]))
    for name, knobs in evaluation.decoders.items():
        check_decoder(name, knobs)
    words = [f"{recipe['train']['output_dir']}/final", "you/tiny-drafter"]
    (card,) = parse((CardOptions,), recipe["card"], words, "card")
    assert card.results == [recipe["bench"]["output"], recipe["eval"]["output"]]
    assert card.license


def test_every_control_of_the_drafter_parses():
    spec = importlib.util.spec_from_file_location("drafter_controls", ROOT / "examples/tiny_qwen3/drafter_controls.py")
    controls = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(controls)
    recipe = yaml.safe_load((ROOT / controls.RECIPE).read_text(encoding="utf-8"))
    for arguments in controls.VARIATIONS.values():
        section = {**recipe["train"], "use_cpu": True, "bf16": False}
        run, _ = parse((RunConfig, DrafterConfig), section, arguments.split(), "train")
        assert run.method == "drafter"


def test_every_ablation_parses_and_differs_from_the_others():
    spec = importlib.util.spec_from_file_location("ablations", ROOT / "examples/tiny_qwen3/ablations.py")
    ablations = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(ablations)
    recipe = yaml.safe_load((ROOT / ablations.RECIPE).read_text(encoding="utf-8"))
    train = {**recipe["train"], "use_cpu": True, "bf16": False}

    def settings(variation):
        (packed,) = parse((PackConfig,), recipe["pack"], variation.pack.split(), "pack")
        _, args = parse((RunConfig, JacobiForcingConfig), train, variation.train.split(), "train")
        parse(
            (CollectConfig,),
            recipe["collect"],
            ["--block_size", str(variation.second_stage or 16), *variation.collect.split()],
            "collect",
        )
        return str(
            (
                packed,
                variation.collect,
                variation.second_stage,
                args.max_steps,
                *(getattr(args, name) for name in args.own_arguments()),
            )
        )

    distinct = {settings(variation) for variation in ablations.VARIATIONS.values()}
    assert len(distinct) == len(ablations.VARIATIONS)


def test_a_recipe_has_the_options_of_the_published_run():
    """The options of the published Qwen3-1.7B run, in the recipe that follows it."""
    recipe = yaml.safe_load((ROOT / "examples/recipes/qwen3_1.7b.yaml").read_text(encoding="utf-8"))
    _, args = parse((RunConfig, JacobiForcingConfig), recipe["train"] | {"use_cpu": True, "bf16": False}, [], "train")
    (packed,) = parse((PackConfig,), recipe["pack"], [], "pack")
    assert (args.block_size, packed.noise_levels, packed.schedule, packed.max_blocks, packed.buckets) == (
        32,
        16,
        "progressive",
        3,
        "8-11",
    )
    assert (args.learning_rate, str(args.lr_scheduler_type), args.get_warmup_steps(1000)) == (
        5e-6,
        "SchedulerType.COSINE",
        30,
    )
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (1, 4)
    assert (args.ar_loss_weight, args.consistency_loss_weight, args.kl_loss_weight) == (10, 1, 0)


@pytest.mark.parametrize("path", sorted((ROOT / "examples" / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_configs_parse(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.num_processes == 4
    text = path.read_text(encoding="utf-8")
    assert "Never run" in text or "Not run on GPUs" in text
