"""The hooks of `generate` that Jacobi decoding overrides.

`JacobiGenerationMixin` goes into the bases of a model class and overrides four private stages of
`GenerationMixin.generate`:

- `_extract_generation_mode_kwargs` sees whether a callable of the caller's will decode,
- `_prepare_generation_config` takes the knobs out of the arguments,
- `_validate_generation_mode` refuses a call, or lets it decode in the ordinary way,
- `_sample` decodes.

Continuous batching does none of this, so its two entries refuse a `decoding`, or warn of one that is saved.

`generate` itself stays transformers' own, so inputs, processors, criteria and streamers arrive prepared. The public
`custom_generate=callable` argument cannot replace the hooks: it decodes only in calls that name it, so a model with a
saved decoding would decode in the ordinary way, and `generate` refuses the knobs as unknown arguments.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from jacobi_hf.config import KNOBS, JacobiConfig, reject_misspelt, reject_pointless
from jacobi_hf.decoding.prompt import NotServedError
from jacobi_hf.drafts.sources import sources_of
from jacobi_hf.integration.call import GenerateCall
from jacobi_hf.integration.compat import CACHE_NAMES
from jacobi_hf.integration.quantisation import warn_of_shared_scales
from jacobi_hf.integration.support import fallback_reason, refusal_reason

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
    from transformers.generation import BaseStreamer

_REQUEST = "_jacobi_request"
_METHOD = "_jacobi_custom_generate"  # among the arguments of a call, between two of its stages
_BATCHING = "continuous batching (generate_batch, or cache_implementation='paged')"
# Model arguments that a call prepares itself. With any other, it decodes in the ordinary way.
_HANDLED = {
    "attention_mask",
    "position_ids",
    *CACHE_NAMES,
    "use_cache",
    "logits_to_keep",
    "inputs_embeds",
    "cache_position",
    "tokenizer",
    "assistant_tokenizer",  # without an assistant, it has no effect
}


@dataclass(frozen=True)
class JacobiRequest:
    """A request for Jacobi decoding, kept with the generation config from hook to hook.

    Attributes:
        config: the knobs.
        in_call: whether the request came from the call's arguments rather than from a saved generation config.
        own_positions: whether the caller gave position ids.
        own_cache: whether the caller gave a cache.
        method: the function that decodes instead of `_sample`, or None.
    """

    config: JacobiConfig
    in_call: bool
    own_positions: bool
    own_cache: bool
    method: Callable[..., Any] | None = None


class JacobiGenerationMixin:
    """Base of model classes whose `generate` takes `decoding="jacobi"` and `decoding="jacobi_multiblock"`."""

    _default_decoding: str | None = None  # used where neither the call nor a generation config names a decoding

    def generate_batch(
        self, inputs: Any, generation_config: GenerationConfig | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Return what transformers' `generate_batch` returns.

        Raises:
            ValueError: the call names a `decoding`, which continuous batching does not have.
        """
        given = {name: kwargs.pop(name) for name in KNOBS if name in kwargs}
        reject_misspelt(kwargs)
        reject_pointless(given, JacobiConfig.from_knobs(given))
        if given.get("decoding") is not None:
            raise ValueError(_contradiction(given["decoding"], _BATCHING))
        if given:  # `decoding=None` puts a saved decoding aside
            model: Any = self
            generation_config = copy.copy(generation_config or model.generation_config)
            generation_config.decoding = None  # type: ignore[attr-defined]
        return super().generate_batch(inputs, generation_config, *args, **kwargs)  # type: ignore[misc]

    def init_continuous_batching(
        self, generation_config: GenerationConfig | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """Return what transformers' `init_continuous_batching` returns; a saved `decoding` is left out with a warning.

        Raises:
            ValueError: the generation config of the call names a `decoding`, which continuous batching does not have.
        """
        model: Any = self
        saved = getattr(model.generation_config, "decoding", None)
        decoding = getattr(generation_config or model.generation_config, "decoding", None)
        if decoding is not None and decoding != saved:
            raise ValueError(_contradiction(decoding, _BATCHING))
        if decoding is not None:
            _warn_of_ordinary(decoding, _BATCHING)
        return super().init_continuous_batching(generation_config, *args, **kwargs)  # type: ignore[misc]

    def _extract_generation_mode_kwargs(self, custom_generate: Any, kwargs: dict[str, Any], *args: Any) -> Any:
        extracted = super()._extract_generation_mode_kwargs(custom_generate, kwargs, *args)  # type: ignore[misc]
        if callable(custom_generate):
            kwargs[_METHOD] = custom_generate
        return extracted

    def _prepare_generation_config(
        self, generation_config: GenerationConfig | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        given = {name: kwargs.pop(name) for name in KNOBS if name in kwargs}
        method = kwargs.pop(_METHOD, None)
        reject_misspelt([*kwargs, *(vars(generation_config) if generation_config is not None else ())])
        parent: Any = super()
        prepared, model_kwargs = parent._prepare_generation_config(generation_config, *args, **kwargs)
        request = _request_in(self, generation_config, prepared, given, kwargs)
        if request is not None:
            setattr(prepared, _REQUEST, replace(request, method=method))
        return prepared, model_kwargs

    def _validate_generation_mode(
        self, generation_mode: Any, generation_config: Any, generation_mode_kwargs: Any
    ) -> None:
        parent: Any = super()
        parent._validate_generation_mode(generation_mode, generation_config, generation_mode_kwargs)
        request: JacobiRequest | None = getattr(generation_config, _REQUEST, None)
        if request is None:
            return
        refusal = refusal_reason(generation_mode, generation_config)
        if refusal and request.in_call:
            raise ValueError(_contradiction(request.config.decoding, refusal))
        reason = refusal or fallback_reason(self, generation_config, own_positions=request.own_positions)
        if reason:
            _fall_back(generation_config, request, reason)
        elif request.method is not None:
            name = getattr(request.method, "__name__", type(request.method).__name__)
            warnings.warn(
                f"custom_generate={name} decodes this call: decoding={request.config.decoding!r} has no effect unless "
                f"{name} calls the model's _sample.",
                UserWarning,
                stacklevel=2,
            )

    def _sample(
        self,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: BaseStreamer | None = None,
        **model_kwargs: Any,
    ) -> Any:
        request: JacobiRequest | None = getattr(generation_config, _REQUEST, None)
        extra = sorted(name for name in model_kwargs if name not in _HANDLED and model_kwargs[name] is not None)
        call = None
        if request is not None and extra:
            _fall_back(generation_config, request, f"the model arguments {', '.join(extra)}")
        elif request is not None:
            try:
                call = GenerateCall(
                    self,  # type: ignore[arg-type]
                    request.config,
                    generation_config,
                    input_ids,
                    model_kwargs,
                    stopping_criteria,
                    own_cache=request.own_cache,
                )
            except NotServedError as reason:
                _fall_back(generation_config, request, str(reason))
            except ValueError as error:
                if request.in_call:
                    raise
                _fall_back(generation_config, request, f"this call ({error})")
        if call is not None and request is not None:
            warn_of_shared_scales(self, request.config.decoding)
            try:
                return call.decode(logits_processor, streamer, synced_gpus=synced_gpus)
            except NotServedError as reason:  # the first forward has shown it, before anything was decoded
                _fall_back(generation_config, request, str(reason))
        return super()._sample(  # type: ignore[misc]
            input_ids,
            logits_processor,
            stopping_criteria,
            generation_config,
            synced_gpus,
            streamer,
            **model_kwargs,
        )


def _request_in(
    model: Any,
    generation_config: GenerationConfig | None,
    prepared: GenerationConfig,
    given: dict[str, Any],
    model_kwargs: dict[str, Any],
) -> JacobiRequest | None:
    """Return what a call requests, or None for ordinary decoding.

    Args:
        model: the model.
        generation_config: the one in the call's arguments, or None.
        prepared: the one that transformers made of it and of the model's own.
        given: the knobs in the call's arguments.
        model_kwargs: the other arguments of the call.

    Raises:
        ValueError: a knob is misspelt, out of range, or has no effect in this call.
    """
    default = model._default_decoding
    persisted = getattr(model.generation_config, "decoding", None) or default
    in_config = getattr(generation_config, "decoding", None)
    in_call = given.get("decoding") is not None or in_config not in (None, persisted)
    knobs = {name: getattr(prepared, name, None) for name in KNOBS}
    config = JacobiConfig.from_knobs(knobs | {"decoding": knobs["decoding"] or default} | given)
    if persisted is None and "decoding" not in given:
        given = {name: getattr(generation_config, name, None) for name in KNOBS} | given
    reject_pointless(given, config)
    if config is None:
        return None
    if given.get("jacobi_verify_width") and not sources_of(config, model).draft_slots:
        raise ValueError(
            "jacobi_verify_width is for drafters, and none is in use: call jacobi_hf.load_drafter, or drop it."
        )
    reject_misspelt(name for name in vars(model.generation_config) if name.startswith("jacobi_"))
    own_positions = model_kwargs.get("position_ids") is not None
    own_cache = any(model_kwargs.get(name) is not None for name in CACHE_NAMES)
    return JacobiRequest(config, in_call, own_positions, own_cache)


def _fall_back(generation_config: GenerationConfig, request: JacobiRequest, reason: str) -> None:
    """Decode a call in the ordinary way, with a warning."""
    delattr(generation_config, _REQUEST)
    _warn_of_ordinary(request.config.decoding, reason)


def _warn_of_ordinary(decoding: str, reason: str) -> None:
    warnings.warn(f"decoding={decoding!r} does not support {reason}: decoding ordinarily.", UserWarning, stacklevel=3)


def _contradiction(decoding: str, refusal: str) -> str:
    """Return the message for a call that names a decoding and something else that it cannot have at the same time."""
    return f"decoding={decoding!r} does not work with {refusal}; drop one of the two."
