"""The loopback Hub as a fixture."""

from __future__ import annotations

import pytest

from tests.hub_cards.hub import LoopbackHub


@pytest.fixture
def hub():
    """An empty Hub for one test."""
    with LoopbackHub() as hub:
        yield hub
