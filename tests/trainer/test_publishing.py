"""What a trainer sends: plain safetensors, its card, its arguments; nothing of its own state, and no token."""

from __future__ import annotations

import json

import pytest
from huggingface_hub import ModelCard
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from jacobi_hf.drafts.lora import LoraDrafter
from jacobi_hf.drafts.lora_format import CONFIG_FILE, WEIGHTS_FILE
from jacobi_hf.hub_cards import push
from jacobi_hf.hub_cards.scan import FolderError
from jacobi_hf.results.schema import Results
from jacobi_hf.trainer import DrafterTrainer, JacobiForcingTrainer
from tests.helpers.models import fresh_model
from tests.helpers.records import records
from tests.hub_cards.folders import make
from tests.trainer.drafter.test_trainer import answers
from tests.trainer.drafter.test_trainer import config as drafter_config
from tests.trainer.forcing.test_trainer import N, config

TOKEN = "hf_" + "trainer" * 6
REPO = {"hub_model_id": "user/forced", "hub_token": TOKEN}
ABOUT = {"license": "apache-2.0", "base_model": "user/base", "datasets": ["user/code"]}


def tokenizer(tmp_path):
    """An object with a `save_pretrained` as tokenizers have it."""

    class Tokenizer:
        eos_token_id, pad_token_id = 1, 0

        def save_pretrained(self, folder):
            make(tmp_path / "tokenizer")
            for name in ("tokenizer.json", "tokenizer_config.json"):
                (tmp_path / "tokenizer" / name).replace(f"{folder}/{name}")

    return Tokenizer()


def trained(tmp_path, **options):
    extra = {name: options.pop(name) for name in ("peft_config", "model") if name in options}
    model = extra.pop("model", None) or fresh_model("qwen3")
    trainer = JacobiForcingTrainer(
        model,
        config(tmp_path, max_steps=2, **(REPO | options)),
        records(8, N, seed=1),
        processing_class=tokenizer(tmp_path),
        **extra,
    )
    trainer.train()
    return trainer


def files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_finished_run_becomes_a_repository(tmp_path, caplog):
    trainer = trained(tmp_path, save_strategy="steps", save_steps=1)
    pushed = trainer.push_to_hub("first", dry_run=tmp_path / "published", **ABOUT)
    assert pushed.repo_id == "user/forced"
    assert pushed.staged.kind == "model"
    assert "model.safetensors" in pushed.staged.summary()  # when the folder that it was staged from is gone
    folder = tmp_path / "published"
    assert files(folder) == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "custom_generate/generate.py",
        "custom_generate/requirements.txt",
        "results/results-1.json",
    }
    assert not (tmp_path / "out" / ".finished").exists()
    for path in folder.rglob("*"):
        assert not path.is_file() or not {TOKEN.encode(), str(tmp_path).encode()} & {
            word for word in (TOKEN.encode(), str(tmp_path).encode()) if word in path.read_bytes()
        }
    assert TOKEN not in caplog.text
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert all((a == b).all() for a, b in zip(model.parameters(), trainer.model.parameters(), strict=True))
    assert json.loads((folder / "generation_config.json").read_text())["decoding"] == "jacobi_multiblock"
    (stage,) = Results.read(folder / "results" / "results-1.json").training
    assert (stage.method, stage.base_model, stage.steps, stage.batch.per_device) == ("finetune", "user/base", 2, 4)
    assert (stage.learning_rate, stage.schedule, stage.optimizer, stage.lora_rank) == (2e-2, "constant", "sgd", None)
    assert (stage.data[0].source, stage.data[0].samples, stage.loss_weights.ar) == ("user/code", 8, 3.0)
    assert stage.slots > 0
    assert stage.loss > 0
    assert "hub_token" not in stage.arguments
    card = ModelCard.load(folder / "README.md")
    assert (
        card.data.to_dict().items()
        >= {"license": "apache-2.0", "base_model": "user/base", "datasets": ["user/code"]}.items()
    )
    assert "0.02" in card.content
    # The card alone is the same one.
    trainer.create_model_card(**ABOUT)
    assert (tmp_path / "out" / "README.md").read_text(encoding="utf-8") == (folder / "README.md").read_text(
        encoding="utf-8"
    )


