"""The loopback Hub."""

from __future__ import annotations

import pytest

from tests.hub_cards.hub import LoopbackHub


@pytest.fixture
def hub():
    """An empty Hub of one's own."""
    with LoopbackHub() as hub:
        yield hub
