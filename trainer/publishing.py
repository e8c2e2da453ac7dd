"""Publishing of a trained model, adapter or drafter on the Hub, from its trainer."""

from __future__ import annotations

import shutil
from collections.abc import Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from jacobi_hf.hub_cards.card import generate_model_card
from jacobi_hf.hub_cards.folder import CARD
from jacobi_hf.hub_cards.metadata import is_repo_id
from jacobi_hf.hub_cards.push import push_to_hub
from jacobi_hf.hub_cards.scan import FolderError
from jacobi_hf.results.environment import Hardware
from jacobi_hf.results.schema import Results
from jacobi_hf.results.training import TrainingData
from jacobi_hf.trainer.run_record import stages_of, training_facts

if TYPE_CHECKING:
    from collections.abc import Iterable

    from huggingface_hub import ModelCard

    from jacobi_hf.hub_cards.push import Pushed
    from jacobi_hf.results.training import Training

# Arguments of `TrainingArguments` that a card's reader may ask for; not all of them, since the Hub's token is one.
_PUBLISHED = ("weight_decay", "warmup_steps", "max_grad_norm", "adam_beta1", "adam_beta2", "adam_epsilon")


class Publishing:
    """Methods of a trainer that concern the Hub, in place of those of `Trainer`.

    Call them on every process. The first process sends.
    """

    args: Any
    model: Any
    state: Any
    accelerator: Any

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Check the arguments that concern the Hub. Nothing is sent before `push_to_hub`.

        Args:
            token, private: not used; those of `args` are used when something is sent.

        Raises:
            ValueError: `hub_strategy` would send checkpoints while the training goes on, or no repository is named.
        """
        strategy = getattr(self.args.hub_strategy, "value", self.args.hub_strategy)
        if self.args.push_to_hub and strategy != "end":
            raise ValueError(
                f"hub_strategy={strategy!r} would send every checkpoint, with the trainer's pickled state: use "
                "hub_strategy='end', and call trainer.push_to_hub() when the training is over."
            )
        if self.args.push_to_hub:
            self._repository(None)
        self.hub_model_id = self.args.hub_model_id
        self.push_in_progress = None

    def create_model_card(
        self,
        *,
        repo_id: str | None = None,
        results: Iterable[str | Path | Results] = (),
        base_model: str | None = None,
        license: str | None = None,
        language: str | None = None,
        datasets: Iterable[str] = (),
    ) -> ModelCard | None:
        """Write the card of this run as README.md of `output_dir`.

        Args:
            repo_id: "user/name"; by default `args.hub_model_id`.
            results: documents of results, or their paths. Without any, the card says that nothing was measured.
            base_model: the repository that the run began from; by default the name that the model was loaded by.
            license, language, datasets: see `generate_model_card`.

        Returns:
            the card, or None on processes other than the first.

        Raises:
            ValueError: no repository is named, or no license can be found.
        """
        if not self.is_world_process_zero():  # type: ignore[attr-defined]
            return None
        datasets = tuple(datasets)
        card = self._card(
            repo_id, [self._run(base_model, datasets), *results], base_model, license, language, datasets
        )
        path = Path(self.args.output_dir) / CARD
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(card), encoding="utf-8", newline="\n")
        return card

    def push_to_hub(
        self,
        commit_message: str | None = None,
        *,
        repo_id: str | None = None,
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
        dry_run: str | Path | None = None,
    ) -> Pushed | None:
        """Publish the model, adapter or drafter as it is now, with its card and the record of this run.

        Args:
            commit_message: message of the commit.
            repo_id, results, base_model, license, language, datasets: as in `create_model_card`.
            plots, create_pr, dry_run: as in `hub_cards.push_to_hub`.
            private, token, revision: as in `hub_cards.push_to_hub`; by default `hub_private_repo`, `hub_token` and
                `hub_revision` of the trainer's arguments.

        Returns:
            what was pushed, or None on processes other than the first.

        Raises:
            ValueError: as in `create_model_card`.
            FolderError: the folder cannot be published.
            PushError: the Hub refused it.
        """
        datasets = tuple(datasets)
        is_first = self.is_world_process_zero()  # type: ignore[attr-defined]
        documents = [self._run(base_model, datasets), *results] if is_first else []
        card = self._card(repo_id, documents, base_model, license, language, datasets) if is_first else None
        folder = Path(self.args.output_dir) / ".finished"
        if is_first:
            shutil.rmtree(folder, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._save_for_others(folder)
        if not is_first:
            return None
        try:
            return push_to_hub(
                folder,
                self._repository(repo_id),
                card=card,
                results=documents,
                plots=plots,
                base_model=base_model,
                private=self.args.hub_private_repo if private is None else private,
                token=self.args.hub_token if token is None else token,
                revision=self.args.hub_revision if revision is None else revision,
                create_pr=create_pr,
                commit_message=commit_message,
                dry_run=dry_run,
            )
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _save_for_others(self, folder: Path) -> None:
        """Save what decoding needs, without what only this run needs."""
        self.save_model(str(folder), _internal_call=True)  # type: ignore[attr-defined]

    def _repository(self, repo_id: str | None) -> str:
        name = repo_id or self.args.hub_model_id
        if name is None:
            raise ValueError(
                "which repository? Give repo_id='user/name', or hub_model_id='user/name' in the "
                f"{type(self.args).__name__}."
            )
        return str(name)

    def _card(
        self,
        repo_id: str | None,
        results: list[Any],
        base_model: str | None,
        license: str | None,
        language: str | None,
        datasets: Iterable[str],
    ) -> ModelCard:
        is_drafter = self.args.method == "drafter"
        is_adapter = not is_drafter and _rank(self._trained_model()) is not None
        base = base_model or _repository_of(self._base())
        if base is None and (is_drafter or is_adapter):
            raise FolderError(
                f"the base model was loaded from {_name_of(self._base())!r}, which is no repository: say which with "
                "base_model='user/name'."
            )
        return generate_model_card(
            results,
            repo_id=self._repository(repo_id),
            base_model=base,
            license=license,
            language=language,
            datasets=datasets,
            drafter=is_drafter,
            adapter=is_adapter,
        )

    def _trained_model(self) -> Any:
        return self.accelerator.unwrap_model(self.model)

    def _base(self) -> Any:
        """Return the model that decodes, without adapter or drafter."""
        raise NotImplementedError

    def _run(self, base_model: str | None, datasets: Iterable[str]) -> Results:
        """Return a document of results that holds the record of this run."""
        base = self._base()
        name = base_model or _repository_of(base) or "a local model"
        run = Results.start(f"A run of {type(self).__name__}", base, name)
        if not self.state.global_step:
            return run
        former = stages_of(_name_of(base)) if _name_of(base) else []
        return run.model_copy(update={"training": [*former, self._stage(name, datasets)]})

    def _stage(self, base_model: str, datasets: Iterable[str]) -> Training:
        args = self.args
        trained = self._trained_model()
        log = self.state.log_history
        ended: dict[str, Any] = next((entry for entry in reversed(log) if "train_runtime" in entry), {})
        stage = training_facts(
            args,
            base_model=base_model,
            train_dataset="",
            steps=self.state.global_step,
            epochs=float(self.state.epoch or 0),
            arguments={name: getattr(args, name) for name in (*sorted(args.own_arguments()), *_PUBLISHED)},
            slots=int(sum(entry.get("slots", 0) for entry in log)),
            minutes=round(ended.get("train_runtime", 0.0) / 60, 2),
            weights_dtype=str(next(p for p in trained.parameters() if p.requires_grad).dtype).removeprefix("torch."),
            lora_rank=_rank(trained),
            threads=torch.get_num_threads(),
            hardware=Hardware.of(args.device),
            loss=ended.get("train_loss"),
        )
        records = self._records  # type: ignore[attr-defined]
        samples = len(records) if isinstance(records, Sized) else None
        data = [TrainingData(name="packed records", source=", ".join(datasets) or "not named", samples=samples)]
        return stage.model_copy(update={"data": data})


def _rank(trained: Any) -> int | None:
    """Return the rank of a drafter or an adapter; None for a model."""
    if hasattr(trained, "drafter"):
        return int(trained.drafter.config.r)
    adapters = getattr(trained, "peft_config", None)
    return None if not adapters else int(next(iter(adapters.values())).r)


def _name_of(model: Any) -> str:
    return str(getattr(model.config, "_name_or_path", "") or "")


def _repository_of(model: Any) -> str | None:
    """Return the repository that a model was loaded from; None for a folder, whose path is published nowhere."""
    name = _name_of(model)
    return name if name and is_repo_id(name) else None
