"""The push of a folder to a repository of the Hub, in one commit."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError

from jacobi_hf.hub_cards.card import generate_model_card
from jacobi_hf.hub_cards.folder import CARD, CONFIG, WEIGHTS, Staged, base_named, kind_of, matches, stage
from jacobi_hf.hub_cards.metadata import check_repo_id
from jacobi_hf.hub_cards.single_file import FOLDER

if TYPE_CHECKING:
    from collections.abc import Iterable

    from huggingface_hub import CommitInfo, ModelCard

    from jacobi_hf.results.schema import Results

logger = logging.getLogger(__name__)

_SHORTEST_SECRET = 12  # a shorter token is a placeholder, which could be a word of the tokenizer
_AGAIN = "Push again later; finished uploads are not repeated"
_ADVICE = {
    400: "the Hub rejects what was sent",
    401: "the token is missing or unknown to the Hub. Log in with `hf auth login`, or give `token`",
    403: "the token has no write access. Use one that has, or propose the change with create_pr=True",
    404: "the repository or revision does not exist, or the token has no access to it",
    409: f"somebody else is changing the repository. {_AGAIN}",
    412: f"somebody else has changed the repository in the meantime. {_AGAIN}",
    429: f"the Hub asks for fewer requests. {_AGAIN}",
}


class PushError(RuntimeError):
    """A push that failed. The message says why; the files of the repository are unchanged."""


@dataclass(frozen=True)
class Pushed:
    """The result of a push.

    Attributes:
        repo_id: the repository.
        staged: the files that were sent, and the files that were left out.
        url: the address of the commit or pull request; None after a dry run.
    """

    repo_id: str
    staged: Staged
    url: str | None = None


def push_to_hub(
    folder: str | Path,
    repo_id: str,
    *,
    card: ModelCard | str | None = None,
    results: Iterable[str | Path | Results] = (),
    plots: Iterable[str | Path] = (),
    base_model: str | None = None,
    license: str | None = None,
    language: str | None = None,
    datasets: Iterable[str] = (),
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    dry_run: str | Path | None = None,
) -> Pushed:
    """Publish a finished model, LoRA adapter or drafter as one commit: weights, card, `custom_generate/` and results.

    The Hub is the one that `HF_ENDPOINT` names. Pushing the same files again makes no commit. Weights, results and
    plots of an earlier push that the folder no longer has are deleted by the same commit. Other files stay.

    Args:
        folder: the folder that `save_pretrained` or the trainer wrote. Everything is checked before anything is sent.
        repo_id: the repository, "user/name"; it is created if it does not exist.
        card: the text of README.md; by default the folder's own, or else `generate_model_card` of `results`.
        results: documents of measured results, sent as `results/*.json`.
        plots: pictures, sent as `plots/*`.
        base_model: the base model's repository, for the card and for the config of an adapter or drafter.
        license: for a card that has to be written, as of `generate_model_card`; so are `language` and `datasets`.
        language: see `license`.
        datasets: see `license`.
        private: whether a new repository is private; None leaves it to the account's setting.
        token: a token with write access; by default that of `hf auth login` or `HF_TOKEN`. False sends none.
        revision: the branch to commit to; it is created if it does not exist.
        create_pr: whether to open a pull request instead.
        commit_message: what changed.
        dry_run: a new folder. The repository is written there, and nothing is sent.

    Returns:
        The files of the repository, and the address of the commit.

    Raises:
        FolderError: the folder cannot or must not be published.
        ValueError: `repo_id` or `token` has a form that no repository or token has.
        PushError: the Hub refused or could not be reached. Uploads that failed for a moment were tried again before.
    """
    _check_name(repo_id)
    results = list(results)
    if card is None and not _has_card(Path(folder)):
        kind = kind_of(folder)
        card = generate_model_card(
            results,
            repo_id=repo_id,
            base_model=base_named(folder, base_model) or base_model,
            license=license,
            language=language,
            datasets=datasets,
            drafter=kind == "drafter",
            adapter=kind == "adapter",
        )
    staged = stage(folder, card=card, results=results, plots=plots, base_model=base_model)
    token = token.strip() if isinstance(token, str) else token
    secret = _secret(token)
    if secret and len(secret) >= _SHORTEST_SECRET:
        staged.refuse(secret)
    if dry_run is not None:
        staged.write(dry_run)
        return Pushed(repo_id, staged)
    api = HfApi(token=token)
    try:
        commit = _commit(api, staged, repo_id, private, revision, create_pr, commit_message)
    except PushError:
        raise
    except Exception as error:  # noqa: BLE001 (a wrong address or another server raises many kinds)
        _explain(repo_id, error, secret)
    url = commit.pr_url or commit.commit_url
    logger.info("%s: %d files, %s", repo_id, len(staged.files), url)
    return Pushed(repo_id, staged, url)


def _check_name(repo_id: str) -> None:
    if "/" not in check_repo_id(repo_id):
        raise ValueError(f"repo_id={repo_id!r} does not name an owner. Write 'user/{repo_id}'.")


def _has_card(folder: Path) -> bool:
    """Return whether the folder has a finished card. PEFT writes a form that somebody has to fill in."""
    path = folder / CARD
    return path.is_file() and b"[More Information Needed]" not in path.read_bytes()


def _secret(token: str | bool | None) -> str | None:
    """Return the token that a push uses, or None if it uses none."""
    if token is False:
        return None
    secret = token if isinstance(token, str) else get_token()
    if secret and not re.fullmatch(r"[!-~]+", secret):
        raise ValueError(
            "The token holds a space, a line break or another character that no token has. Copy it again."
        )
    return secret


def _commit(
    api: HfApi,
    staged: Staged,
    repo_id: str,
    private: bool | None,
    revision: str | None,
    create_pr: bool,
    message: str | None,
) -> CommitInfo:
    """Create the repository if it does not exist, and commit.

    `HfApi.upload_folder` would be shorter, but can split a push into several commits.
    """
    api.create_repo(repo_id, private=private, exist_ok=True)
    if revision is not None and not create_pr and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    info = api.model_info(repo_id, revision=revision)
    there = {file.rfilename for file in info.siblings or ()}
    if private and info.private is False:
        raise PushError(
            f"{repo_id} already exists and is public, and private=True does not change that. "
            "Make it private on the Hub, or give another name."
        )
    _check_kind(repo_id, staged, there)
    return api.create_commit(
        repo_id,
        _operations(staged, there),
        commit_message=message or f"Upload {staged.kind} with Jacobi decoding",
        revision=revision,
        create_pr=create_pr,
        parent_commit=info.sha,
    )


def _check_kind(repo_id: str, staged: Staged, there: set[str]) -> None:
    """Raise PushError if the repository holds another kind of model."""
    for kind, name in CONFIG.items():
        if kind != staged.kind and name in there:
            raise PushError(
                f"{repo_id} holds {name}, so it is not the repository of a {staged.kind}. Use another one."
            )


def _operations(staged: Staged, there: set[str]) -> list[CommitOperationAdd | CommitOperationDelete]:
    """Return what a commit does: delete files of an earlier push that are gone, and add the files of this one.

    Args:
        staged: the files of this push.
        there: the files in the repository.
    """
    ours = (*WEIGHTS[staged.kind], "results/*.json", "plots/*", f"{FOLDER}/*")
    gone = sorted(name for name in there - staged.files.keys() if any(matches(name, pattern) for pattern in ours))
    deleted = [CommitOperationDelete(name) for name in gone]
    return [*deleted, *(CommitOperationAdd(name, file) for name, file in staged.files.items())]


def _explain(repo_id: str, error: Exception, secret: str | None) -> NoReturn:
    """Raise a PushError that says what to do. The original error is dropped, because its text can hold the token."""
    if isinstance(error.__cause__, HfHubHTTPError):  # from the upload of one file
        error = error.__cause__
    reason = _advice(error) if isinstance(error, HfHubHTTPError) else f"{error} ({type(error).__name__})"
    for shown in (secret, repr(secret)[1:-1]) if secret else ():
        reason = reason.replace(shown, "[token]")
    raise PushError(f"{repo_id} was not pushed: {reason}. Its files are unchanged.") from None


def _advice(error: HfHubHTTPError) -> str:
    """Return what to do about an answer of the Hub."""
    status = error.response.status_code
    advice = _ADVICE.get(status, f"the Hub has an internal error. {_AGAIN}" if status >= 500 else "the Hub refused")
    return f"{advice} (HTTP {status}: {error.server_message or 'no further explanation'})"
