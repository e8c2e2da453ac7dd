"""The page of the demo, with and without a browser.

`JACOBI_HF_SCREENSHOT=docs/images/page.png` writes the picture that the docs show.
"""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from jacobi_hf.cli.serve import listener
from jacobi_hf.demo import page

KNOBS = {"jacobi_block_size": 16, "jacobi_max_blocks": 2, "jacobi_activation_ratio": 0.0, "jacobi_pool_size": 2}
PROMPT = "    def __repr__(self):\n        info = ['StreamReader']\n"
HOSTILE = "<img src=x onerror=window.pwned=1><script>window.pwned=1</script> ${window.pwned=1} {{window.pwned=1}}"
VISITOR = SimpleNamespace(session_hash="somebody")
SCREENSHOT = os.environ.get("JACOBI_HF_SCREENSHOT")
NEW = 96 if SCREENSHOT else 24


@pytest.fixture(scope="module")
def lanes():
    return page.lanes()


@pytest.fixture
def somebody(lanes):
    return page.Page(lanes)


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("runner ")]


def eventually(condition, seconds=180.0):
    """Return what `condition` returns, as soon as that is true."""
    until = time.monotonic() + seconds
    while True:
        found = condition()
        if found:
            return found
        assert time.monotonic() < until, "the condition stayed false"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("prompt", "new", "knobs", "message"),
    [
        ("", 8, {}, "There is no prompt"),
        (" \n", 8, {}, "There is no prompt"),
        ("word " * 3000, 8, {}, "the model has 2048 positions. Shorten the prompt"),
        ("word", 0, {}, "0 new tokens"),
        ("word", 10**9, {}, "1000000000 new tokens"),
        ("word", 2.5, {}, "2.5 new tokens"),
        (
            "word",
            8,
            {"jacobi_block_size": 1},
            "jacobi_block_size=1 cannot be used; it must be an integer from 2 to 1024",
        ),
        ("word", 8, {"jacobi_block_size": 4.5}, "jacobi_block_size=4.5"),
        ("word", 8, {"jacobi_max_blocks": None}, "jacobi_max_blocks=None"),
        ("word", 8, {"jacobi_activation_ratio": "<b>"}, "jacobi_activation_ratio='&lt;b&gt;'"),
    ],
)
def test_bad_input_is_a_message_before_anything_starts(somebody, prompt, new, knobs, message):
    before = threads()
    (picture,) = list(somebody.generate(prompt, new, *(KNOBS | knobs).values(), VISITOR))
    assert message.replace("'", "&#39;") in picture[len(somebody.lanes)]
    assert 'role="alert"' in picture[len(somebody.lanes)]
    assert threads() == before
    assert not somebody.races


def test_panes_fill_and_agree_and_the_replay_follows(somebody):
    *_, last = list(somebody.generate(PROMPT, 20, *KNOBS.values(), VISITOR))
    assert "All texts are the same. n = 16, K = 2, r = 0, pool = 2." in last[3]
    race = somebody.races["somebody"]
    assert [one.lane.title for one in race.runners] == ["generate", "Jacobi", "Jacobi with a drafter (lossless)"]
    assert [one.tokens for one in race.runners] == [20] * 3
    assert len(race.runners[2].steps) < len(race.runners[0].steps) == 20
    title = race.runners[2].lane.title
    forwards = len(race.runners[2].steps)
    assert f"Forward {forwards} of {forwards}" in somebody.replay(title, forwards, VISITOR)
    assert [somebody.next_forward(n, title, VISITOR) for n in (1, forwards)] == [2, forwards]
    assert "Nothing has been written yet" in somebody.replay(title, 1, SimpleNamespace(session_hash="somebody else"))


@pytest.mark.parametrize("how", ["stop", "leave", "close"])
def test_a_generation_ends_when_its_visitor_stops_it_or_leaves(somebody, how):
    pictures = somebody.generate(PROMPT, 1000, *KNOBS.values(), VISITOR)
    next(pictures)
    assert threads()
    if how == "close":  # as gradio does when the connection is gone
        pictures.close()
    else:
        getattr(somebody, how)(VISITOR)
        *_, last = list(pictures)
        assert "Stopped." in last[3]
    eventually(lambda: not threads())
    assert ("somebody" in somebody.races) == (how != "leave")


@pytest.fixture(scope="module")
def address(lanes):
    at = listener("127.0.0.1", 0)
    server = page.Server(page.Page(lanes), PROMPT, NEW)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [at]})
    thread.start()
    yield f"http://127.0.0.1:{at.getsockname()[1]}/"
    server.handle_exit(signal.SIGINT, None)
    thread.join(20)
    assert not thread.is_alive()


