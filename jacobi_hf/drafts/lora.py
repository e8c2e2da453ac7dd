"""A drafter: a LoRA and one learnt embedding that act on draft positions alone, so that the untouched model verifies what they propose.

Rows of a forward from the gate's first slot on get the drafter's delta, all others the model's weights exactly. So the text is the
model's own whatever a drafter has learnt; it decides how many tokens come true per forward.
"""

from __future__ import annotations

import contextlib
import json
import math
import tempfile
import threading
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

CONFIG_FILE, WEIGHTS_FILE = "drafter_config.json", "drafter_model.safetensors"
EMBEDDING = "draft_embedding"
_SHAPE = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")


class DrafterError(ValueError):
    """A drafter that cannot be used, with the reason."""


@dataclass(frozen=True)
class LoraDrafterConfig:
    """What a drafter is and which model it was made for; `drafter_config.json`.

    Attributes:
        base_model, base_revision: name of the model, and its commit where it came from the Hub.
        model_type, hidden_size, num_hidden_layers, vocab_size: the model's shape, which must be that of the model it is loaded into.
        r, lora_alpha: rank and scale (`lora_alpha / r`), as in PEFT.
        target_modules: last parts of the names of the linear layers that it acts on.
        constant_draft: an id that it is given in place of every draft, if it was trained so (plain multi-token prediction).
        format_version: of these files.
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
        """Refuse what no drafter can have."""
        if self.format_version != 1:
            raise DrafterError(f"format_version={self.format_version!r} is not known to this package, which knows 1.")
        sizes = (self.r, self.hidden_size, self.num_hidden_layers, self.vocab_size)
        if any(type(size) is not int or size < 1 for size in sizes):
            raise DrafterError(
                f"r, hidden_size, num_hidden_layers and vocab_size must be integers of at least 1, not {sizes}."
            )
        alpha, modules, constant = self.lora_alpha, self.target_modules, self.constant_draft
        if type(alpha) not in (int, float) or not math.isfinite(alpha):
            raise DrafterError(f"lora_alpha={alpha!r} must be a finite number.")
        if not isinstance(modules, list) or not modules or any(type(name) is not str for name in modules):
            raise DrafterError(f"target_modules={modules!r} must be a list of names.")
        if constant is not None and (type(constant) is not int or not 0 <= constant < self.vocab_size):
            raise DrafterError(f"constant_draft={constant!r} must be an id below {self.vocab_size}, or none.")

    @classmethod
    def of(cls, model: Any, r: int, lora_alpha: float, target_modules: list[str], constant_draft: int | None) -> Self:
        """For a new drafter of a model."""
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
        """From a drafter's folder.

        Raises:
            DrafterError: there is none in it, or it is damaged.
        """
        path = folder / CONFIG_FILE
        if not path.is_file():
            hint = ""
            if (folder / "adapter_config.json").is_file():
                hint = ": it holds an ordinary adapter, which would act on every position; load it with model.load_adapter or PeftModel"
            raise DrafterError(f"{folder} has no {CONFIG_FILE}{hint}.")
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


def _shape_of(model: Any) -> dict[str, Any]:
    config = model.config.get_text_config(decoder=True)
    return {name: getattr(config, name) for name in _SHAPE}


class _Gate(threading.local):
    """From which slot on the forward that this thread runs is the drafter's; None outside of a step."""

    first: int | None = None
    slots: int = 0
    rows: int = 0


