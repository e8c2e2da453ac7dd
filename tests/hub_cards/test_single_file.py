"""`custom_generate/generate.py` is built from the package and decodes on machines that have only transformers."""

from __future__ import annotations

import ast
import json
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

import jacobi_hf
from jacobi_hf.hub_cards import single_file
from jacobi_hf.hub_cards.single_file import REQUIREMENTS, Module, build, check_names, write_custom_generate
from tests.helpers.models import fresh_model
from tests.helpers.tiny import EXAMPLE

ROOT = Path(__file__).resolve().parents[2]
CLIENT = Path(__file__).with_name("client.py")


def test_the_file_is_the_package_s_modules_and_the_same_every_time(tmp_path):
    written = write_custom_generate(tmp_path, "drafter", "user/base", "abc")
    assert [path.relative_to(tmp_path).as_posix() for path in written] == [
        "custom_generate/generate.py",
        "custom_generate/requirements.txt",
    ]
    text = written[0].read_text(encoding="utf-8")
    assert text == build("drafter", "user/base", "abc")
    assert [*write_custom_generate(tmp_path, "drafter", "user/base", "abc")] == written
    assert written[0].read_text(encoding="utf-8") == text
    # The file holds each definition of each module and nothing else but the entry.
    sections = re.findall(r"^# -+ jacobi_hf/([\w/]+)\.py$", text, re.MULTILINE)
    defined = {ast.unparse(node) for node in ast.parse(text).body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    theirs = set()
    for name in sections:
        tree = ast.parse((ROOT / "jacobi_hf" / f"{name}.py").read_text(encoding="utf-8"))
        theirs |= {ast.unparse(node) for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    assert defined == theirs
    assert {
        "integration/mixin",
        "decoding/loop",
        "drafts/loading",
        "decoding/step",
        "attention/interface",
        "integration/custom_generate",
        "tuning/controller",
    } <= set(sections)
    assert not {name for name in sections if name.startswith(("tuning/autotune", "tuning/timing", "results"))}


def test_what_transformers_and_people_see(tmp_path):
    text = build()
    drafters = build("drafter", "user/base", "abc")
    for one in (text, drafters):
        head = one[:800]
        assert f"jacobi_hf {jacobi_hf.__version__}" in head
        assert "Apache-2.0" in head
        assert not re.search(r"^\s*(from\s+\.|import\s+\.|from jacobi_hf|import jacobi_hf)", one, re.MULTILINE)
        assert str(ROOT) not in one
        assert str(Path.home()) not in one
    assert "'user/base', revision 'abc'" in drafters[:800]
    assert text.splitlines()[-1] == 'generate = entry("model")'
    assert drafters.splitlines()[-1] == 'generate = entry("drafter")'


def test_names_of_a_base_model_are_data():
    future = "from __future__ import annotations"
    body = build("drafter").partition(future)[2]
    for name in ("a\nimport os", 'a"""\nb', "ü\r\x85\u2028import os", "\\\n", "'"):
        head, _, rest = build("drafter", name, name).partition(future)
        assert rest == body
        assert all(line.startswith("#") for line in head.splitlines() if line)
    with pytest.raises(ValueError, match="'adapter'"):
        build("adapter")


def test_requirements_are_those_of_the_package(tmp_path):
    write_custom_generate(tmp_path)
    lines = (tmp_path / "custom_generate" / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert lines == list(REQUIREMENTS)
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    # No upper bound: like the package, the copy warns about releases newer than the tests and tries to decode.
    wanted = {re.match(r"[\w-]+", line)[0]: set(re.findall(r">=[\d.]+", line)) for line in declared}
    for package in ("torch", "transformers"):
        assert {line.removeprefix(package) for line in lines if line.startswith(package)} == wanted[package]


ODD_IMPORT = "does not work in custom_generate/generate.py. Write `from jacobi_hf.module import name` at the top"


def replaced(monkeypatch, name, text):
    """Build with another source for one module; its last lines are `text`."""
    modules = [
        Module(one.name, one.file, f"{one.text}\n{text}\n") if one.name == name else one
        for one in single_file._modules()
    ]
    monkeypatch.setattr(single_file, "_modules", lambda: modules)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def generate(): pass", r"`generate` has two meanings: .*transformers calls .* jacobi_hf.streaming.generate"),
        (
            "from math import ceil as warnings",
            r"`warnings` has two meanings: .*math.ceil \(jacobi_hf/streaming.py:\d",
        ),
        ("sum = 3", r"`sum` has two meanings: builtins.sum \(Python\) and jacobi_hf.streaming.sum \(jacobi_hf/strea"),
        ("def late():\n    from jacobi_hf.config import JacobiConfig", ODD_IMPORT),
        ("try:\n    from jacobi_hf.config import JacobiConfig\nfinally:\n    pass", ODD_IMPORT),
        ("import jacobi_hf.config", ODD_IMPORT),
        ("import jacobi_hf.config as settings", ODD_IMPORT),
        ("from jacobi_hf.config import JacobiConfig as Knobs", ODD_IMPORT),
        ("from jacobi_hf import JacobiConfig", ODD_IMPORT),
        ("from .config import JacobiConfig", ODD_IMPORT),
        ("from . import config", ODD_IMPORT),
        (
            "from jacobi_hf.config import Nothing",
            r"`Nothing` is not defined in jacobi_hf.config\. Import names, not m",
        ),
        (
            "from jacobi_hf.drafts import lora",
            r"`lora` is not defined in jacobi_hf.drafts\. Import names, not modules",
        ),
    ],
)
def test_modules_that_cannot_become_one_file_are_refused(monkeypatch, text, message):
    replaced(monkeypatch, "streaming", text)
    with pytest.raises(ValueError, match=message) as refused:
        build()
    assert re.search(r"jacobi_hf/streaming\.py:\d+", str(refused.value))


def test_imports_for_type_checkers_have_any_form(monkeypatch):
    replaced(monkeypatch, "streaming", "if TYPE_CHECKING:\n    import jacobi_hf.decoding.loop\n    sum = 3")
    assert "jacobi_hf.decoding.loop" not in build()


def package(monkeypatch, folder, sources):
    """Make a package jacobi_hf of these sources the one that the builder reads."""
    for name, text in sources.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    monkeypatch.setattr(single_file.resources, "files", lambda name: folder)


def test_packages_and_their_reexports_become_one_file(monkeypatch, tmp_path):
    sources = {
        "integration/custom_generate.py": "from jacobi_hf.drafts import SOURCES, guess\n\n\ndef entry(kind):\n"
        "    return lambda: [source() for source in SOURCES] + [guess()]\n",
        "drafts/__init__.py": "from jacobi_hf.drafts.window import guess\nfrom jacobi_hf.drafts.lookup import find\n\n"
        "SOURCES = (guess, find)\n",
        "drafts/window.py": "import math\n\n\ndef guess():\n    return math.floor(1.5)\n",
        "drafts/lookup.py": "import math\nfrom jacobi_hf.drafts.window import guess\n\n\ndef find():\n"
        "    return guess() + 1\n",
    }
    package(monkeypatch, tmp_path, sources)
    text = build()
    assert re.findall(r"^# -+ jacobi_hf/(\S+)$", text, re.MULTILINE) == [
        "drafts/window.py",
        "drafts/lookup.py",
        "drafts/__init__.py",
        "integration/custom_generate.py",
    ]
    built = {}
    exec(compile(text, "generate.py", "exec"), built)
    assert built["generate"]() == [1, 2, 1]


def test_two_definitions_of_a_name_are_reported_with_both_places(monkeypatch, tmp_path):
    entry = "from jacobi_hf.a.x import f\nfrom jacobi_hf.b import g\n"
    package(
        monkeypatch,
        tmp_path,
        {
            "integration/custom_generate.py": entry,
            "a/x.py": "def f(): ...\ndef _head(): ...\n",
            "b.py": "def g(): ...\n\n\nif True:\n    _head = 3\n",
        },
    )
    with pytest.raises(ValueError, match="two meanings") as refused:
        build()
    assert str(refused.value) == (
        "`_head` has two meanings: jacobi_hf.a.x._head (jacobi_hf/a/x.py:2) and jacobi_hf.b._head (jacobi_hf/b.py:5). "
        "custom_generate/generate.py holds both in one namespace. Rename one of them."
    )


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (
            {"integration/custom_generate.py": "from jacobi_hf.a import f", "a.py": "from jacobi_hf.b.c import g"},
            r"jacobi_hf\.a imports jacobi_hf\.b\.c, which does not exist",
        ),
        (
            {
                "integration/custom_generate.py": "from jacobi_hf.a import f",
                "a.py": "from jacobi_hf.b import g",
                "b.py": "from jacobi_hf.a import f",
            },
            r"cannot become one file: jacobi_hf\.a -> jacobi_hf\.b -> jacobi_hf\.a\.",
        ),
    ],
)
def test_imports_that_lead_nowhere_or_in_a_circle_are_refused(monkeypatch, tmp_path, sources, message):
    package(monkeypatch, tmp_path, sources)
    with pytest.raises(ValueError, match=message):
        build()


