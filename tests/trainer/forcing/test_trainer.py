"""The trainer: equal to plain SFT where it must be, equal however a batch is cut, resumable, and it does learn."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

import jacobi_hf
from jacobi_hf.evaluation.decoding import measure_decoding, ordinary_outputs
from jacobi_hf.trainer import BadRecordError, JacobiForcingConfig, JacobiForcingTrainer
from tests.helpers.models import VOCAB, fresh_model
from tests.helpers.records import END, own_records, records
from tests.trainer.forcing.test_losses import by_hand

ROOT = Path(__file__).resolve().parents[3]
N = 4


def config(tmp_path, **options) -> JacobiForcingConfig:
    """Return arguments with plain SGD; Adam would turn the rounding of a gradient near 0 into a whole step."""
    defaults = {
        "output_dir": str(tmp_path / "out"),
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "block_size": N,
        "max_length": 128,
        "learning_rate": 2e-2,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_steps": 5,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "jacobi_block_size": N,
        "ar_loss_weight": 3.0,
        "replay_loss_weight": 3.0,
        "kl_loss_weight": 0.0,
        "replay_ratio": 1.0,
        "bf16": False,
        "weight_decay": 0.0,
    }
    return JacobiForcingConfig(**(defaults | options))


def forced(tmp_path, data, model=None, **options):
    """A trainer over `data`, and what it logged after training."""
    extra = {
        name: options.pop(name)
        for name in ("replay_dataset", "eval_dataset", "eval_prompts", "peft_config", "ref_model")
        if name in options
    }
    trainer = JacobiForcingTrainer(model or fresh_model("qwen3"), config(tmp_path, **options), data, **extra)
    trainer.train()
    return trainer


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def same_order(count):
    """Records that all have the same length, so that the order within a batch changes nothing but rounding."""
    return records(count, N, seed=3, blocks=2, prompt=5)


@pytest.mark.parametrize("accumulated", [2, 4])
def test_a_batch_of_4_equals_accumulated_smaller_ones(tmp_path, accumulated):
    data = records(20, N, seed=1)
    whole = forced(tmp_path, data)
    parts = forced(
        tmp_path, data, per_device_train_batch_size=4 // accumulated, gradient_accumulation_steps=accumulated
    )
    torch.testing.assert_close(weights(parts.model), weights(whole.model), rtol=1e-4, atol=1e-5)
    losses = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (whole, parts)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize("reduction", ["mean", "block_sum", "reference"])
def test_every_reduction_is_what_its_formula_says(tmp_path, reduction, views):
    """Mean over slots; mean over blocks of sums (paper, eq. 8); mean over samples of tau^2 / T times their mean."""
    tau, data = 1.7, records(5, N, seed=9, views=views)
    options = {
        "consistency_reduction": reduction,
        "distill_temperature": tau,
        "ar_loss_weight": 2.0,
        "consistency_loss_weight": 0.7,
    }
    model = fresh_model("qwen3")
    model.generation_config.eos_token_id = END
    trainer = JacobiForcingTrainer(model, config(tmp_path, **options), data)
    terms = [by_hand(trainer.model, record, N, "clean", None, tau) for record in data]
    blocks = [len(record["traj_position_indices"]) for record in data]
    expected = {
        "mean": sum(sum(c) for _, c in terms) / sum(len(c) for _, c in terms),
        "block_sum": sum(sum(c) for _, c in terms) / (views * sum(blocks)),
        "reference": sum(tau**2 / count * sum(c) / len(c) for (_, c), count in zip(terms, blocks, strict=True) if c)
        / len(data),
    }[reduction]
    ar = [term for of_record, _ in terms for term in of_record]
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(data))
    torch.testing.assert_close(loss, 2.0 * sum(ar) / len(ar) + 0.7 * expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "block_sum", "reference"])
def test_every_reduction_survives_accumulation(tmp_path, reduction):
    data = records(8, N, seed=2)
    whole = forced(tmp_path, data, max_steps=2, consistency_reduction=reduction, kl_loss_weight=0.5)
    parts = forced(
        tmp_path,
        data,
        max_steps=2,
        consistency_reduction=reduction,
        kl_loss_weight=0.5,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
    )
    torch.testing.assert_close(weights(parts.model), weights(whole.model), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_layouts_and_chunks_train_alike(tmp_path):
    data = records(20, N, seed=4)
    options = {"context": "window", "context_window": 2, "kl_loss_weight": 2.0}
    packed = forced(tmp_path, data, **options)
    rows = forced(tmp_path, data, layout="rows", **options)
    chunked = forced(tmp_path, data, loss_chunk_numbers=10 * VOCAB, **options)
    torch.testing.assert_close(weights(rows.model), weights(packed.model), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weights(chunked.model), weights(packed.model), rtol=1e-4, atol=1e-5)


def test_kl_is_measured_from_the_model_before_training(tmp_path):
    """Against a forward of the plain texts through both models."""
    data, replay = records(12, N, seed=4), [{"input_ids": [3, 5, 7, 9, 11]}]
    before = fresh_model("qwen3")
    trainer = forced(tmp_path, data, kl_loss_weight=1.0, max_steps=3, learning_rate=0.1, replay_dataset=replay)
    logged = [entry["kl_loss"] for entry in trainer.state.log_history if "kl_loss" in entry]
    assert logged[0] == pytest.approx(0, abs=1e-6)
    assert logged[-1] > 1e-3
    batch = [trainer.train_dataset[i] for i in (0, 1, 12)]
    inputs = trainer.data_collator(batch)
    trainer.model.eval()
    trainer.compute_loss(trainer.model, inputs)
    total, count = 0.0, 0
    for record in batch:
        ids, steps = record.get("input_ids"), None
        if ids is None:
            prompt, body = record["prompt_ids"], record["complete_training_sequence_ids"][len(record["prompt_ids"]) :]
            ids = prompt + [t for start in range(N, len(body), 2 * N) for t in body[start : start + N]]
        steps = len(ids) - 1
        with torch.no_grad():
            of_trained, of_base = (
                m(torch.tensor([ids])).logits[0, :steps].log_softmax(-1) for m in (trainer.model, before)
            )
        total, count = total + float((of_base.exp() * (of_base - of_trained)).sum()), count + steps
    assert trainer._held_out_metrics(None)["kl_loss"] == pytest.approx(total / count, rel=1e-4)


@pytest.mark.parametrize("given", ["adapter", "model"])
def test_kl_has_a_reference_of_its_own(tmp_path, given):
    """With an adapter, the base under it; the same gradients as with a copy of the base."""
    from peft import LoraConfig

    data = records(12, N, seed=4)
    adapter = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=True)
    torch.manual_seed(0)
    own = {} if given == "adapter" else {"ref_model": fresh_model("qwen3")}
    trainer = forced(tmp_path, data, kl_loss_weight=3.0, peft_config=adapter, learning_rate=0.1, **own)
    torch.manual_seed(0)
    copied = forced(
        tmp_path, data, kl_loss_weight=3.0, peft_config=adapter, learning_rate=0.1, ref_model=fresh_model("qwen3")
    )
    logged = [[entry["kl_loss"] for entry in t.state.log_history if "kl_loss" in entry] for t in (trainer, copied)]
    assert logged[0][-1] > 0
    assert logged[0] == pytest.approx(logged[1], rel=1e-4, abs=1e-7)
    assert trainer.model.training


@pytest.mark.slow
def test_compiling_changes_nothing(tmp_path, monkeypatch):
    """Both forwards, trained and frozen; traced only, which is what could go wrong here."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")  # TrainingArguments writes it and leaves it
    data = records(4, N, seed=3)
    plain = forced(tmp_path, data, kl_loss_weight=1.0, max_steps=2)
    compiled = forced(tmp_path, data, kl_loss_weight=1.0, max_steps=2, torch_compile_backend="eager")
    assert compiled._forward.ref_model._compiled_call_impl is not None
    torch.testing.assert_close(weights(plain.model), weights(compiled.model), atol=1e-6, rtol=1e-5)


