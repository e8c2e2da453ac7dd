"""The page of the demo: decoders side by side, live, and a replay of their forwards. Needs gradio."""

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
from jacobi_hf.config import CONSTANT, JacobiConfig
from jacobi_hf.demo import paint, showcase
from jacobi_hf.demo.race import Lane, Race, Runner, twin
from jacobi_hf.loading import load, positions_of

FRAME = 0.15  # seconds between two pictures
TICK = 0.4  # seconds between two forwards of the replay
MOST_NEW_TOKENS = 1024
SLIDERS = {
    "jacobi_block_size": (2, 64, 1),
    "jacobi_max_blocks": (0, 4, 1),
    "jacobi_activation_ratio": (0, 1, 0.05),
    "jacobi_pool_size": (0, 8, 1),
}
SHORT = {
    "jacobi_block_size": "n",
    "jacobi_max_blocks": "K",
    "jacobi_activation_ratio": "r",
    "jacobi_pool_size": "pool",
}
ABOUT = (
    "Tokens of one colour in a row come from one forward. The decoders take turns, so each has the speed that it has "
    "alone on the machine. Tokens per forward include the prefill."
)
LEGEND = (
    "Each row is a forward with the guesses of its window. Grey: text before the forward. Strong green: accepted by "
    "this forward. Light green: equal to the final text, but not accepted yet. Dotted: wrong. Italic: guesses of a "
    "drafter that the forward did not verify."
)


def lanes(model: str | None = None, drafter: str | None = None, dtype: str = "auto") -> list[Lane]:
    """Return what the page compares: ordinary decoding, Jacobi decoding, and Jacobi decoding with a drafter if there
    is one.

    All lanes share one set of weights.

    Args:
        model: name or folder of a model; None is the tiny checkpoint of the repository with its drafter.
        drafter: folder or Hub repository of a drafter.
        dtype: dtype of the model; see `jacobi_hf.loading.load`. The tiny checkpoint is always float32, in which all
            decoders write the same tokens.

    Raises:
        ValueError: there is no such model, or the drafter does not fit the model.
    """
    if model is None:
        if not (showcase.TINY / "checkpoint").is_dir():
            raise ValueError(showcase.NO_CHECKPOINT)
        model = str(showcase.TINY / "checkpoint")
        drafter = drafter or str(showcase.TINY / "drafter")
        dtype = "float32"
    loaded, tokenizer = load(model, dtype)
    found = [Lane("generate", loaded, tokenizer, None), Lane("Jacobi", twin(loaded), tokenizer)]
    if drafter is not None:
        drafted = twin(loaded)
        jacobi_hf.load_drafter(drafted, drafter)
        found.append(Lane("Jacobi with a drafter (lossless)", drafted, tokenizer))
    return found


