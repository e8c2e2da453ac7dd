"""From a folder to a repository of the Hub, in one commit."""

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

_SHORTEST_SECRET = 12  # what is shorter is a placeholder, which may well be a word of the tokenizer
_AGAIN = "push again later; what was uploaded already is not uploaded twice"
_ADVICE = {
    400: "the Hub does not take what was sent",
    401: "the Hub does not know the token, or there is none: log in with `hf auth login`, or give token",
    403: "the token may not write there: give one with write access, or propose the change with create_pr=True",
    404: "there is no such repository or revision, or the token may not see it",
    409: f"somebody else changes it at this moment: {_AGAIN}",
    412: f"somebody else changed it meanwhile: {_AGAIN}",
    429: f"the Hub asks for fewer requests: {_AGAIN}",
}


class PushError(RuntimeError):
    """A push that did not happen, with the reason; the files of the repository are as they were."""


@dataclass(frozen=True)
class Pushed:
    """What a push did.

    Attributes:
        repo_id: the repository.
        staged: its files.
        url: of the commit, or of the pull request; None after a dry run.
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
    """Publish a finished model, LoRA adapter or drafter as one commit: weights, card, `custom_generate/`, results.

    Pushing the same again changes nothing. Weights, results and plots of an earlier push that are no more in the folder are deleted by
    the same commit; other files of the repository stay. The Hub is the one that `HF_ENDPOINT` names.

    Args:
        folder, results, plots: see `folder.stage`, which checks everything before anything is sent.
        repo_id: "user/name"; made if it is not there.
        card: the text of README.md; by default the folder's own, and where it has none, `generate_model_card` of `results`.
        base_model, license, language, datasets: for that card, see there. An adapter's or drafter's config names the base too.
        private: whether a new repository is private.
        token: with write access; by default that of `hf auth login` or `HF_TOKEN`.
        revision: branch to commit to, made if it is not there.
        create_pr: open a pull request instead.
        commit_message: says what changed.
        dry_run: a folder to write the repository to, instead of sending anything.

    Raises:
        FolderError: the folder cannot or must not be published.
        ValueError: `repo_id` is no name of a repository; a token that cannot be one.
        PushError: the Hub refused, or could not be reached; transient failures of uploads have been retried before.
    """
    _check_name(repo_id)
    results = list(results)
    if card is None and not _has_card(Path(folder)):
        kind, base = kind_of(folder), base_named(folder, base_model) or base_model
        card = generate_model_card(
            results,
            repo_id=repo_id,
            base_model=base,
            license=license,
            language=language,
            datasets=datasets,
            drafter=kind == "drafter",
            adapter=kind == "adapter",
        )
    staged = stage(folder, card=card, results=results, plots=plots, base_model=base_model)
    token = token.strip() if isinstance(token, str) else token
    secret = token if isinstance(token, str) else None if token is False else get_token()
    if secret and not re.fullmatch(r"[!-~]+", secret):
        raise ValueError(
            "the token holds a space, line break or other character that no token has: was it copied whole?"
        )
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
    except Exception as error:  # noqa: BLE001 (whatever an address that is none, or a server that is no Hub, leads to)
        _explain(repo_id, error, secret)
    url = commit.pr_url or commit.commit_url
    logger.info("%s: %d files, %s", repo_id, len(staged.files), url)
    return Pushed(repo_id, staged, url)


def _check_name(repo_id: str) -> None:
    if "/" not in check_repo_id(repo_id):
        raise ValueError(f"repo_id={repo_id!r} does not say whose repository it is: 'user/{repo_id}'.")


def _has_card(folder: Path) -> bool:
    """Whether somebody wrote it: PEFT leaves a form that is to be filled in."""
    path = folder / CARD
    return path.is_file() and b"[More Information Needed]" not in path.read_bytes()


def _commit(
    api: HfApi,
    staged: Staged,
    repo_id: str,
    private: bool | None,
    revision: str | None,
    create_pr: bool,
    message: str | None,
) -> CommitInfo:
    """Make the repository where it is missing, and commit. `HfApi.upload_folder` may split what it sends into several commits."""
    api.create_repo(repo_id, private=private, exist_ok=True)
    if revision is not None and not create_pr and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    info = api.model_info(repo_id, revision=revision)
    if private and info.private is False:
        raise PushError(
            f"{repo_id} is there already and public, which private=True does not change: make it private first, or rename."
        )
    there = {file.rfilename for file in info.siblings or ()}
    if others := [name for kind, name in CONFIG.items() if kind != staged.kind and name in there]:
        raise PushError(
            f"{repo_id} holds {others[0]}, so it is not the repository of a {staged.kind}: push to one of its own."
        )
    ours = (*WEIGHTS[staged.kind], "results/*.json", "plots/*", f"{FOLDER}/*")
    stale = sorted(name for name in there - staged.files.keys() if any(matches(name, pattern) for pattern in ours))
    return api.create_commit(
        repo_id,
        [
            *(CommitOperationDelete(name) for name in stale),
            *(CommitOperationAdd(name, file) for name, file in staged.files.items()),
        ],
        commit_message=message or f"Upload {staged.kind} with Jacobi decoding",
        revision=revision,
        create_pr=create_pr,
        parent_commit=info.sha,
    )


def _explain(repo_id: str, error: Exception, secret: str | None) -> NoReturn:
    """Raise what a person can act on, without the original error, whose text and request may hold the token."""
    if isinstance(error.__cause__, HfHubHTTPError):  # of one file's upload
        error = error.__cause__
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        advice = _ADVICE.get(status, f"the Hub has trouble: {_AGAIN}" if status >= 500 else "the Hub refused")
        said = f"{advice} (HTTP {status}: {error.server_message or 'no more was said'})"
    else:
        said = f"{error or type(error).__name__} ({type(error).__name__})"
    for shown in (secret, repr(secret)[1:-1]) if secret else ():
        said = said.replace(shown, "[token]")
    raise PushError(f"{repo_id} was not pushed: {said}. Its files are as they were.") from None