class Visitor:
    """A visitor with a browser, who finds parts of the page by their ids."""

    def __init__(self, browser):
        self.browser = browser

    def find(self, css):
        return self.browser.find_element("css selector", css)

    def text(self, css):
        return self.browser.execute_script("return document.querySelector(arguments[0])?.textContent ?? ''", css)

    def write(self, css, text):
        from selenium.webdriver.common.keys import Keys

        field = self.find(css)
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(text, Keys.TAB)

    def set_prompt(self, text):
        """All at once: a long one would take long to type."""
        self.browser.execute_script(
            "const [field, text] = arguments; field.value = text;"
            " field.dispatchEvent(new Event('input', {bubbles: true}))",
            self.find("#prompt textarea"),
            text,
        )

    def generate(self, until):
        self.find("#generate").click()
        eventually(lambda: until in self.text("#message"))
        if until.startswith("All texts"):
            eventually(lambda: self.forward() == 1)

    def panes(self):
        return [self.text(f"#pane{i} .text") for i in range(3)]

    def counts(self, name):
        return [float(self.text(f"#pane{i} [data-count='{name}']")) for i in range(3)]

    def forward(self):
        return int(
            self.browser.execute_script("return document.querySelector('#replay .replay')?.dataset.forward ?? 0")
        )

    def show_forward(self, number):
        self.write("#forward input[type=number]", str(number))
        eventually(lambda: self.forward() == number)

    def guesses(self):
        """Of the last forward shown, in its window."""
        return len(self.browser.find_elements("css selector", "#replay tr:last-child td:not(.known)"))


@pytest.fixture(scope="module")
def visitor(address):
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("the page is tested in Debian's chromium and chromium-driver, which are not installed")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in (
        "headless=new",
        "no-sandbox",
        "disable-gpu",
        "disable-dev-shm-usage",
        "disable-extensions",
        "window-size=1400,1450",
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        browser.get(address)
        eventually(lambda: browser.find_elements("css selector", "#generate"))
        yield Visitor(browser)
    finally:
        browser.quit()


@pytest.mark.slow
def test_in_a_browser(visitor):
    visitor.generate("All texts are the same. n = 16, K = 2")
    panes = visitor.panes()
    per_forward = visitor.counts("tokens per forward")
    assert len(set(panes)) == 1
    assert panes[0].startswith(PROMPT)
    assert len(panes[0]) > len(PROMPT)
    assert per_forward[0] == 1.0 < per_forward[2]
    assert visitor.counts("tokens") == [NEW] * 3
    if SCREENSHOT:
        visitor.browser.set_window_size(1400, 1900)
        visitor.show_forward(12)
        Path(SCREENSHOT).write_bytes(visitor.browser.get_screenshot_as_png())

    visitor.show_forward(3)
    earlier = visitor.text("#replay .replay")
    visitor.show_forward(4)
    assert visitor.guesses() > 4
    assert visitor.text("#replay .replay") != earlier
    visitor.find("#plays input").click()
    eventually(lambda: visitor.forward() > 4)
    visitor.find("#plays input").click()

    visitor.write("#jacobi_block_size input[type=number]", "2")
    visitor.generate("All texts are the same. n = 2, K = 2")
    assert visitor.panes() == panes
    visitor.show_forward(4)
    assert 0 < visitor.guesses() <= 4  # n times K

    visitor.set_prompt("word " * 3000)
    visitor.generate("the model has 2048 positions. Shorten the prompt")
    visitor.set_prompt("")
    visitor.generate("There is no prompt")
    assert visitor.panes() == panes

    visitor.set_prompt(HOSTILE)
    visitor.generate("All texts are the same.")
    assert visitor.panes()[0].startswith(HOSTILE)
    assert visitor.browser.execute_script("return window.pwned") is None

    names = visitor.browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert names
    assert not [
        name for name in names if not name.startswith(visitor.browser.execute_script("return location.origin"))
    ]
    assert not [entry for entry in visitor.browser.get_log("browser") if entry["level"] == "SEVERE"]


def test_a_generation_ends_when_its_page_is_closed(visitor):
    """This test is the last one in the browser, because it leaves the page."""
    visitor.set_prompt(PROMPT)
    visitor.write("#new_tokens input[type=number]", "1000")
    visitor.generate("Writing, ")
    assert threads()
    visitor.browser.get("about:blank")
    eventually(lambda: not threads())
