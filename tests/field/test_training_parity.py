"""Training beside the paper's code: recipes, optimizer steps, slots with a loss, the table of differences, float64."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
import yaml
from transformers import get_scheduler

from jacobi_hf.attention.interface import MaskBuilder
from jacobi_hf.cli._recipes import parse
from jacobi_hf.trainer import JacobiForcingConfig, JacobiForcingTrainer
from jacobi_hf.trainer.data.collator import JacobiForcingCollator
from jacobi_hf.trainer.data.collect_options import CollectConfig
from jacobi_hf.trainer.data.pack_options import PackConfig
from jacobi_hf.trainer.method_options import RunConfig
from tests.docs.pages import ROOT
from tests.helpers.models import fresh_model
from tests.helpers.records import END, records
from tests.trainer.forcing.test_losses import by_hand
from tests.trainer.forcing.test_trainer import N, config, forced

FOLLOWING = ("reference_n32", "qwen2.5_coder_7b", "qwen2.5_coder_7b_stage2")
OPTIMIZER = ("weight_decay", "max_grad_norm", "adam_beta1", "adam_beta2", "adam_epsilon")


def recipe(name):
    """Return the training arguments of a recipe, and its section for `collect`."""
    sections = yaml.safe_load((ROOT / f"examples/recipes/{name}.yaml").read_text(encoding="utf-8"))
    train = sections["train"] | {"use_cpu": True, "bf16": False}
    _, args = parse((RunConfig, JacobiForcingConfig), train, [], "train")
    return args, sections["collect"]


@pytest.mark.parametrize("name", FOLLOWING)
def test_recipes_follow_the_schedule_and_the_lengths_of_the_reference(name):
    """Somebody repeats the paper's run: the rate warms up over 3 % of the steps and falls along half a cosine."""
    args, collect = recipe(name)
    steps = 1000
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_scheduler(args.lr_scheduler_type, optimizer, args.get_warmup_steps(steps), steps)
    rates = []
    for _ in range(steps):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    wanted = [
        step / 30 if step < 30 else (1 + math.cos(math.pi * (step - 30) / (steps - 30))) / 2 for step in range(steps)
    ]
    assert rates == pytest.approx(wanted, abs=1e-9)
    assert collect["max_new_tokens"] == 1024


@pytest.mark.parametrize("name", FOLLOWING)
def test_an_optimizer_step_of_a_recipe_decays_weights_and_clips_nothing(tmp_path, name):
    """The reference builds `torch.optim.AdamW` itself, so it has torch's weight decay, and nothing clips gradients.

    Gradient descent shows both in one step; AdamW would hide the clipping, because it divides by the gradient's size.
    """
    args, _ = recipe(name)
    adamw = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], betas=(0.9, 0.95)).defaults
    assert (args.adam_beta1, args.adam_beta2) == adamw["betas"]
    assert (args.weight_decay, args.adam_epsilon) == (adamw["weight_decay"], adamw["eps"])
    rate = 1e-2
    options = {name: getattr(args, name) for name in OPTIMIZER} | {
        "context": args.context,
        "consistency_reduction": args.consistency_reduction,
        "ar_loss_weight": args.ar_loss_weight,
        "consistency_loss_weight": args.consistency_loss_weight,
        "learning_rate": rate,
        "per_device_train_batch_size": 1,
        "max_steps": 1,
    }
    (record,) = records(1, N, seed=3, blocks=3, ended=False)
    trainer = forced(tmp_path, [record], **options)
    model = fresh_model("qwen3")
    ar, consistency = by_hand(model, record, N, "noisy", None)
    share = 1 / 3 / len(consistency) if args.consistency_reduction == "reference" else 1 / 3
    (10 * sum(ar) / len(ar) + share * sum(consistency)).backward()
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters()))
    assert norm > 5 * JacobiForcingConfig(tmp_path, use_cpu=True).max_grad_norm
    for (of, stepped), parameter in zip(trainer.model.named_parameters(), model.parameters(), strict=True):
        decay = 0.01 if parameter.dim() > 1 else 0.0
        wanted = parameter - rate * (parameter.grad + decay * parameter)
        torch.testing.assert_close(stepped, wanted, rtol=1e-5, atol=1e-5, msg=of)


def test_the_ar_loss_of_an_accumulated_batch_is_a_mean_over_its_tokens(tmp_path):
    """A short and a long sample, accumulated: the reference averages within each sample, and then over samples."""
    data = [*records(1, N, seed=5, blocks=1, prompt=2, ended=False), *records(1, N, seed=6, blocks=4, ended=False)]
    options = {"ar_loss_weight": 1.0, "consistency_loss_weight": 0.0, "max_steps": 1}
    accumulated = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    trainer = forced(tmp_path, data, **options, **accumulated)
    logged = next(entry["ar_loss"] for entry in trainer.state.log_history if "ar_loss" in entry)
    terms = [by_hand(fresh_model("qwen3"), record, N, "clean", None)[0] for record in data]
    sums = [float(torch.stack(of).sum().detach()) for of in terms]
    of_tokens = sum(sums) / sum(map(len, terms))
    of_samples = sum(total / len(of) for total, of in zip(sums, terms, strict=True)) / len(terms)
    assert logged == pytest.approx(of_tokens, abs=1e-4)
    assert abs(of_samples - of_tokens) > 1e-2


