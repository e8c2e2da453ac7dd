"""Which files of a folder are sent, which are left out, and what stops a push."""

from __future__ import annotations

import io
import json
import pickle
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from jacobi_hf.hub_cards.folder import stage
from jacobi_hf.hub_cards.scan import FolderError
from jacobi_hf.hub_cards.single_file import REQUIREMENTS, build
from jacobi_hf.results.schema import Results
from tests.helpers.tiny import EXAMPLE
from tests.hub_cards.folders import CARD, KINDS, make, weights

RESULTS = EXAMPLE.parent / "benchmarks" / "results" / "forcing" / "forced-seed42.json"
SECRET = "hf_" + "Q7" * 17


def saved_by_torch():
    file = io.BytesIO()
    torch.save({"w": torch.zeros(1)}, file)
    return file.getvalue()


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_becomes_a_repository(tmp_path, kind):
    folder = make(tmp_path / "run", kind)
    extra = (
        "LICENSE",
        "chat_template.jinja",
        "run.json",
        "notes.txt",
        "training_args.bin",
        "checkpoint-5/optimizer.pt",
        "runs/x/events.1",
    )
    for name in extra:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    (folder / "curve.png").write_bytes(b"\x89PNG")
    config, _, weights_file = KINDS[kind]
    staged = stage(folder, results=[RESULTS, Results.read(RESULTS)], plots=[folder / "curve.png"])
    assert staged.kind == kind
    target = staged.write(tmp_path / "made" / "repository")
    assert {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()} == {
        "README.md",
        config,
        weights_file,
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
        "LICENSE",
        "custom_generate/generate.py",
        "custom_generate/requirements.txt",
        "results/forced-seed42.json",
        "results/results-2.json",
        "plots/curve.png",
    }
    for name in (config, weights_file, "README.md", "generation_config.json"):
        assert (target / name).read_bytes() == (folder / name).read_bytes()
    assert Results.read(target / "results" / "forced-seed42.json") == Results.read(
        target / "results" / "results-2.json"
    )
    made_for = ("drafter", "user/base") if kind == "drafter" else ("model", None if kind == "model" else "user/base")
    assert (target / "custom_generate" / "generate.py").read_text(encoding="utf-8") == build(*made_for)
    assert (target / "custom_generate" / "requirements.txt").read_text().split() == list(REQUIREMENTS)
    assert staged.left_out == {
        "checkpoint-5/": "never sent",
        "runs/": "never sent",
        "training_args.bin": "state of the trainer",
        "run.json": "not part of a model",
        "notes.txt": "not part of a model",
        "curve.png": "not part of a model",
    }
    summary = staged.summary()
    assert all(name in summary for name in (*staged.files, *staged.left_out))
    # What was written is a folder to publish itself, and the same one.
    again = stage(target)
    assert again.left_out == {}
    assert {
        name: again.write(tmp_path / "again") and (tmp_path / "again" / name).read_bytes() for name in ("README.md",)
    }
    assert again.files.keys() == staged.files.keys()


