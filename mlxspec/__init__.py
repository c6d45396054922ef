"""Lossless speculative decoding on MLX, and the training of the drafters that make it fast.

Names are imported when they are first used: MLX takes a second to import, which ``mlxspec --help`` need not wait for.
"""

import importlib

from mlxspec.blas import load_openblas

TYPE_CHECKING = False  # as in ``typing``, which takes a while to import

if TYPE_CHECKING:
    from typing import Any

    from mlxspec.decoding.conversation import Conversation
    from mlxspec.decoding.decoder import Block, SpeculativeDecoder
    from mlxspec.decoding.generation import Generation, generate
    from mlxspec.decoding.sampling import Sampling
    from mlxspec.decoding.stats import DecodingStats
    from mlxspec.decoding.text import Segment
    from mlxspec.errors import (
        DisagreementError,
        InvalidRequestError,
        MlxspecError,
        ModelLoadError,
        NumericalError,
        ProcessError,
        TokenizerMismatchError,
        TrainingError,
        UnsupportedModelError,
        WriteError,
    )
    from mlxspec.models.drafter import Drafter, DrafterConfig, PromptLookup
    from mlxspec.models.loading import load
    from mlxspec.models.pair import ModelPair

__version__ = "0.1.0"

load_openblas()  # before anything imports MLX

MODULES = {
    "mlxspec.decoding.conversation": ["Conversation"],
    "mlxspec.decoding.decoder": ["Block", "SpeculativeDecoder"],
    "mlxspec.decoding.generation": ["Generation", "generate"],
    "mlxspec.decoding.sampling": ["Sampling"],
    "mlxspec.decoding.stats": ["DecodingStats"],
    "mlxspec.decoding.text": ["Segment"],
    "mlxspec.errors": [
        "DisagreementError",
        "InvalidRequestError",
        "MlxspecError",
        "ModelLoadError",
        "NumericalError",
        "ProcessError",
        "TokenizerMismatchError",
        "TrainingError",
        "UnsupportedModelError",
        "WriteError",
    ],
    "mlxspec.models.drafter": ["Drafter", "DrafterConfig", "PromptLookup"],
    "mlxspec.models.loading": ["load"],
    "mlxspec.models.pair": ["ModelPair"],
}
HOMES = {name: module for module, names in MODULES.items() for name in names}

__all__ = [
    "Block",
    "Conversation",
    "DecodingStats",
    "DisagreementError",
    "Drafter",
    "DrafterConfig",
    "Generation",
    "InvalidRequestError",
    "MlxspecError",
    "ModelLoadError",
    "ModelPair",
    "NumericalError",
    "ProcessError",
    "PromptLookup",
    "Sampling",
    "Segment",
    "SpeculativeDecoder",
    "TokenizerMismatchError",
    "TrainingError",
    "UnsupportedModelError",
    "WriteError",
    "generate",
    "load",
]


def __getattr__(name: str) -> "Any":
    """Import a public name when it is first used."""
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
