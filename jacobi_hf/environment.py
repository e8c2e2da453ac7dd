"""What is installed, and where it runs, for `jacobi-hf info`. Neither torch nor transformers is imported at once."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib import metadata

from packaging.requirements import Requirement

import jacobi_hf
from jacobi_hf.integration.defaults import SERVED


@dataclass(frozen=True)
class Environment:
    """What is installed and where it runs.

    Attributes:
        versions: Versions by package.
        device: Type of the device that models are moved to.
        device_name: Name of that device.
        threads: Threads of torch on the CPU.
        registered: Classes that have the `decoding` argument once jacobi_hf is imported.
        kernels: Whether each optional attention kernel can be used here.
        extras: Packages that each extra of this package lacks.
    """

    versions: dict[str, str]
    device: str
    device_name: str
    threads: int
    registered: list[str]
    kernels: dict[str, bool]
    extras: dict[str, list[str]]

    @classmethod
    def here(cls) -> Environment:
        """Return the environment of this process."""
        import torch

        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        is_cuda = device is not None and device.type == "cuda"
        return cls(
            versions=versions(),
            device=device.type if device else "cpu",
            device_name=torch.cuda.get_device_name() if is_cuda else platform.processor() or platform.machine(),
            threads=torch.get_num_threads(),
            registered=sorted(SERVED),
            kernels=_kernels(is_cuda=is_cuda),
            extras=_extras(),
        )


def versions() -> dict[str, str]:
    """Return versions by package."""
    return {
        "jacobi_hf": jacobi_hf.__version__,
        "transformers": metadata.version("transformers"),
        "torch": metadata.version("torch"),
        "python": platform.python_version(),
    }


def _kernels(*, is_cuda: bool) -> dict[str, bool]:
    """Return which optional attention kernels can be used. Importing them takes seconds, so only a GPU is asked."""
    if not is_cuda:
        return {"flex_attention": False, "flash-attn": False}
    from jacobi_hf.attention.kernels import flash_attn_with_kvcache, has_flex

    return {"flex_attention": has_flex(), "flash-attn": flash_attn_with_kvcache() is not None}


def _extras() -> dict[str, list[str]]:
    """Return the packages that each extra lacks. There are no extras if this package is not installed."""
    try:
        about = metadata.metadata("jacobi-hf")
    except metadata.PackageNotFoundError:
        return {}
    needed = [Requirement(one) for one in about.get_all("Requires-Dist") or []]
    return {
        extra: [
            one.name
            for one in needed
            if one.marker and one.marker.evaluate({"extra": extra}) and not _is_installed(one)
        ]
        for extra in about.get_all("Provides-Extra") or []
    }


def _is_installed(requirement: Requirement) -> bool:
    try:
        return requirement.specifier.contains(metadata.version(requirement.name), prereleases=True)
    except metadata.PackageNotFoundError:
        return False