def test_nothing_is_written_over(tmp_path):
    staged = stage(make(tmp_path / "run"))
    (tmp_path / "there").mkdir()
    staged.write(tmp_path / "there")
    with pytest.raises(FolderError, match="there already exists"):
        staged.write(tmp_path / "there")
    staged.files["config.json"] = tmp_path / "gone"
    with pytest.raises(FileNotFoundError):
        staged.write(tmp_path / "other")
    assert {path.name for path in tmp_path.iterdir()} == {"run", "there"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("pytorch_model.bin", "x", "pytorch_model.bin is pickled"),
        ("original/consolidated.00.PTH", "x", "original/consolidated.00.PTH is pickled"),
        ("last.ckpt", "x", "last.ckpt is pickled"),
        ("a/data.pkl", "x", "a/data.pkl is pickled"),
        (".env", "A=b", ".env looks like a secret"),
        ("deploy/server.PEM", "x", "deploy/server.PEM looks like a secret"),
        (".ssh/id_rsa", "x", ".ssh/id_rsa looks like a secret"),
        ("token", "x", "token looks like a secret"),
        ("hf_token.txt", "x", "hf_token.txt looks like a secret"),
        ("README.md", f"{CARD}login with {SECRET}", "README.md holds what looks like a secret"),
        ("generation_config.json", json.dumps({"a": SECRET}), "generation_config.json holds what looks like a secret"),
        (
            "generation_config.json",
            json.dumps({"a": f"x\n{SECRET}"}),
            "generation_config.json holds what looks like a secret",
        ),
        (
            "generation_config.json",
            json.dumps({"a": f"\x00{SECRET}"}),
            "generation_config.json holds what looks like a secret",
        ),
        ("tokenizer.model", pickle.dumps({"a": 1}), "tokenizer.model is pickled"),
        ("LICENSE", saved_by_torch(), "LICENSE is pickled"),
        ("notes.txt", f"export HF_TOKEN={SECRET}\n", "notes.txt holds what looks like a secret"),
        ("LICENSE", "-----BEGIN RSA PRIVATE KEY-----", "LICENSE holds what looks like a secret"),
        (
            "model.safetensors",
            "version https://git-lfs.github.com/spec/v1",
            "model.safetensors is damaged or not a safetensors file",
        ),
        ("config.json", "{", "config.json is not JSON"),
        ("config.json", "[]", "config.json holds no JSON object"),
        ("config.json", '{"auto_map": {"AutoModel": "x.Y"}}', "config.json names code of its own"),
        ("adapter_config.json", "{}", "config.json, adapter_config.json. Put a model, an adapter and a drafter"),
        ("model-00001-of-00001.safetensors", None, "holds model.safetensors and the parts of another save"),
        ("README.md", "---\na: [\n---\n", "README.md is not a card"),
        ("README.md", b"\xff", "README.md is not a card"),
    ],
)
def test_folders_that_are_refused(tmp_path, name, content, message):
    folder = make(tmp_path / "run")
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    if content is None:
        weights(path)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(FolderError, match=re.escape(message)) as refused:
        stage(folder)
    assert SECRET not in str(refused.value)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("model.safetensors", "model.safetensors is missing"),
        ("config.json", "holds none of config.json, adapter_config.json, drafter_config.json"),
        ("tokenizer_config.json", "tokenizer_config.json. is missing"),
        ("README.md", "The card is missing"),
    ],
)
def test_what_a_model_needs(tmp_path, missing, message):
    folder = make(tmp_path / "run")
    (folder / missing).unlink()
    with pytest.raises(FolderError, match=message):
        stage(folder)
    with pytest.raises(FolderError, match="is not a folder"):
        stage(folder / "config.json")


def test_parts_of_weights_are_those_of_the_index(tmp_path):
    folder = make(tmp_path)
    (folder / "model.safetensors").unlink()
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    weights(folder / names[0])
    with pytest.raises(FolderError, match=r"but model\.safetensors\.index\.json is missing"):
        stage(folder)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict(zip("ab", names, strict=True))}))
    with pytest.raises(FolderError, match=f"lists {names[1]}, which is missing"):
        stage(folder)
    weights(folder / names[1])
    assert {*names, index.name} <= stage(folder).files.keys()
    index.write_text(json.dumps({"weight_map": {"a": names[0]}}))
    with pytest.raises(FolderError, match=f"does not list {names[1]}"):
        stage(folder)