class LoraDrafter(torch.nn.Module):
    """LoRA factors for linear layers of a model, and the embedding added to draft tokens.

    Args:
        config: rank, scale, layers.
        shapes: `(in, out)` features of each layer, by its name in the model.

    Attributes:
        lora_A, lora_B: `(r, in)` and `(out, r)`, by the layer's name with "." written "-".
        embedding: `(H,)`.
    """

    def __init__(self, config: LoraDrafterConfig, shapes: dict[str, tuple[int, int]]) -> None:
        super().__init__()
        self.config = config
        self.scale = config.lora_alpha / config.r
        self.layers = {name: name.replace(".", "-") for name in shapes}
        self.lora_A, self.lora_B = torch.nn.ParameterDict(), torch.nn.ParameterDict()
        for name, (inputs, outputs) in shapes.items():
            factor = torch.empty(config.r, inputs)
            torch.nn.init.kaiming_uniform_(factor, a=math.sqrt(5))
            self.lora_A[self.layers[name]] = torch.nn.Parameter(factor)
            self.lora_B[self.layers[name]] = torch.nn.Parameter(torch.zeros(outputs, config.r))
        self.embedding = torch.nn.Parameter(torch.zeros(config.hidden_size))
        self._gate = _Gate()
        self._uses = 0
        self._lock = threading.Lock()

    @classmethod
    def new(
        cls,
        model: Any,
        r: int = 64,
        lora_alpha: float | None = None,
        target_modules: str | Iterable[str] = "all-linear",
        constant_draft: int | None = None,
    ) -> Self:
        """An untrained drafter for a model: its delta is zero.

        Args:
            r, lora_alpha: rank, and scale times rank (the rank when not given).
            target_modules: last parts of layer names, or "all-linear": all linear layers but the LM head.
            constant_draft: see `LoraDrafterConfig`.

        Raises:
            DrafterError: a name that is no linear layer of the model.
        """
        layers = linear_layers(model)
        last = {name.rpartition(".")[2] for name in layers}
        wanted = (
            last if isinstance(target_modules, str) and target_modules == "all-linear" else {*_as_list(target_modules)}
        )
        if unknown := sorted(wanted - last):
            raise DrafterError(
                f"target_modules {', '.join(unknown)} are no linear layers of the model; it has {', '.join(sorted(last))}."
            )
        shapes = {
            name: (layer.in_features, layer.out_features)
            for name, layer in layers.items()
            if name.rpartition(".")[2] in wanted
        }
        config = LoraDrafterConfig.of(
            model, r, r if lora_alpha is None else lora_alpha, sorted(wanted), constant_draft
        )
        return cls(config, shapes)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Read a drafter from its folder.

        Raises:
            DrafterError: something is missing, damaged, pickled, or not finite; the file is named.
        """
        folder = Path(folder)
        config, path = LoraDrafterConfig.read(folder), folder / WEIGHTS_FILE
        if not path.is_file():
            pickled = [p.name for p in folder.glob("*") if p.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt")]
            hint = f"; {pickled[0]} is pickled, which is never read" if pickled else ""
            raise DrafterError(f"{folder} has no {WEIGHTS_FILE}{hint}.")
        try:
            tensors = load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise DrafterError(f"{path} is damaged or no safetensors file: {error}.") from error
        if broken := [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]:
            raise DrafterError(f"{path}: {broken[0]} holds NaN or Inf.")
        drafter = cls(config, _shapes_in(tensors, config, path))
        with torch.no_grad():
            for name, parameter in drafter.weights().items():
                if tensors[name].shape != parameter.shape:
                    raise DrafterError(
                        f"{path}: {name} has shape {tuple(tensors[name].shape)}, not {tuple(parameter.shape)}."
                    )
                parameter.copy_(tensors[name])
        return drafter.requires_grad_(requires_grad=False).eval()

    def weights(self) -> dict[str, torch.nn.Parameter]:
        """Parameters by their names in the file, which for the factors are PEFT's."""
        named = {EMBEDDING: self.embedding}
        for name, key in self.layers.items():
            named[f"base_model.model.{name}.lora_A.weight"] = self.lora_A[key]
            named[f"base_model.model.{name}.lora_B.weight"] = self.lora_B[key]
        return named

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype = torch.bfloat16) -> None:
        """Write `drafter_config.json` and `drafter_model.safetensors`, each whole or not at all.

        No `adapter_config.json` on purpose: `from_pretrained` attaches any adapter that it finds, ungated.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: p.detach().to("cpu", dtype).contiguous().clone() for name, p in self.weights().items()}
        with tempfile.TemporaryDirectory(dir=folder) as part:
            save_file(tensors, Path(part) / WEIGHTS_FILE, metadata={"format": "pt"})
            (Path(part) / CONFIG_FILE).write_text(json.dumps(asdict(self.config), indent=1) + "\n", encoding="utf-8")
            for name in (WEIGHTS_FILE, CONFIG_FILE):
                (Path(part) / name).chmod(0o644)
                (Path(part) / name).replace(folder / name)

    def merge_and_unload(self) -> None:
        """Refused.

        Raises:
            DrafterError: always.
        """
        raise DrafterError(
            "a drafter cannot be merged: in the model's weights it would act on every position and change the text."
        )

    def copied(self) -> Self:
        """A drafter with the same weights of its own, not to be trained."""
        shapes = {name: (self.lora_A[key].shape[1], self.lora_B[key].shape[0]) for name, key in self.layers.items()}
        twin = type(self)(self.config, shapes)
        twin.load_state_dict(self.state_dict())
        return twin.requires_grad_(requires_grad=False).eval()

    def place(self, model: Any, dtype: torch.dtype) -> Self:
        """Move each factor to the device of its layer."""
        layers = linear_layers(model)
        for name, key in self.layers.items():
            for factors in (self.lora_A, self.lora_B):
                factors[key].data = factors[key].data.to(_device_of(layers[name], model), dtype)
        self.embedding.data = self.embedding.data.to(_device_of(model.get_input_embeddings(), model), dtype)
        return self

    @contextlib.contextmanager
    def attached(self, model: Any) -> Iterator[None]:
        """The model with the drafter's hooks on its layers, which do nothing outside of `drafting`. Calls may overlap."""
        with self._lock:
            if not self._uses:
                layers = linear_layers(model)
                if missing := [name for name in self.layers if name not in layers]:
                    raise DrafterError(
                        f"the model has no layer {missing[0]} any more, on which its drafter acts: load the drafter again."
                    )
                self._handles = [
                    layers[name].register_forward_hook(self._delta_hook(key)) for name, key in self.layers.items()
                ]
                self._handles.append(model.get_input_embeddings().register_forward_hook(self._embedding_hook()))
            self._uses += 1
        try:
            yield
        finally:
            with self._lock:
                self._uses -= 1
                if not self._uses:
                    for handle in self._handles:
                        handle.remove()

    @property
    def in_use(self) -> bool:
        """Whether a call that runs has it attached."""
        return self._uses > 0

    def shown(self, token_BQ: torch.Tensor, noisy: int) -> torch.Tensor:
        """The ids of a forward with what the drafter is given in place of the last `noisy` ones."""
        constant = self.config.constant_draft
        return (
            token_BQ
            if constant is None
            else torch.cat([token_BQ[:, :-noisy], torch.full_like(token_BQ[:, -noisy:], constant)], 1)
        )

    @contextlib.contextmanager
    def drafting(self, first: int, slots: int, rows: int) -> Iterator[None]:
        """This thread's forward of `rows` rows of `slots` slots is the drafter's from slot `first` on."""
        self._gate.first, self._gate.slots, self._gate.rows = first, slots, rows
        try:
            yield
        finally:
            self._gate.first = None

    def _delta_hook(self, key: str) -> Any:
        def add_delta(_: torch.nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            gate = self._gate
            if gate.first is None:
                return output
            # Some blocks flatten rows and slots into one dimension; what has other rows (a routed part of the slots) cannot be told apart.
            if args[0].numel() != gate.rows * gate.slots * args[0].shape[-1]:
                raise DrafterError(
                    f"a layer ({key}) does not see every slot once: leave it out of the drafter's target_modules."
                )
            inputs = args[0].reshape(-1, gate.slots, args[0].shape[-1])[:, gate.first :]
            lora_A, lora_B = self.lora_A[key], self.lora_B[key]
            if not torch.is_autocast_enabled(inputs.device.type):
                inputs = inputs.to(lora_A.dtype)
            delta = torch.nn.functional.linear(torch.nn.functional.linear(inputs, lora_A), lora_B)
            return _added(output, (delta * self.scale).to(output.dtype), gate)

        add_delta.is_drafters = True  # type: ignore[attr-defined]
        return add_delta

    def _embedding_hook(self) -> Any:
        def add_embedding(_: torch.nn.Module, __: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            return output if self._gate.first is None else _added(output, self.embedding.to(output.dtype), self._gate)

        add_embedding.is_drafters = True  # type: ignore[attr-defined]
        return add_embedding


def _added(output: torch.Tensor, delta: torch.Tensor, gate: _Gate) -> torch.Tensor:
    if gate.first == 0:
        return output + delta.reshape(output.shape) if delta.ndim > 1 else output + delta
    output.view(-1, gate.slots, output.shape[-1])[:, gate.first :] += delta
    return output


def linear_layers(model: Any) -> dict[str, Any]:
    """Linear layers of a model but its LM head, by name; layers under a PEFT adapter by the name that they have without it."""
    head = model.get_output_embeddings()
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        is_linear = hasattr(module, "in_features") and hasattr(module, "out_features")
        if is_linear and module is not head and not any(name.startswith(outer + ".") for outer in found):
            found[name] = module
    return found


def check_fits(drafter: LoraDrafter, model: Any) -> None:
    """Refuse a drafter that was made for another model.

    Raises:
        DrafterError: shape, layers or revision differ; both are named.
    """
    config, shape = drafter.config, _shape_of(model)
    of = f"the drafter was made for {config.base_model or 'another model'}"
    for name, value in shape.items():
        if getattr(config, name) != value:
            raise DrafterError(f"{of}, whose {name} is {getattr(config, name)!r}; this model's is {value!r}.")
    revision = getattr(model.config, "_commit_hash", None)
    if config.base_revision and revision and config.base_revision != revision:
        name = getattr(model.config, "_name_or_path", None) or "another repository"
        advice = f": load it with revision={config.base_revision!r}" if config.base_model == name else f" of {name}"
        raise DrafterError(f"{of} at revision {config.base_revision}; this model is at {revision}{advice}.")
    layers = linear_layers(model)
    for name, key in drafter.layers.items():
        wanted = (drafter.lora_A[key].shape[1], drafter.lora_B[key].shape[0])
        there = (layers[name].in_features, layers[name].out_features) if name in layers else None
        if there != wanted:
            raise DrafterError(
                f"{of}, with a layer {name} of {wanted} features; this model has {there or 'no such layer'}."
            )


def _shapes_in(tensors: dict[str, torch.Tensor], config: LoraDrafterConfig, path: Path) -> dict[str, tuple[int, int]]:
    shapes, known = {}, {EMBEDDING}
    for name in sorted(tensors):
        layer = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        if name != f"base_model.model.{layer}.lora_A.weight":
            continue
        second = f"base_model.model.{layer}.lora_B.weight"
        pair = [tensors[one] for one in (name, second) if one in tensors]
        if (
            len(pair) < 2
            or any(one.ndim != 2 for one in pair)
            or layer.rpartition(".")[2] not in config.target_modules
        ):
            raise DrafterError(
                f"{path}: {name} has no counterpart, is no matrix, or is none of the target_modules of {CONFIG_FILE}."
            )
        shapes[layer] = (tensors[name].shape[-1], tensors[second].shape[0])
        known |= {name, second}
    if EMBEDDING not in tensors or set(tensors) != known or not shapes:
        odd = sorted(set(tensors) ^ known)
        raise DrafterError(f"{path} does not hold a drafter: {odd[0] if odd else 'no factors'} is missing or unknown.")
    return shapes


def _device_of(layer: torch.nn.Module, model: Any) -> torch.device:
    weight = next(layer.parameters(), None)
    if weight is not None and weight.device.type != "meta":
        return weight.device
    offloaded = getattr(getattr(layer, "_hf_hook", None), "execution_device", None)
    device = model.device if offloaded is None else torch.device(offloaded)
    if device.type == "meta":
        raise DrafterError("the model's weights are on no device (meta), and nothing says where they run.")
    return device


def _as_list(value: str | Iterable[str]) -> list[str]:
    return [value] if isinstance(value, str) else list(value)
