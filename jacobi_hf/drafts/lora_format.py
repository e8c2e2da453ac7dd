"""Files of a LoRA drafter: how they are written, read, and checked against the model that a drafter is loaded into.

A folder holds `drafter_config.json` (`LoraDrafterConfig`) and `drafter_model.safetensors`: the factors under PEFT's
names, and the embedding of draft slots.
"""

from __future__ import annotations

import json
import math
import tempfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    import torch

CONFIG_FILE = "drafter_config.json"
WEIGHTS_FILE = "drafter_model.safetensors"
EMBEDDING = "draft_embedding"
_MODEL_SHAPE = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")
_PICKLED = (".bin", ".pt", ".pth", ".pkl", ".ckpt")


class DrafterError(ValueError):
    """A drafter cannot be used; the message says why, and what to do."""


@dataclass(frozen=True)
class LoraDrafterConfig:
    """Content of `drafter_config.json`: what a LoRA drafter is, and which model it was made for.

    Attributes:
        base_model: name or path of the model that the drafter was made for; empty if unknown.
        base_revision: commit of that model on the Hub, or None.
        model_type, hidden_size, num_hidden_layers, vocab_size: values of that model's config. A drafter is loaded only
            into models that have the same values.
        r: rank of the factors.
        lora_alpha: scale times rank, as in PEFT: the delta is scaled by `lora_alpha / r`.
        target_modules: last parts of the names of the linear layers that have factors, such as "q_proj".
        constant_draft: a token id that replaces every guess at the drafter's input, or None to use the guesses. A
            drafter trained with it does plain multi-token prediction.
        format_version: version of this file format.
    """

    base_model: str
    base_revision: str | None
    model_type: str
    hidden_size: int
    num_hidden_layers: int
    vocab_size: int
    r: int
    lora_alpha: float
    target_modules: list[str]
    constant_draft: int | None = None
    format_version: int = 1

    def __post_init__(self) -> None:
        """Raise `DrafterError` for a value that no drafter can have."""
        if self.format_version != 1:
            raise DrafterError(f"format_version={self.format_version!r} cannot be read; this package reads version 1.")
        sizes = (self.r, self.hidden_size, self.num_hidden_layers, self.vocab_size)
        if any(type(size) is not int or size < 1 for size in sizes):
            raise DrafterError(
                f"r, hidden_size, num_hidden_layers and vocab_size must be integers of at least 1, not {sizes}."
            )
        alpha = self.lora_alpha
        if type(alpha) not in (int, float) or not math.isfinite(alpha):
            raise DrafterError(f"lora_alpha={alpha!r} must be a finite number.")
        modules = self.target_modules
        if not isinstance(modules, list) or not modules or any(type(name) is not str for name in modules):
            raise DrafterError(f"target_modules={modules!r} must be a list of names.")
        constant = self.constant_draft
        if constant is not None and (type(constant) is not int or not 0 <= constant < self.vocab_size):
            raise DrafterError(f"constant_draft={constant!r} must be a token id below {self.vocab_size}, or null.")

    @classmethod
    def of(cls, model: Any, r: int, lora_alpha: float, target_modules: list[str], constant_draft: int | None) -> Self:
        """Return the config of a new drafter for `model`."""
        config = model.config
        return cls(
            base_model=str(getattr(config, "_name_or_path", "") or ""),
            base_revision=getattr(config, "_commit_hash", None),
            **_shape_of(model),
            r=r,
            lora_alpha=lora_alpha,
            target_modules=sorted(target_modules),
            constant_draft=constant_draft,
        )

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Return the config in a drafter's folder.

        Raises:
            DrafterError: `drafter_config.json` is missing, damaged, or of a newer version.
        """
        path = folder / CONFIG_FILE
        if not path.is_file():
            raise DrafterError(f"{folder} has no {CONFIG_FILE}{_hint_of_adapter(folder)}.")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            unknown = sorted(set(values) - {field.name for field in fields(cls)})
            config = cls(**{name: value for name, value in values.items() if name not in unknown})
        except (json.JSONDecodeError, UnicodeDecodeError, TypeError, AttributeError) as error:
            raise DrafterError(f"{path} is damaged: {error}.") from error
        except DrafterError as error:
            raise DrafterError(f"{path}: {error}") from error
        if unknown:
            raise DrafterError(
                f"{path} has the unknown fields {', '.join(unknown)}: it was written by a newer version."
            )
        return config


def read_drafter_files(folder: Path) -> tuple[LoraDrafterConfig, dict[str, torch.Tensor]]:
    """Return the config and the tensors, by name, of a drafter's folder.

    Raises:
        DrafterError: a file is missing, damaged or pickled, or a tensor is missing, unknown, of the wrong shape, or
            holds NaN or Inf. The message names the file.
    """
    config = LoraDrafterConfig.read(folder)
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        pickled = [file.name for file in folder.glob("*") if file.suffix in _PICKLED]
        hint = f"; {pickled[0]} is pickled, which is never read" if pickled else ""
        raise DrafterError(f"{folder} has no {WEIGHTS_FILE}{hint}.")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise DrafterError(f"{path} is damaged or no safetensors file: {error}.") from error
    _check_tensors(tensors, config, path)
    return config, tensors


def write_drafter_files(folder: Path, config: LoraDrafterConfig, tensors: dict[str, torch.Tensor]) -> None:
    """Write a drafter's two files into `folder`, which is made if it is missing.

    Each file appears whole or not at all. There is no `adapter_config.json` on purpose: transformers'
    `from_pretrained` would attach the factors to the model as an ordinary adapter, which acts on every position.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as name_of_part:
        part = Path(name_of_part)
        save_file(tensors, part / WEIGHTS_FILE, metadata={"format": "pt"})
        (part / CONFIG_FILE).write_text(json.dumps(asdict(config), indent=1) + "\n", encoding="utf-8")
        for name in (WEIGHTS_FILE, CONFIG_FILE):
            (part / name).chmod(0o644)
            (part / name).replace(folder / name)


