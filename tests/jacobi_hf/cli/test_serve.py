"""The verb `serve`: its options, its errors, and the application that it starts."""

from __future__ import annotations

import socket
import sys

import pytest
import uvicorn
from fastapi.testclient import TestClient
from typer.testing import CliRunner

from jacobi_hf.cli import app
from jacobi_hf.config import JacobiConfig
from jacobi_hf.drafts.loading import drafter_of
from jacobi_hf.serving.app import build_app
from tests.helpers.tiny import EXAMPLE

run = CliRunner().invoke


@pytest.fixture
def started(monkeypatch):
    """The applications that `serve` would run, each with its address."""
    runs = []

    def start(self, sockets):
        runs.append((self.config.app, sockets[0].getsockname()))
        raise KeyboardInterrupt

    monkeypatch.setattr(uvicorn.Server, "run", start)
    return runs


def test_the_verb_serves_on_this_machine_alone_until_it_is_interrupted(started):
    result = run(app, ["serve", str(EXAMPLE / "forced"), "--port", "0", "--dtype", "float32"])
    (application, (host, port)) = started[0]
    assert (result.exit_code, host) == (0, "127.0.0.1")
    assert result.stdout == f"{EXAMPLE / 'forced'} (jacobi_multiblock) at http://127.0.0.1:{port}/v1\n"
    assert TestClient(application).get("/v1/models").json()["data"][0]["id"] == str(EXAMPLE / "forced")


@pytest.mark.parametrize(
    ("arguments", "decoding", "block_size"),
    [
        (["forced"], "jacobi_multiblock", 16),
        (["checkpoint"], "jacobi_multiblock", 16),
        (["forced", "--decoding", "none"], None, None),
        (["forced", "--jacobi-block-size", "8"], "jacobi_multiblock", 8),
        (["checkpoint", "--decoding", "jacobi"], "jacobi", 16),
        (["checkpoint", "--drafter", str(EXAMPLE / "drafter"), "--jacobi-verify-width", "4"], "jacobi_multiblock", 16),
    ],
)
def test_knobs_of_the_verb_are_the_default_of_requests(started, monkeypatch, arguments, decoding, block_size):
    models = []
    monkeypatch.setattr(
        "jacobi_hf.serving.app.build_app",
        lambda model, *rest, **options: models.append(model) or build_app(model, *rest, **options),
    )
    result = run(app, ["serve", str(EXAMPLE / arguments[0]), *arguments[1:], "--port", "0"])
    assert result.exit_code == 0, result.output
    config = JacobiConfig.from_generation_config(models[0].generation_config)
    assert (config and config.decoding, config and config.jacobi_block_size) == (decoding, block_size)
    assert (drafter_of(models[0]) is None) == ("--drafter" not in arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere/at/all"], "nowhere/at/all is no model"),
        ([str(EXAMPLE)], "holds no model"),
        ([str(EXAMPLE / "forced"), "--jacobi-block-size", "1"], "from 2 to 1024"),
        ([str(EXAMPLE / "forced"), "--decoding", "jacoby"], "did you mean 'jacobi'"),
        ([str(EXAMPLE / "forced"), "--decoding", "none", "--jacobi-pool-size", "1"], "without decoding"),
        ([str(EXAMPLE / "forced"), "--jacobi-verify-width", "4"], "--drafter"),
        ([str(EXAMPLE / "forced"), "--dtype", "fp32"], "'fp32'"),
        ([str(EXAMPLE / "forced"), "--drafter", "nowhere"], "nowhere"),
        ([str(EXAMPLE / "forced"), "--host", "256.0.0.1"], "256.0.0.1"),
    ],
)
def test_errors_of_the_verb_are_one_line(started, arguments, message):
    result = run(app, ["serve", "--port", "0", *arguments])
    assert (result.exit_code, started) == (2, [])
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("jacobi-hf")]
    assert line.startswith("jacobi-hf serve: ")
    assert message in line
    assert "Traceback" not in result.output


def test_a_port_that_is_taken_is_reported_before_the_model_is_loaded(started, monkeypatch):
    monkeypatch.setattr("jacobi_hf.loading.load", lambda *_: pytest.fail("loaded"))
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        result = run(app, ["serve", str(EXAMPLE / "forced"), "--port", port])
    assert (result.exit_code, f"cannot listen on 127.0.0.1, port {port}" in result.stderr) == (2, True)


@pytest.mark.parametrize("package", ["fastapi", "openai", "uvicorn"])
def test_without_the_extra_the_error_names_it(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    result = run(app, ["serve", str(EXAMPLE / "forced")])
    assert (result.exit_code, "pip install 'jacobi-hf[serve]'" in result.stderr) == (2, True)