def test_names_inside_functions_and_comprehensions_have_one_meaning():
    text = "def f():\n    sum = 3\n\n\nLISTED = [max for max in (1,)]\nCALLED = lambda: [min for min in (1,)]\n"
    check_names([Module("a", "jacobi_hf/a.py", text)])


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["single_file", str(tmp_path), "--drafter"])
    monkeypatch.delitem(sys.modules, "jacobi_hf.hub_cards.single_file")
    with pytest.raises(SystemExit) as done:
        runpy.run_module("jacobi_hf.hub_cards.single_file", run_name="__main__")
    assert not done.value.code
    assert capsys.readouterr().out.split() == [
        str(tmp_path / "custom_generate" / name) for name in ("generate.py", "requirements.txt")
    ]
    assert (tmp_path / "custom_generate" / "generate.py").read_text(encoding="utf-8") == build("drafter")


@pytest.fixture
def published(hub, tmp_path):
    """The Hub with the forced checkpoint, its base, its drafter and random models. One copy has another version."""
    for name, kind in (("forced", "model"), ("checkpoint", None), ("drafter", "drafter")):
        folder = shutil.copytree(EXAMPLE / name, tmp_path / name)
        if kind:
            write_custom_generate(folder, kind)
        hub.add(f"user/tiny-{name}.v1", folder)
    for number, name in enumerate(("llama", "qwen2", "falcon")):
        folder = tmp_path / name
        if name != "falcon":
            fresh_model(name, number).save_pretrained(folder)
        write_custom_generate(folder)
        hub.add(f"user/{name}", folder)
    drafter = hub.repos["user/tiny-drafter.v1"]
    drafter["v2"] = drafter["main"] | {"README.md": b"another commit"}
    other = hub.repos["user/qwen2"]["main"]
    other["custom_generate/generate.py"] = other["custom_generate/generate.py"].replace(
        f'__version__ = "{jacobi_hf.__version__}"'.encode(), b'__version__ = "0.0.1"'
    )
    return hub


