"""What of a folder becomes a Hub repository: the model's files, its card, `custom_generate/` and results; everything else is named."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import zipfile
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import yaml
from huggingface_hub import ModelCard
from safetensors import SafetensorError, safe_open

from jacobi_hf.drafts.lora_format import CONFIG_FILE, WEIGHTS_FILE
from jacobi_hf.hub_cards.custom_generate import FOLDER, write_custom_generate
from jacobi_hf.hub_cards.metadata import is_repo_id
from jacobi_hf.results.schema import Results

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

Kind = Literal["model", "adapter", "drafter"]
Content = Path | bytes

CARD = "README.md"
CONFIG: dict[Kind, str] = {"model": "config.json", "adapter": "adapter_config.json", "drafter": CONFIG_FILE}
WEIGHTS: dict[Kind, tuple[str, ...]] = {
    "model": ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json"),
    "adapter": ("adapter_model.safetensors",),
    "drafter": (WEIGHTS_FILE,),
}
_BESIDE = (
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
_BASE_FIELD: dict[Kind, tuple[str, str]] = {
    "adapter": ("base_model_name_or_path", "revision"),
    "drafter": ("base_model", "base_revision"),
}
_SKIPPED_FOLDERS = ("checkpoint-*", "runs", ".git", ".cache", "__pycache__")
_TRAINER_STATE = (
    "optimizer.pt",
    "optimizer.bin",
    "scheduler.pt",
    "scheduler.bin",
    "scaler.pt",
    "training_args.bin",
    "rng_state*.pth",
    "random_states_*.pkl",
    "trainer_state.json",
)
_PICKLED = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib")
_SECRET_NAMES = (
    ".env",
    ".env.*",
    "*.env",
    "*.pem",
    "*.key",
    "*.p12",
    "*.pfx",
    "*.keystore",
    "id_rsa*",
    "id_dsa*",
    "id_ecdsa*",
    "id_ed25519*",
    ".netrc",
    "_netrc",
    ".pypirc",
    ".npmrc",
    ".git-credentials",
    "credentials",
    "credentials.json",
    "secret*",
    "kubeconfig",
    "token",
    "token.*",
    ".token",
    "*.token",
    "*_token",
    "*_token.txt",
    "stored_tokens",
)
# A word begins behind no letter, or behind what JSON writes a control character as: its last letter is none of the word.
_SECRET_TEXT = re.compile(
    rb"(?:(?<!\w)|(?<=\\[bfnrt])|(?<=\\u[0-9A-Fa-f]{4}))"
    rb"(?:hf_[A-Za-z0-9]{30,}|api_org_[A-Za-z0-9]{30,}|gh[oprsu]_[A-Za-z0-9]{36}|github_pat_\w{60,}|AKIA[0-9A-Z]{16}(?!\w)"
    rb"|sk-(?:ant|proj|svcacct)-[\w-]{20,}|xox[abprs]-[\w-]{20,}|AIza[\w-]{35})"
    rb"|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
_LARGEST_UNSENT = 10_000_000  # bytes of a file that is not sent and is searched for secrets all the same


class FolderError(ValueError):
    """A folder that must not or cannot be published, with the file's name and the reason."""


