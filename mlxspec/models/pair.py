"""A target and its drafters."""

from dataclasses import dataclass
from typing import Any

import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlxspec.models.attention import context_length, position_table
from mlxspec.models.drafter import PromptLookup
from mlxspec.models.eagle import Eagle, fitting_parts
from mlxspec.models.sharding import Group


@dataclass
class ModelPair:
    """A target and its drafters, in memory. ``mlxspec.load`` creates one from names.

    Attributes:
        target: The target model.
        drafter: A draft model, an EAGLE head, prompt lookup, or None to decode without drafts.
        tokenizer: A tokenizer of mlx-lm or transformers, or None to work on token ids.
        context_length: Maximum number of positions of the target. None for what its config declares, or no limit.
        lookup: A second drafter, which ``draft_length="auto"`` may choose for text that repeats itself.
        drafter_context_length: The same for the draft model. It does not draft beyond.
        drafter_name: What drafts, for users, such as "amd-135m+lookup". ``load`` sets it.
        group: The processes of ``mlx.launch`` over which the target is divided. None for a whole target.
        drafter_note: Why ``load`` chose another drafter than the recommended one, "" if it did not.

    Raises:
        UnsupportedModelError: The drafter is an EAGLE head that does not fit the target.
    """

    target: nn.Module
    drafter: nn.Module | PromptLookup | None = None
    tokenizer: Any = None
    context_length: int | None = None
    lookup: PromptLookup | None = None
    drafter_context_length: int | None = None
    drafter_name: str = ""
    drafter_note: str = ""
    group: Group | None = None

    def __post_init__(self) -> None:
        if self.lookup and isinstance(self.drafter, PromptLookup):
            self.lookup = None
        self.context_length = limit_of(self.target, self.context_length)
        if isinstance(self.drafter, Eagle):
            fitting_parts(self.drafter, self.target)  # or an error
        if isinstance(self.drafter, nn.Module):
            self.drafter_context_length = limit_of(self.drafter, self.drafter_context_length)
        if self.tokenizer is not None and not isinstance(self.tokenizer, TokenizerWrapper):
            self.tokenizer = TokenizerWrapper(self.tokenizer)

    @property
    def eos_token_ids(self) -> set[int]:
        """The tokens that end an answer. Empty without a tokenizer."""
        return set(getattr(self.tokenizer, "eos_token_ids", ()))


def limit_of(model: nn.Module, given: int | None) -> int | None:
    """Return the positions that a model may have: as given or else declared, and never more than its table has."""
    declared = given or context_length(model)
    limits = [limit for limit in (declared, position_table(model)) if limit]
    return min(limits, default=None)
