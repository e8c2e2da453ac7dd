"""Loading, choosing and unloading the drafters of a model."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from jacobi_hf.drafts.lora import LoraDrafter
from jacobi_hf.drafts.lora_format import CONFIG_FILE, WEIGHTS_FILE, DrafterError, check_fits
from jacobi_hf.execution.kept import clear_graphs

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel


class _Loaded:
    """The drafters of a model by name, and the name of the one in use."""

    def __init__(self) -> None:
        self.by_name: dict[str, LoraDrafter] = {}
        self.active: str | None = None


_loaded: WeakKeyDictionary[Any, _Loaded] = WeakKeyDictionary()
_loading = threading.Lock()


def load_drafter(
    model: PreTrainedModel,
    source: str | Path,
    name: str = "default",
    *,
    revision: str | None = None,
    token: str | bool | None = None,
) -> None:
    """Load a drafter for a model and use it: the next calls with Jacobi decoding take their guesses from it.

    The text of a call does not change, nor do ordinary calls.

    Args:
        model: a model of a registered class, such as Qwen3 or Llama.
        source: a folder, or a repository of the Hub.
        name: name of the drafter, if a model has several. The one loaded last is in use; `set_drafter` chooses
            another.
        revision: branch, tag or commit of the repository.
        token: token for the Hub, as in `from_pretrained`.

    Raises:
        DrafterError: the files are missing or damaged, the drafter was made for another model, or the name is taken.
            The model is as it was before.
    """
    model = _base_of(model)
    drafters = _loaded.get(model) or _Loaded()
    if name in drafters.by_name:
        raise DrafterError(
            f"a drafter named {name!r} is loaded already: unload it first, or load this one with another name=."
        )
    if (getattr(model, "tp_size", None) or 1) > 1:
        raise DrafterError(
            "the model's layers are split over several processes (tp_plan), and drafters do not support that: "
            "load the model without tp_plan."
        )
    drafter = read_drafter(model, source, revision=revision, token=token)
    if broken := [layer for layer, p in drafter.weights().items() if not bool(p.to(model.dtype).isfinite().all())]:
        raise DrafterError(f"{source}: {broken[0]} holds numbers that are not finite in the model's {model.dtype}.")
    attach(model, drafter, name)


def read_drafter(
    model: Any, source: str | Path, *, revision: str | None = None, token: str | bool | None = None
) -> LoraDrafter:
    """Return a drafter from a folder or repository, after checking that it was made for `model`.

    Args:
        model: a transformers model, which may be on the meta device.
        source: a folder, or a repository of the Hub.
        revision: branch, tag or commit of the repository.
        token: token for the Hub.

    Raises:
        DrafterError: as in `load_drafter`.
    """
    drafter = LoraDrafter.from_pretrained(_folder_of(source, revision, token))
    check_fits(drafter.config, drafter.shapes(), model)
    return drafter


def attach(model: PreTrainedModel, drafter: LoraDrafter, name: str = "default") -> None:
    """Add a drafter to those of a model, and use it. Its weights move to the model's devices and dtype."""
    model = _base_of(model)
    drafters = _loaded.setdefault(model, _Loaded())
    drafters.by_name[name] = drafter.place(model, model.dtype)
    drafters.active = name
    clear_graphs(model)


@contextlib.contextmanager
def using(model: Any, drafter: LoraDrafter) -> Iterator[None]:
    """Return a context in which a model uses `drafter`; afterwards it uses the drafter from before."""
    drafters = _loaded.setdefault(_base_of(model), _Loaded())
    former = drafters.active
    name = f"for a while {id(drafter)}"
    attach(model, drafter, name)
    try:
        yield
    finally:
        drafters.by_name.pop(name, None)
        drafters.active = former
        clear_graphs(_base_of(model))