@dataclass(frozen=True)
class Staged:
    """What a repository will hold.

    Attributes:
        kind: "model", "adapter" (LoRA) or "drafter".
        files: by their path in the repository, a file of this machine or the content itself.
        left_out: files and folders of the source that are not sent, and why.
        sizes: of the files, bytes.
    """

    kind: Kind
    files: dict[str, Content]
    left_out: dict[str, str]
    sizes: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        sizes = {name: c.stat().st_size if isinstance(c, Path) else len(c) for name, c in sorted(self.files.items())}
        object.__setattr__(self, "sizes", sizes)  # taken now: the folder may be a passing one

    def write(self, target: str | Path) -> Path:
        """Write the repository as a folder, whole or not at all.

        Raises:
            FolderError: the folder is there already and not empty.
        """
        target = Path(target).absolute()
        if target.exists() and not (target.is_dir() and not any(target.iterdir())):
            raise FolderError(f"{target} is there already: give a new folder, or remove this one first.")
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as part:
            whole = Path(part) / target.name
            for name, content in self.files.items():
                (whole / name).parent.mkdir(parents=True, exist_ok=True)
                if isinstance(content, Path):
                    shutil.copyfile(content, whole / name)
                else:
                    (whole / name).write_bytes(content)
            whole.replace(target)
        return target

    def refuse(self, secret: str) -> None:
        """Refuse the whole where a file holds this secret.

        Raises:
            FolderError: naming the file, never the secret.
        """
        for name, content in self.files.items():
            if secret.encode() in _text_of(name, content):
                raise FolderError(
                    f"{name} holds the token that it would be pushed with: take it out. Nothing was sent."
                )

    def summary(self) -> str:
        """One line a file with its size, then what is left out and why."""
        lines = [f"{size:>15,}  {name}" for name, size in self.sizes.items()]
        return "\n".join(
            [*lines, *(f"{'left out':>15}  {name} ({why})" for name, why in sorted(self.left_out.items()))]
        )


def stage(
    source: str | Path,
    *,
    card: ModelCard | str | None = None,
    results: Iterable[str | Path | Results] = (),
    plots: Iterable[str | Path] = (),
    base_model: str | None = None,
) -> Staged:
    """What will be pushed of a folder that `save_pretrained` or the trainer wrote. Nothing is copied and nothing sent.

    Args:
        source: the folder of a model or a LoRA adapter, with its tokenizer, or of a drafter. Weights are sent in the dtype they are in.
        card: the text of README.md; by default the folder's own.
        results: documents of measured results, sent as `results/*.json`.
        plots: pictures, sent as `plots/*`.
        base_model: of an adapter or drafter, written into its config: the repository that it was made for.

    Raises:
        FolderError: something is missing or damaged; or the folder holds pickled weights, links that leave it, or what looks like a
            secret. The message names the file.
    """
    source = Path(source)
    kind = kind_of(source)
    found, left_out = _listed(source)
    files: dict[str, Content] = {}
    for name, path in found.items():
        if any(matches(name, pattern) for pattern in (CONFIG[kind], *WEIGHTS[kind], *_BESIDE)):
            files[name] = path
        else:
            left_out[name] = "not part of a model"
            if path.stat().st_size <= _LARGEST_UNSENT:
                _refuse_secrets(name, path)
    _check_weights(kind, files)
    if base := base_named(source, base_model):
        files[CONFIG[kind]] = _with_base(kind, files[CONFIG[kind]], base)
    files |= _results(results) | _plots(plots) | _custom_generate(kind, base)
    if card is not None:
        files[CARD] = str(card).encode()
    _check_card(files)
    for name, content in files.items():
        _refuse_secrets(name, content)
    return Staged(kind, files, left_out)


def kind_of(source: str | Path) -> Kind:
    """What a folder holds.

    Raises:
        FolderError: none of the three, or several.
    """
    if not Path(source).is_dir():
        raise FolderError(f"{source} is no folder: give the folder that the finished model was saved to.")
    kinds = [kind for kind, name in CONFIG.items() if (Path(source) / name).is_file()]
    if len(kinds) != 1:
        names = ", ".join(CONFIG[kind] for kind in kinds or CONFIG)
        if kinds:
            raise FolderError(
                f"{source} holds {names}: a model, an adapter and a drafter each need a folder of their own."
            )
        raise FolderError(f"{source} holds none of {names}: give the folder that the finished model was saved to.")
    return kinds[0]


def matches(name: str, pattern: str) -> bool:
    """Whether a path has a pattern's form, folder by folder."""
    return name.count("/") == pattern.count("/") and fnmatchcase(name, pattern)