@dataclass(frozen=True)
class Page:
    """Actions of the page; `build` adds how it looks.

    Attributes:
        lanes: models and decodings that the page compares.
        races: the last generation of each visitor, by the hash of the session.
    """

    lanes: Sequence[Lane] = field(repr=False)
    races: dict[str, Race] = field(default_factory=dict, repr=False)

    def start(self, prompt: str, new_tokens: int, knobs: dict[str, Any]) -> Race:
        """Start a generation in every lane.

        Args:
            prompt: text to continue.
            new_tokens: most new tokens.
            knobs: knobs of the Jacobi lanes.

        Raises:
            ValueError: there is no prompt, the model has too few positions, or a knob is out of range. Nothing has
                started.
        """
        token_ids = self._encode(prompt, new_tokens)
        decodings = JacobiConfig(jacobi_schedule=CONSTANT, **knobs).to_knobs()  # the replay shows what the sliders say
        options = {"max_new_tokens": new_tokens, "do_sample": False}
        return Race(
            [
                Runner(lane, token_ids, options | (decodings if lane.decoding else {"decoding": None}))
                for lane in self.lanes
            ]
        )

    def _encode(self, prompt: str, new_tokens: int) -> list[int]:
        """Return the ids of a prompt.

        Raises:
            ValueError: the prompt or the number of new tokens cannot be used.
        """
        lane = self.lanes[0]
        token_ids: list[int] = lane.tokenizer(prompt)["input_ids"]
        if not prompt.strip() or not token_ids:
            raise ValueError("There is no prompt: write one first.")
        if isinstance(new_tokens, bool) or not isinstance(new_tokens, int) or not 1 <= new_tokens <= MOST_NEW_TOKENS:
            raise ValueError(
                f"{new_tokens!r} new tokens cannot be written; it must be an integer from 1 to {MOST_NEW_TOKENS}."
            )
        positions = positions_of(lane.model)
        if len(token_ids) + new_tokens > positions:
            raise ValueError(
                f"The prompt has {len(token_ids)} tokens, and {new_tokens} more are to be written; "
                f"the model has {positions} positions. Shorten the prompt, or ask for fewer."
            )
        return token_ids

    def generate(
        self, prompt: str, new_tokens: int, n: int, k: int, r: float, pool: int, request: gr.Request
    ) -> Iterator[list[Any]]:
        """Yield the panes, the message and the replay's slider while the lanes generate, and once more at the end."""
        knobs = dict(zip(SLIDERS, (n, k, r, pool), strict=True))
        try:
            race = self.start(prompt, new_tokens, knobs)
        except ValueError as error:
            yield [*(gr.skip() for _ in self.lanes), paint.message(str(error), is_error=True), gr.skip()]
            return
        shown = ", ".join(f"{SHORT[name]} = {value:g}" for name, value in knobs.items())
        with race:  # also stops the race when gradio closes this generator, because the visitor has left
            self.races[str(request.session_hash)] = race
            while not race.is_over:
                race.advance(FRAME)
                yield [*_panes(race, prompt), paint.message(f"Writing, {shown}."), gr.skip()]
            words, is_error = self.outcome(race)
        last = max(len(runner.steps) for runner in race.runners if runner.lane.decoding)
        forwards = gr.Slider(maximum=max(last, 2), value=1, interactive=last > 0)
        yield [*_panes(race, prompt), paint.message(f"{words} {shown}.", is_error=is_error), forwards]

    def outcome(self, race: Race) -> tuple[str, bool]:
        """Return the message at the end of a race, and whether it is an error."""
        if failed := [runner for runner in race.runners if runner.error]:
            return f"{failed[0].lane.title}: {failed[0].error}", True
        if race.is_stopped:
            return "Stopped.", False
        if len({tuple(runner.pieces.token_ids) for runner in race.runners}) == 1:
            return "All texts are the same.", False
        dtype = self.lanes[0].model.dtype
        return f"The texts differ, which can happen in {dtype}: two logits can be equal there.", False

    def stop(self, request: gr.Request) -> None:
        """End the generation of this visitor."""
        if race := self.races.get(str(request.session_hash)):
            race.stop()

    def leave(self, request: gr.Request) -> None:
        """End and forget the generation of a visitor who has left."""
        if race := self.races.pop(str(request.session_hash), None):
            race.stop()

    def replay(self, title: str, number: float, request: gr.Request) -> str:
        """Return the replay of this visitor's last generation in a lane, at one forward."""
        runner = self._runner(title, request)
        if runner is None or not runner.steps:
            return paint.message("Nothing has been written yet.")
        return paint.Replay(runner).at(int(number))

    def next_forward(self, number: float, title: str, request: gr.Request) -> Any:
        """Return the number of the next forward of the replay, or of the last one again."""
        runner = self._runner(title, request)
        return min(int(number) + 1, max(len(runner.steps) if runner else 0, 1))

    def _runner(self, title: str, request: gr.Request) -> Runner | None:
        race = self.races.get(str(request.session_hash))
        runners = race.runners if race else ()
        return next((runner for runner in runners if runner.lane.title == title), None)


def _panes(race: Race, prompt: str) -> list[str]:
    return [paint.pane(runner, prompt) for runner in race.runners]


