"""A LoRA drafter: a LoRA and one learnt embedding that act on the draft slots of a forward alone.

The draft slots are the last ones of a forward. There the drafter adds its delta to the output of linear layers. All
other slots run with the model's weights exactly, and they verify what the draft slots propose. So the text is the
model's own, whatever a drafter has learnt. The drafter decides how many guesses are accepted.
"""

from __future__ import annotations

import contextlib
import math
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch

from jacobi_hf.drafts.lora_format import (
    EMBEDDING,
    DrafterError,
    LoraDrafterConfig,
    factor_names,
    linear_layers,
    read_drafter_files,
    shapes_of_factors,
    write_drafter_files,
)
from jacobi_hf.shared_change import CallHook, SharedChange

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from contextlib import AbstractContextManager


class _Gate(threading.local):
    """The draft slots of the forward that a thread runs: those from `first` on; None while no forward drafts."""

    first: int | None = None
    slots: int = 0
    rows: int = 0


class LoraDrafter(torch.nn.Module):
    """A drafter for one model: LoRA factors for its linear layers, and an embedding that is added to draft tokens.

    Make an untrained one with `new`, or read one with `from_pretrained`. `jacobi_hf.load_drafter` reads one for
    decoding.

    Args:
        config: rank, scale and layers.
        shapes: `(in_features, out_features)` of each layer that gets factors, by its name in the model.

    Attributes:
        config: rank, scale and layers.
        layers: key of each layer's factors, by the layer's name in the model.
        lora_A: first factors, `(r, in_features)`, by key.
        lora_B: second factors, `(out_features, r)`, by key.
        embedding: `(H,)`.
    """

    def __init__(self, config: LoraDrafterConfig, shapes: dict[str, tuple[int, int]]) -> None:
        super().__init__()
        self.config = config
        self.scale = config.lora_alpha / config.r
        self.layers = {name: name.replace(".", "-") for name in shapes}
        self.lora_A = torch.nn.ParameterDict()
        self.lora_B = torch.nn.ParameterDict()
        for name, (inputs, outputs) in shapes.items():
            factor = torch.empty(config.r, inputs)
            torch.nn.init.kaiming_uniform_(factor, a=math.sqrt(5))
            self.lora_A[self.layers[name]] = torch.nn.Parameter(factor)
            self.lora_B[self.layers[name]] = torch.nn.Parameter(torch.zeros(outputs, config.r))
        self.embedding = torch.nn.Parameter(torch.zeros(config.hidden_size))
        self._gate = _Gate()
        self._hooked = SharedChange()

    @classmethod
    def new(
        cls,
        model: Any,
        r: int = 64,
        lora_alpha: float | None = None,
        target_modules: str | Iterable[str] = "all-linear",
        constant_draft: int | None = None,
    ) -> Self:
        """Return an untrained drafter for a model; its delta is zero.

        Args:
            model: a transformers model; it does not change.
            r: rank of the factors.
            lora_alpha: scale times rank, as in PEFT; by default the rank, for a scale of 1.
            target_modules: last parts of the names of linear layers, such as "q_proj"; or "all-linear" for all linear
                layers but the LM head.
            constant_draft: a token id that replaces every guess at the drafter's input; None to use the guesses.

        Raises:
            DrafterError: the model has no linear layer of such a name.
        """
        layers = linear_layers(model)
        last = {name.rpartition(".")[2] for name in layers}
        named = {target_modules} if isinstance(target_modules, str) else {*target_modules}
        wanted = last if target_modules == "all-linear" else named
        if unknown := sorted(wanted - last):
            raise DrafterError(
                f"target_modules {', '.join(unknown)} are no linear layers of the model; "
                f"it has {', '.join(sorted(last))}."
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
        """Return the drafter in a folder, in float32 and without gradients.

        Raises:
            DrafterError: a file is missing, damaged or pickled, or a number is not finite. The message names the file.
        """
        config, tensors = read_drafter_files(Path(folder))
        drafter = cls(config, shapes_of_factors(tensors))
        with torch.no_grad():
            for name, parameter in drafter.weights().items():
                parameter.copy_(tensors[name])
        return drafter.requires_grad_(requires_grad=False).eval()

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Return `(in_features, out_features)` of each layer that has factors, by the layer's name in the model."""
        return {name: (self.lora_A[key].shape[1], self.lora_B[key].shape[0]) for name, key in self.layers.items()}

    def weights(self) -> dict[str, torch.nn.Parameter]:
        """Return the parameters by their names in the file; the names of the factors are PEFT's."""
        named = {EMBEDDING: self.embedding}
        for name, key in self.layers.items():
            name_A, name_B = factor_names(name)
            named[name_A] = self.lora_A[key]
            named[name_B] = self.lora_B[key]
        return named

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype = torch.bfloat16) -> None:
        """Write `drafter_config.json` and `drafter_model.safetensors`; see `write_drafter_files`.

        Args:
            folder: made if it is missing.
            dtype: of the weights in the file.
        """
        tensors = {name: p.detach().to("cpu", dtype).contiguous().clone() for name, p in self.weights().items()}
        write_drafter_files(Path(folder), self.config, tensors)

    def merge_and_unload(self) -> None:
        """Raise an error: a drafter cannot become part of the model's weights.

        Raises:
            DrafterError: always.
        """
        raise DrafterError(
            "a drafter cannot be merged: in the model's weights it would act on every position and change the text."
        )

    def copied(self) -> Self:
        """Return a copy with weights of its own, without gradients."""
        twin = type(self)(self.config, self.shapes())
        twin.load_state_dict(self.state_dict())
        return twin.requires_grad_(requires_grad=False).eval()

    def place(self, model: Any, dtype: torch.dtype) -> Self:
        """Move each factor to the device of its layer, in a dtype; return the drafter.

        Raises:
            DrafterError: a layer is on the meta device, so nothing says where it runs.
        """
        layers = linear_layers(model)
        for name, key in self.layers.items():
            for factors in (self.lora_A, self.lora_B):
                factors[key].data = factors[key].data.to(_device_of(layers[name], model), dtype)
        self.embedding.data = self.embedding.data.to(_device_of(model.get_input_embeddings(), model), dtype)
        return self

    def attached(self, model: Any) -> AbstractContextManager[None]:
        """Return a context in which the model's layers have the drafter's hooks. Calls may overlap.

        The hooks do nothing outside of `drafting`.

        Raises:
            DrafterError: the model has lost a layer on which the drafter acts.
        """
        return self._hooked.made(model, lambda: self._attach(model))

    def _attach(self, model: Any) -> Callable[[], None]:
        layers = linear_layers(model)
        if missing := [name for name in self.layers if name not in layers]:
            raise DrafterError(
                f"the model has no layer {missing[0]} any more, on which its drafter acts: load the drafter again."
            )
        embeddings = model.get_input_embeddings()
        handles = [layers[name].register_forward_hook(self._delta_hook(key)) for name, key in self.layers.items()]
        handles.append(embeddings.register_forward_hook(self._embedding_hook()))
        if self.config.constant_draft is not None:
            handles.append(embeddings.register_forward_pre_hook(self._token_hook()))

        def detach() -> None:
            for handle in handles:
                handle.remove()

        return detach

    def is_attached(self, model: Any) -> bool:
        """Return whether a call on this model is drafting with this drafter."""
        return self._hooked.is_made(model)

    def replace_drafts(self, token_BQ: torch.Tensor, draft_slots: int) -> torch.Tensor:
        """Return the ids of a forward; `constant_draft`, if there is one, replaces the last `draft_slots` ids."""
        constant = self.config.constant_draft
        if constant is None:
            return token_BQ
        return torch.cat([token_BQ[:, :-draft_slots], torch.full_like(token_BQ[:, -draft_slots:], constant)], 1)

    @contextlib.contextmanager
    def drafting(self, first: int, slots: int, rows: int) -> Iterator[None]:
        """Return a context in which the drafter acts on the last slots of this thread's forwards.

        Args:
            first: the first draft slot.
            slots: Q, slots of the forward.
            rows: B.
        """
        self._gate.first = first
        self._gate.slots = slots
        self._gate.rows = rows
        try:
            yield
        finally:
            self._gate.first = None

    def _delta_hook(self, key: str) -> CallHook:
        def add_delta(_: torch.nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            gate = self._gate
            if gate.first is None:
                return output
            # A block may flatten rows and slots into one axis. If it drops slots, the draft slots cannot be found.
            if args[0].numel() != gate.rows * gate.slots * args[0].shape[-1]:
                raise DrafterError(
                    f"a layer ({key}) does not see every slot once: leave it out of the drafter's target_modules."
                )
            inputs = args[0].reshape(-1, gate.slots, args[0].shape[-1])[:, gate.first :]
            lora_A = self.lora_A[key]
            lora_B = self.lora_B[key]
            if not torch.is_autocast_enabled(inputs.device.type):
                inputs = inputs.to(lora_A.dtype)
            delta = torch.nn.functional.linear(torch.nn.functional.linear(inputs, lora_A), lora_B)
            return _added(output, (delta * self.scale).to(output.dtype), gate)

        return CallHook(add_delta, is_drafters=True)

    def _token_hook(self) -> CallHook:
        def show_constant(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
            if self._gate.first is None:
                return None
            token_BQ, *rest = args
            return (self.replace_drafts(token_BQ, self._gate.slots - self._gate.first), *rest)

        return CallHook(show_constant, is_drafters=True)

    def _embedding_hook(self) -> CallHook:
        def add_embedding(_: torch.nn.Module, __: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            return output if self._gate.first is None else _added(output, self.embedding.to(output.dtype), self._gate)

        return CallHook(add_embedding, is_drafters=True)


def _added(output: torch.Tensor, delta: torch.Tensor, gate: _Gate) -> torch.Tensor:
    """Return a layer's output with `delta` added to its draft slots; in place unless all slots are draft slots."""
    if gate.first == 0:
        return output + delta.reshape(output.shape) if delta.ndim > 1 else output + delta
    output.view(-1, gate.slots, output.shape[-1])[:, gate.first :] += delta
    return output


def _device_of(layer: torch.nn.Module, model: Any) -> torch.device:
    """Return the device that a layer runs on, also if its weights are offloaded."""
    weight = next(layer.parameters(), None)
    if weight is not None and weight.device.type != "meta":
        return weight.device
    offloaded = getattr(getattr(layer, "_hf_hook", None), "execution_device", None)
    device = model.device if offloaded is None else torch.device(offloaded)
    if device.type == "meta":
        raise DrafterError(
            "the model's weights are on the meta device, so there is no device for the drafter: "
            "load the model with its weights."
        )
    return device