def test_models_that_are_no_reference_are_refused(tmp_path):
    model, data = fresh_model("qwen3"), records(4, N, seed=4)
    with pytest.raises(ValueError, match="ref_model is the model that is trained"):
        JacobiForcingTrainer(model, config(tmp_path, kl_loss_weight=1.0), data, ref_model=model)
    other = fresh_model("qwen3")
    other.resize_token_embeddings(VOCAB + 3)
    with pytest.raises(ValueError, match=rf"ref_model's vocabulary is {VOCAB + 3}, the model's {VOCAB}"):
        JacobiForcingTrainer(model, config(tmp_path, kl_loss_weight=1.0), data, ref_model=other)
    assert all(p.requires_grad for p in model.parameters())


def test_gradient_checkpointing_changes_nothing(tmp_path):
    data = records(12, N, seed=4)
    plain, checkpointed = (
        forced(tmp_path, data, max_steps=3),
        forced(tmp_path, data, max_steps=3, activation_checkpointing=True),
    )
    torch.testing.assert_close(weights(checkpointed.model), weights(plain.model), rtol=1e-4, atol=1e-5)


def test_bf16_autocast_trains(tmp_path):
    """As float32 does, within bfloat16's three digits."""
    curves = []
    for bf16 in (False, True):
        trainer = forced(tmp_path, records(12, N, seed=4), max_steps=3, bf16=bf16)
        assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
        curves.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert curves[0] != curves[1]
    assert curves[0] == pytest.approx(curves[1], rel=2e-2)


