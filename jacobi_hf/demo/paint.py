"""Paint generations as HTML. Text of a model or a visitor is data: `Markup` escapes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from jacobi_hf.demo.race import Runner
    from jacobi_hf.streaming import Candidate, StepEvent

COLOURS = 6  # classes f0, f1, .. in page.css
ROWS = 6  # forwards that a replay shows at a time
MARKS = str.maketrans({"\n": "↵", "\t": "⇥", " ": "·"})


def join(parts: Iterable[Markup]) -> Markup:
    """Return the parts joined in order."""
    return Markup("").join(parts)


def pane(runner: Runner, prompt: str) -> Markup:
    """Return the text of a runner so far, each token in the colour of its forward, with the counts below."""
    speed = runner.tokens / runner.seconds if runner.seconds else 0.0
    counts = {
        "tokens": f"{runner.tokens}",
        "forwards": f"{len(runner.steps)}",
        "tokens per forward": f"{runner.tokens_per_forward:.2f}",
        "tok/s": f"{speed:.0f}",
    }
    footer = join(
        Markup('<span><b data-count="{}">{}</b> {}</span>').format(name, value, name) for name, value in counts.items()
    )
    failed = Markup('<p class="failed" role="alert">{}</p>').format(runner.error) if runner.error else ""
    body = Markup('<div class="text"><span class="prompt">{}</span>{}</div>').format(
        prompt, text(runner.pieces.of_step)
    )
    return Markup('<section class="pane"><h3>{}</h3>{}{}<footer>{}</footer></section>').format(
        runner.lane.title, body, failed, footer
    )


def empty_pane(title: str) -> Markup:
    """Return a pane as it is before the first generation."""
    return Markup('<section class="pane"><h3>{}</h3><div class="text"></div></section>').format(title)


def text(pieces: Sequence[str]) -> Markup:
    """Return the text of each forward in the colour of the forward."""
    return join(
        Markup('<span class="f{}" title="forward {}">{}</span>').format(number % COLOURS, number, piece)
        for number, piece in enumerate(pieces, 1)
    )


def message(words: str, *, is_error: bool = False) -> Markup:
    """Return a message to the visitor; nothing for no words."""
    kind = Markup('class="failed" role="alert"') if is_error else Markup('role="status"')
    return Markup("<p {}>{}</p>").format(kind, words) if words else Markup("")


@dataclass(frozen=True)
class Replay:
    """A finished generation, shown forward by forward.

    Args:
        runner: runner of the generation; later forwards of it do not appear.
    """

    runner: Runner

    def at(self, number: int) -> Markup:
        """Return the replay at one forward: what was verified, the last windows, the branches, and the text after it.

        Args:
            number: number of the forward, from 1; a number out of range means the first or the last forward.
        """
        number = max(1, min(int(number), len(self.runner.steps)))
        step = self.runner.steps[number - 1]
        summary = Markup("<p class='summary'>{}</p>").format(self._summary(number))
        so_far = Markup('<div class="text">{}</div>').format(text(self.runner.pieces.of_step[:number]))
        branches = join(
            _branch(candidate, step, self.runner.lane.tokenizer)
            for candidate in step.candidates
            if not candidate.is_backbone
        )
        listed = Markup('<ul class="branches">{}</ul>').format(branches) if branches else ""
        return Markup('<section class="replay" data-forward="{}">{}{}{}{}</section>').format(
            number, summary, self._windows(number), listed, so_far
        )

    def _summary(self, number: int) -> str:
        """Return in a sentence what a forward verified, accepted and committed."""
        step = self.runner.steps[number - 1]
        shape = f" ({step.shape})" if step.shape and step.candidates else ""
        of = f"Forward {number} of {len(self.runner.steps)}{shape}"
        if not step.candidates:
            return f"{of}: no guesses, 1 token." if number > 1 else f"{of}: the prompt, and the first token."
        best = max(step.candidates, key=lambda candidate: candidate.accepted(step.token_ids))
        accepted = best.accepted(step.token_ids)
        source = f" ({f'the {best.source}' if best.is_backbone else best.source})" if accepted else ""
        guesses = sum(candidate.verified for candidate in step.candidates)
        tokens = f"{len(step.token_ids)} token{'s' * (len(step.token_ids) != 1)}"
        return f"{of}: {guesses} guesses verified, {accepted} accepted{source}, {tokens}."

    def _windows(self, number: int) -> Markup:
        """Return the windows of the last forwards, one a row; each column is one place in the text."""
        rows = range(max(2, number - ROWS + 1), number + 1)
        if not rows:
            return Markup("")
        ends = [0]  # tokens after each forward
        for step in self.runner.steps:
            ends.append(ends[-1] + len(step.token_ids))
        painted = join(self._row(row, ends[rows[0] - 1], ends[row - 1]) for row in rows)
        return Markup('<div class="windows"><table>{}</table></div>').format(painted)

    def _row(self, number: int, first: int, before: int) -> Markup:
        """Return one row of the windows.

        Args:
            number: number of the forward.
            first: tokens before the first column.
            before: tokens before the forward.
        """
        step = self.runner.steps[number - 1]
        final = self.runner.pieces.token_ids
        tokenizer = self.runner.lane.tokenizer
        cells = [Markup('<td class="known">{}</td>').format(_shown(tokenizer, token)) for token in final[first:before]]
        for window in (candidate for candidate in step.candidates if candidate.is_backbone):
            kinds = _kinds(window, step.token_ids, final[before:])
            cells += [
                Markup('<td class="{}">{}</td>').format(kind, _shown(tokenizer, token))
                for kind, token in zip(kinds, window.token_ids, strict=True)
            ]
        return Markup("<tr><th>{}</th>{}</tr>").format(number, join(cells))


def _kinds(window: Candidate, committed: Sequence[int], final: Sequence[int]) -> list[str]:
    """Return the class of each guess of a window.

    "accepted" guesses were accepted by this forward. "early" guesses equal the final text, but a wrong guess stands
    before them. All others are "wrong". Guesses that the forward did not verify are "unverified" too.

    Args:
        window: the guesses.
        committed: tokens that the forward committed.
        final: final text from the first guess on.
    """
    accepted = window.accepted(committed)
    kinds = []
    for place, token in enumerate(window.token_ids):
        equal = place < len(final) and token == final[place]
        unverified = " unverified" if place >= window.verified else ""
        kinds.append("accepted" if place < accepted else ("early" if equal else "wrong") + unverified)
    return kinds


def _branch(candidate: Candidate, step: StepEvent, tokenizer: Any) -> Markup:
    """Return the guesses of a branch after the name of its source."""
    accepted = candidate.accepted(step.token_ids)
    guesses = join(
        Markup('<span class="{}">{}</span>').format(
            "accepted" if place < accepted else "wrong", _shown(tokenizer, token)
        )
        for place, token in enumerate(candidate.token_ids)
    )
    return Markup("<li><b>{}</b>{}</li>").format(candidate.source, guesses)


def _shown(tokenizer: Any, token: int) -> str:
    """Return the text of a token with visible white space."""
    return str(tokenizer.decode([token])).translate(MARKS)
