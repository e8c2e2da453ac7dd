"""Cards of trajectory datasets."""

from __future__ import annotations

import json

import pytest
from huggingface_hub import DatasetCard

from jacobi_hf.hub_cards import generate_dataset_card
from jacobi_hf.trainer.data.shards import ManifestError
from tests.hub_cards.documents import tables

SETTINGS = {
    "model": "org/model",
    "dataset": "org/prompts",
    "name": "math",
    "block_size": 16,
    "max_new_tokens": 96,
    "top_k": None,
    "prompts": 5,
}
COLLECTED = {
    "settings": SETTINGS,
    "shards": {
        "a": {"prompts": 3, "rows": 2, "too_short": 1, "sha256": "0"},
        "b": {"prompts": 2, "rows": 2, "too_short": 0, "sha256": "0"},
    },
    "complete": True,
}
PACKED = {
    "settings": {"sources": ["a"], "schedule": "progressive", "noise_levels": 8, "of": {"a": SETTINGS}},
    "shards": {"packed": {"rows": 2500}},
    "complete": True,
}
FIXED = {"repo_id": "user/data", "license": "mit", "language": "en"}


def test_a_folder_of_trajectories(tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps(COLLECTED))
    card = str(generate_dataset_card(tmp_path, description="Word problems.", **FIXED))
    data = DatasetCard(card).data
    assert (data.license, data.language, data.size_categories, data.source_datasets) == (
        "mit",
        ["en"],
        "n<1K",
        ["org/prompts"],
    )
    sources, counts, settings = tables(card)
    assert sources == [["`math`", "`org/model`", "`org/prompts`", "`5`", "`16`", "`96`"]]
    assert counts == [["prompts", "5"], ["rows", "4"], ["too_short", "1"]]
    assert ["block_size", "`16`"] in settings
    assert "Word problems." in card
    assert 'load_dataset("user/data", split="train")' in card


def test_packed_records_name_what_they_were_packed_from():
    card = str(generate_dataset_card(PACKED, **FIXED))
    sources, counts, settings = tables(card)
    assert sources[0][:2] == ["`math`", "`org/model`"]
    assert counts == [["rows", "2,500"]]
    assert settings == [["schedule", "`progressive`"], ["noise_levels", "`8`"]]
    assert "train_dataset: user/data" in card
    assert DatasetCard(card).data.size_categories == "1K<n<10K"


@pytest.mark.parametrize(
    ("manifest", "said"),
    [
        ({**PACKED, "complete": False}, "unfinished"),
        ({"settings": {}}, "no settings and shards"),
        ({**PACKED, "shards": {"a": 3}}, "damaged"),
    ],
)
def test_what_is_no_finished_folder_is_refused(manifest, said):
    with pytest.raises(ManifestError, match=said):
        generate_dataset_card(manifest, **FIXED)


def test_a_folder_without_manifest_is_refused(tmp_path):
    with pytest.raises(ManifestError, match=r"manifest.json does not exist"):
        generate_dataset_card(tmp_path, **FIXED)


def test_the_license_is_demanded():
    with pytest.raises(ValueError, match="license='by ' is not an identifier"):
        generate_dataset_card(PACKED, repo_id="user/data", license="by ")
