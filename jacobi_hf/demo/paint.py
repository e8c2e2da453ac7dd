"""Generations as HTML. Whatever a model or a visitor wrote is data: `Markup` escapes what is put into it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from jacobi_hf.demo.race import Runner
    from jacobi_hf.streaming import Candidate

COLOURS = 6  # of the classes f0, f1, .. in page.css
ROWS = 6  # forwards that a replay shows at a time
MARKS = str.maketrans({"\n": "↵", "\t": "⇥", " ": "·"})


def join(parts: Iterable[Markup]) -> Markup:
    """One after the other."""
    return Markup("").join(parts)


def pane(runner: Runner, prompt: str) -> Markup:
    """The text so far, each token in the colour of the forward that it came out of, and the count."""
    speed = runner.tokens / runner.seconds if runner.seconds else 0.0
    counts = [("tokens", f"{runner.tokens}"), ("forwards", f"{len(runner.steps)}")]
    counts += [("tokens per forward", f"{runner.tokens_per_forward:.2f}"), ("tok/s", f"{speed:.0f}")]
    footer = join(
        Markup('<span><b data-count="{}">{}</b> {}</span>').format(name, value, name) for name, value in counts
    )
    failed = Markup('<p class="failed" role="alert">{}</p>').format(runner.error) if runner.error else ""
    body = Markup('<div class="text"><span class="prompt">{}</span>{}</div>').format(
        prompt, text(runner.pieces.of_step)
    )
    return Markup('<section class="pane"><h3>{}</h3>{}{}<footer>{}</footer></section>').format(
        runner.lane.title, body, failed, footer
    )


def empty_pane(title: str) -> Markup:
    """Before the first generation."""
    return Markup('<section class="pane"><h3>{}</h3><div class="text"></div></section>').format(title)


def text(pieces: Sequence[str]) -> Markup:
    """What the forwards wrote, in their colours."""
    return join(
        Markup('<span class="f{}" title="forward {}">{}</span>').format(number % COLOURS, number, piece)
        for number, piece in enumerate(pieces, 1)
    )


def message(words: str, *, is_error: bool = False) -> Markup:
    """A line to the visitor; none for no words."""
    kind = Markup('class="failed" role="alert"') if is_error else Markup('role="status"')
    return Markup("<p {}>{}</p>").format(kind, words) if words else Markup("")


@dataclass(frozen=True)
class Replay:
    """A generation that is over, to be looked at forward by forward.

    Args:
        runner: whose; only what it has done when it is painted counts.
    """

    runner: Runner

    def at(self, number: int) -> Markup:
        """What is known behind forward `number` (from 1), what it had to verify, and the windows of those before it."""
        steps, tokenizer = self.runner.steps, self.runner.lane.tokenizer
        number = max(1, min(int(number), len(steps)))
        step = steps[number - 1]
        words = Markup("<p class='said'>{}</p>").format(self._said(number))
        known = Markup('<div class="text">{}</div>').format(text(self.runner.pieces.of_step[:number]))
        branches = join(
            _branch(draft, step.token_ids, tokenizer) for draft in step.candidates if draft.source != "window"
        )
        listed = Markup('<ul class="branches">{}</ul>').format(branches) if branches else ""
        return Markup('<section class="replay" data-forward="{}">{}{}{}{}</section>').format(
            number, words, self._windows(number), listed, known
        )

    def _said(self, number: int) -> str:
        step, of = self.runner.steps[number - 1], f"Forward {number} of {len(self.runner.steps)}"
        if not step.candidates:
            return f"{of}: no guesses, 1 token." if number > 1 else f"{of}: the prompt, and the first token."
        best = max(step.candidates, key=lambda draft: draft.accepted(step.token_ids))
        confirmed = best.accepted(step.token_ids)
        whence = f" ({'the window' if best.source == 'window' else best.source})" if confirmed else ""
        guesses = sum(draft.verified for draft in step.candidates)
        tokens = f"{len(step.token_ids)} token{'s' * (len(step.token_ids) != 1)}"
        return f"{of}: {guesses} guesses verified, {confirmed} confirmed{whence}, {tokens}."

    def _windows(self, number: int) -> Markup:
        """The last forwards, one a row, their guesses under each other by the place in the text that they are for."""
        steps, final, tokenizer = self.runner.steps, self.runner.pieces.token_ids, self.runner.lane.tokenizer
        rows = range(max(2, number - ROWS + 1), number + 1)
        if not rows:
            return Markup("")
        ends = [0]  # tokens behind each forward
        for step in steps:
            ends.append(ends[-1] + len(step.token_ids))
        first = ends[rows[0] - 1]
        painted = []
        for row in rows:
            before, step = ends[row - 1], steps[row - 1]
            cells = [
                Markup('<td class="known">{}</td>').format(_shown(tokenizer, token)) for token in final[first:before]
            ]
            window = next((draft for draft in step.candidates if draft.source == "window"), None)
            cells += [
                Markup('<td class="{}">{}</td>').format(
                    _kind(window, place, step.token_ids, final[before:]), _shown(tokenizer, token)
                )
                for place, token in enumerate(window.token_ids if window else ())
            ]
            painted.append(Markup("<tr><th>{}</th>{}</tr>").format(row, join(cells)))
        return Markup('<div class="windows"><table>{}</table></div>').format(join(painted))


def _kind(draft: Candidate | None, place: int, committed: Sequence[int], becomes: Sequence[int]) -> str:
    """The class of a guess: "confirmed" in this forward; "right" already, though not yet confirmed; "wrong"; and whether "unverified"."""
    assert draft is not None
    unverified = " unverified" * (place >= draft.verified)
    if place < draft.accepted(committed):
        return "confirmed"
    return ("right" if place < len(becomes) and draft.token_ids[place] == becomes[place] else "wrong") + unverified


def _branch(draft: Candidate, committed: Sequence[int], tokenizer: Any) -> Markup:
    confirmed = draft.accepted(committed)
    guesses = join(
        Markup('<span class="{}">{}</span>').format(
            "confirmed" if place < confirmed else "wrong", _shown(tokenizer, token)
        )
        for place, token in enumerate(draft.token_ids)
    )
    return Markup("<li><b>{}</b>{}</li>").format(draft.source, guesses)


def _shown(tokenizer: Any, token: int) -> str:
    """A token on its own, white space made visible."""
    return str(tokenizer.decode([token])).translate(MARKS)
