"""The time that a block takes on this device: a table of measured seconds, and estimates from it."""

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, replace

from mlxspec.decoding.cache import capacity_for
from mlxspec.decoding.drafting import MODEL, Choice

MEASURED_AT = capacity_for(1)  # the cache capacity, in positions, at which the table was measured


@dataclass(frozen=True)
class BlockCosts:
    """Seconds of the parts of a block, as ``calibration.py`` measured them.

    A block with draft length γ takes ``rows[γ+1]`` seconds. If the draft model drafts, it takes
    ``draft_once + γ · draft_step`` more.

    Args:
        rows: Number of rows -> seconds of a block that verifies them, without drafting. Missing numbers are
            interpolated. Numbers beyond the largest are extrapolated with the last slope.
        draft_once: Seconds of each draft by the draft model, in addition to its tokens.
        draft_step: Seconds of each token that the draft model drafts.
        draft_read: Seconds of each token that the draft model reads before it can draft, at the start of a text.
        trace: Seconds of tracing a block of a new draft length.
        position: Seconds that one more position of cache capacity adds to a pass over one row.
        position_row: Seconds that one more position adds for each further row.
        position_draft: Seconds that one more position adds to each token that the draft model drafts.
        position_read: Seconds that each position before a token adds to reading it.
    """

    rows: Mapping[int, float]
    draft_once: float = 0.0
    draft_step: float = 0.0
    draft_read: float = 0.0
    trace: float = 0.0
    position: float = 0.0
    position_row: float = 0.0
    position_draft: float = 0.0
    position_read: float = 0.0

    def verify(self, rows: int) -> float:
        """Return the seconds of a block over ``rows`` rows, without drafting."""
        known = sorted(self.rows)
        if len(known) == 1:
            return self.rows[known[0]] * rows / known[0]  # with one figure, assume that each row costs the same
        at = min(max(bisect_left(known, rows), 1), len(known) - 1)
        low, high = known[at - 1], known[at]
        slope = (self.rows[high] - self.rows[low]) / (high - low)
        return max(self.rows[low] + slope * (rows - low), self.rows[known[0]])

    def block(self, choice: Choice) -> float:
        """Return the seconds of a block, drafting included."""
        drafting = self.draft_once + choice.length * self.draft_step if choice.proposer == MODEL else 0.0
        return self.verify(choice.length + 1) + drafting

    def reading(self, tokens: int, length: int) -> float:
        """Return the seconds in which the draft model reads the last ``tokens`` tokens of a text of ``length``."""
        return tokens * (self.draft_read + max(0.0, length - tokens / 2) * self.position_read)

    def at_length(self, tokens: int) -> "BlockCosts":
        """Return the costs for a text of ``tokens`` tokens. Attention covers the caches' whole capacity."""
        more = capacity_for(tokens) - MEASURED_AT
        rows = {m: s + more * (self.position + (m - 1) * self.position_row) for m, s in self.rows.items()}
        return replace(self, rows=rows, draft_step=self.draft_step + more * self.position_draft)