def test_an_adapter(tmp_path):
    trainer = trained(
        tmp_path, peft_config=LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"]), optim="adamw_torch"
    )
    with pytest.raises(FolderError, match="say which with base_model"):
        trainer.push_to_hub(license="mit", dry_run=tmp_path / "published")
    pushed = trainer.push_to_hub(dry_run=tmp_path / "published", **ABOUT)
    assert pushed.staged.kind == "adapter"
    folder = tmp_path / "published"
    assert {"adapter_config.json", "adapter_model.safetensors", "generation_config.json", "README.md"} <= files(folder)
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "user/base"
    (stage,) = Results.read(folder / "results" / "results-1.json").training
    assert (stage.lora_rank, stage.optimizer) == (2, "adamw_torch")
    assert "pip install peft" in (folder / "README.md").read_text()  # ours, not the one that PEFT writes


def trained_drafter(tmp_path, **options):
    model = fresh_model("qwen3")
    trainer = DrafterTrainer(
        model=model,
        args=drafter_config(tmp_path / "out", max_steps=1, **REPO, **options),
        train_dataset=answers(model),
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"),
    )
    trainer.train()
    return trainer


def test_saving_a_drafter_pushes_it_where_the_arguments_say_so(tmp_path, monkeypatch):
    mine = trained_drafter(tmp_path, push_to_hub=True, hub_strategy="end")
    sent = []
    monkeypatch.setattr(
        "jacobi_hf.trainer.publishing.push_to_hub", lambda folder, repo_id, **_: sent.append((files(folder), repo_id))
    )
    monkeypatch.setattr("jacobi_hf.hub_cards.metadata._card_of", lambda base: ModelCard("---\nlicense: mit\n---\n"))
    mine._base().config._name_or_path = "user/base"
    mine.save_model()
    assert sent == [({CONFIG_FILE, WEIGHTS_FILE}, "user/forced")]
    assert {CONFIG_FILE, WEIGHTS_FILE} <= files(tmp_path / "out")


def test_a_drafter(tmp_path):
    mine = trained_drafter(tmp_path)
    pushed = mine.push_to_hub(dry_run=tmp_path / "published", **ABOUT)
    folder = tmp_path / "published"
    assert pushed.staged.kind == "drafter"
    assert files(folder) == {
        "README.md",
        CONFIG_FILE,
        WEIGHTS_FILE,
        "custom_generate/generate.py",
        "custom_generate/requirements.txt",
        "results/results-1.json",
    }
    assert (folder / "custom_generate" / "generate.py").read_text().endswith('generate = entry("drafter")\n')
    drafter = LoraDrafter.from_pretrained(folder)
    assert (drafter.config.base_model, drafter.config.r) == ("user/base", 4)
    (stage,) = Results.read(folder / "results" / "results-1.json").training
    assert (stage.method, stage.lora_rank, stage.strategy.schedule) == ("drafter", 4, "drafter")


def test_what_is_told_before_anything_is_saved(tmp_path):
    with pytest.raises(ValueError, match="hub_strategy='every_save' would send every checkpoint"):
        trained(tmp_path, push_to_hub=True)
    with pytest.raises(ValueError, match="which repository"):  # not after hours of training
        trained(tmp_path, push_to_hub=True, hub_strategy="end", hub_model_id=None)
    trainer = trained(tmp_path, hub_model_id=None)
    with pytest.raises(ValueError, match="which repository"):
        trainer.push_to_hub(**ABOUT)
    with pytest.raises(ValueError, match="license is missing"):
        trainer.push_to_hub(repo_id="user/x")
    assert not (tmp_path / "out" / ".finished").exists()


def test_saving_pushes_where_the_arguments_say_so(tmp_path, monkeypatch):
    """`save_model` of a trainer with push_to_hub=True, as in `Trainer`."""
    trainer = trained(tmp_path, push_to_hub=True, hub_strategy="end", hub_private_repo=True)
    sent = []
    monkeypatch.setattr(
        "jacobi_hf.trainer.publishing.push_to_hub",
        lambda folder, repo_id, **k: sent.append((files(folder), repo_id, k)),
    )
    trainer.model.config._name_or_path = "user/base"
    monkeypatch.setattr("jacobi_hf.hub_cards.metadata._card_of", lambda base: ModelCard("---\nlicense: mit\n---\n"))
    trainer.save_model()
    ((names, repo_id, arguments),) = sent
    assert "model.safetensors" in names
    assert repo_id == "user/forced"
    assert (arguments["private"], arguments["token"], arguments["commit_message"]) == (True, TOKEN, "Model save")
    assert arguments["card"].data.license == "mit"
    # And only the first process sends.
    monkeypatch.setattr(trainer, "is_world_process_zero", lambda: False)
    assert trainer.push_to_hub() is None
    assert trainer.create_model_card() is None
    assert len(sent) == 1
    assert push.push_to_hub is not None