def test_links(tmp_path):
    folder = make(tmp_path / "run")
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    (folder / "model.safetensors").symlink_to("weights.safetensors")
    written = stage(folder).write(tmp_path / "out") / "model.safetensors"
    assert not written.is_symlink()
    assert written.read_bytes() == (folder / "weights.safetensors").read_bytes()
    (tmp_path / "elsewhere.txt").write_text("mine")
    (tmp_path / "other").mkdir()
    for target, message in (
        ("../elsewhere.txt", "LICENSE is a link out of the folder"),
        ("../other", "LICENSE is a link out of the folder"),
        ("../run/../elsewhere.txt", "LICENSE is a link out of the folder"),
        ("nowhere", "LICENSE is a link, but not to a file"),
        (".", "LICENSE is a link, but not to a file"),
    ):
        (folder / "LICENSE").symlink_to(target)
        with pytest.raises(FolderError, match=message):
            stage(folder)
        (folder / "LICENSE").unlink()
    (tmp_path / "link").symlink_to(folder)
    assert stage(tmp_path / "link").kind == "model"


def test_the_header_of_weights_is_searched(tmp_path):
    from safetensors.torch import save_file
    from torch import zeros

    folder = make(tmp_path)
    save_file({"w": zeros(2)}, folder / "model.safetensors", metadata={"format": "pt", "by": SECRET})
    with pytest.raises(FolderError, match=r"model\.safetensors holds what looks like a secret"):
        stage(folder)


@pytest.mark.parametrize("kind", ["adapter", "drafter"])
def test_the_base_is_a_repository(tmp_path, monkeypatch, kind):
    folder = make(tmp_path / "run", kind)
    name, config, _ = KINDS[kind]
    field, revision = ("base_model", "base_revision") if kind == "drafter" else ("base_model_name_or_path", "revision")
    (tmp_path / "models" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for base in ("", "../base", "/models/base", "a/b/c", "models/base", "user/a\nb"):
        (folder / name).write_text(json.dumps(config | {field: base}))
        with pytest.raises(FolderError, match=r"which is no repository of the Hub\. Give base_model="):
            stage(folder)
    with pytest.raises(FolderError, match="no repository"):
        stage(folder, base_model="models/base")
    content = stage(folder, base_model="user/other").files[name]
    assert json.loads(content) == config | {field: "user/other", revision: None}
    (folder / name).write_text(json.dumps(config))
    assert stage(folder, base_model="user/base").files[name] == folder / name  # with its revision


def test_results_plots_and_cards_from_elsewhere(tmp_path):
    folder = make(tmp_path / "run")
    staged = stage(folder, card=ModelCard(CARD + "by hand"))
    assert staged.files["README.md"] == (CARD + "by hand").encode()
    (tmp_path / "x.json").write_text('{"what": "x"}')
    for results, message in (
        ([tmp_path / "x.json"], "x.json holds no results of jacobi_hf"),
        ([tmp_path / "none.json"], "none.json holds no results"),
        ([RESULTS, RESULTS], "Two files would become results/forced-seed42.json"),
    ):
        with pytest.raises(FolderError, match=message):
            stage(folder, results=results)
    with pytest.raises(FolderError, match=r"x\.json is not a picture"):
        stage(folder, plots=[tmp_path / "x.json"])
    with pytest.raises(FolderError, match=r"^README\.md holds the token of this push") as refused:
        stage(folder, card=CARD + "my own word").refuse("my own word")
    assert "my own word" not in str(refused.value).partition("README.md holds the token")[2]


def test_the_length_of_a_header_is_no_pickle(tmp_path):
    """640 is 80 02 in the first two bytes, like a pickle."""
    from safetensors.torch import save_file

    folder = make(tmp_path)
    save_file({"w": torch.zeros(2)}, folder / "model.safetensors", metadata={"format": "pt", "a": ""})
    have = int.from_bytes((folder / "model.safetensors").read_bytes()[:8], "little")
    save_file({"w": torch.zeros(2)}, folder / "model.safetensors", metadata={"format": "pt", "a": "x" * (640 - have)})
    assert (folder / "model.safetensors").read_bytes()[:2] == b"\x80\x02"
    assert "model.safetensors" in stage(folder).files


def test_nothing_in_a_folder_is_changed(tmp_path):
    folder = make(tmp_path, "drafter")

    def snapshot() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    before = snapshot()
    stage(folder, base_model="user/other", card=CARD + "!", results=[RESULTS])
    assert snapshot() == before