def test_ar_part_alone_is_plain_sft(tmp_path):
    """Against transformers' Trainer on `prompt + answer`, its own loss, its own data collator."""
    data = records(12, N, seed=6, ended=True)
    ending = fresh_model("qwen3")
    ending.generation_config.eos_token_id = END
    mine = forced(tmp_path, data, model=ending, consistency_loss_weight=0.0, ar_loss_weight=1.0)
    texts = []
    for record in data:
        prompt, body = record["prompt_ids"], record["complete_training_sequence_ids"][len(record["prompt_ids"]) :]
        answer = [t for start in range(N, len(body), 2 * N) for t in body[start : start + N]]
        texts.append({"input_ids": prompt + answer[: answer.index(END) + 1]})
    model = fresh_model("qwen3")
    width = max(len(t["input_ids"]) for t in texts)
    rows = [
        {
            "input_ids": t["input_ids"] + [0] * (width - len(t["input_ids"])),
            "attention_mask": [1] * len(t["input_ids"]) + [0] * (width - len(t["input_ids"])),
            # No token predicts the first one; releases before 5.10 count its label all the same.
            "labels": [-100] + t["input_ids"][1:] + [-100] * (width - len(t["input_ids"])),
        }
        for t in texts
    ]
    args = TrainingArguments(
        output_dir=str(tmp_path / "sft"),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        learning_rate=2e-2,
        optim="sgd",
        lr_scheduler_type="constant",
        max_steps=5,
        logging_steps=1,
        per_device_train_batch_size=4,
        bf16=False,
        weight_decay=0.0,
        remove_unused_columns=False,
    )
    sft = Trainer(model, args, train_dataset=rows)
    sft.train()
    losses = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (sft, mine)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    torch.testing.assert_close(weights(mine.model), weights(model), rtol=1e-3, atol=1e-4)


def test_lora_leaves_the_base_untouched(tmp_path):
    from peft import LoraConfig

    base = fresh_model("qwen3")
    before = copy.deepcopy(base.state_dict())
    adapter = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = forced(tmp_path, records(12, N, seed=4), model=base, peft_config=adapter)
    learnt = [p for name, p in trainer.model.named_parameters() if "lora_B" in name]  # zero before training
    assert learnt
    assert all(p.detach().abs().max() > 0 for p in learnt)
    after = trainer.model.unload().state_dict()
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value, after[name]), name


