"""Use the published tiny models in an environment that has transformers and torch, but not jacobi_hf.

    OMP_NUM_THREADS=1 python examples/benchmarks/custom_generate.py

The script makes a virtual environment with the versions of constraints.txt, and serves a Hub on the loopback
interface. It publishes the tiny models there (examples/tiny_qwen3/publish.py), and decodes in that environment in the
three ways that a model card shows.

Measured are tokens per forward and equality. Baseline: ordinary `generate` of the same models in the same environment.
The exit status is 1 if a text differs. The last line on stdout is the path of the JSON document.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import venv
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import common
import torch
import typer
from rich.console import Console
from transformers import AutoModelForCausalLM

from jacobi_hf.config import CONSTANT, JacobiConfig
from jacobi_hf.results.environment import Software
from jacobi_hf.results.schema import Agreement, Decoder, Measurement, Prompts, Results

ROOT = common.EXAMPLES.parent
sys.path.append(str(ROOT))

from tests.hub_cards.hub import LoopbackHub  # noqa: E402

USER = "someone"
REPORTED = ("torch", "transformers", "tokenizers", "huggingface_hub", "safetensors")


def environment(folder: Path) -> Path:
    """Create a virtual environment with transformers and torch, and return its interpreter."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    install = [
        python,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "-c",
        ROOT / "constraints.txt",
    ]
    subprocess.run([*install, "torch", "transformers"], check=True)
    return python


def publish(hub: LoopbackHub, home: Path) -> None:
    """Publish the three repositories on the loopback Hub."""
    command = [sys.executable, ROOT / "examples" / "tiny_qwen3" / "publish.py", USER, "--drafter"]
    subprocess.run(command, env=hub.environment(home), stdout=subprocess.DEVNULL, check=True)


def measurement(run: dict[str, Any], config: JacobiConfig, max_new_tokens: int) -> Measurement:
    """Return one of the client's runs as a measurement."""
    drafter = "examples/tiny_qwen3/drafter" if run["usage"] == "drafter" else None
    tokens = run["tokens"]
    forwards = run["forwards"]
    count = len(run["tokens"])
    return Measurement(
        decoder=Decoder.of(f"custom_generate, {run['usage']}", config, drafter),
        prompts=Prompts(domain=run["domain"], source="held-out prompts", count=count, max_new_tokens=max_new_tokens),
        model="base" if drafter else "forced",
        new_tokens=sum(tokens),
        forwards=sum(forwards),
        tokens_per_forward=sum(tokens) / sum(forwards),
        per_prompt_tokens_per_forward=[round(new / used, 4) for new, used in zip(tokens, forwards, strict=True)],
        agreement=Agreement(
            baseline="generate", identical=count - len(run["different"]), total=count, different=run["different"]
        ),
    )


def main(
    output: Annotated[Path, typer.Option(help="Path of the JSON document to write.")] = common.RESULTS
    / "custom_generate.json",
    python: Annotated[
        Path | None,
        typer.Option(help="Interpreter that has torch and transformers alone (default: a new environment)."),
    ] = None,
    forced_prompts: Annotated[int, typer.Option(help="Prompts of each domain for the forced model.")] = 32,
    drafter_prompts: Annotated[int, typer.Option(help="Prompts of each domain for the base with its drafter.")] = 64,
    max_new_tokens: Annotated[int, typer.Option(help="New tokens per prompt.")] = 128,
) -> None:
    """Publish, decode in a new environment, and write the document."""
    model = AutoModelForCausalLM.from_pretrained(common.MODELS["forced"], dtype=torch.float32)  # as the client does
    saved = JacobiConfig.from_generation_config(model.generation_config) or JacobiConfig()
    config = replace(saved, jacobi_schedule=CONSTANT)  # as the client does
    with tempfile.TemporaryDirectory() as folder, LoopbackHub() as hub:
        work = Path(folder)
        publish(hub, work / "home")
        python = python or environment(work / "environment")
        client = [python, Path(__file__).with_name("custom_generate_client.py"), USER, common.PROMPTS]
        counts = map(str, (forced_prompts, drafter_prompts, max_new_tokens))
        variables = {name: value for name, value in hub.environment(work / "home").items() if name != "PYTHONPATH"}
        done = subprocess.run(
            [*client, *counts], env=variables, cwd=work, stdout=subprocess.PIPE, text=True, check=True
        )
    found = json.loads(done.stdout.splitlines()[-1])
    results = Results.start("custom_generate without jacobi_hf, from a Hub on the loopback interface", model, "tiny")
    packages = {name: found["versions"][name] for name in REPORTED}
    software = Software(python=found["python"], packages=packages, git_revision=results.software.git_revision)
    measurements = [measurement(run, config, max_new_tokens) for run in found["runs"]]
    results.with_measurements(measurements).model_copy(update={"software": software}).write(output)
    console = Console()
    for one in measurements:
        agreement = one.agreement or Agreement(baseline="generate", identical=0, total=0)
        console.print(
            f"{one.decoder.name}, {one.prompts.domain}: {one.tokens_per_forward:.2f} tokens per forward, "
            f"{agreement.identical} of {agreement.total} texts identical",
            soft_wrap=True,
        )
    print(output)
    if any(one.agreement and one.agreement.different for one in measurements):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
