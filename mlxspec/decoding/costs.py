"""What a block costs on this device: a table of seconds, and its arithmetic."""

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from mlxspec.decoding.cache import capacity_for
from mlxspec.decoding.drafting import MODEL, Choice

MEASURED_AT = capacity_for(1)  # the cache capacity, in positions, at which the table was measured
CORRECTION_MEMORY = 0.9  # decay of the correction per timed block
LARGEST_CORRECTION = 2.0  # ignore times above this multiple of the figure


@dataclass(frozen=True)
class BlockCosts:
    """Seconds of the parts of a block, as ``calibration.py`` measured them.

    A block that drafts γ tokens costs ``rows[γ+1]``, plus ``draft_once + γ · draft_step`` if the draft model drafts
    them.

    Args:
        rows: Number of rows -> seconds of a block that verifies them, without drafting. Missing numbers are
            interpolated. Numbers beyond the largest are extrapolated with the last slope.
        draft_once: Seconds of each draft by the draft model, in addition to its tokens.
        draft_step: Seconds of each token that the draft model drafts.
        draft_read: Seconds of each token of text that the draft model reads before it can draft.
        trace: Seconds of tracing a block of a new draft length.
        position: Seconds that one more position of cache capacity adds to a pass over one row.
        position_row: Seconds that it adds for each further row.
        position_draft: Seconds that it adds to each token that the draft model drafts.
    """

    rows: Mapping[int, float]
    draft_once: float = 0.0
    draft_step: float = 0.0
    draft_read: float = 0.0
    trace: float = 0.0
    position: float = 0.0
    position_row: float = 0.0
    position_draft: float = 0.0

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
        """Return the seconds of a block."""
        drafting = self.draft_once + choice.length * self.draft_step if choice.proposer == MODEL else 0.0
        return self.verify(choice.length + 1) + drafting

    def at_length(self, tokens: int) -> "BlockCosts":
        """Return the costs for a text of ``tokens`` tokens. In a block, attention covers the capacity of the caches."""
        more = capacity_for(tokens) - MEASURED_AT
        rows = {m: s + more * (self.position + (m - 1) * self.position_row) for m, s in self.rows.items()}
        return replace(self, rows=rows, draft_step=self.draft_step + more * self.position_draft)


@dataclass
class RunningCosts:
    """The cost of each block at the present length of the text, corrected by the blocks that were timed.

    The table is coarse, and decoding takes longer than the minimum of several rounds. So a timed block corrects the
    figure of its own choice. It also corrects the figures of all choices that were not timed yet, by a common factor.
    Corrections are factors, so that they stay valid when the text grows.

    Args:
        table: Measured costs.
        factors: Correction of each choice that was timed.
        others: Correction of the choices that were not timed yet.
        capacity: Cache capacity of the present text, in positions.
    """

    table: BlockCosts
    present: BlockCosts = field(init=False)
    factors: dict[Choice, float] = field(default_factory=dict)
    others: float = 1.0
    capacity: int = MEASURED_AT

    def __post_init__(self) -> None:
        self.present = self.table

    def set_length(self, tokens: int) -> None:
        """Set the length of the text, in tokens."""
        if capacity_for(tokens) != self.capacity:
            self.present, self.capacity = self.table.at_length(tokens), capacity_for(tokens)

    def block(self, choice: Choice) -> float:
        """Return the seconds of a block at the present length of the text."""
        return self.present.block(choice) * self.factors.get(choice, self.others)

    def observe(self, choice: Choice, seconds: float) -> None:
        """Correct the figures by the time that a block took, in seconds."""
        factor = seconds / self.present.block(choice)
        known = self.factors.get(choice, self.others)
        if factor < LARGEST_CORRECTION * known:
            self.factors[choice] = known + (1 - CORRECTION_MEMORY) * (factor - known)
            self.others += (1 - CORRECTION_MEMORY) * (factor - self.others)
