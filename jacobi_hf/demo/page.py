"""The page of the demo: decoders side by side, live, and a replay of what they did. Needs gradio."""

from __future__ import annotations

from collections.abc import Iterator, Sequence  # noqa: TC003  (gradio reads annotations)
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import FrameType  # noqa: TC003
from typing import Any

import gradio as gr
import uvicorn
from fastapi import FastAPI

import jacobi_hf
from jacobi_hf.config import JacobiConfig
from jacobi_hf.demo import paint, showcase
from jacobi_hf.demo.race import Lane, Race, Runner, twin
from jacobi_hf.loading import load

FRAME = 0.15  # seconds between two pictures
MOST_NEW_TOKENS = 1024
SLIDERS = {"jacobi_block_size": (2, 64, 1), "jacobi_max_blocks": (0, 4, 1), "jacobi_activation_ratio": (0, 1, 0.05)}
SLIDERS |= {"jacobi_pool_size": (0, 8, 1)}
SHORT = {
    "jacobi_block_size": "n",
    "jacobi_max_blocks": "K",
    "jacobi_activation_ratio": "r",
    "jacobi_pool_size": "pool",
}
ABOUT = (
    "A run of one colour came out of one forward. The decoders take turns, so the speed of each is that of a machine of its own; "
    "tokens per forward count the prefill."
)
LEGEND = (
    "Each row is a forward and what was in its window. Grey: text by then. Strong green: confirmed by this forward. Light green: right "
    "already, though not yet confirmed. Dotted: wrong. Italic: a drafter's, not verified yet."
)


def lanes(model: str | None = None, drafter: str | None = None, dtype: str = "auto") -> list[Lane]:
    """What the page compares: ordinary and Jacobi decoding, and lossless forcing where there is a drafter; one set of weights.

    Args:
        model: name or folder; the tiny checkpoint and its drafter when not given.
        drafter: folder or repository.
        dtype: as `load` takes it; float32 is the one in which texts are equal token for token, and that of the tiny checkpoint.

    Raises:
        ValueError: there is no such model, or the drafter does not fit.
    """
    if model is None:
        if not (showcase.TINY / "checkpoint").is_dir():
            raise ValueError(
                "the tiny checkpoint is part of the repository, not of an installed package: name a model with --model."
            )
        model, drafter, dtype = str(showcase.TINY / "checkpoint"), drafter or str(showcase.TINY / "drafter"), "float32"
    loaded, tokenizer = load(model, dtype)
    found = [Lane("generate", loaded, tokenizer, None), Lane("Jacobi", twin(loaded), tokenizer)]
    if drafter is not None:
        forced = twin(loaded)
        jacobi_hf.load_drafter(forced, drafter)
        found.append(Lane("Jacobi with a drafter (lossless)", forced, tokenizer))
    return found


