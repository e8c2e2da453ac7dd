"""When a draft source is tried that does not seem to pay. Plain Python on the host."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jacobi_hf.tuning.policy import Policy


class TrialTimes:
    """When a source is tried that does not seem to pay.

    Attributes:
        at: tokens of a row after which the next trial is due.
    """

    def __init__(self, policy: Policy) -> None:
        self.at = 1.0
        self._gap = policy.gap
        self._most = policy.most_gap

    def postpone(self, tokens: float) -> None:
        """Set the next trial after one at so many tokens; the gaps double."""
        self.at = tokens + self._gap
        self._gap = min(2 * self._gap, self._most)
