"""Differences between releases of transformers and torch."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import hypothesis
import pytest
import torch
import transformers
from hypothesis import strategies as st
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from transformers import LlamaForCausalLM, Qwen2ForCausalLM, TrainingArguments
from transformers.generation import GenerateDecoderOnlyOutput

from jacobi_hf.integration import compat, registry, releases
from jacobi_hf.output import JacobiDecoderOnlyOutput
from jacobi_hf.trainer import JacobiForcingConfig
from tests.helpers.models import fresh_model, tiny_model
from tests.helpers.properties import at_most

ROOT = Path(__file__).resolve().parents[3]


def pretend(monkeypatch, release):
    monkeypatch.setattr(transformers, "__version__", release)


def test_the_range_is_the_one_that_pip_is_given():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (declared,) = [d for d in project["dependencies"] if d.startswith("transformers")]
    allowed = SpecifierSet(declared.removeprefix("transformers"))
    newest = Version(releases.NEWEST_TESTED)
    assert f"{releases.OLDEST_SUPPORTED}.0" in allowed
    assert f"{newest}.99" in allowed
    assert f"{newest.major}.{newest.minor + 1}.0" not in allowed
    assert declared in releases.INSTALL


@pytest.mark.parametrize("release", ["5.5.0", "5.5.4", "5.17.0", "5.24.3", "5.24.0.dev0"])
def test_a_release_in_the_range_is_accepted_silently(monkeypatch, release):
    pretend(monkeypatch, release)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        releases.check_release()
    assert releases.is_tested()


@pytest.mark.parametrize("release", ["4.57.6", "5.4.0"])
def test_a_release_that_is_too_old_is_refused_with_what_to_install(monkeypatch, release):
    pretend(monkeypatch, release)
    with pytest.raises(ImportError, match=re.escape(f"but {release} is installed: pip install 'transformers>=")):
        releases.check_release()


@pytest.mark.parametrize("release", ["5.25.0", "6.0.0"])
def test_a_newer_release_gets_a_warning(monkeypatch, release):
    pretend(monkeypatch, release)
    with pytest.warns(UserWarning, match=f"5.24, and {re.escape(release)} is installed"):
        releases.check_release()


def test_importing_with_a_newer_release_warns_once_and_decodes():
    program = (
        "import transformers, warnings; transformers.__version__ = '5.99.0'; "
        "found = warnings.catch_warnings(record=True); caught = found.__enter__(); warnings.simplefilter('always'); "
        "import jacobi_hf, jacobi_hf.trainer, jacobi_hf.cli; "
        "print(len([w for w in caught if '5.99.0' in str(w.message)]), "
        "hasattr(transformers.Qwen3ForCausalLM, '_default_decoding'))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["1", "True"], done.stderr


def test_importing_with_an_older_release_says_what_to_install():
    program = "import transformers; transformers.__version__ = '5.4.0'; import jacobi_hf"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert (
        last == f"ImportError: jacobi_hf needs transformers 5.5 or newer, but 5.4.0 is installed: {releases.INSTALL}"
    )


def test_a_class_that_a_newer_release_has_changed_is_left_out(monkeypatch):
    def refuse(model_class):
        raise TypeError("forward does not take position_ids")

    monkeypatch.setattr(registry, "register", refuse)
    with pytest.raises(TypeError, match="position_ids"):
        registry.register_defaults()
    pretend(monkeypatch, "5.99.0")
    with pytest.warns(UserWarning, match="Qwen2ForCausalLM is not registered: forward does not take position_ids"):
        registry.register_defaults()


def test_a_feature_of_a_newer_release_says_which(monkeypatch):
    pretend(monkeypatch, "5.14.1")
    releases.require_release("this", "5.14")
    with pytest.raises(
        ValueError, match=r"jacobi-hf serve needs transformers 5.15 or newer, but 5.14.1 is installed: pip install"
    ):
        releases.require_release("jacobi-hf serve", "5.15")


def test_the_server_refuses_releases_without_its_parts_in_one_line(monkeypatch):
    from typer.testing import CliRunner

    from jacobi_hf.cli import app

    pretend(monkeypatch, "5.10.4")
    done = CliRunner().invoke(app, ["serve", "no-model"])
    assert done.exit_code == 2
    what = "jacobi-hf serve: serving needs transformers 5.15 or newer, but 5.10.4 is installed"
    assert done.stderr.splitlines() == [f"{what}: pip install 'transformers>=5.15'"]


@pytest.mark.parametrize("model_class", [Qwen2ForCausalLM, LlamaForCausalLM])
def test_parameters_are_those_of_the_innermost_function(model_class):
    assert {compat.CACHE, "position_ids", "logits_to_keep"} <= compat.parameters_of(model_class.forward)
    assert compat.CACHE_NAMES[1 - compat.CACHE_NAMES.index(compat.CACHE)] not in compat.parameters_of(
        model_class.forward
    )


def test_outputs_answer_to_both_names_of_the_cache(model, prompt):
    output = model.generate(**prompt, max_new_tokens=3, return_dict_in_generate=True, decoding="jacobi")
    assert type(output) is JacobiDecoderOnlyOutput
    assert output.cache is output.past_key_values is output[compat.CACHE]
    assert output.cache.get_seq_length() == output.sequences.shape[1] - 1
    assert issubclass(JacobiDecoderOnlyOutput, GenerateDecoderOnlyOutput)
    assert "jacobi_stats" in output.keys()  # noqa: SIM118  (of a ModelOutput)


def test_a_cache_under_either_name_is_continued(model, prompt):
    """From 5.24 on both names are arguments of `generate`; before, only the old one."""
    from transformers import DynamicCache

    names = compat.CACHE_NAMES if compat.CACHE == "cache" else ("past_key_values",)
    plain = model.generate(**prompt, max_new_tokens=3)
    for name in names:
        cache = DynamicCache(config=model.config)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            output = model.generate(**prompt, max_new_tokens=3, decoding="jacobi", **{name: cache})
        assert torch.equal(plain, output)
        assert cache.get_seq_length() == output.shape[1] - 1


@hypothesis.given(
    rows=st.integers(1, 3),
    kept=st.integers(1, 4),
    slots=st.integers(4, 9),
    seed=st.integers(0, 99),
    by_row=st.booleans(),
)
@at_most(40)
def test_scores_of_some_slots_are_those_of_all_slots_gathered(rows, kept, slots, seed, by_row):
    """`by_row` is how releases before 5.21 take the argument, with a model that computes `hidden[:, index, :]`."""
    generator = torch.Generator().manual_seed(seed)
    logits_BQV = torch.randn(rows, slots, 5, generator=generator)
    keep_BN = torch.randint(0, slots, (rows, kept), generator=generator)
    expected = logits_BQV.take_along_dim(keep_BN[..., None], 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compat, "TAKES_SLOTS_BY_ROW", by_row)
        argument = compat.logits_to_keep(keep_BN, slots)
        if by_row:
            computed = logits_BQV.take_along_dim(argument[..., None], 1)
        else:
            index = slice(None) if isinstance(argument, int) else argument
            computed = logits_BQV[:, index, :]
            assert computed.shape[1] <= slots
        assert torch.equal(compat.kept_logits(computed, keep_BN, slots), expected)
        assert compat.logits_to_keep(None, slots) == 0
        assert compat.kept_logits(logits_BQV, None, slots) is logits_BQV


def test_a_model_says_whether_it_recomputes_activations():
    model = fresh_model("qwen3")
    assert not compat.is_checkpointing(model)
    model.gradient_checkpointing_enable()
    assert compat.is_checkpointing(model)
    assert not compat.is_checkpointing(tiny_model("qwen3"))


@pytest.mark.parametrize("name", ["activation_checkpointing", "gradient_checkpointing"])
def test_training_arguments_know_checkpointing_by_both_names(tmp_path, name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        args = JacobiForcingConfig(
            output_dir=str(tmp_path), use_cpu=True, **{name: True, f"{name}_kwargs": {"use_reentrant": False}}
        )
    assert args.activation_checkpointing is True
    assert args.gradient_checkpointing is True
    assert args.activation_checkpointing_kwargs == args.gradient_checkpointing_kwargs == {"use_reentrant": False}
    assert isinstance(args, TrainingArguments)
    plain = JacobiForcingConfig(output_dir=str(tmp_path), use_cpu=True)
    assert not plain.activation_checkpointing


def test_muon_on_a_torch_without_it_is_refused_at_once(tmp_path, monkeypatch):
    from jacobi_hf.trainer import base_config as arguments

    monkeypatch.setattr(arguments, "MUON", None)
    with pytest.raises(ValueError, match=r"muon_learning_rate needs torch.optim.Muon, which torch .* does not have"):
        JacobiForcingConfig(output_dir=str(tmp_path), use_cpu=True, muon_learning_rate=1e-3)


def test_only_two_modules_name_releases():
    """No other module looks at the version of transformers or of torch to decide something."""
    for path in [
        *(ROOT / "jacobi_hf").rglob("*.py"),
        *(ROOT / "trainer").rglob("*.py"),
        *(ROOT / "hub_cards").rglob("*.py"),
    ]:
        if path.name not in ("compat.py", "releases.py"):
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"is_(torch|transformers)_(greater|less)|Version\(|past_key_values=", text), path.name