def _listed(source: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """Files that may be sent, by their path in the folder; and what is left out, with the reason."""
    found: dict[str, Path] = {}
    left_out: dict[str, str] = {}
    for path in _walk(source, left_out):
        name = path.relative_to(source).as_posix()
        if any(fnmatchcase(path.name.lower(), pattern) for pattern in _SECRET_NAMES):
            raise FolderError(f"{name} looks like a secret: move it out of the folder. Nothing was sent.")
        if any(fnmatchcase(path.name, pattern) for pattern in _TRAINER_STATE):
            left_out[name] = "the trainer's own"
        elif path.suffix.lower() in _PICKLED or _is_pickled(path):
            raise FolderError(
                f"{name} is pickled, which runs code when it is read: save the weights as safetensors. Nothing was sent."
            )
        elif name.partition("/")[0] != FOLDER:  # that is written anew
            found[name] = path
    return dict(sorted(found.items())), left_out


def _is_pickled(path: Path) -> bool:
    """Whether a file of any name holds a pickle, or is the archive of one that `torch.save` writes."""
    with path.open("rb") as file:
        head = file.read(4)
    if head == b"PK\x03\x04":
        try:
            with zipfile.ZipFile(path) as archive:
                return any(name.endswith(".pkl") for name in archive.namelist())
        except (zipfile.BadZipFile, NotImplementedError):
            return False
    # The mark of a pickle; the length of a safetensors header may look like it, and that format is checked by its library.
    return head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05") and path.suffix != ".safetensors"


def _walk(source: Path, left_out: dict[str, str]) -> Iterator[Path]:
    """Files of a folder, without the folders that are never sent."""
    for parent, folders, names in os.walk(source):
        for path in (Path(parent) / name for name in [*folders, *names]):
            name = path.relative_to(source).as_posix()
            if path.is_symlink() and not path.resolve().is_relative_to(source.resolve()):
                raise FolderError(
                    f"{name} is a link that leaves the folder: put the file itself there. Nothing was sent."
                )
            if path.is_symlink() and not path.is_file():
                raise FolderError(
                    f"{name} is a link, but not to a file: put the files themselves there. Nothing was sent."
                )
        skipped = [name for name in folders if any(fnmatchcase(name, pattern) for pattern in _SKIPPED_FOLDERS)]
        left_out |= {(Path(parent) / name).relative_to(source).as_posix() + "/": "never sent" for name in skipped}
        folders[:] = [name for name in folders if name not in skipped]
        yield from (path for name in names if (path := Path(parent) / name).is_file())


def _check_weights(kind: Kind, files: dict[str, Content]) -> None:
    """All weights are there and whole, a tokenizer is beside them, and no code is asked for."""
    weights = [name for name in files if name.endswith(".safetensors")]
    if not weights:
        raise FolderError(f"there is no {WEIGHTS[kind][0]}: save the {kind} to the folder first.")
    for name in weights:
        try:
            with safe_open(str(files[name]), "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise FolderError(f"{name} is damaged or no safetensors file: {error}.") from error
    if kind == "model":
        _check_parts(files)
    if kind != "drafter" and "tokenizer_config.json" not in files:
        raise FolderError(
            f"there is no tokenizer (tokenizer_config.json): save it beside the {kind}, tokenizer.save_pretrained(folder)."
        )
    if "auto_map" in _object(files[CONFIG[kind]]):
        raise FolderError(
            f"{CONFIG[kind]} names code of its own (auto_map), which is not sent: a model of transformers' classes can be."
        )


def _check_parts(files: dict[str, Content]) -> None:
    """One save of the weights: a single file, or all parts of the index."""
    index = files.get("model.safetensors.index.json")
    parts = {name for name in files if fnmatchcase(name, "model-*.safetensors")}
    if "model.safetensors" in files and (parts or index):
        raise FolderError("there are model.safetensors and the parts of another save: keep one of them.")
    if index is None:
        if parts:
            raise FolderError(f"there is {min(parts)}, but no model.safetensors.index.json: save the model again.")
        return
    listed = _object(index).get("weight_map")
    names = {str(name) for name in listed.values()} if isinstance(listed, dict) else set()
    if different := sorted(names ^ parts):
        what = "lists {}, which is not there" if different[0] in names else "does not list {}, which is there"
        raise FolderError(f"model.safetensors.index.json {what.format(different[0])}: save the model again.")


def base_named(source: str | Path, base_model: str | None = None) -> str | None:
    """The repository that the adapter or drafter of a folder was made for; None for a model.

    Args:
        base_model: takes the place of what the folder's config says.

    Raises:
        FolderError: it is no repository of the Hub.
    """
    kind = kind_of(source)
    if kind == "model":
        return None
    base = base_model or str(_object(Path(source) / CONFIG[kind]).get(_BASE_FIELD[kind][0]) or "")
    if not base or not is_repo_id(base):
        raise FolderError(
            f"{CONFIG[kind]} names the base model {base!r}, which is no repository of the Hub: say which with base_model."
        )
    return base


def _with_base(kind: Kind, config: Content, base: str) -> Content:
    """A config that names this base."""
    values = _object(config)
    field, revision = _BASE_FIELD[kind]
    if values.get(field) == base:
        return config
    return (json.dumps(values | {field: base, revision: None}, indent=1) + "\n").encode()


def _results(results: Iterable[str | Path | Results]) -> dict[str, Content]:
    """Documents of results under their names in the repository."""
    files: dict[str, Content] = {}
    for number, one in enumerate(results, 1):
        if isinstance(one, Results):
            _add(
                files,
                f"results/results-{number}.json",
                (one.model_dump_json(indent=1, exclude_none=True) + "\n").encode(),
            )
            continue
        path = Path(one)
        try:
            Results.read(path)
        except (OSError, ValueError) as error:
            raise FolderError(f"{path} holds no results of this package: {error}") from error
        _add(files, f"results/{path.stem}.json", path)
    return files


def _plots(plots: Iterable[str | Path]) -> dict[str, Content]:
    files: dict[str, Content] = {}
    for path in map(Path, plots):
        if path.suffix not in (".png", ".svg") or not path.is_file():
            raise FolderError(f"{path} is no picture (.png or .svg).")
        _add(files, f"plots/{path.name}", path)
    return files


def _add(files: dict[str, Content], name: str, content: Content) -> None:
    if name in files:
        raise FolderError(f"two files would be {name}: rename one.")
    files[name] = content


def _custom_generate(kind: Kind, base: str | None) -> dict[str, Content]:
    with tempfile.TemporaryDirectory() as folder:
        written = write_custom_generate(Path(folder), "drafter" if kind == "drafter" else "model", base)
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in written}


def _check_card(files: dict[str, Content]) -> None:
    if CARD not in files:
        raise FolderError(
            f"there is no card: give one with card, or write {CARD} into the folder (generate_model_card makes one)."
        )
    try:
        text = _bytes_of(files[CARD]).decode()
        ModelCard(text)
    except (ValueError, yaml.YAMLError) as error:
        raise FolderError(f"{CARD} is no card that the Hub can read: {error}") from error


def _object(content: Content) -> dict[str, object]:
    """A JSON file's object."""
    name = content.name if isinstance(content, Path) else "the config"
    try:
        value = json.loads(_bytes_of(content))
    except ValueError as error:
        raise FolderError(f"{name} is no JSON: {error}.") from error
    if not isinstance(value, dict):
        raise FolderError(f"{name} holds no JSON object.")
    return value


def _bytes_of(content: Content) -> bytes:
    return content.read_bytes() if isinstance(content, Path) else content


def _text_of(name: str, content: Content) -> bytes:
    """Where a secret could stand: of weights, their header."""
    if name.endswith(".safetensors") and isinstance(content, Path):
        with content.open("rb") as file:
            return file.read(int.from_bytes(file.read(8), "little"))
    return _bytes_of(content)


def _refuse_secrets(name: str, content: Content) -> None:
    if _SECRET_TEXT.search(_text_of(name, content)):
        raise FolderError(
            f"{name} holds what looks like a secret (a token or a private key): take it out. Nothing was sent."
        )
