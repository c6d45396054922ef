"""Lossless speculative decoding on MLX, and the training of the drafters that make it fast."""

from mlxspec.decoding.conversation import Conversation
from mlxspec.decoding.decoder import Block, Generation, SpeculativeDecoder, generate
from mlxspec.decoding.sampling import Sampling
from mlxspec.decoding.stats import DecodingStats
from mlxspec.decoding.text import Segment
from mlxspec.errors import InvalidRequestError, MlxspecError
from mlxspec.models.drafter import Drafter, DrafterConfig, PromptLookup
from mlxspec.models.loading import load
from mlxspec.models.pair import ModelPair

__version__ = "0.1.0"

__all__ = [
    "Block",
    "Conversation",
    "DecodingStats",
    "Drafter",
    "DrafterConfig",
    "Generation",
    "InvalidRequestError",
    "MlxspecError",
    "ModelPair",
    "PromptLookup",
    "Sampling",
    "Segment",
    "SpeculativeDecoder",
    "generate",
    "load",
]
