"""The model's forward over the slots of a layout."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache

from jacobi_hf.attention.dispatch import AttentionProbe, install_dispatch, probing
from jacobi_hf.attention.interface import StepMasks, attention_key
from jacobi_hf.decoding.prompt import NotServedError
from jacobi_hf.decoding.step import ForwardInputs, ForwardOutput
from jacobi_hf.execution.kept import kept_for
from jacobi_hf.integration.compat import CACHE, CACHE_LAYERS, kept_logits, logits_to_keep
from jacobi_hf.shared_change import CallHook, SharedChange

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from transformers import Cache

    from jacobi_hf.decoding.cache import JacobiStaticCache
    from jacobi_hf.decoding.layout import Layout
    from jacobi_hf.drafts.sources import Sources


# What a forward raises that cannot run with our cache and masks.
_ERRORS = (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError)


class ModelForward:
    """The forward of a transformers model over the slots of a layout, with our cache, positions and masks.

    Args:
        model: the model.
        cache: what it reads and writes.
        sources: the draft sources of the call.
        last_position: the last position at which the call may need the model's choice, of each row `(B, 1)` or of all.
            Slots after it belong to rows that need fewer slots than others, and nothing reads their outcome.
        ordinary_cache: the cache that ordinary decoding would use, or None.
        gapped: columns that the call may need if pads stand between the tokens of a row, else 0.

    Raises:
        NotServedError: an earlier forward has shown that the model does not decode with our masks and such a cache.
    """

    def __init__(
        self,
        model: Any,
        cache: JacobiStaticCache,
        sources: Sources,
        last_position: torch.Tensor,
        ordinary_cache: Cache | None = None,
        *,
        gapped: int = 0,
    ) -> None:
        install_dispatch()
        self._model = model
        self._cache = cache
        self._backbone = sources.backbone
        self._last_position = last_position
        # With offloaded weights the model has no device of its own, and accelerate's hooks move the inputs.
        self._device = cache.lengths_B.device if model.device.type == "meta" else model.device
        self._masks = StepMasks(model, self._device)
        self._ordinary_cache = ordinary_cache
        self._gapped = gapped
        self._probes = kept_for(model).probes
        self._key = attention_key(model.config)
        known = self._probes.get(self._key)
        if known is not None:
            self._learn(known)
        self._taps = sources.taps
        self._tapped: dict[int, torch.Tensor] = {}

    def __call__(self, inputs: ForwardInputs) -> ForwardOutput:
        """Return logits and features; see `jacobi_hf.decoding.step.Forward`.

        In the first forward of a model, its own code asks for its masks.

        Raises:
            NotServedError: the first forward has shown that the model does not decode with our masks.
        """
        layout = inputs.layout
        exact = self._masks.is_learnt and self._masks.needs_none(layout, inputs.past)
        self._cache.open_step(layout.slots, inputs.key_column_K, layout.draft_slots, past=inputs.past, exact=exact)
        outputs = self._outputs(layout, self.arguments(inputs)) if self._masks.is_learnt else self._first(inputs)
        logits = outputs.logits.to(self._cache.lengths_B.device)
        features = [self._tapped.pop(tap) for tap in self._taps if tap in self._tapped]
        features_BQF = torch.cat(features, -1) if features else None
        return ForwardOutput(kept_logits(logits, inputs.keep_BN, layout.slots), features_BQF)

    def _outputs(self, layout: Layout, arguments: dict[str, Any]) -> Any:
        if not layout.draft_slots or self._backbone is None:
            return self._model(**arguments)
        with self._backbone.during_forward(layout, len(self._cache.lengths_B)):
            outputs = self._model(**arguments)
        # A drafter that returns NaN must not make a processor fail.
        outputs.logits[:, -layout.draft_slots :].nan_to_num_()
        return outputs

    def _first(self, inputs: ForwardInputs) -> Any:
        """Return the outputs of a forward in which the model asks for its masks, and learn from it."""
        layout = inputs.layout
        probe = self._masks.probe(layout, self._cache.lengths_B, inputs.key_column_K)
        try:
            with probing(probe), _uncompiled(self._model):
                outputs = self._outputs(layout, self.arguments(inputs))
        except torch.OutOfMemoryError:
            raise
        except _ERRORS as error:
            problem = str(error).partition("\n")[0]
            raise NotServedError(f"this model, whose forward fails with our cache and masks ({problem})") from error
        self._probes[self._key] = probe.without_masks()
        self._learn(probe)
        return outputs

    def _learn(self, probe: AttentionProbe) -> None:
        if reason := self._masks.learn(probe) or slides_alone(self._ordinary_cache, self._masks):
            raise NotServedError(reason)
        if any(window is not None and window < self._gapped for window in self._masks.windows.values()):
            raise NotServedError("pads between the tokens of a row under a sliding window, which counts them")

    def needs_mask(self, slots: int, *, without_past: bool) -> bool:
        """Return whether a chain of `slots` slots needs a mask; see `StepMasks.is_causal`."""
        return not (without_past and self._masks.is_causal(slots))

    def arguments(self, inputs: ForwardInputs) -> dict[str, Any]:
        """Return the arguments of the model; the cache must be open for the step."""
        layout = inputs.layout
        lengths_B = self._cache.lengths_B
        position_BQ = self._cache.slot_BQ if layout.is_chain else lengths_B[:, None] + layout.depth_Q
        keep_BN = None if inputs.keep_BN is None else inputs.keep_BN.to(self._device)
        return {
            "input_ids": None if inputs.token_BQ is None else inputs.token_BQ.to(self._device),
            "inputs_embeds": inputs.embeds_BQH,
            "attention_mask": self._mask(inputs),
            "position_ids": position_BQ.clamp(max=self._last_position).to(self._device),
            CACHE: self._cache,
            "use_cache": True,
            "logits_to_keep": logits_to_keep(keep_BN, layout.slots),
            "return_dict": True,
        }

    def _mask(self, inputs: ForwardInputs) -> Any:
        if not self._masks.is_learnt:  # the model's code makes its masks itself if it is given none
            return None
        if self._masks.needs_none(inputs.layout, inputs.past):
            return self._masks.of_single()
        return self._masks.of_step(inputs.layout, self._cache.lengths_B, inputs.key_column_K)

    @contextlib.contextmanager
    def tapping(self) -> Iterator[None]:
        """Read the outputs of the tapped layers while the context is open, by hooks that are removed afterwards.

        `output_hidden_states` will not do: it leaves hooks on every layer, and it returns the last layer after the
        norm.
        """
        layers = self._model.base_model.layers if self._taps else []
        handles = [layers[tap].register_forward_hook(self._tap_hook(tap)) for tap in self._taps]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _tap_hook(self, tap: int) -> CallHook:
        def keep(_: torch.nn.Module, __: Any, output: Any) -> None:
            self._tapped[tap] = output if isinstance(output, torch.Tensor) else output[0]

        return CallHook(keep)


_eager_forwards = SharedChange()


def _uncompiled(model: Any) -> AbstractContextManager[None]:
    """Return a context in which the parts of a model that the caller has compiled run uncompiled.

    A probe sees nothing of compiled code. The setting is torch's, for all threads, so other models are left alone.
    """
    is_compiled = any(
        module._compiled_call_impl is not None or hasattr(module.forward, "_torchdynamo_orig_callable")
        for module in model.modules()
    )
    if not is_compiled:
        return contextlib.nullcontext()

    def force_eager() -> Callable[[], None]:
        stance = torch.compiler.set_stance("force_eager")
        return lambda: stance.__exit__(None, None, None)

    return _eager_forwards.made(torch, force_eager)


def problem_of(model: Any) -> str | None:
    """Return why a model does not decode with our masks and cache, seen in a forward of two tokens; None if it does.

    The weights may be on the meta device. If the forward cannot run there, the first call will find out.
    """
    install_dispatch()
    probe = AttentionProbe(lambda _: None)
    cache = DynamicCache(config=model.config)
    ids_BP = torch.zeros(1, 2, dtype=torch.long, device=model.device)
    try:
        with torch.no_grad(), probing(probe):
            model(ids_BP, **{CACHE: cache})
    except Exception:  # noqa: BLE001  # nobody asked for this forward, so its error is of no interest
        return None
    masks = StepMasks(model, model.device)
    return unknown_layers(cache) or masks.learn(probe) or slides_alone(cache, masks)


def unknown_layers(cache: Any) -> str | None:
    """Return what in the cache of a call keeps something else than keys and values of tokens, or None."""
    kinds = {type(layer) for layer in getattr(cache, "layers", ())}
    other = sorted(kind.__name__ for kind in kinds if kind not in CACHE_LAYERS)
    return f"layers that keep a state of their own ({', '.join(other)})" if other else None


def slides_alone(cache: Cache | None, masks: StepMasks) -> str | None:
    """Return what is wrong if the cache of a call keeps the last tokens only, and no mask of the model slides."""
    if cache is None or not any(cache.is_sliding) or any(masks.windows.values()):
        return None
    return "layers whose cache keeps a sliding window although their mask does not slide"
