"""The drafters of a model: loading, choosing, unloading."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from jacobi_hf.drafts.lora import LoraDrafter
from jacobi_hf.drafts.lora_format import CONFIG_FILE, WEIGHTS_FILE, DrafterError, check_fits
from jacobi_hf.execution.buffers import clear_graphs

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel


class _Loaded:
    """The drafters of a model, and the one in use."""

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
    """Give a model a drafter: its next calls with Jacobi decoding draft with it. Ordinary calls are not changed.

    Args:
        model: of a registered class.
        source: folder, or repository of the Hub.
        name: to tell several apart; the one loaded last is in use (`set_drafter`).
        revision, token: for the Hub.

    Raises:
        DrafterError: the files are missing, damaged or those of another model, or the name is taken; the model is as it was.
    """
    model = _base_of(model)
    drafters = _loaded.get(model) or _Loaded()
    if name in drafters.by_name:
        raise DrafterError(
            f"a drafter named {name!r} is loaded already: unload it first, or give this one another name."
        )
    if (getattr(model, "tp_size", None) or 1) > 1:
        raise DrafterError(
            "the model's layers are split over several processes (tp_plan), which a drafter does not follow."
        )
    drafter = read_drafter(model, source, revision=revision, token=token)
    if broken := [layer for layer, p in drafter.weights().items() if not bool(p.to(model.dtype).isfinite().all())]:
        raise DrafterError(f"{source}: {broken[0]} holds numbers that are not finite in the model's {model.dtype}.")
    attach(model, drafter, name)


def read_drafter(
    model: Any, source: str | Path, *, revision: str | None = None, token: str | bool | None = None
) -> LoraDrafter:
    """A drafter that is for a model of this shape, which may be without weights (on the meta device).

    Raises:
        DrafterError: as `load_drafter`.
    """
    drafter = LoraDrafter.from_pretrained(_folder_of(source, revision, token))
    check_fits(drafter.config, drafter.shapes(), model)
    return drafter


def attach(model: PreTrainedModel, drafter: LoraDrafter, name: str = "default") -> None:
    """Make a drafter one of a model's, and the one in use."""
    model = _base_of(model)
    drafters = _loaded.setdefault(model, _Loaded())
    drafters.by_name[name] = drafter.place(model, model.dtype)
    drafters.active = name
    clear_graphs(model)


@contextlib.contextmanager
def using(model: Any, drafter: LoraDrafter) -> Iterator[None]:
    """A drafter in use for a while, and then again what was before."""
    drafters = _loaded.setdefault(_base_of(model), _Loaded())
    former, name = drafters.active, f"for a while {id(drafter)}"
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
    """The drafter of a folder or repository in use; loaded the first time, and kept for the next.

    Afterwards it is as after `load_drafter`, except that another one which was in use is in use again.

    Raises:
        DrafterError: as `load_drafter`.
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
    """Take a drafter off a model, or all of them; if it was in use, none is then.

    Raises:
        DrafterError: there is none of that name, or a call is drafting with it.
    """
    model = _base_of(model)
    drafters = _loaded.get(model) or _Loaded()
    if name is not None and name not in drafters.by_name:
        raise DrafterError(
            f"no drafter named {name!r} is loaded; there is {', '.join(map(repr, drafters.by_name)) or 'none'}."
        )
    names = list(drafters.by_name) if name is None else [name]
    if busy := [one for one in names if drafters.by_name[one].in_use]:
        raise DrafterError(f"a call of generate is drafting with {busy[0]!r}: unload it when that has ended.")
    for one in names:
        del drafters.by_name[one]
        if drafters.active == one:
            drafters.active = None
    clear_graphs(model)


def set_drafter(model: PreTrainedModel, name: str | None) -> None:
    """Choose which of a model's drafters is in use; None for none of them.

    Raises:
        DrafterError: there is none of that name.
    """
    model = _base_of(model)
    drafters = _loaded.get(model) or _Loaded()
    if name is not None and name not in drafters.by_name:
        raise DrafterError(
            f"no drafter named {name!r} is loaded; there is {', '.join(map(repr, drafters.by_name)) or 'none'}."
        )
    drafters.active = name
    clear_graphs(model)


def drafter_of(model: Any) -> LoraDrafter | None:
    """The drafter that a model's next call drafts with."""
    drafters = _loaded.get(_base_of(model))
    return None if drafters is None or drafters.active is None else drafters.by_name[drafters.active]


def _base_of(model: Any) -> Any:
    """The model under a PEFT adapter, which is the one that decodes."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _folder_of(source: str | Path, revision: str | None, token: str | bool | None) -> Path:
    folder = Path(source)
    if folder.is_dir():
        return folder
    if folder.exists() or not isinstance(source, str) or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise DrafterError(f"{source} is no folder; a drafter is a folder or a repository of the Hub.")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        paths = [hf_hub_download(source, name, revision=revision, token=token) for name in (CONFIG_FILE, WEIGHTS_FILE)]
    except HFValidationError as error:
        raise DrafterError(f"{source!r} is neither a folder nor a name of a repository: {error}") from error
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
