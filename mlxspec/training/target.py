"""The target of a training run, and the shape of a new drafter."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxspec.errors import MlxspecError
from mlxspec.files import fingerprint
from mlxspec.models.checks import model_fingerprint
from mlxspec.models.config import declared_context
from mlxspec.models.drafter import Drafter, DrafterConfig
from mlxspec.models.memory import check_memory
from mlxspec.models.quantizing import dequantized
from mlxspec.models.reading import model_folder, read_config, read_model, read_tokenizer
from mlxspec.models.sharding import Group, agree, machine
from mlxspec.models.tokens import end_token
from mlxspec.settings import option
from mlxspec.training.corpus import BadLines
from mlxspec.training.run_folder import Metrics


@dataclass(frozen=True)
class DrafterShape:
    """Shape of a new drafter. Its vocabulary is the target's. The defaults are those of arXiv 2403.00858 (115M)."""

    hidden_size: int = option(1024, "Size of the hidden states.")
    intermediate_size: int = option(2816, "Size of the MLP's inner layer.")
    num_hidden_layers: int = option(4, "Number of layers.")
    num_attention_heads: int = option(8, "Number of attention heads.")
    num_key_value_heads: int | None = option(
        None, "Number of key and value heads. By default, the number of attention heads."
    )
    tie_word_embeddings: bool = option(False, "Use the input embedding as the output head.")


@dataclass
class Listener:
    """Callbacks for the progress of the stages.

    Attributes:
        stage: Called at the start of a stage with its name and a description.
        work: Called while shards are written or answers are measured, with the work done, the total work, and the
            tokens so far.
        step: Called after a training step with the number of steps of the stage, the step, and its metrics.
        bad_lines: Called after a corpus was read, with its skipped lines.
    """

    stage: Callable[[str, str], None] = lambda name, what: None
    work: Callable[[int, int, int], None] = lambda done, total, tokens: None
    step: Callable[[int, int, Metrics], None] = lambda steps, step, metrics: None
    bad_lines: Callable[[BadLines], None] = lambda bad: None


@dataclass
class Target:
    """The model that a drafter is trained for. Files are read when they are first needed.

    Args:
        name: Folder, hub id or short name.
        listener: Callbacks for the progress of the stages.
        group: Processes of ``mlx.launch`` over which the model is divided. All of them must then run it on the same
            input at the same time. None for a whole model.
    """

    name: str
    listener: Listener = field(default_factory=Listener)
    group: Group | None = None

    @cached_property
    def folder(self) -> Path:
        """Local folder of the model."""
        return model_folder(self.name)

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer, loaded with mlx-lm."""
        return read_tokenizer(self.folder, self.name)

    @cached_property
    def config(self) -> dict[str, Any]:
        """Content of the model's config.json."""
        return read_config(self.folder)

    @property
    def vocab_size(self) -> int:
        """Number of logits, or the size of the tokenizer if the config does not state it."""
        size = self.config.get("vocab_size", -1)
        return size if size > 0 else len(self.tokenizer.get_vocab())

    @property
    def context(self) -> int | None:
        """Maximum number of positions. None if the config does not state it."""
        return declared_context(self.config)

    @property
    def weight_bytes(self) -> int:
        """Memory of the weights in this process during training, in bytes."""
        return sum(weight.nbytes for weight in dict(tree_flatten(self.model.parameters())).values())

    @cached_property
    def model(self) -> nn.Module:
        """The model. On the CPU back end it is dequantized, since quantized matrix products are slow there.

        A divided one is dequantized only where that pays, since it has to be done before it is divided.
        """
        if self.group is None:
            model = read_model(self.folder)
            return dequantized(model) if mx.default_device().type == mx.cpu else model
        try:
            check_memory([(self.folder, self.config)], 1, None, True, self.group.size())
            model = read_model(self.folder, widen=True, group=self.group)
        except MlxspecError as error:
            agree(self.group, {}, error)
            raise
        agree(self.group, {"target": self.fingerprint} | machine())
        return model

    @property
    def embedding(self) -> Any:
        """The input embedding. None if the model has none where mlx-lm's models have it."""
        return getattr(getattr(self.model, "model", None), "embed_tokens", None)

    @cached_property
    def tokenizer_fingerprint(self) -> str:
        """Fingerprint of the vocabulary, which maps token ids to text."""
        vocabulary = sorted(self.tokenizer.get_vocab().items(), key=lambda item: item[1])
        return fingerprint(json.dumps(vocabulary))

    @cached_property
    def fingerprint(self) -> str:
        """Fingerprint of the weights and the config."""
        return model_fingerprint(self.folder, self.config)

    def new_drafter(self, shape: DrafterShape, seed: int) -> Drafter:
        """Return a drafter for this target with random weights."""
        bos, eos = self.tokenizer.bos_token_id, end_token(self.tokenizer)
        context = self.context or 2048
        mx.random.seed(seed)
        return Drafter(
            DrafterConfig(
                self.vocab_size, **asdict(shape), max_position_embeddings=context, bos_token_id=bos, eos_token_id=eos
            )
        )
