"""A repository of the Hub from a folder: the model's files, its card, `custom_generate/`, results and plots."""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import yaml
from huggingface_hub import ModelCard
from safetensors import SafetensorError, safe_open

from jacobi_hf.drafts.lora_format import CONFIG_FILE, WEIGHTS_FILE
from jacobi_hf.hub_cards.metadata import is_repo_id
from jacobi_hf.hub_cards.scan import FolderError, bytes_of, refuse_secrets, scan, searchable
from jacobi_hf.hub_cards.single_file import write_custom_generate
from jacobi_hf.results.schema import Results

if TYPE_CHECKING:
    from collections.abc import Iterable

    from jacobi_hf.hub_cards.scan import Content

Kind = Literal["model", "adapter", "drafter"]

CARD = "README.md"
CONFIG: dict[Kind, str] = {"model": "config.json", "adapter": "adapter_config.json", "drafter": CONFIG_FILE}
WEIGHTS: dict[Kind, tuple[str, ...]] = {
    "model": ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json"),
    "adapter": ("adapter_model.safetensors",),
    "drafter": (WEIGHTS_FILE,),
}
_BESIDE_WEIGHTS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
    "results/*.json",
    "plots/*.png",
    "plots/*.svg",
    CARD,
)
# The fields of a config that name the base model and its revision.
_BASE_FIELD: dict[Kind, tuple[str, str]] = {
    "adapter": ("base_model_name_or_path", "revision"),
    "drafter": ("base_model", "base_revision"),
}
_LARGEST_SEARCHED = 10_000_000  # bytes; a larger file that is not sent is not searched for secrets


@dataclass(frozen=True)
class Staged:
    """The content of a repository, ready to be sent or written to a folder.

    Attributes:
        kind: "model", "adapter" (LoRA) or "drafter".
        files: the files by their path in the repository: a file of this machine, or the content itself.
        left_out: the files and subfolders of the source that are not sent, each with the reason.
        sizes: the sizes of the files in bytes.
    """

    kind: Kind
    files: dict[str, Content]
    left_out: dict[str, str]
    sizes: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        sizes = {name: c.stat().st_size if isinstance(c, Path) else len(c) for name, c in sorted(self.files.items())}
        object.__setattr__(self, "sizes", sizes)  # measured now, because the folder may be a temporary one

    def write(self, target: str | Path) -> Path:
        """Write the repository as a folder, either all of it or nothing.

        Args:
            target: a new folder, or an empty one.

        Returns:
            The absolute path of the folder.

        Raises:
            FolderError: the folder exists and is not empty.
        """
        target = Path(target).absolute()
        if target.exists() and not (target.is_dir() and not any(target.iterdir())):
            raise FolderError(f"{target} already exists. Give a new folder, or remove this one first.")
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as part:
            whole = Path(part) / target.name
            for name, content in self.files.items():
                _write(whole / name, content)
            whole.replace(target)
        return target

    def refuse(self, secret: str) -> None:
        """Raise FolderError if a file holds this secret. The error names the file, never the secret."""
        for name, content in self.files.items():
            if secret.encode() in searchable(name, content):
                raise FolderError(f"{name} holds the token of this push. Remove it from the file. Nothing was sent.")

    def summary(self) -> str:
        """Return one line for each file with its size, then one for each file that is left out with the reason."""
        lines = [f"{size:>15,}  {name}" for name, size in self.sizes.items()]
        left_out = [f"{'left out':>15}  {name} ({why})" for name, why in sorted(self.left_out.items())]
        return "\n".join([*lines, *left_out])