@pytest.mark.parametrize("muon_learning_rate", [None, pytest.param(0.01, marks=pytest.mark.slow)])
def test_resuming_gives_the_same_curve(tmp_path, muon_learning_rate):
    data, replay = records(24, N, seed=8), [{"input_ids": list(range(2, 12))}, {"input_ids": list(range(5, 20))}]
    options = {"max_steps": 6, "replay_dataset": replay, "replay_ratio": 0.5, "lr_scheduler_type": "linear"}
    options["muon_learning_rate"] = muon_learning_rate

    def dropping(seed=0):
        """Draws random numbers in each forward, so that a generator which is not restored shows."""
        model = fresh_model("qwen3", seed=seed)
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.1
        return model

    whole = forced(tmp_path / "whole", data, model=dropping(), **options)

    class Interrupt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    first = JacobiForcingTrainer(
        dropping(),
        config(
            tmp_path / "cut",
            save_strategy="steps",
            save_steps=3,
            **{k: v for k, v in options.items() if k != "replay_dataset"},
        ),
        data,
        replay_dataset=replay,
        callbacks=[Interrupt()],
    )
    first.train()
    second = JacobiForcingTrainer(
        dropping(seed=9),
        config(tmp_path / "cut", **{k: v for k, v in options.items() if k != "replay_dataset"}),
        data,
        replay_dataset=replay,
    )
    second.train(resume_from_checkpoint=True)
    curves = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (whole, second)]
    assert len(curves[0]) == 6
    assert curves[0] == curves[1]
    assert torch.equal(weights(whole.model), weights(second.model))


def test_a_loss_that_is_not_finite_names_its_samples_and_spares_the_weights(tmp_path):
    model = fresh_model("qwen3")
    data = records(4, N, seed=4)
    trainer = JacobiForcingTrainer(model, config(tmp_path, per_device_train_batch_size=2), data)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    before = weights(model).clone()
    with pytest.raises(FloatingPointError, match=r"step 0 is not finite; its batch held random 0\.\d+"):
        trainer.train()
    torch.testing.assert_close(weights(model), before, equal_nan=True)


def test_the_checkpoint_is_plain_and_decodes_as_it_says(tmp_path):
    trainer = forced(tmp_path, records(8, N, seed=4), max_steps=1, jacobi_max_blocks=1)
    trainer.save_model(str(tmp_path / "saved"))
    written = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert written["architectures"] == ["Qwen3ForCausalLM"]
    assert written["use_cache"] is True
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    saved = jacobi_hf.JacobiConfig.from_generation_config(loaded.generation_config)
    assert saved == trainer.args.decoding_config()
    ids = torch.tensor([[3, 4, 5]])
    plain, jacobi = (loaded.generate(ids, max_new_tokens=12, do_sample=False, **d) for d in ({"decoding": None}, {}))
    assert torch.equal(plain, jacobi)


def test_evaluation_reports_losses_and_decoding(tmp_path):
    data, model = records(5, N, seed=5), fresh_model("qwen3")
    model.generation_config.eos_token_id = END
    trainer = forced(
        tmp_path,
        records(8, N, seed=4),
        model=model,
        max_steps=1,
        eval_dataset=data,
        eval_prompts={"own": [[3, 4, 5], [7, 8]]},
        eval_max_new_tokens=12,
        per_device_eval_batch_size=2,
    )
    metrics = trainer.evaluate()
    assert metrics["eval_own_identical"] == 1
    assert metrics["eval_own_tokens_per_forward"] >= 1
    terms = [by_hand(model.eval(), record, N, "clean", None) for record in data]
    for name, of_records in (
        ("ar", [t for ar, _ in terms for t in ar]),
        ("consistency", [t for _, c in terms for t in c]),
    ):
        assert metrics[f"eval_{name}_loss"] == pytest.approx(
            float(sum(of_records).detach()) / len(of_records), rel=1e-4
        )
    assert 0 <= metrics["eval_agreement"] <= 1
    before = metrics["eval_own_tokens_per_forward"]
    assert trainer.evaluate()["eval_own_tokens_per_forward"] == before
    with torch.no_grad():  # a model that says one word only is always guessed right
        model.get_output_embeddings().weight.zero_()
    assert trainer.evaluate()["eval_own_tokens_per_forward"] > before
    logged = [entry for entry in trainer.state.log_history if "ar_loss" in entry]
    assert {"consistency_loss", "agreement", "kept_positions", "slots_per_second"} <= logged[0].keys()