def build(page: Page, prompt: str = "", new_tokens: int = 128) -> gr.Blocks:
    """Return the page as a gradio application.

    Args:
        page: actions of the page.
        prompt: the first prompt.
        new_tokens: the first number of new tokens.
    """
    hidden: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    with gr.Blocks(analytics_enabled=False, title="jacobi-hf", fill_width=True) as blocks:
        gr.Markdown(f"## Several tokens per forward\n{ABOUT}")
        inputs = _inputs(prompt, new_tokens)
        with gr.Row():
            generate = gr.Button("Generate", variant="primary", elem_id="generate")
            stop = gr.Button("Stop", elem_id="stop")
        message = gr.HTML(elem_id="message", apply_default_css=False)
        with gr.Row(equal_height=True):
            panes = [
                gr.HTML(paint.empty_pane(lane.title), elem_id=f"pane{number}", apply_default_css=False)
                for number, lane in enumerate(page.lanes)
            ]
        which, forward, replay = _replay(page, hidden)
        generate.click(page.generate, inputs, [*panes, message, forward], concurrency_limit=1, **hidden).then(
            page.replay, [which, forward], replay, **hidden
        )
        stop.click(page.stop, queue=False, **hidden)
        blocks.unload(page.leave)
    return blocks


def _inputs(prompt: str, new_tokens: int) -> list[Any]:
    """Add the prompt and the sliders, and return them."""
    text = gr.Textbox(prompt, label="Prompt", lines=3, max_lines=12, elem_id="prompt")
    with gr.Row():
        length = gr.Slider(1, MOST_NEW_TOKENS, new_tokens, step=1, label="new tokens", elem_id="new_tokens")
        return [text, length, *(_slider(name) for name in SLIDERS)]


def _slider(name: str) -> gr.Slider:
    """Return the slider of a knob, with the knob's default and help."""
    low, high, step = SLIDERS[name]
    knob = next(knob for knob in fields(JacobiConfig) if knob.name == name)
    return gr.Slider(low, high, knob.default, step=step, label=SHORT[name], info=knob.metadata["help"], elem_id=name)


def _replay(page: Page, hidden: dict[str, Any]) -> tuple[gr.Radio, gr.Slider, gr.HTML]:
    """Add the replay; return the choice of the lane, the slider of the forward, and the picture."""
    titles = [lane.title for lane in page.lanes if lane.decoding]
    gr.Markdown(f"### Replay\n{LEGEND}")
    with gr.Row():
        which = gr.Radio(titles, value=titles[-1], label="decoder", elem_id="which")
        forward = gr.Slider(1, 2, 1, step=1, label="forward", elem_id="forward", interactive=False, scale=2)
        plays = gr.Checkbox(label="play", elem_id="plays", min_width=80, scale=0)
    picture = gr.HTML(elem_id="replay", apply_default_css=False)
    clock = gr.Timer(TICK, active=False)
    gr.on([forward.change, which.change], page.replay, [which, forward], picture, trigger_mode="always_last", **hidden)
    plays.change(lambda on: gr.Timer(active=on), plays, clock, **hidden)
    clock.tick(page.next_forward, [forward, which], forward, **hidden)
    return which, forward, picture


def look() -> dict[str, Any]:
    """Return how the page looks, for `Blocks.launch`; fonts and styles come from this package alone."""
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
    """Serves the page at /; on SIGINT and SIGTERM it ends all generations first.

    Args:
        page: actions of the page.
        prompt: the first prompt.
        new_tokens: the first number of new tokens.
    """

    def __init__(self, page: Page, prompt: str = "", new_tokens: int = 128) -> None:
        app = gr.mount_gradio_app(FastAPI(), build(page, prompt, new_tokens), "/", show_error=False, **look())
        self._page = page
        self._mounted = app.routes[-1].app
        super().__init__(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5))

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """End all generations, then the server; called on SIGINT and SIGTERM."""
        for race in list(self._page.races.values()):
            race.stop()
        self._mounted.stop_event.set()  # ends the connections that open pages keep
        super().handle_exit(sig, frame)
