"""Publishing on the Hub: the card of a model, the `custom_generate` of its repository, and the push."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jacobi_hf.hub_cards.card import generate_model_card, model_card_cells
    from jacobi_hf.hub_cards.dataset_card import generate_dataset_card
    from jacobi_hf.hub_cards.push import Pushed, PushError, push_to_hub
    from jacobi_hf.hub_cards.scan import FolderError

# Loaded on demand, so that a module of the package can be run (python -m jacobi_hf.hub_cards.single_file).
_MODULE_OF = {
    "FolderError": "scan",
    "PushError": "push",
    "Pushed": "push",
    "generate_dataset_card": "dataset_card",
    "generate_model_card": "card",
    "model_card_cells": "card",
    "push_to_hub": "push",
}

__all__ = [
    "FolderError",
    "PushError",
    "Pushed",
    "generate_dataset_card",
    "generate_model_card",
    "model_card_cells",
    "push_to_hub",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