@pytest.mark.slow
def test_overfitting_eight_samples(tmp_path):
    """Guesses of a memorised text are accepted: agreement above 0.95, more than three tokens a forward."""
    model = fresh_model("qwen3")
    data = own_records(model, 8, 16, 32, visits=8)
    trainer = forced(
        tmp_path,
        data,
        model=model,
        max_steps=300,
        block_size=16,
        per_device_train_batch_size=16,
        optim="adamw_torch",
        learning_rate=5e-3,
        lr_scheduler_type="linear",
        logging_steps=10,
    )
    last = [entry for entry in trainer.state.log_history if "agreement" in entry][-1]
    assert last["agreement"] > 0.95
    prompts = [record["prompt_ids"] for record in data[:8]]
    config_ = jacobi_hf.JacobiConfig(
        jacobi_schedule="constant",
        jacobi_block_size=16,
        jacobi_max_blocks=1,
        jacobi_pool_size=0,
        jacobi_lookup_tokens=0,
    )
    model.eval()
    report = measure_decoding(model, prompts, config_, 32)
    assert report.tokens_per_forward > 3
    assert report.outputs == ordinary_outputs(model, prompts, 32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 1}, "block_size=1"),
        ({"context_window": 0}, "context_window=0"),
        ({"context": "any"}, "context='any'"),
        ({"context": "window"}, "needs a context_window"),
        ({"layout": "rows"}, "layout='rows' has no clean context"),
        ({"layout": "grid"}, "layout='grid'"),
        ({"consistency_reduction": "sum"}, "consistency_reduction='sum'"),
        ({"ar_loss_weight": -1.0}, "ar_loss_weight=-1"),
        ({"fp16": True}, "fp16=True"),
        ({"distill_temperature": 0.0}, "distill_temperature=0"),
        ({"remove_unused_columns": True}, "remove_unused_columns"),
        ({"jacobi_block_size": 1}, "jacobi_block_size=1"),
    ],
)
def test_bad_arguments_are_named(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)


def test_weights_that_leave_nothing_to_learn_are_refused(tmp_path):
    data, replay = records(3, N, seed=1), [{"input_ids": [3, 4, 5]}]
    none = {"ar_loss_weight": 0.0, "consistency_loss_weight": 0.0, "replay_loss_weight": 0.0}

    def made(given=None, **options):
        return JacobiForcingTrainer(fresh_model("qwen3"), config(tmp_path, **options), data, **(given or {}))

    with pytest.raises(ValueError, match=r"leave nothing to train on: give"):
        made(**none)
    with pytest.raises(ValueError, match="leave nothing to train on but the KL divergence"):
        made(**none, kl_loss_weight=4.0)
    made({"ref_model": fresh_model("qwen3", seed=1)}, **none, kl_loss_weight=4.0)
    with pytest.raises(ValueError, match="replay_dataset is given, but"):
        made({"replay_dataset": replay}, replay_loss_weight=0.0)
    made({"replay_dataset": replay}, replay_loss_weight=0.0, kl_loss_weight=4.0)
    with pytest.raises(ValueError, match="eval_prompts are decoded when"):
        made({"eval_prompts": {"own": [[3, 4]]}})