def _run(hub, tmp_path, *arguments, **environment):
    command = [sys.executable, CLIENT, *arguments]
    done = subprocess.run(
        command,
        env=hub.environment(tmp_path / "home") | environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("release", "raised", "match"),
    [
        ("5.4.0", ImportError, "needs transformers 5.5 or newer, but 5.4.0 is installed"),
        ("5.99.0", UserWarning, "5.99.0 is installed"),
    ],
)
def test_the_copy_looks_at_the_release_of_transformers(monkeypatch, release, raised, match):
    """Without the package: an error for a release that is too old, a warning for one newer than the tests."""
    copy = ModuleType("a_copy")
    monkeypatch.setitem(sys.modules, "a_copy", copy)
    exec(compile(build(), "generate.py", "exec"), vars(copy))
    monkeypatch.setattr(copy.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(copy.transformers, "__version__", release)
    with pytest.warns(raised, match=match) if issubclass(raised, Warning) else pytest.raises(raised, match=match):
        copy.entry("model")


@pytest.mark.slow
def test_without_the_package(published, tmp_path):
    """One process without jacobi_hf compares each output with that of plain `generate`."""
    seen = _run(published, tmp_path, "without", tmp_path / "drafter")
    assert seen.pop("modules") == []
    calls = seen.pop("calls")
    assert {name for name, call in calls.items() if not call["same"]} == set()
    ordinary = {"decoding=None", "plain afterwards", "plain after a drafter", "beams", "no persisted knobs afterwards"}
    assert {name for name, call in calls.items() if call["tokens_per_forward"] is None} == ordinary
    rates = {name: call["tokens_per_forward"] for name, call in calls.items() if name not in ordinary}
    assert all(rate > 1 for rate in rates.values()), rates
    # The knobs are the checkpoint's own, in each way of calling.
    assert rates["positional"] == rates["by name"] == rates["keywords"]
    assert rates["other knobs"] != rates["positional"]
    assert (
        rates["drafter"]
        == rates["drafter again"]
        == rates["drafter from a folder"]
        == rates["drafter through a forced model's generate"]
    )
    errors = {
        "misspelt": "ValueError: 'jacobi_blok_size' is not a knob",
        "refused": "TypeError: FalconForCausalLM does not use transformers' attention interface",
        "no trust": "ValueError: The repository",
        "of another model": "DrafterError: the drafter was made for",
    }
    found = seen.pop("errors")
    assert found.keys() == errors.keys()
    assert all(found[name].startswith(text) for name, text in errors.items()), found
    assert seen == {
        "class": ["Qwen3ForCausalLM", "Qwen3PreTrainedModel"],
        "architectures": ["Qwen3ForCausalLM"],
        "warnings": ["beam"],
        "generate": "generate_by_default",
        "functions before sdpa": 1,  # seven copies (five repositories, another revision, a folder) share one
        "pipeline": True,
    }
    fetched = [
        request.path for request in published.requests if request.method == "GET" and "drafter_model" in request.path
    ]
    assert len(fetched) == 1


@pytest.mark.slow
def test_where_the_package_is_installed_it_decodes_and_says_when_versions_differ(published, tmp_path):
    seen = _run(published, tmp_path, "installed", PYTHONPATH=str(ROOT))
    assert seen.pop("told") == [
        f"jacobi_hf {jacobi_hf.__version__} is installed and decodes; the repository's own copy is version 0.0.1."
    ]
    calls = seen.pop("calls")
    assert all(call["same"] and call["tokens_per_forward"] > 1 for call in calls.values()), calls
    assert seen == {"module": "jacobi_hf.integration.custom_generate", "errors": {}}
