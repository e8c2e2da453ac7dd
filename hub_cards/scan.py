"""Scan of a folder before it is published: which files may be sent, and what stops a push.

Pickled files, links out of the folder and secrets stop a push. The trainer's state is left out.
"""

from __future__ import annotations

import os
import re
import zipfile
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from jacobi_hf.hub_cards.single_file import FOLDER

if TYPE_CHECKING:
    from collections.abc import Iterator

Content = Path | bytes

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
_PICKLE_PROTOCOLS = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
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
# A secret starts a word. In JSON the word may follow an escape such as \n or \u0000, whose last character is a letter.
_SECRET_TEXT = re.compile(
    rb"(?:(?<!\w)|(?<=\\[bfnrt])|(?<=\\u[0-9A-Fa-f]{4}))"
    rb"(?:hf_[A-Za-z0-9]{30,}|api_org_[A-Za-z0-9]{30,}|gh[oprsu]_[A-Za-z0-9]{36}|github_pat_\w{60,}"
    rb"|AKIA[0-9A-Z]{16}(?!\w)|sk-(?:ant|proj|svcacct)-[\w-]{20,}|xox[abprs]-[\w-]{20,}|AIza[\w-]{35})"
    rb"|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)


class FolderError(ValueError):
    """A folder that cannot or must not be published. The message names the file and the reason."""


def scan(source: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """Return the files of a folder that may be sent, and the others with the reason why each is left out.

    Args:
        source: the folder.

    Returns:
        Two dictionaries, both by the path inside the folder: files, and reasons.

    Raises:
        FolderError: a file is pickled, is a link out of the folder, or has the name of a secret.
    """
    found: dict[str, Path] = {}
    left_out: dict[str, str] = {}
    for path in _walk(source, left_out):
        name = path.relative_to(source).as_posix()
        if any(fnmatchcase(path.name.lower(), pattern) for pattern in _SECRET_NAMES):
            raise FolderError(f"{name} looks like a secret. Move it out of the folder. Nothing was sent.")
        if any(fnmatchcase(path.name, pattern) for pattern in _TRAINER_STATE):
            left_out[name] = "state of the trainer"
        elif path.suffix.lower() in _PICKLED or _is_pickled(path):
            raise FolderError(
                f"{name} is pickled, and reading a pickle runs code. Save weights as safetensors. Nothing was sent."
            )
        elif name.partition("/")[0] != FOLDER:  # a push builds that folder again
            found[name] = path
    return dict(sorted(found.items())), left_out


def refuse_secrets(name: str, content: Content) -> None:
    """Raise FolderError if a file holds text that looks like a token or a private key."""
    if _SECRET_TEXT.search(searchable(name, content)):
        raise FolderError(
            f"{name} holds what looks like a secret (a token or a private key). Remove it. Nothing was sent."
        )


def searchable(name: str, content: Content) -> bytes:
    """Return the part of a file in which a secret could stand: the header of weights, the whole of another file."""
    if name.endswith(".safetensors") and isinstance(content, Path):
        with content.open("rb") as file:
            return file.read(int.from_bytes(file.read(8), "little"))
    return bytes_of(content)


def bytes_of(content: Content) -> bytes:
    """Return the bytes of a file, or of content that is no file yet."""
    return content.read_bytes() if isinstance(content, Path) else content


def _is_pickled(path: Path) -> bool:
    """Return whether a file of any name is a pickle, or an archive with a pickle as `torch.save` writes it."""
    with path.open("rb") as file:
        head = file.read(4)
    if head == b"PK\x03\x04":
        return _holds_pickle(path)
    # The length of a safetensors header can look like a pickle's start. That format is checked by its own library.
    return head[:2] in _PICKLE_PROTOCOLS and path.suffix != ".safetensors"


def _holds_pickle(path: Path) -> bool:
    """Return whether a zip archive holds a pickle."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith(".pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, NotImplementedError):
        return False


def _walk(source: Path, left_out: dict[str, str]) -> Iterator[Path]:
    """Yield the files of a folder, and note the subfolders that are never sent in `left_out`."""
    for parent, folders, names in os.walk(source):
        here = Path(parent)
        for name in (*folders, *names):
            _check_link(here / name, source)
        skipped = [name for name in folders if any(fnmatchcase(name, pattern) for pattern in _SKIPPED_FOLDERS)]
        left_out |= {f"{(here / name).relative_to(source).as_posix()}/": "never sent" for name in skipped}
        folders[:] = [name for name in folders if name not in skipped]
        yield from (here / name for name in names if (here / name).is_file())


def _check_link(path: Path, source: Path) -> None:
    """Raise FolderError for a link that leads out of the folder, or to anything but a file."""
    if not path.is_symlink():
        return
    name = path.relative_to(source).as_posix()
    if not path.resolve().is_relative_to(source.resolve()):
        raise FolderError(f"{name} is a link out of the folder. Put the file itself there. Nothing was sent.")
    if not path.is_file():
        raise FolderError(f"{name} is a link, but not to a file. Put the files themselves there. Nothing was sent.")