def test_data_that_cannot_be_trained_on_is_named(tmp_path):
    model = fresh_model("qwen3")
    with pytest.raises(BadRecordError, match=r"row 0 of train_dataset: its blocks have 6 tokens, but block_size=4"):
        JacobiForcingTrainer(model, config(tmp_path), records(3, 6, seed=1))
    foreign = records(3, N, seed=1)
    foreign[1]["prompt_ids"][0] = foreign[1]["complete_training_sequence_ids"][0] = VOCAB + 7
    with pytest.raises(BadRecordError, match=rf"row 1 .* id {VOCAB + 7} is outside the model's vocabulary of {VOCAB}"):
        JacobiForcingTrainer(model, config(tmp_path), foreign)
    assert len(JacobiForcingTrainer(model, config(tmp_path, on_bad_row="skip"), foreign).train_dataset) == 2
    with pytest.raises(ValueError, match=r"no record is left: 3 of 3 are longer than max_length=8"):
        JacobiForcingTrainer(model, config(tmp_path, max_length=8), records(3, N, seed=1))
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r"attn_implementation='flash_attention_2'.*use layout='rows'"):
        JacobiForcingTrainer(model, config(tmp_path), records(3, N, seed=1))


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What two gloo processes wrote that trained in every way, one after the other."""
    folder = tmp_path_factory.mktemp("two_processes")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, str(ROOT / "tests" / "helpers" / "distributed.py"), str(folder)]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return folder


@pytest.mark.slow
@pytest.mark.serial
@pytest.mark.parametrize("way", ["plain", "fsdp", "drafter"])
def test_two_processes_equal_one(two_processes, tmp_path, way):
    """Two processes with a batch of 2 each end at the weights of one process with a batch of 4; sharded by FSDP2 too.

    Those that train a drafter draw windows of their own: the drafter is moved as far as by one process.
    """
    from tests.helpers.distributed import train

    one, two = train(way, tmp_path), torch.load(two_processes / f"{way}.pt")
    assert (two["processes"], two["sharded"]) == (2, way == "fsdp")
    assert one["weights"].shape == two["weights"].shape
    if way == "drafter":
        torch.testing.assert_close(two["weights"].norm(), one["weights"].norm(), rtol=0.05, atol=0)
    else:
        torch.testing.assert_close(two["weights"], one["weights"], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.serial
def test_processes_know_of_each_other(two_processes):
    assert sorted(path.name for path in two_processes.glob("process *")) == ["process 0 of 2", "process 1 of 2"]


def test_a_streamed_dataset_trains(tmp_path):
    from datasets import Dataset

    data = Dataset.from_list(records(20, N, seed=1)).to_iterable_dataset()
    trainer = forced(tmp_path, data, replay_dataset=[{"input_ids": [3, 4, 5]}], max_steps=3)
    logged = [entry for entry in trainer.state.log_history if "ar_loss" in entry]
    assert len(logged) == 3
    assert "replay_loss" in logged[-1]
    broken = [*records(2, N), {**records(1, N)[0], "prompt_ids_len": 99}]
    with pytest.raises(BadRecordError, match="row 2 of train_dataset"):
        forced(tmp_path, Dataset.from_list(broken).to_iterable_dataset(), max_steps=3)


def test_replay_does_not_dilute_the_consistency_loss(tmp_path):
    data, replay = records(4, N, seed=2), [{"input_ids": [3, 4, 5]}]
    for reduction in ("mean", "block_sum", "reference"):
        losses = []
        for options in ({}, {"replay_dataset": replay, "replay_ratio": 1.0}):
            trainer = JacobiForcingTrainer(
                fresh_model("qwen3"),
                config(tmp_path, consistency_reduction=reduction, replay_ratio=options.get("replay_ratio", 1.0)),
                data,
                replay_dataset=options.get("replay_dataset"),
            )
            batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(trainer.train_dataset))])
            trainer.compute_loss(trainer.model.eval(), batch)
            losses.append(trainer._held_out_metrics(None)["consistency_loss"])
        assert losses[0] == pytest.approx(losses[1]), reduction


def test_a_gradient_that_is_not_finite_names_its_samples_and_spares_the_weights(tmp_path):
    model = fresh_model("qwen3")
    data = records(4, N, seed=4)
    trainer = JacobiForcingTrainer(model, config(tmp_path, per_device_train_batch_size=2, max_grad_norm=0.0), data)
    model.model.layers[1].mlp.up_proj.weight.register_hook(lambda gradient: gradient * float("inf"))
    before = weights(model).clone()
    with pytest.raises(
        FloatingPointError, match=r"gradient of step 0 is not finite; its batch held random 0\.\d+, random 0\.\d+\."
    ):
        trainer.train()
    assert torch.equal(weights(model), before)


def test_the_last_finished_checkpoint_is_resumed_from(tmp_path):
    from jacobi_hf.trainer.checkpoints import last_finished_checkpoint

    assert last_finished_checkpoint(tmp_path) is None
    for number in (2, 10, 9):
        (tmp_path / f"checkpoint-{number}").mkdir()
        (tmp_path / f"checkpoint-{number}" / "trainer_state.json").write_text("{}")
    (tmp_path / "checkpoint-11").mkdir()  # killed before its last file
    (tmp_path / "checkpoint-12").mkdir()
    (tmp_path / "checkpoint-12" / "trainer_state.json").write_text("{")
    assert last_finished_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    trainer = JacobiForcingTrainer(
        fresh_model("qwen3"), config(tmp_path, output_dir=str(tmp_path / "new")), records(4, N)
    )
    trainer.train(resume_from_checkpoint=True)  # nothing to resume from is no error


def test_models_whose_loss_would_be_wrong_are_refused(tmp_path):
    for name, value in (("final_logit_softcapping", 30.0), ("logits_scaling", 8.0), ("output_router_logits", True)):
        model = fresh_model("qwen3")
        setattr(model.config, name, value)
        with pytest.raises(ValueError, match=f"the model's {name}={value}"):
            JacobiForcingTrainer(model, config(tmp_path), records(4, N))
    with pytest.raises(TypeError, match="args is a TrainingArguments"):
        JacobiForcingTrainer(
            fresh_model("qwen3"), TrainingArguments(output_dir=str(tmp_path), use_cpu=True), records(4, N)
        )


def test_half_precision_weights_are_warned_of(tmp_path, caplog):
    JacobiForcingTrainer(fresh_model("qwen3").bfloat16(), config(tmp_path), records(4, N))
    assert "small updates are rounded away" in caplog.text


def test_several_evaluation_sets_are_decoded_once(tmp_path):
    trainer = forced(
        tmp_path,
        records(8, N, seed=4),
        max_steps=1,
        eval_dataset={"a": records(3, N, seed=5), "b": records(3, N, seed=6)},
        eval_prompts={"own": [[3, 4, 5]]},
        eval_max_new_tokens=8,
    )
    metrics = trainer.evaluate()
    assert {"eval_a_loss", "eval_b_loss", "eval_a_agreement", "eval_own_identical"} <= metrics.keys()
    assert not [name for name in metrics if name.startswith(("eval_a_own", "eval_b_own"))]
    from datasets import Dataset

    stream = Dataset.from_list(records(3, N)).to_iterable_dataset()
    with pytest.raises(ValueError, match="is streamed"):
        JacobiForcingTrainer(fresh_model("qwen3"), config(tmp_path), records(4, N), stream)


def test_flex_masks_know_sliding_layers(tmp_path):
    """The masks alone: FlexAttention has no backward on the CPU."""
    trainer = JacobiForcingTrainer(
        fresh_model("qwen3-sliding"), config(tmp_path, max_length=64), records(4, N, seed=4)
    )
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    dense = trainer.attention_mask(batch)
    trainer.model.config._attn_implementation = "flex_attention"
    blocks = trainer.attention_mask(batch)
    assert blocks.keys() == dense.keys() == {"full_attention", "sliding_attention"}
    index = torch.arange(batch["input_ids"].shape[1])
    for kind, mask in blocks.items():
        rule = mask.mask_mod
        row = torch.zeros((), dtype=torch.long)
        assert torch.equal(rule(row, row, index[:, None], index), dense[kind][0, 0])


def test_saved_decoding_follows_the_block_size(tmp_path):
    assert config(tmp_path, jacobi_block_size=None).decoding_config().jacobi_block_size == N
    assert config(tmp_path, decoding="none").decoding_config() is None