@dataclass(frozen=True)
class Page:
    """What the page does, apart from how it looks.

    Attributes:
        lanes: what is compared.
        races: the last generation of each visitor, by session.
    """

    lanes: Sequence[Lane] = field(repr=False)
    races: dict[str, Race] = field(default_factory=dict, repr=False)

    def start(self, prompt: str, new_tokens: int, knobs: dict[str, Any]) -> Race:
        """Begin to generate.

        Raises:
            ValueError: no prompt, more than the model has positions for, or a knob out of range; nothing has begun.
        """
        lane = self.lanes[0]
        token_ids = lane.tokenizer(prompt)["input_ids"]
        if not prompt.strip() or not token_ids:
            raise ValueError("There is no prompt: write one first.")
        if isinstance(new_tokens, bool) or not isinstance(new_tokens, int) or not 1 <= new_tokens <= MOST_NEW_TOKENS:
            raise ValueError(
                f"{new_tokens!r} new tokens cannot be written; it must be an integer from 1 to {MOST_NEW_TOKENS}."
            )
        positions = getattr(lane.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        if positions is not None and len(token_ids) + new_tokens > positions:
            raise ValueError(
                f"The prompt has {len(token_ids)} tokens, and {new_tokens} more are to be written; the model has {positions} positions. "
                "Shorten the prompt, or ask for fewer."
            )
        wanted = JacobiConfig(**knobs).to_knobs()
        options = {"max_new_tokens": new_tokens, "do_sample": False}
        return Race(
            [Runner(one, token_ids, options | (wanted if one.decoding else {"decoding": None})) for one in self.lanes]
        )

    def generate(
        self, prompt: str, new_tokens: int, n: int, k: int, r: float, pool: int, request: gr.Request
    ) -> Iterator[list[Any]]:
        """Pictures of the panes while they are written; then the replay."""
        untouched = [gr.skip() for _ in self.lanes]
        knobs = dict(zip(SLIDERS, (n, k, r, pool), strict=True))
        try:
            race = self.start(prompt, new_tokens, knobs)
        except ValueError as error:
            yield [*untouched, paint.message(str(error), is_error=True), gr.skip()]
            return
        shown = ", ".join(f"{SHORT[name]} = {value:g}" for name, value in knobs.items())
        with race:  # which ends it too where the visitor has left, and gradio closes this generator
            self.races[str(request.session_hash)] = race
            while not race.is_over:
                race.advance(FRAME)
                yield [
                    *(paint.pane(runner, prompt) for runner in race.runners),
                    paint.message(f"Writing, {shown}."),
                    gr.skip(),
                ]
            words, is_error = self.acceptance(race)
        last = max(len(runner.steps) for runner in race.runners if runner.lane.decoding)
        forwards = gr.Slider(maximum=max(last, 2), value=1, interactive=last > 0)
        yield [
            *(paint.pane(runner, prompt) for runner in race.runners),
            paint.message(f"{words} {shown}.", is_error=is_error),
            forwards,
        ]

    def acceptance(self, race: Race) -> tuple[str, bool]:
        """What is to say at the end, and whether something went wrong."""
        if failed := [runner for runner in race.runners if runner.error]:
            return f"{failed[0].lane.title}: {failed[0].error}", True
        if race.is_stopped:
            return "Stopped.", False
        if len({tuple(runner.pieces.token_ids) for runner in race.runners}) == 1:
            return "All texts are the same.", False
        return f"The texts differ, which they may in {self.lanes[0].model.dtype}: two logits can tie there.", False

    def stop(self, request: gr.Request) -> None:
        """End what this visitor is waiting for."""
        if race := self.races.get(str(request.session_hash)):
            race.stop()

    def leave(self, request: gr.Request) -> None:
        """The visitor is gone."""
        if race := self.races.pop(str(request.session_hash), None):
            race.stop()

    def replay(self, title: str, number: float, request: gr.Request) -> str:
        """The last generation in the lane of that title, as of a forward."""
        race = self.races.get(str(request.session_hash))
        runner = next((one for one in race.runners if one.lane.title == title), None) if race else None
        if runner is None or not runner.steps:
            return paint.message("Nothing has been written yet.")
        return paint.Replay(runner).at(int(number))

    def next_forward(self, number: float, title: str, request: gr.Request) -> Any:
        """What the slider shows next while the replay plays."""
        race = self.races.get(str(request.session_hash))
        last = max((len(one.steps) for one in race.runners if one.lane.title == title), default=0) if race else 0
        return min(int(number) + 1, max(last, 1))


def build(page: Page, prompt: str = "", new_tokens: int = 128) -> gr.Blocks:
    """How the page looks; `prompt` and `new_tokens` are what it begins with."""
    compared = page.lanes
    titles = [lane.title for lane in compared if lane.decoding]
    with gr.Blocks(analytics_enabled=False, title="jacobi-hf", fill_width=True) as blocks:
        gr.Markdown(f"## Several tokens per forward\n{ABOUT}")
        text = gr.Textbox(prompt, label="Prompt", lines=3, max_lines=12, elem_id="prompt")
        with gr.Row():
            length = gr.Slider(1, MOST_NEW_TOKENS, new_tokens, step=1, label="new tokens", elem_id="new_tokens")
            sliders = [_slider(name) for name in SLIDERS]
        with gr.Row():
            generate, stop = (
                gr.Button("Generate", variant="primary", elem_id="generate"),
                gr.Button("Stop", elem_id="stop"),
            )
        said = gr.HTML(elem_id="message", apply_default_css=False)
        with gr.Row(equal_height=True):
            panes = [
                gr.HTML(paint.empty_pane(lane.title), elem_id=f"pane{i}", apply_default_css=False)
                for i, lane in enumerate(compared)
            ]
        gr.Markdown(f"### Replay\n{LEGEND}")
        with gr.Row():
            which = gr.Radio(titles, value=titles[-1], label="decoder", elem_id="which")
            forward = gr.Slider(1, 2, 1, step=1, label="forward", elem_id="forward", interactive=False, scale=2)
            plays = gr.Checkbox(label="play", elem_id="plays", min_width=80, scale=0)
        replay = gr.HTML(elem_id="replay", apply_default_css=False)
        clock = gr.Timer(0.4, active=False)

        hidden: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        generate.click(
            page.generate, [text, length, *sliders], [*panes, said, forward], concurrency_limit=1, **hidden
        ).then(page.replay, [which, forward], replay, **hidden)
        stop.click(page.stop, queue=False, **hidden)
        gr.on(
            [forward.change, which.change], page.replay, [which, forward], replay, trigger_mode="always_last", **hidden
        )
        plays.change(lambda on: gr.Timer(active=on), plays, clock, **hidden)
        clock.tick(page.next_forward, [forward, which], forward, **hidden)
        blocks.unload(page.leave)
    return blocks


def _slider(name: str) -> gr.Slider:
    low, high, step = SLIDERS[name]
    knob = next(knob for knob in fields(JacobiConfig) if knob.name == name)
    return gr.Slider(low, high, knob.default, step=step, label=SHORT[name], info=knob.metadata["help"], elem_id=name)


def look() -> dict[str, Any]:
    """How the page looks, for `Blocks.launch`: all of it comes from here, without fonts or scripts of others."""
    fonts = {"font": ("system-ui", "sans-serif"), "font_mono": ("ui-monospace", "Consolas", "monospace")}
    return {
        "theme": gr.themes.Base(**fonts),
        "css_paths": Path(__file__).with_name("page.css"),
        "footer_links": [],
        "run_history": False,
        "ssr_mode": False,
        "mcp_server": False,
    }


class Server(uvicorn.Server):
    """Serves the page at /; told to stop, it ends what is being written first.

    Args:
        page: what is served.
        prompt, new_tokens: what it begins with.
    """

    def __init__(self, page: Page, prompt: str = "", new_tokens: int = 128) -> None:
        app = gr.mount_gradio_app(FastAPI(), build(page, prompt, new_tokens), "/", show_error=False, **look())
        self._page, self._mounted = page, app.routes[-1].app
        super().__init__(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5))

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """On SIGINT and SIGTERM."""
        for race in list(self._page.races.values()):
            race.stop()
        self._mounted.stop_event.set()  # of the connections that open pages keep
        super().handle_exit(sig, frame)
