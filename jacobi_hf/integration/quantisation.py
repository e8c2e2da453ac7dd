"""Quantisation with which a token's logits depend on the other tokens of its forward.

Activations that are quantised while a model runs need scales. A scale for each token changes nothing between tokens.
A scale that several tokens share also depends on the guesses of a step, so a choice can differ from that of ordinary
decoding. It depends on the other rows of a batch in the same way, so ordinary decoding differs from itself, too.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_Reason = tuple[str, str]  # what shares a scale, and what to do

_TORCH_DYNAMIC = "torch.ao.nn.quantized.dynamic.modules.linear"
_STATIC_SCALES = ("act_quant_scale", "act_per_tensor_scale")  # attributes of torchao's weights
_BETTER = "quantise weights only, or activations with a scale for each token"
_seen_models: WeakSet[Any] = WeakSet()


def warn_of_shared_scales(model: Any, decoding: str) -> None:
    """Warn, once for a model, that its quantisation can make the tokens of `decoding` differ.

    A model is looked at in its first call.
    """
    if model in _seen_models:
        return
    _seen_models.add(model)
    if reason := shared_scales(model):
        warnings.warn(f"decoding={decoding!r} {reason}.", UserWarning, stacklevel=3)


def shared_scales(model: Any) -> str | None:
    """Return what a model's quantisation does to its text and how to avoid it, or None if it does nothing.

    It reads the config's `quantization_config`, and the layers: torch's dynamic quantisation and torchao's `quantize_`
    leave no trace in a config.
    """
    found = _of_config(model) or next((reason for layer in model.modules() if (reason := _of_layer(layer))), None)
    if found is None:
        return None
    what, advice = found
    return (
        "may write other tokens than ordinary decoding, as two batch sizes do in ordinary decoding, because with "
        f"{what} a token's logits depend on the guesses beside it: {advice}"
    )


def _of_config(model: Any) -> _Reason | None:
    config = getattr(model.config, "quantization_config", None)
    method = config.get("quant_method") if isinstance(config, dict) else getattr(config, "quant_method", None)
    reason_of = _BY_METHOD.get(str(getattr(method, "value", method)))
    if reason_of is None or _is_unquantised(model, config):
        return None
    return next((reason for node in _nodes(config) if (reason := reason_of(node))), None)


def _is_unquantised(model: Any, config: Any) -> bool:
    """Return whether compressed-tensors' own treatment of activations is off in a model that is loaded."""
    quantizer = getattr(model, "hf_quantizer", None)
    return bool(getattr(config, "dequantize", False) or getattr(quantizer, "use_fp8_kernel", False))


def _nodes(value: Any) -> Iterator[dict[str, Any]]:
    """Yield every dict in a quantisation config, the outermost first, whether it is saved or loaded."""
    if hasattr(value, "to_dict"):
        value = value.to_dict()
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for one in value:
            yield from _nodes(one)


def _of_layer(layer: Any) -> _Reason | None:
    """Return the reason of a layer of torch's dynamic quantisation, or with a weight of torchao's."""
    if any(base.__module__ == _TORCH_DYNAMIC for base in type(layer).__mro__):
        is_int8 = layer._packed_params.dtype == torch.qint8  # the other kind is weights in float16
        return ("torch's dynamic quantisation", _BETTER) if is_int8 else None
    weight = layer._parameters.get("weight")
    options = getattr(weight, "act_quant_kwargs", None)
    if options is None or any(getattr(weight, name, None) is not None for name in _STATIC_SCALES):
        return None
    per_tensor = type(getattr(options, "granularity", None)).__name__ == "PerTensor"
    if not per_tensor and not getattr(options, "use_dynamic_per_tensor_scale", False):
        return None
    return "torchao's dynamic activations with one scale for a tensor", "quantise with granularity=PerRow()"


def _of_torchao(node: dict[str, Any]) -> _Reason | None:
    kind = str(node.get("_type"))
    data = node.get("_data")
    if not isinstance(data, dict) or "WeightOnly" in kind:
        return None
    if data.get("weight_only_decode"):
        return f"torchao's {kind}(weight_only_decode=True)", "set weight_only_decode=False"
    if kind.startswith("NVFP4") and data.get("use_dynamic_per_tensor_scale"):
        return f"torchao's {kind}(use_dynamic_per_tensor_scale=True)", "set use_dynamic_per_tensor_scale=False"
    if "DynamicActivation" not in kind:
        return None
    granularity = data.get("granularity")
    if isinstance(granularity, (list, tuple)):
        granularity = granularity[0]  # that of activations; the other one is that of weights
    shares = isinstance(granularity, dict) and granularity.get("_type") == "PerTensor"
    return (f"torchao's {kind}(granularity=PerTensor())", "quantise with granularity=PerRow()") if shares else None


def _of_compressed_tensors(node: dict[str, Any]) -> _Reason | None:
    for name in ("input_activations", "output_activations"):
        scheme = node.get(name)
        if isinstance(scheme, dict) and scheme.get("dynamic") is True and scheme.get("strategy") in (None, "tensor"):
            return f"compressed-tensors' dynamic {name} of strategy 'tensor'", "quantise with strategy 'token'"
    return None


def _of_bitsandbytes(node: dict[str, Any]) -> _Reason | None:
    threshold = node.get("llm_int8_threshold", 6.0)
    if not (node.get("load_in_8bit") or node.get("_load_in_8bit")) or not threshold:
        return None
    return f"bitsandbytes' LLM.int8 and llm_int8_threshold={threshold:g}", "load the model with llm_int8_threshold=0"


def _of_quark(node: dict[str, Any]) -> _Reason | None:
    scheme = node.get("input_tensors")
    if not isinstance(scheme, dict) or not scheme.get("is_dynamic") or scheme.get("qscheme") != "per_tensor":
        return None
    return "Quark's dynamic input_tensors of qscheme 'per_tensor'", _BETTER


def _of_nvfp4(node: dict[str, Any]) -> _Reason | None:
    if node.get("quant_method") is None:
        return None
    return "NVFP4 kernels that quantise activations of several tokens only", _BETTER


def _of_fouroversix(node: dict[str, Any]) -> _Reason | None:
    if (node.get("activation_dtype") or node.get("dtype", "nvfp4")) != "nvfp4":
        return None
    return "Four Over Six' NVFP4 activations", "quantise activations with dtype='mxfp4'"


_BY_METHOD: dict[str, Callable[[dict[str, Any]], _Reason | None]] = {
    "torchao": _of_torchao,
    "compressed-tensors": _of_compressed_tensors,
    "bitsandbytes": _of_bitsandbytes,
    "quark": _of_quark,
    "nvfp4": _of_nvfp4,
    "fouroversix": _of_fouroversix,
}