@contextlib.contextmanager
def using_source(
    model: PreTrainedModel, source: str, *, revision: str | None = None, token: str | bool | None = None
) -> Iterator[None]:
    """Return a context in which a model uses the drafter of a folder or repository.

    The drafter is loaded the first time and stays loaded. If another drafter was in use before, that is in use
    afterwards; otherwise this one stays in use.

    Args:
        model: a model of a registered class.
        source: a folder, or a repository of the Hub.
        revision: branch, tag or commit of the repository.
        token: token for the Hub.

    Raises:
        DrafterError: as in `load_drafter`.
    """
    name = source if revision is None else f"{source}@{revision}"
    with _loading:
        drafters = _loaded.get(_base_of(model)) or _Loaded()
        former = drafters.active
        if name not in drafters.by_name:
            load_drafter(model, source, name, revision=revision, token=token)
        elif former != name:
            set_drafter(model, name)
    try:
        yield
    finally:
        if former not in (None, name):
            set_drafter(model, former)


def unload_drafter(model: PreTrainedModel, name: str | None = None) -> None:
    """Remove a drafter from a model, or all of its drafters. If it was in use, none is in use afterwards.

    Args:
        model: the model that the drafter was loaded for.
        name: name of the drafter; None for all.

    Raises:
        DrafterError: no drafter has this name, or a call is drafting with it.
    """
    model = _base_of(model)
    drafters = _drafters_with(model, name)
    names = list(drafters.by_name) if name is None else [name]
    if busy := [one for one in names if drafters.by_name[one].is_attached(model)]:
        raise DrafterError(f"a call of generate is drafting with {busy[0]!r}: unload it when the call has ended.")
    for one in names:
        del drafters.by_name[one]
        if drafters.active == one:
            drafters.active = None
    clear_graphs(model)


def set_drafter(model: PreTrainedModel, name: str | None) -> None:
    """Choose which of a model's drafters is in use.

    Args:
        model: the model that the drafters were loaded for.
        name: name of the drafter; None to draft without one.

    Raises:
        DrafterError: no drafter has this name.
    """
    model = _base_of(model)
    _drafters_with(model, name).active = name
    clear_graphs(model)


def _drafters_with(model: Any, name: str | None) -> _Loaded:
    """Return the drafters of a model; raise `DrafterError` unless `name` is one of them, or None."""
    drafters = _loaded.get(model) or _Loaded()
    if name is not None and name not in drafters.by_name:
        raise DrafterError(
            f"no drafter named {name!r} is loaded; there is {', '.join(map(repr, drafters.by_name)) or 'none'}."
        )
    return drafters


def drafter_of(model: Any) -> LoraDrafter | None:
    """Return the drafter that is in use for a model, or None."""
    drafters = _loaded.get(_base_of(model))
    return None if drafters is None or drafters.active is None else drafters.by_name[drafters.active]


def _base_of(model: Any) -> Any:
    """Return the model under a PEFT adapter, which is the one that decodes; other models as they are."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _folder_of(source: str | Path, revision: str | None, token: str | bool | None) -> Path:
    """Return the folder of a drafter, after fetching it from the Hub if `source` is no folder."""
    folder = Path(source)
    if folder.is_dir():
        return folder
    if folder.exists() or not isinstance(source, str) or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise DrafterError(f"{source} is no folder; name a folder with a drafter, or a repository of the Hub.")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        paths = [hf_hub_download(source, name, revision=revision, token=token) for name in (CONFIG_FILE, WEIGHTS_FILE)]
    except HFValidationError as error:
        raise DrafterError(f"{source!r} is neither a folder nor the name of a repository: {error}") from error
    except LocalEntryNotFoundError as error:
        raise DrafterError(
            f"the drafter {source} is not in the cache, and the Hub cannot be reached: {error}"
        ) from error
    except EntryNotFoundError as error:
        raise DrafterError(
            f"the repository {source} holds no drafter ({CONFIG_FILE} and {WEIGHTS_FILE}): {error}"
        ) from error
    except HfHubHTTPError as error:
        raise DrafterError(f"the drafter {source} cannot be fetched: {error}") from error
    return Path(paths[0]).parent
