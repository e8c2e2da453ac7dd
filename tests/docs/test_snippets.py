"""What the pages tell a reader to type works.

Blocks of Python run, one after another in one namespace for each page. Some text is replaced before:

- A model of the Hub (`Qwen/...`) becomes the tiny checkpoint.
- Numbers of new tokens become 16, and a search for a setting gets one second.
- `bf16=True` of a trainer becomes one step on the CPU.

A page may use `model`, `tokenizer`, `inputs` and `prompts`, as its reader has them, packed trajectories, and a server
of the model. A block that cannot run here has a comment before it, `<!-- not run here: REASON -->`. Quotes of code
(`quotes.py`) do not run. A block after a comment `<!-- what it prints -->` is compared with what the block before it
prints.

Lines of shell do not run. They are parsed: verbs and options of `jacobi-hf` and of scripts, files, make targets and
extras must exist.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import re
import runpy
import shlex
import signal
import sys
import threading
import time
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest
import typer
import yaml
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

import jacobi_hf
from jacobi_hf.attention import dispatch
from jacobi_hf.cli import VERBS, app
from jacobi_hf.cli._models import make_default
from jacobi_hf.cli._recipes import parse, section_of
from jacobi_hf.cli.serve import listener
from jacobi_hf.config import JacobiConfig
from jacobi_hf.drafts import sources
from jacobi_hf.serving.app import Server, build_app
from jacobi_hf.trainer.data import schedule
from tests.docs.pages import PAGES, ROOT, blocks, code_spans
from tests.helpers.records import records

CHECKPOINT = "examples/tiny_qwen3/checkpoint"
HUB_MODEL = re.compile(r"(?<=[\"' =])Qwen/[\w.-]+")
PACKED = "build/packed"
SERVER = "http://127.0.0.1:8000"
MOST_EXCUSES = 3
OTHER_PROGRAMS = {"cd", "curl", "export", "git", "for", "do", "done"}
PLACEHOLDER = re.compile(r"[A-Z][A-Z_]+|.*\.\.\.")


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A new folder with the examples in it."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    # What docs/developer.md adds goes away with the page.
    monkeypatch.setattr(sources, "SOURCES", list(sources.SOURCES))
    monkeypatch.setattr(schedule, "SCHEDULES", dict(schedule.SCHEDULES))
    monkeypatch.setattr(dispatch, "grouped_sdpa", dispatch.grouped_sdpa)
    yield tmp_path
    jacobi_hf.unregister()
    jacobi_hf.register_defaults()


@pytest.fixture
def reader(workplace):
    """Return the names that a reader has."""
    tokenizer, model = AutoTokenizer.from_pretrained(CHECKPOINT), AutoModelForCausalLM.from_pretrained(CHECKPOINT)
    prompts = ["def add(a, b):", "Question: What is 17 + 25?\n"]
    inputs = tokenizer(prompts[0], return_tensors="pt", return_token_type_ids=False)
    return {"__name__": "snippet", "model": model, "tokenizer": tokenizer, "inputs": inputs, "prompts": prompts}


@contextlib.contextmanager
def served(model, tokenizer):
    """Run a server of the model in a thread, and return its address."""
    make_default(model, JacobiConfig())
    with listener("127.0.0.1", 0) as at:
        server = Server(build_app(model, tokenizer, CHECKPOINT))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [at]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{at.getsockname()[1]}"
        server.handle_exit(signal.SIGINT, None)
        thread.join()


def translated(code):
    code = re.sub(r"(max_(?:new_)?tokens)=\d+", r"\1=16", HUB_MODEL.sub(CHECKPOINT, code)).replace(
        "bf16=True", "use_cpu=True, max_steps=1"
    )
    return re.sub(r"autotune\(model, prompts,(?!.*seconds=)", "autotune(model, prompts, seconds=1,", code)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_python_runs(page, reader):
    asks, trains = (any(what in block.code for block in blocks(page, "python")) for what in (SERVER, PACKED))
    if trains:
        Path(PACKED).mkdir(parents=True)
        Dataset.from_list(records(4, 16)).to_parquet(f"{PACKED}/0.parquet")
    with served(reader["model"], reader["tokenizer"]) if asks else contextlib.nullcontext() as server:
        for block in blocks(page, "python"):
            code = block.code if block.prints else translated(block.code).replace(SERVER, server or SERVER)
            program = compile("\n" * (block.line - 1) + code, str(ROOT / page), "exec")
            if block.excuse is None:
                output = shown(lambda program=program: exec(program, reader))
                assert block.prints in (None, output)


def test_few_blocks_are_excused():
    excuses = [
        (block.page, block.excuse)
        for page in PAGES
        for language in ("python", "bash")
        for block in blocks(page, language)
        if block.excuse
    ]
    assert len(excuses) <= MOST_EXCUSES, excuses


def commands(code):
    """Return the commands of a block of shell, as lists of words."""
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        for ends, command in itertools.groupby(words, lambda word: word in ("&&", "|", "||", ";")):
            found = list(itertools.dropwhile(lambda word: re.match(r"\w+=", word) or word == "do", command))
            if found and not ends:
                yield found


def fault_of(words):
    """Return what is wrong with a command, or None."""
    program, *rest = words
    if program == "jacobi-hf":
        return fault_of_verb(rest)
    if program in ("python", "bash") and rest and rest[0] == "-m":
        return None if find_spec(rest[1]) else f"no module {rest[1]}"
    if program in ("accelerate", "torchrun"):
        return fault_of_launch(rest)
    if program in ("python", "bash"):
        return fault_of_script(rest)
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        return next((f"make has no target {word}" for word in rest if "=" not in word and word not in targets), None)
    if program == "pip":
        wanted = re.findall(r"(?:\.|jacobi-hf)\[([\w,]+)\]", " ".join(rest))
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
            "optional-dependencies"
        ]
        return next((f"no extra {name}" for names in wanted for name in names.split(",") if name not in extras), None)
    return None if program in OTHER_PROGRAMS else f"{program} is none of the programs that the docs use"


def fault_of_launch(rest):
    """Return what is wrong with `accelerate launch -m jacobi_hf.cli VERB` or `torchrun SCRIPT`, or None."""
    if "jacobi_hf.cli" in rest:
        return fault_of_verb(rest[rest.index("jacobi_hf.cli") + 1 :])
    script = next((number for number, word in enumerate(rest) if word.endswith(".py")), None)
    return "what is launched?" if script is None else fault_of_script(rest[script:])


def fault_of_verb(rest):
    rest = list(itertools.dropwhile(lambda word: word.startswith("-") and word != "--help", rest))
    if not rest or rest[0] == "--help":
        return None
    verb, *arguments = rest
    if verb not in VERBS:
        return f"jacobi-hf has no verb {verb}"
    unknown = unknown_options(arguments, help_of_verb(verb))
    if unknown or "--help" in arguments or any(PLACEHOLDER.fullmatch(word) for word in arguments) or not arguments:
        return unknown
    return None if verb == "train" else fault_of_options(verb, [word for word in arguments if word != "--json"])


def fault_of_options(verb, words):
    """What is wrong with the values of a verb's options."""
    section = {}
    if "--config" in words:
        at = words.index("--config")
        section = section_of(words[at + 1], verb) if Path(words[at + 1]).is_file() else None
        words = words[:at] + words[at + 2 :]
    if section is None:
        return None
    section.pop("sets", None)
    try:
        parse(VERBS[verb].kinds(), section, words, verb)
    except ValueError as error:
        return str(error)
    return None