def stage(
    source: str | Path,
    *,
    card: ModelCard | str | None = None,
    results: Iterable[str | Path | Results] = (),
    plots: Iterable[str | Path] = (),
    base_model: str | None = None,
) -> Staged:
    """Return the repository that a folder becomes. Nothing is copied or sent.

    Args:
        source: the folder that `save_pretrained` or the trainer wrote. It holds a model or a LoRA adapter with its
            tokenizer, or a drafter. Weights keep the dtype in which they were saved.
        card: the text of README.md; by default the folder's own.
        results: documents of measured results, sent as `results/*.json`.
        plots: pictures, sent as `plots/*`.
        base_model: the Hub repository of the base of an adapter or drafter; it replaces the one in their config.

    Returns:
        The content of the repository, and what is left out.

    Raises:
        FolderError: a file is missing or damaged, or the folder holds pickled files, links out of it, or what looks
            like a secret. The message names the file.
    """
    source = Path(source)
    kind = kind_of(source)
    files, left_out = _select(source, kind)
    _check_weights(kind, files)
    if base := base_named(source, base_model):
        files[CONFIG[kind]] = _with_base(kind, files[CONFIG[kind]], base)
    files |= _results(results) | _plots(plots) | _custom_generate(kind, base)
    if card is not None:
        files[CARD] = str(card).encode()
    _check_card(files)
    for name, content in files.items():
        refuse_secrets(name, content)
    return Staged(kind, files, left_out)


def kind_of(source: str | Path) -> Kind:
    """Return what a folder holds: "model", "adapter" or "drafter".

    Raises:
        FolderError: the folder holds none of them, or several.
    """
    if not Path(source).is_dir():
        raise FolderError(f"{source} is not a folder. Give the folder in which the finished model was saved.")
    kinds = [kind for kind, name in CONFIG.items() if (Path(source) / name).is_file()]
    names = ", ".join(CONFIG[kind] for kind in kinds or CONFIG)
    if not kinds:
        raise FolderError(f"{source} holds none of {names}. Give the folder in which the finished model was saved.")
    if len(kinds) > 1:
        raise FolderError(f"{source} holds {names}. Put a model, an adapter and a drafter each in its own folder.")
    return kinds[0]


def base_named(source: str | Path, base_model: str | None = None) -> str | None:
    """Return the Hub repository of the base model of an adapter or drafter, or None for a model.

    Args:
        source: the folder.
        base_model: the base, instead of the one in the folder's config.

    Raises:
        FolderError: the base is no repository of the Hub.
    """
    kind = kind_of(source)
    if kind == "model":
        return None
    base = base_model or str(_json_object(Path(source) / CONFIG[kind]).get(_BASE_FIELD[kind][0]) or "")
    if not base or not is_repo_id(base):
        raise FolderError(
            f"{CONFIG[kind]} names the base model {base!r}, which is no repository of the Hub. "
            "Give base_model='user/name'."
        )
    return base


def matches(name: str, pattern: str) -> bool:
    """Return whether a path matches a pattern. `*` stays within a folder."""
    return name.count("/") == pattern.count("/") and fnmatchcase(name, pattern)


def _select(source: Path, kind: Kind) -> tuple[dict[str, Content], dict[str, str]]:
    """Return the files of a folder that belong in a repository, and the others with the reason."""
    found, left_out = scan(source)
    files: dict[str, Content] = {}
    for name, path in found.items():
        if any(matches(name, pattern) for pattern in (CONFIG[kind], *WEIGHTS[kind], *_BESIDE_WEIGHTS)):
            files[name] = path
            continue
        left_out[name] = "not part of a model"
        if path.stat().st_size <= _LARGEST_SEARCHED:
            refuse_secrets(name, path)
    return files, left_out


def _check_weights(kind: Kind, files: dict[str, Content]) -> None:
    """Raise FolderError unless weights and tokenizer are complete and the config needs no code of its own."""
    weights = [name for name in files if name.endswith(".safetensors")]
    if not weights:
        raise FolderError(f"{WEIGHTS[kind][0]} is missing. Save the {kind} in the folder first.")
    for name in weights:
        _check_safetensors(name, files[name])
    if kind == "model":
        _check_parts(files)
    if kind != "drafter" and "tokenizer_config.json" not in files:
        raise FolderError(
            f"The tokenizer (tokenizer_config.json) is missing. Save it beside the {kind} "
            "with tokenizer.save_pretrained(folder)."
        )
    if "auto_map" in _json_object(files[CONFIG[kind]]):
        raise FolderError(
            f"{CONFIG[kind]} names code of its own (auto_map), which is never sent. Use a model class of transformers."
        )


