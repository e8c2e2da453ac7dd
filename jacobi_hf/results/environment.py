"""Where a result was measured: machine, software versions and command line."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch
from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from collections.abc import Sequence

_SECRET_OPTION = re.compile(r"(token|password|secret|key)$", re.IGNORECASE)
_HUB_TOKEN = re.compile(r"hf_\w{8,}")
_PACKAGES = ("jacobi-hf", "torch", "transformers", "accelerate", "peft", "tokenizers")


class Part(BaseModel):
    """Base class of every part of a results document: immutable, and without unknown fields."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Hardware(Part):
    """Machine that a result was measured on."""

    cpu: str
    """Model name of the CPU."""
    cores: int
    """Number of logical CPU cores."""
    gpu: str | None = None
    """Model name of the accelerator; None if the CPU did the work."""

    @classmethod
    def of(cls, device: torch.device) -> Self:
        """Return a description of this machine; `gpu` is the name of `device` unless that is a CPU."""
        gpu = torch.get_device_module(device).get_device_name(device) if device.type not in ("cpu", "meta") else None
        return cls(cpu=_cpu_name(), cores=os.cpu_count() or 1, gpu=gpu)


class Software(Part):
    """Versions of the software that a result was measured with."""

    python: str
    """Version of Python."""
    packages: dict[str, str]
    """Version of each installed package that can change a result."""
    git_revision: str | None = None
    """Commit of this repository, followed by "+changes" if tracked files were modified; None outside a checkout."""

    @classmethod
    def installed(cls) -> Self:
        """Return the versions that this process runs."""
        return cls(python=platform.python_version(), packages=_versions(), git_revision=_git_revision())


def command_line() -> str:
    """Return the command line of this process, without the folder of its program and without secrets."""
    program = Path(sys.argv[0])
    return " ".join([program.name if program.is_absolute() else sys.argv[0], *without_secrets(sys.argv[1:])])


def without_secrets(words: Sequence[str]) -> list[str]:
    """Return the words of a command line with `...` for each secret.

    Secrets are the values of options such as `--hub_token`, and whatever looks like a token of the Hub.
    """
    shown = []
    hides_next = False
    for word in words:
        name, equals, _ = word.partition("=")
        is_secret = name.startswith("-") and _SECRET_OPTION.search(name) is not None
        shown.append("..." if hides_next else f"{name}=..." if is_secret and equals else _HUB_TOKEN.sub("...", word))
        hides_next = is_secret and not equals
    return shown


def _cpu_name() -> str:
    """Return the model name of the CPU; where Linux does not list it, the processor type."""
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text().splitlines() if listed.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _git_revision() -> str | None:
    try:
        changes = "+changes" if _git("status", "--porcelain", "--untracked-files=no") else ""
        return _git("rev-parse", "--short=12", "HEAD") + changes
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*arguments: str) -> str:
    folder = Path(__file__).resolve().parents[1]
    run = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True, timeout=10)
    return run.stdout.strip()