def help_of_verb(verb):
    return shown(lambda: app([verb, "--help"], standalone_mode=False))


def fault_of_script(rest):
    script, *arguments = rest
    if not (ROOT / script).is_file():
        return f"no file {script}"
    if not any(word.startswith("--") for word in arguments):
        return None
    source = (ROOT / script).read_text(encoding="utf-8")
    if not re.search(r"argparse|typer|HfArgumentParser", source):
        return f"{script} takes no options"
    before = list(itertools.takewhile(lambda word: not word.startswith("-"), arguments))
    if any("$" in word for word in before):
        return None
    return unknown_options(arguments, help_of_script(script, *before[:1]) + source)


def help_of_script(script, *subcommand):
    given, path = sys.argv, list(sys.path)
    sys.argv, sys.path[:0] = [script, *subcommand, "--help"], [str((ROOT / script).parent)]
    try:
        return shown(lambda: runpy.run_path(str(ROOT / script), run_name="__main__"))
    finally:
        sys.argv, sys.path[:] = given, path


def shown(call):
    """Return what a call prints before it ends or exits."""
    with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.suppress(SystemExit, typer.Exit):
        call()
    return output.getvalue()


def unknown_options(arguments, text):
    known = {name.replace("_", "-") for name in re.findall(r"--[\w-]+", text)}
    return next(
        (
            f"no option {word}"
            for word in arguments
            if word.startswith("--") and word.split("=")[0].replace("_", "-") not in known
        ),
        None,
    )


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "bash")])
def test_shell_parses(page, workplace):
    faults = [
        (f"{page}:{block.line}", " ".join(words), fault)
        for block in blocks(page, "bash")
        if block.excuse is None
        for words in commands(block.code)
        if (fault := fault_of(words))
    ]
    assert not faults


@pytest.mark.parametrize("block", [block for page in PAGES for block in blocks(page, "yaml")], ids=str)
def test_recipes_parse(block, workplace):
    recipe = workplace / "recipe.yaml"
    recipe.write_text(block.code, encoding="utf-8")
    for section in yaml.safe_load(block.code):
        assert fault_of(["jacobi-hf", section, "--config", str(recipe)]) is None


@pytest.mark.parametrize("page", PAGES)
def test_verbs_in_the_text_exist(page):
    verbs = {words[1] for span in code_spans(page) if span.startswith("jacobi-hf ") and len(words := span.split()) > 1}
    assert {verb for verb in verbs if not verb.startswith("-") and not PLACEHOLDER.fullmatch(verb)} <= set(
        typer.main.get_command(app).commands
    )


FAULTS = """
jacobi-hf evaluate --model x
jacobi-hf eval --model x --task gsm8k
jacobi-hf eval --model x --limit none
jacobi-hf eval --limit 3
python examples/nothing.py
python examples/benchmarks/decode.py compare --prompt 3
python examples/benchmarks/write_report.py --fast
python -m jacobi_hf.nothing
accelerate launch
make everything
pip install 'jacobi-hf[all]'
jacobi --help
"""


@pytest.mark.parametrize("line", FAULTS.strip().splitlines())
def test_faults_are_found(line, workplace):
    (words,) = commands(line)
    assert fault_of(words)
