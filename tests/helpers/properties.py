"""How many cases a property draws."""

from __future__ import annotations

import hypothesis


def at_most(cases: int) -> hypothesis.settings:
    """Return settings for slow cases: this many in `make test`, the usual number in `make test-deep`."""
    common = hypothesis.settings()
    is_deep = hypothesis.settings.get_current_profile_name() == "deep"
    return hypothesis.settings(max_examples=common.max_examples if is_deep else min(cases, common.max_examples))
