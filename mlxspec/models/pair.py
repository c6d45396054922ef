"""A target and what drafts for it."""

from dataclasses import dataclass
from typing import Any

import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlxspec.models.attention import context_length
from mlxspec.models.drafter import PromptLookup


@dataclass
class ModelPair:
    """Models that are in memory already; ``mlxspec.load`` makes one from names.

    ``lookup`` is a second drafter that ``draft_length="auto"`` may choose for a text that repeats itself.
    ``tokenizer`` is mlx-lm's or transformers', or None for work on token ids. ``context_length`` is what the target's
    config says, None if nothing; set it to decode further or less far.
    """

    target: nn.Module
    drafter: nn.Module | PromptLookup | None = None
    tokenizer: Any = None
    context_length: int | None = None
    lookup: PromptLookup | None = None

    def __post_init__(self):
        if self.lookup and isinstance(self.drafter, PromptLookup):
            self.lookup = None
        if self.context_length is None:
            self.context_length = context_length(self.target)
        if self.tokenizer is not None and not isinstance(self.tokenizer, TokenizerWrapper):
            self.tokenizer = TokenizerWrapper(self.tokenizer)

    @property
    def eos_token_ids(self) -> set[int]:
        """The tokens that end an answer; none without a tokenizer."""
        return set(getattr(self.tokenizer, "eos_token_ids", ()))
