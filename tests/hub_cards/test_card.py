"""Model cards: each number comes from its document, metadata fit the Hub, and nothing unmeasured is shown."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from jacobi_hf.hub_cards import generate_model_card, model_card_cells
from jacobi_hf.hub_cards.cells import FORMATS, resolve
from jacobi_hf.results.schema import Agreement, Decoder, Measurement, Prompts, Quality
from jacobi_hf.results.training import TrainingDrafts
from tests.hub_cards.documents import document, tables, training

TINY = Path(__file__).resolve().parents[2] / "examples" / "tiny_qwen3"
LICENSED = {"repo_id": "user/model", "license": "mit"}


@pytest.fixture(scope="module")
def tiny_cards():
    spec = importlib.util.spec_from_file_location("tiny_cards", TINY / "cards.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=["forced", "drafter"])
def kind(request):
    return request.param


@pytest.fixture
def committed(kind):
    return (TINY / "cards" / f"{kind}.md").read_text(encoding="utf-8")


def snippets(card):
    return re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)


def test_the_tiny_cards_are_up_to_date(tiny_cards, kind, committed):
    assert tiny_cards.card(kind) == committed


def test_every_number_of_the_tiny_cards_resolves_to_its_document(tiny_cards, kind, committed):
    inputs = tiny_cards.INPUTS[kind]
    documents = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in inputs["results"]}
    chosen = {
        name: inputs[name] for name in ("measured_as", "base_measured_as", "decoders", "drafter") if name in inputs
    }
    cells = model_card_cells(inputs["results"], **chosen)
    for cell in cells:
        assert FORMATS[cell.format](resolve(documents[cell.document], cell.path)) == cell.markdown

    recipe, benchmark, setting = tables(committed)
    columns = [*(row[1:] for row in recipe), *benchmark, *(row[1:] for row in setting)]
    shown = [entry for row in columns for entry in row if entry != "-"]
    assert len(shown) > 100
    assert shown == [cell.markdown for cell in cells[-len(shown) :]]
    sentences = re.search(r"## Highlights\n\n(.*?)\n\n##", committed, flags=re.DOTALL).group(1)
    for cell in cells[: -len(shown)]:
        assert cell.markdown in sentences
        sentences = sentences.replace(cell.markdown, "", 1)
    assert not re.search(r"\d", sentences)


def test_the_tiny_cards_hold_the_rows_of_a_published_card(committed):
    recipe, benchmark, _ = tables(committed)
    rows = {row[0] for row in recipe}
    assert {
        "Start",
        "Data",
        "Guesses trained on",
        "Epochs",
        "Schedule",
        "Batch",
        "Precision of the forward pass",
        "Time",
    } <= rows
    assert {row[0] for row in benchmark} == {"code", "arithmetic", "prose"}
    for part in (
        "Ordinary decoding",
        "With jacobi_hf",
        "With nothing but transformers",
        "What happens without the package",
    ):
        assert f"### {part}" in committed
    for part in ("arXiv:2512.14681", "arXiv:2403.00835", "License: apache-2.0"):
        assert part in committed


def test_examples_of_use_are_whole_programs_and_name_the_measured_dtype(kind, committed):
    ar, ours, plain = snippets(committed)
    for program in (ar, ours, plain):
        ast.parse(program)
        assert "dtype=torch.float32" in program
    assert "decoding=" not in ar
    assert "import jacobi_hf" in ours
    assert "import jacobi_hf" not in plain
    assert "custom_generate=" in plain
    assert ("load_drafter" in ours) == (kind == "drafter")


def test_metadata_is_what_the_hub_filters_by():
    datasets = ["org/data", "org/data", "/local"]
    card = generate_model_card(document("math"), base_model="org/base", language="en", datasets=datasets, **LICENSED)
    data = ModelCard(str(card)).data
    assert (data.license, data.language, data.base_model, data.base_model_relation) == (
        "mit",
        ["en"],
        "org/base",
        "finetune",
    )
    assert (data.datasets, data.library_name, data.pipeline_tag) == (["org/data"], "transformers", "text-generation")
    assert {"jacobi-forcing", "parallel-decoding", "custom_generate"} <= set(data.tags)


def test_the_model_index_survives_and_keeps_quality_and_speed_apart():
    card = generate_model_card(document("math"), **LICENSED)
    found = ModelCard(str(card)).data.eval_results
    assert found == card.data.eval_results
    assert sorted((one.task_name, one.metric_type, one.metric_value) for one in found) == [
        ("Decoding speed", "tokens_per_forward", 3.14159),
        ("Decoding speed", "tokens_per_second", 250.4),
        ("Quality", "math", 0.75),
        ("Quality", "math", 0.75),
    ]


def test_numbers_are_those_of_the_document():
    card = str(generate_model_card(document("math"), **LICENSED))
    recipe, benchmark, _ = tables(card)
    score = "math 0.750 [0.500, 0.875] of 10"
    assert benchmark == [
        [
            "math",
            "`jacobi math` (n=16, K=2, pool 2, lookup 12)",
            "10 x 64",
            score,
            score,
            "100",
            "250",
            "2.50 x",
            "1.67 x",
            "3.14",
            "2.00",
            "9 of 10",
        ]
    ]
    rows = dict(recipe)
    assert rows["Data"] == "math (1,000 samples)"
    assert rows["Batch"] == "8 devices x 4 rows x 2 accumulated"
    assert rows["Time"] == "2.5 hours"
    assert rows["Loss weights"] == "consistency 1, next token 0.5, replay 0, KL 4"
    assert "**math**: 3.14 tokens per forward, 2.50 x the speed of eager `generate`" in card


def test_acceptance_and_an_adaptive_schedule_are_shown_as_they_were_measured():
    results = document("math")
    found = results.measurements[-1]
    adaptive = found.decoder.model_copy(update={"adaptive": True})
    found = found.model_copy(update={"decoder": adaptive, "mean_acceptance_length": 2.345})
    card = str(generate_model_card(results.with_measurements([*results.measurements[:-1], found]), **LICENSED))
    _, ((_, decoding, *_, length, _),), _ = tables(card)
    assert (decoding, length) == ("`jacobi math` (adaptive, n=16, K=2, pool 2, lookup 12)", "2.35")


def test_without_results_the_card_says_so():
    card = str(generate_model_card([], **LICENSED))
    assert "Nothing was measured yet, so this card has no numbers." in card
    assert "No benchmark was run." in card
    assert not tables(card)
    assert 'dtype="auto"' in card
    assert ModelCard(card).data.eval_results is None


def test_a_drafter_s_recipe_names_the_method_and_its_own_guesses():
    strategy = TrainingDrafts(schedule="drafter", window_width=16, windows_per_text=5, steps_per_window=3)
    stage = training("math").model_copy(update={"method": "drafter", "strategy": strategy})
    recipe, *_ = tables(str(generate_model_card(document(training=[stage]), **LICENSED)))
    assert ["Method", "LoRA drafter, with the model frozen"] in recipe
    assert ["Guesses trained on", "the drafter's own: 16 a window, 5 windows a text, 3 steps a window"] in recipe


def test_what_was_not_measured_has_no_row_and_no_column():
    prompts = Prompts(domain="math", source="a file", count=1, max_new_tokens=8)
    first, second = (Decoder(name=name, kind="jacobi", block_size=4) for name in ("first", "second"))
    measured = [
        Measurement(decoder=first, prompts=prompts),
        Measurement(decoder=second, prompts=prompts, tokens_per_forward=2),
    ]
    card = str(generate_model_card(document(measurements=measured, training=[]), **LICENSED))
    benchmark, _ = tables(card)
    assert benchmark == [["math", "`second` (n=4)", "1 x 8", "2.00"]]
    assert "do not say how the model was trained" in card


def test_stages_have_a_column_each_and_the_document_of_most_stages_is_taken():
    two = document(training=[training("one"), training("two")])
    card = str(generate_model_card([document(), two], **LICENSED))
    assert ["Start", "`one`", "`two`"] in tables(card)[0]


def test_two_documents_of_one_name_are_refused(tmp_path):
    paths = [tmp_path / folder / "speed.json" for folder in ("a", "b")]
    for path in paths:
        document().write(path)
    assert {cell.document for cell in model_card_cells([paths[0], document()])} == {"speed.json", "results-2.json"}
    with pytest.raises(ValueError, match=r"Two documents of results would become speed.json"):
        model_card_cells(paths)


def test_a_document_of_several_models_needs_the_name_of_the_right_one():
    ours = Decoder(name="jacobi", kind="jacobi")
    prompts = Prompts(domain="math", source="a file", count=1, max_new_tokens=8)
    measured = [
        Measurement(decoder=ours, prompts=prompts, model=model, tokens_per_forward=tpf)
        for model, tpf in (("small", 2.0), ("big", 4.0))
    ]
    both = document(measurements=measured)
    with pytest.raises(ValueError, match=r"'small', 'big'.*measured_as"):
        generate_model_card(both, **LICENSED)
    with pytest.raises(ValueError, match=r"No measurement is of 'middle'. The documents hold 'small', 'big'"):
        generate_model_card(both, measured_as="middle", **LICENSED)
    benchmark = tables(str(generate_model_card(both, measured_as="big", **LICENSED)))[1]
    assert [row[3] for row in benchmark] == ["4.00"]


def test_a_drafter_counts_only_what_decoded_with_it():
    prompts = Prompts(domain="math", source="a file", count=1, max_new_tokens=8)
    same = Agreement(baseline="generate", identical=1, total=1)
    measured = [
        Measurement(
            decoder=Decoder(name=name, kind="jacobi", drafter=drafter),
            prompts=prompts,
            tokens_per_forward=2,
            agreement=same,
        )
        for name, drafter in (("alone", None), ("drafted", "a drafter"))
    ]
    results = document(measurements=measured, training=[])
    with pytest.raises(ValueError, match="base_model is missing"):
        generate_model_card(results, drafter=True, **LICENSED)
    card = generate_model_card(results, drafter=True, base_model="org/base", **LICENSED)
    assert [row[1] for row in tables(str(card))[0]] == ["`drafted`"]
    assert card.data.base_model_relation == "adapter"
    assert "## Guarantee" in str(card)
    assert [row[1] for row in tables(str(generate_model_card(results, **LICENSED)))[0]] == ["`alone`"]


def test_an_adapter_says_that_peft_is_needed():
    card = generate_model_card([], adapter=True, base_model="org/base", **LICENSED)
    assert card.data.base_model_relation == "adapter"
    assert "pip install peft" in str(card)


def test_the_license_is_inherited(tmp_path):
    (tmp_path / "README.md").write_text(
        "---\nlicense: other\nlicense_name: their-own\nlicense_link: LICENSE\n---\n# Base\n"
    )
    data = generate_model_card([], repo_id="user/model", base_model=str(tmp_path)).data
    assert (data.license, data.license_name, data.license_link) == ("other", "their-own", "LICENSE")
    assert data.base_model is None  # a folder is no repository
    assert generate_model_card([], base_model=str(tmp_path), **LICENSED).data.license == "mit"


@pytest.mark.parametrize(
    "readme", [None, "# no metadata\n", "---\nlicense: [\n---\n", "---\nlicense: 7\n---\n", "---\n- a list\n---\n"]
)
def test_a_license_that_cannot_be_inherited_is_demanded(tmp_path, readme):
    if readme is not None:
        (tmp_path / "README.md").write_text(readme)
    with pytest.raises(ValueError, match=r"The license is missing.*such as license='apache-2.0'"):
        generate_model_card([], repo_id="user/model", base_model=str(tmp_path))
    with pytest.raises(ValueError, match="The license is missing"):
        generate_model_card([], repo_id="user/model")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda d: d.update(speed=3), "speed"),
        (lambda d: d.pop("dtype"), "dtype"),
        (lambda d: d["training"][0].pop("steps"), "training.0.steps"),
    ],
)
def test_unknown_and_missing_fields_are_named(tmp_path, change, named):
    content = json.loads(document().model_dump_json(exclude_none=True))
    change(content)
    path = tmp_path / "results.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=named) as error:
        generate_model_card(path, **LICENSED)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe", b"null"])
def test_a_file_that_is_no_document_is_named(tmp_path, content):
    path = tmp_path / "results.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"results.json is not a document of results"):
        generate_model_card(path, **LICENSED)


def test_a_quality_without_a_value_is_named():
    results = document()
    broken = Quality(metric="exact_match", value=float("nan"), low=0.0, high=1.0, samples=4)
    first = results.measurements[0].model_copy(update={"quality": broken})
    results = results.with_measurements([first, *results.measurements[1:]])
    with pytest.raises(ValueError, match=r"measurements\.0\.quality is .*, which cannot be shown as quality"):
        generate_model_card([results], **LICENSED)


@pytest.mark.parametrize(
    "prompt", ["def f(x):\n    return x", 'a\ttab, "quotes", `ticks` and \\ back\u2028slash', "```\n# heading"]
)
def test_examples_hold_the_prompt_as_it_was_given(prompt):
    (first, *_) = snippets(str(generate_model_card([], prompt=prompt, **LICENSED)))
    constants = {node.value for node in ast.walk(ast.parse(first)) if isinstance(node, ast.Constant)}
    assert prompt in constants