def factor_names(layer: str) -> tuple[str, str]:
    """Return the names of a layer's two factors, `lora_A` and `lora_B`, in the file."""
    return f"base_model.model.{layer}.lora_A.weight", f"base_model.model.{layer}.lora_B.weight"


def shapes_of_factors(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[int, int]]:
    """Return `(in_features, out_features)` of each layer that has factors among `tensors`, by the layer's name."""
    prefix, suffix = factor_names("|")[0].split("|")
    layers = [name[len(prefix) : -len(suffix)] for name in sorted(tensors) if _is_first_factor(name)]
    pairs = {layer: factor_names(layer) for layer in layers}
    return {layer: (tensors[first].shape[1], tensors[second].shape[0]) for layer, (first, second) in pairs.items()}


def linear_layers(model: Any) -> dict[str, Any]:
    """Return the linear layers of a model by name, all but its LM head.

    A layer under a PEFT adapter has the name that it has without the adapter.
    """
    head = model.get_output_embeddings()
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        is_linear = hasattr(module, "in_features") and hasattr(module, "out_features")
        if is_linear and module is not head and not any(name.startswith(outer + ".") for outer in found):
            found[name] = module
    return found


def check_fits(config: LoraDrafterConfig, shapes: dict[str, tuple[int, int]], model: Any) -> None:
    """Raise an error unless a drafter was made for `model`.

    Args:
        config: the drafter's config.
        shapes: `(in_features, out_features)` of each layer that the drafter has factors for.
        model: a transformers model, which may be on the meta device.

    Raises:
        DrafterError: the model's config, revision or layers are not those that the drafter was made for.
    """
    whose = f"the drafter was made for {config.base_model or 'another model'}"
    for name, value in _shape_of(model).items():
        if getattr(config, name) != value:
            raise DrafterError(f"{whose}, whose {name} is {getattr(config, name)!r}; this model's is {value!r}.")
    revision = getattr(model.config, "_commit_hash", None)
    if config.base_revision and revision and config.base_revision != revision:
        name = getattr(model.config, "_name_or_path", None) or "another repository"
        advice = f": load it with revision={config.base_revision!r}" if config.base_model == name else f" of {name}"
        raise DrafterError(f"{whose} at revision {config.base_revision}; this model is at {revision}{advice}.")
    layers = linear_layers(model)
    for name, wanted in shapes.items():
        there = (layers[name].in_features, layers[name].out_features) if name in layers else None
        if there != wanted:
            raise DrafterError(
                f"{whose}, with a layer {name} of {wanted} features; this model has {there or 'no such layer'}."
            )


def _shape_of(model: Any) -> dict[str, Any]:
    config = model.config.get_text_config(decoder=True)
    return {name: getattr(config, name) for name in _MODEL_SHAPE}


def _hint_of_adapter(folder: Path) -> str:
    if not (folder / "adapter_config.json").is_file():
        return ""
    advice = "load it with model.load_adapter or PeftModel"
    return f": it holds an ordinary adapter, which would act on every position; {advice}"


def _is_first_factor(name: str) -> bool:
    prefix, suffix = factor_names("|")[0].split("|")
    return name.startswith(prefix) and name.endswith(suffix)


def _check_tensors(tensors: dict[str, torch.Tensor], config: LoraDrafterConfig, path: Path) -> None:
    """Raise `DrafterError` unless `tensors` are finite, and are the factors and the embedding that `config` names."""
    if broken := [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]:
        raise DrafterError(f"{path}: {broken[0]} holds NaN or Inf.")
    prefix, suffix = factor_names("|")[0].split("|")
    expected: dict[str, tuple[int, ...]] = {EMBEDDING: (config.hidden_size,)}
    for first in filter(_is_first_factor, sorted(tensors)):
        layer = first[len(prefix) : -len(suffix)]
        pair = [name for name in factor_names(layer) if name in tensors and tensors[name].ndim == 2]
        if len(pair) < 2 or layer.rpartition(".")[2] not in config.target_modules:
            raise DrafterError(
                f"{path}: {first} has no counterpart, is no matrix, or is none of the target_modules of {CONFIG_FILE}."
            )
        second = pair[1]
        expected[first] = (config.r, tensors[first].shape[1])
        expected[second] = (tensors[second].shape[0], config.r)
    if set(tensors) != set(expected) or len(expected) == 1:
        odd = sorted(set(tensors) ^ set(expected))
        raise DrafterError(f"{path} does not hold a drafter: {odd[0] if odd else 'no factors'} is missing or unknown.")
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != shape:
            raise DrafterError(f"{path}: {name} has shape {tuple(tensors[name].shape)}, not {shape}.")
