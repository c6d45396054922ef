"""The model that a drafter is made for, and the new drafter's shape."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxspec.files import fingerprint, fingerprint_files
from mlxspec.models.drafter import Drafter, DrafterConfig
from mlxspec.models.loading import model_folder, read_config, read_model, read_tokenizer
from mlxspec.models.memory import declared_context
from mlxspec.models.quantizing import dequantized
from mlxspec.models.tokens import end_token
from mlxspec.settings import option
from mlxspec.training.corpus import BadLines
from mlxspec.training.record import Metrics


@dataclass(frozen=True)
class DrafterShape:
    """A new drafter's shape; the vocabulary is the target's. The defaults are the 115M preset of arXiv 2403.00858."""

    hidden_size: int = option(1024, "Width.")
    intermediate_size: int = option(2816, "Width inside the MLP.")
    num_hidden_layers: int = option(4, "Layers.")
    num_attention_heads: int = option(8, "Heads.")
    num_key_value_heads: int | None = option(None, "Heads of keys and values; as many as heads if not given.")
    tie_word_embeddings: bool = option(False, "One table for input and output.")


@dataclass
class Listener:
    """Whom the stages tell how they get on."""

    stage: Callable[[str, str], None] = lambda name, what: None
    work: Callable[[int, int, int], None] = lambda done, total, tokens: None  # of making shards
    step: Callable[[int, int, Metrics], None] = lambda steps, step, metrics: None
    bad_lines: Callable[[BadLines], None] = lambda bad: None


@dataclass
class Target:
    """The model that a drafter is made for; nothing is read before it is needed."""

    name: str
    listener: Listener = field(default_factory=Listener)

    @cached_property
    def folder(self) -> Path:
        return model_folder(self.name)

    @cached_property
    def tokenizer(self) -> Any:
        return read_tokenizer(self.folder, self.name)

    @cached_property
    def config(self) -> dict[str, Any]:
        return read_config(self.folder)

    @property
    def vocab_size(self) -> int:
        """Of its logits; an old config does not say, the tokenizer then does."""
        size = self.config.get("vocab_size", -1)
        return size if size > 0 else len(self.tokenizer.get_vocab())

    @property
    def context(self) -> int | None:
        return declared_context(self.config)

    @property
    def bytes(self) -> int:
        """Of the weights as they are held in training."""
        return sum(weight.nbytes for _, weight in tree_flatten(self.model.parameters()))

    @cached_property
    def model(self) -> nn.Module:
        model = read_model(self.folder)
        return dequantized(model) if mx.default_device().type == mx.cpu else model

    @cached_property
    def tokens(self) -> str:
        """Fingerprint of the tokenizer: which text each id is."""
        vocabulary = sorted(self.tokenizer.get_vocab().items(), key=lambda item: item[1])
        return fingerprint(json.dumps(vocabulary))

    @cached_property
    def fingerprint(self) -> str:
        """Of the weights and the config, wherever the folder is."""
        config = json.dumps(self.config, sort_keys=True)
        return fingerprint_files(sorted([*self.folder.glob("*.safetensors"), *self.folder.glob("*.npz")]), config)

    def new_drafter(self, shape: DrafterShape, seed: int) -> Drafter:
        bos, eos = self.tokenizer.bos_token_id, end_token(self.tokenizer)
        context = self.context or 2048
        mx.random.seed(seed)
        return Drafter(
            DrafterConfig(
                self.vocab_size, **asdict(shape), max_position_embeddings=context, bos_token_id=bos, eos_token_id=eos
            )
        )