@pytest.mark.parametrize("context", ["clean", "noisy"])
def test_the_consistency_loss_covers_a_block_from_its_first_wrong_slot_to_its_last(context):
    """The reference leaves out the last slot with the clean context; the paper's sum also has the right slots."""
    data = records(20, N, seed=8, ended=False)
    collator = JacobiForcingCollator(N, (END,), context=context, max_length=256)
    for record in data:
        taught = collator([record])["teacher"] >= 0
        body = record["complete_training_sequence_ids"][len(record["prompt_ids"]) :]
        blocks = [(body[start : start + N], body[start + N : start + 2 * N]) for start in range(0, len(body), 2 * N)]
        wrong = [[a != b for a, b in zip(noisy, clean, strict=True)] for noisy, clean in blocks]
        assert int(taught.sum()) == sum(N - of.index(True) for of in wrong if any(of))
    positions = collator([data[0]])
    offset = positions["position_ids"][positions["teacher"] >= 0] - len(data[0]["prompt_ids"])
    assert N - 1 in (offset % N).tolist()


def test_block_sum_divides_the_sum_from_the_first_wrong_slot_by_all_blocks(tmp_path):
    """A block without a wrong slot counts as a block, and adds nothing to the sum."""
    (record,) = records(1, N, seed=3, blocks=2, ended=False)
    start = len(record["prompt_ids"])
    body = record["complete_training_sequence_ids"]
    body[start : start + N] = body[start + N : start + 2 * N]
    options = {"context": "noisy", "consistency_reduction": "block_sum", "ar_loss_weight": 0.0}
    trainer = JacobiForcingTrainer(fresh_model("qwen3"), config(tmp_path, **options), [record])
    _, consistency = by_hand(trainer.model, record, N, "noisy", None)
    assert 0 < len(consistency) <= N
    loss = trainer.compute_loss(trainer.model, trainer.data_collator([record]))
    torch.testing.assert_close(loss, sum(consistency) / 2, rtol=1e-5, atol=1e-5)


def test_the_table_of_differences_names_keys_of_recipes(tmp_path):
    """A reader copies a key out of the table: a recipe takes it, and it differs from the default."""
    page = (ROOT / "docs/training.md").read_text(encoding="utf-8")
    table = page.split("## How this differs from the reference, and why")[1].split("\n## ")[0]
    given = dict(re.findall(r"`(\w+): ([\w.]+)`[^|`\n]*\|$", table, re.MULTILINE))
    assert len(given) == 11
    own = {name: yaml.safe_load(value) for name, value in given.items()}
    defaults = JacobiForcingConfig(tmp_path, use_cpu=True)
    known = {**vars(CollectConfig("m", "d", "o")), **vars(PackConfig(["s"], "o")), **vars(defaults)}
    assert own.keys() <= known.keys()
    assert not [name for name, value in own.items() if known[name] == value]
    train = {name: value for name, value in own.items() if hasattr(defaults, name)}
    _, args = parse((RunConfig, JacobiForcingConfig), {"output_dir": "o", "use_cpu": True, **train}, [], "train")
    assert {name: getattr(args, name) for name in train} == train


@pytest.mark.parametrize("layout", [("packed", "clean"), ("packed", "noisy"), ("rows", "noisy")], ids="-".join)
def test_float64_trains_with_eager_attention(tmp_path, layout):
    """Somebody checks gradients in float64, with the attention that needs no kernel: as with sdpa, no overflow."""
    data = records(8, N, seed=1)
    options = {"layout": layout[0], "context": layout[1], "kl_loss_weight": 1.0, "max_steps": 2}
    trained = []
    for attention in ("eager", "sdpa"):
        model = fresh_model("qwen3").double()
        model.set_attn_implementation(attention)
        trained.append(torch.cat([p.flatten() for p in forced(tmp_path, data, model, **options).model.parameters()]))
    assert trained[0].dtype == torch.float64
    torch.testing.assert_close(*trained, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_mask_of_eager_attention_is_in_the_models_dtype(dtype):
    """The lowest number of the model's own dtype stands where attention is forbidden, and 0 elsewhere."""
    model = fresh_model("qwen3")
    model.set_attn_implementation("eager")
    allowed = torch.tensor([[True, False], [True, True]])[None, None]
    mask = MaskBuilder(model.config, dtype)(lambda _: allowed, allowed.device)
    assert mask.dtype == dtype
    assert mask[0, 0].tolist() == [[0.0, torch.finfo(dtype).min], [0.0, 0.0]]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_float64_decodes_like_ordinary_generate(attention):
    """The same model decodes. Without padding, for which transformers' own eager attention gives NaN in float64."""
    model = fresh_model("qwen3").double()
    model.set_attn_implementation(attention)
    ids = torch.tensor([[6, 11, 5, 9, 4], [3, 8, 6, 7, 2]])
    options: dict[str, Any] = {"max_new_tokens": 40, "do_sample": False}
    assert model.generate(ids, **options, decoding="jacobi_multiblock").equal(model.generate(ids, **options))
