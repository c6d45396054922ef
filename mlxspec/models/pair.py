"""A target and its drafters."""

from dataclasses import dataclass
from typing import Any

import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlxspec.models.attention import context_length
from mlxspec.models.drafter import PromptLookup


@dataclass
class ModelPair:
    """A target and its drafters, in memory. ``mlxspec.load`` creates one from names.

    Attributes:
        target: The target model.
        drafter: A draft model, prompt lookup, or None to decode without drafts.
        tokenizer: A tokenizer of mlx-lm or transformers, or None to work on token ids.
        context_length: Maximum number of positions. By default that of the target's config, None for no limit.
        lookup: A second drafter, which ``draft_length="auto"`` may choose for text that repeats itself.
    """

    target: nn.Module
    drafter: nn.Module | PromptLookup | None = None
    tokenizer: Any = None
    context_length: int | None = None
    lookup: PromptLookup | None = None
    drafter_context_length: int | None = None

    def __post_init__(self) -> None:
        if self.lookup and isinstance(self.drafter, PromptLookup):
            self.lookup = None
        if self.context_length is None:
            self.context_length = context_length(self.target)
        if self.drafter_context_length is None and isinstance(self.drafter, nn.Module):
            self.drafter_context_length = context_length(self.drafter)
        if self.tokenizer is not None and not isinstance(self.tokenizer, TokenizerWrapper):
            self.tokenizer = TokenizerWrapper(self.tokenizer)

    @property
    def eos_token_ids(self) -> set[int]:
        """The tokens that end an answer. Empty without a tokenizer."""
        return set(getattr(self.tokenizer, "eos_token_ids", ()))