def _check_safetensors(name: str, content: Content) -> None:
    try:
        with safe_open(str(content), "pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise FolderError(f"{name} is damaged or not a safetensors file: {error}.") from error


def _check_parts(files: dict[str, Content]) -> None:
    """Raise FolderError unless the weights are one file, or exactly the parts that the index lists."""
    index = files.get("model.safetensors.index.json")
    parts = {name for name in files if fnmatchcase(name, "model-*.safetensors")}
    if "model.safetensors" in files and (parts or index):
        raise FolderError("The folder holds model.safetensors and the parts of another save. Keep one of the two.")
    if index is None:
        if parts:
            raise FolderError(
                f"{min(parts)} is there, but model.safetensors.index.json is missing. Save the model again."
            )
        return
    listed = _json_object(index).get("weight_map")
    names = {str(name) for name in listed.values()} if isinstance(listed, dict) else set()
    if different := sorted(names ^ parts):
        what = "lists {}, which is missing" if different[0] in names else "does not list {}, which is there"
        raise FolderError(f"model.safetensors.index.json {what.format(different[0])}. Save the model again.")


def _with_base(kind: Kind, config: Content, base: str) -> Content:
    """Return a config that names this base; the same config if it does already."""
    values = _json_object(config)
    base_field, revision_field = _BASE_FIELD[kind]
    if values.get(base_field) == base:
        return config
    return (json.dumps(values | {base_field: base, revision_field: None}, indent=1) + "\n").encode()


def _results(results: Iterable[str | Path | Results]) -> dict[str, Content]:
    """Return documents of results by their path in the repository."""
    files: dict[str, Content] = {}
    for number, one in enumerate(results, 1):
        if isinstance(one, Results):
            text = one.model_dump_json(indent=1, exclude_none=True) + "\n"
            _add(files, f"results/results-{number}.json", text.encode())
        else:
            path = Path(one)
            _check_results(path)
            _add(files, f"results/{path.stem}.json", path)
    return files


def _check_results(path: Path) -> None:
    try:
        Results.read(path)
    except (OSError, ValueError) as error:
        raise FolderError(f"{path} holds no results of jacobi_hf: {error}") from error


def _plots(plots: Iterable[str | Path]) -> dict[str, Content]:
    """Return pictures by their path in the repository."""
    files: dict[str, Content] = {}
    for path in map(Path, plots):
        if path.suffix not in (".png", ".svg") or not path.is_file():
            raise FolderError(f"{path} is not a picture. Give a .png or .svg file.")
        _add(files, f"plots/{path.name}", path)
    return files


def _add(files: dict[str, Content], name: str, content: Content) -> None:
    if name in files:
        raise FolderError(f"Two files would become {name}. Rename one of them.")
    files[name] = content


def _custom_generate(kind: Kind, base: str | None) -> dict[str, Content]:
    """Return the files of `custom_generate/` by their path in the repository."""
    with tempfile.TemporaryDirectory() as folder:
        written = write_custom_generate(Path(folder), "drafter" if kind == "drafter" else "model", base)
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in written}


def _check_card(files: dict[str, Content]) -> None:
    if CARD not in files:
        raise FolderError(
            f"The card is missing. Give `card`, or write {CARD} into the folder with generate_model_card."
        )
    try:
        ModelCard(bytes_of(files[CARD]).decode())
    except (ValueError, yaml.YAMLError) as error:
        raise FolderError(f"{CARD} is not a card that the Hub can read: {error}") from error


def _json_object(content: Content) -> dict[str, object]:
    name = content.name if isinstance(content, Path) else "the config"
    try:
        value = json.loads(bytes_of(content))
    except ValueError as error:
        raise FolderError(f"{name} is not JSON: {error}.") from error
    if not isinstance(value, dict):
        raise FolderError(f"{name} holds no JSON object.")
    return value


def _write(path: Path, content: Content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, Path):
        shutil.copyfile(content, path)
    else:
        path.write_bytes(content)
