"""Counts and times of an answer, added up block by block. The command line prints them, the benchmark compares them.

The acceptance rate here is accepted / drafted tokens. A token after the first rejection of its block counts as drafted,
not as accepted. Two other rates have the same name elsewhere: training measures α = Σ min(p, q) of one token, and the
rates of the draft policy are by position, given that the earlier positions of the block were accepted.
"""

from dataclasses import asdict, dataclass, field, fields
from itertools import zip_longest
from typing import Any

from mlxspec.decoding.drafting import Choice


@dataclass
class DecodingStats:
    """Counts and times of one answer. Times are in seconds.

    ``drafted`` and ``accepted`` count what was verified. If max_tokens, EOS or a stop string cuts a block, they include
    the tokens after the cut. ``blocks`` is the number of target passes. ``dropped_blocks`` were queued too, but never
    read, because the answer had ended.
    """

    tokens: int = 0
    blocks: int = 0
    dropped_blocks: int = 0
    drafted: int = 0
    accepted: int = 0
    accepted_at: list[int] = field(default_factory=list)  # how often draft position i was accepted
    drafted_at: list[int] = field(default_factory=list)  # how often draft position i was drafted
    blocks_by: dict[str, int] = field(default_factory=dict)  # blocks by proposer: "model", "lookup" or "none"
    drafted_by: dict[str, int] = field(default_factory=dict)  # drafted tokens by proposer
    prompt_tokens: int = 0
    prompt_tokens_reused: int = 0
    prompt_seconds: float = 0.0
    decode_seconds: float = 0.0
    peak_memory_bytes: int = 0

    def add(self, emitted: int, choice: Choice, accepted: int) -> None:
        """Add a block.

        Args:
            emitted: Number of its tokens in the answer.
            choice: Its proposer and draft length.
            accepted: Number of accepted tokens.
        """
        proposer, drafted = choice
        self.blocks += 1
        self.blocks_by[proposer] = self.blocks_by.get(proposer, 0) + 1
        self.drafted_by[proposer] = self.drafted_by.get(proposer, 0) + drafted
        self.tokens += emitted
        self.drafted += drafted
        self.accepted += accepted
        for counts, times in ((self.drafted_at, drafted), (self.accepted_at, accepted)):
            counts += [0] * (drafted - len(counts))
            for position in range(times):
                counts[position] += 1

    def __add__(self, other: "DecodingStats") -> "DecodingStats":
        """Return the sums over both answers, and the larger peak of memory."""
        total = DecodingStats()
        for f in fields(self):
            mine, theirs = getattr(self, f.name), getattr(other, f.name)
            value: Any
            if isinstance(mine, list):
                value = [a + b for a, b in zip_longest(mine, theirs, fillvalue=0)]
            elif isinstance(mine, dict):
                value = {name: mine.get(name, 0) + theirs.get(name, 0) for name in {**mine, **theirs}}
            else:
                value = max(mine, theirs) if f.name == "peak_memory_bytes" else mine + theirs
            setattr(total, f.name, value)
        return total

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "DecodingStats":
        """Return the statistics that ``to_dict`` stored."""
        return cls(**{f.name: content[f.name] for f in fields(cls) if f.name in content})

    @property
    def block_efficiency(self) -> float:
        """Tokens per target pass: the mean of accepted + 1 over the blocks. 0 without blocks."""
        return (self.accepted + self.blocks) / self.blocks if self.blocks else 0.0

    @property
    def acceptance_rate(self) -> float:
        """Accepted / drafted tokens. 0 if none were drafted."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def acceptance_by_position(self) -> list[float]:
        """Accepted / drafted tokens of each draft position, not conditional on the earlier positions."""
        return [accepted / drafted for accepted, drafted in zip(self.accepted_at, self.drafted_at, strict=True)]

    @property
    def tokens_per_second(self) -> float:
        """Emitted tokens / decoding time, without the prompt."""
        return self.tokens / self.decode_seconds if self.decode_seconds else 0.0

    @property
    def draft_length(self) -> float:
        """Mean number of drafted tokens per block."""
        return self.drafted / self.blocks if self.blocks else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return all counts and times, and the ratios derived from them, for JSON."""
        derived = ("block_efficiency", "acceptance_rate", "tokens_per_second", "draft_length")
        return {**asdict(self), **{name: getattr(self, name) for name in derived}}
