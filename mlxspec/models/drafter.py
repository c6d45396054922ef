"""The drafter: a small Llama-architecture language model as MLX modules.

The modules use the attribute names of Hugging Face's ``LlamaForCausalLM``. So the flattened parameters have the names
of its checkpoint layout.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.activations import swiglu
from mlx_lm.models.base import create_attention_mask, scaled_dot_product_attention

from mlxspec.errors import InvalidRequestError, ModelLoadError, in_one_line
from mlxspec.files import load_arrays, read_json, write_atomically, write_json
from mlxspec.models.vocabulary import checked_map, over_all_tokens

EMBEDDING = "model.embed_tokens.weight"
OWN_KEYS = ("draft_vocab_size", "shared_embedding")  # keys of config.json that Llama models do not have


@dataclass(frozen=True)
class PromptLookup:
    """A drafter without weights: it proposes the tokens that followed an earlier occurrence of the last n-gram.

    Attributes:
        ngram: Longest suffix to search for, in tokens. Shorter ones, down to one token, are the fallback.

    Source: Saxena, "Prompt Lookup Decoding" (2023).
    """

    ngram: int = 3

    def __post_init__(self) -> None:
        if self.ngram < 1:
            raise InvalidRequestError(f"prompt lookup: ngram is {self.ngram}; use 1 or more")


@dataclass(frozen=True)
class DrafterConfig:
    """Shape of a Llama-architecture drafter. The names are those of a Hugging Face ``config.json``."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None  # None is replaced by num_attention_heads
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 1
    eos_token_id: int | None = 2
    draft_vocab_size: int | None = None  # size of a smaller output vocabulary; None for all tokens
    shared_embedding: bool = False  # whether the input embedding is the target's, and not stored

    def __post_init__(self) -> None:
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        for name in (f.name for f in fields(self) if f.type in (int, int | None)):
            value = getattr(self, name)
            if value is not None and not (0 if name.endswith("token_id") else 1) <= value < 2**31:
                raise InvalidRequestError(f"drafter config: {name} is {value}; use a positive number below 2**31")
        if self.hidden_size % (2 * self.num_attention_heads):
            raise InvalidRequestError(
                f"drafter config: hidden_size is {self.hidden_size}; use an even multiple of "
                f"num_attention_heads, {self.num_attention_heads}"
            )
        if self.num_attention_heads % self.key_value_heads:
            raise InvalidRequestError(
                f"drafter config: num_attention_heads is {self.num_attention_heads}; use a multiple of "
                f"num_key_value_heads, {self.key_value_heads}"
            )
        if self.tie_word_embeddings and (self.draft_vocab_size or self.shared_embedding):
            raise InvalidRequestError(
                "drafter config: tie_word_embeddings is true, but a smaller output vocabulary and a shared embedding "
                "need a head of their own; use tie_word_embeddings false"
            )
        if self.draft_vocab_size and self.draft_vocab_size > self.vocab_size:
            raise InvalidRequestError(
                f"drafter config: draft_vocab_size is {self.draft_vocab_size}; use at most vocab_size, "
                f"{self.vocab_size}"
            )

    @classmethod
    def llama2_chat_115m(cls) -> "DrafterConfig":
        """Return the shape of the "Llama 2 Chat Drafter 115M": 116.9 M parameters, untied.

        Source: Goel et al., arXiv 2403.00858.
        """
        return cls(
            vocab_size=32000,
            hidden_size=1024,
            intermediate_size=2816,
            num_hidden_layers=4,
            num_attention_heads=8,
        )

    @property
    def key_value_heads(self) -> int:
        """Number of key and value heads."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_dim(self) -> int:
        """Size of an attention head, hidden_size / num_attention_heads."""
        return self.hidden_size // self.num_attention_heads

    @property
    def num_parameters(self) -> int:
        """Number of weights of a ``Drafter`` of this shape. A shared embedding is not counted."""
        attention = 2 * self.hidden_size * (self.hidden_size + self.head_dim * self.key_value_heads)
        mlp = 3 * self.hidden_size * self.intermediate_size
        layer = attention + mlp + 2 * self.hidden_size
        embedding = 0 if self.shared_embedding else self.vocab_size
        head = 0 if self.tie_word_embeddings else self.output_size
        return self.num_hidden_layers * layer + (embedding + head + 1) * self.hidden_size

    @property
    def output_size(self) -> int:
        """Number of tokens that the head can output."""
        return self.draft_vocab_size or self.vocab_size

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> "DrafterConfig":
        """Create a config from the content of a Hugging Face ``config.json``.

        Missing keys take Hugging Face's defaults. mlx-lm's defaults differ: it ties the embeddings.

        Raises:
            ModelLoadError: The config is not that of a Llama model, or has a feature that ``Drafter`` lacks.
            InvalidRequestError: A size is out of range.
        """
        known = {f.name for f in fields(cls)}
        settings = {key: value for key, value in config.items() if key in known}
        rope = config.get("rope_parameters") or {}
        settings["rope_theta"] = rope.get("rope_theta", settings.get("rope_theta", cls.rope_theta))
        for name in ("bos_token_id", "eos_token_id"):
            if isinstance(settings.get(name), list):
                settings[name] = settings[name][0]
        try:
            drafter_config = cls(**settings)
        except TypeError as error:
            raise ModelLoadError(f"not a Llama config: {error}; use the config.json of a Llama model") from None
        expected = {
            "head_dim": drafter_config.head_dim,
            "attention_bias": False,
            "mlp_bias": False,
            "rope_scaling": None,
        }
        for name, value in expected.items():
            if config.get(name, value) not in (value, None):
                raise ModelLoadError(
                    f"Drafter does not support {name} {config[name]!r}; load the model with mlxspec.load instead"
                )
        if rope.get("rope_type", "default") != "default":
            raise ModelLoadError(
                f"Drafter does not support rope_type {rope['rope_type']!r}; load the model with mlxspec.load instead"
            )
        return drafter_config

    def to_dict(self) -> dict[str, Any]:
        """Return the content of a ``config.json`` for transformers, mlx-lm and llama.cpp's converter."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "head_dim": self.head_dim,
            **{name: value for name, value in asdict(self).items() if name not in OWN_KEYS or value},
        }


class Attention(nn.Module):
    """Grouped-query attention with rotary embedding: [B, L, hidden_size] -> [B, L, hidden_size]."""

    def __init__(self, config: DrafterConfig):
        super().__init__()
        self.config = config
        key_value_size = config.key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key_value_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, key_value_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.rope = nn.RoPE(config.head_dim, traditional=False, base=config.rope_theta)

    def __call__(self, x: mx.array, mask: Any, cache: Any) -> mx.array:
        """Return the attention of x [B, T, D] over the cache and x itself."""
        batch, length, _ = x.shape

        def heads(projected: mx.array) -> mx.array:
            return projected.reshape(batch, length, -1, self.config.head_dim).swapaxes(1, 2)

        queries, keys, values = heads(self.q_proj(x)), heads(self.k_proj(x)), heads(self.v_proj(x))
        offset = 0 if cache is None else cache.offset
        queries, keys = self.rope(queries, offset=offset), self.rope(keys, offset=offset)
        if cache is not None:
            keys, values = cache.update_and_fetch(keys, values)
        mixed = scaled_dot_product_attention(
            queries, keys, values, cache=cache, scale=self.config.head_dim**-0.5, mask=mask
        )
        return self.o_proj(mixed.swapaxes(1, 2).reshape(batch, length, -1))


class MLP(nn.Module):
    """The gated feed-forward network (SwiGLU): [B, L, hidden_size] -> [B, L, hidden_size]."""

    def __init__(self, config: DrafterConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        """Return the MLP's output for x [B, T, D]."""
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class DecoderLayer(nn.Module):
    """One transformer layer with pre-normalization: [B, L, hidden_size] -> [B, L, hidden_size]."""

    def __init__(self, config: DrafterConfig):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def __call__(self, x: mx.array, mask: Any, cache: Any) -> mx.array:
        """Return the hidden states [B, T, D] after this layer."""
        x = x + self.self_attn(self.input_layernorm(x), mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class LlamaBody(nn.Module):
    """The model without its output head: token ids [B, L] -> hidden states [B, L, hidden_size]."""

    def __init__(self, config: DrafterConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [DecoderLayer(config) for _ in range(config.num_hidden_layers)]
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def __call__(self, tokens: mx.array, cache: list | None = None, recompute: bool = False) -> mx.array:
        """Return the hidden states [B, L, hidden_size] after the last normalization.

        Args:
            tokens: Token ids [B, L].
            cache: One KV cache for each layer, or None.
            recompute: Store only each layer's input for the backward pass, and recompute its other activations there.
                This saves memory.

        Source: Chen et al. 2016, arXiv 1604.06174 (``recompute``).
        """
        x = self.embed_tokens(tokens).astype(self.norm.weight.dtype)  # a shared embedding may have another type
        cache = cache or [None] * len(self.layers)
        mask = create_attention_mask(x, cache[0])
        for layer, layer_cache in zip(self.layers, cache, strict=True):
            run = partial(layer, mask=mask, cache=layer_cache)
            x = (nn.utils.checkpoint(layer, run) if recompute else run)(x)
        return self.norm(x)


class Drafter(nn.Module):
    """A Llama model: token ids [B, L] -> logits [B, L, V]. It accepts the same caches as mlx-lm's models.

    Two features go beyond Llama. With ``draft_vocab_size`` K, the head has K rows, and ``d2t`` [K] maps a row to its
    token: token = row + d2t[row]. The logits of all other tokens are −inf. With ``shared_embedding``, the input
    embedding is the target's. It is neither trained nor stored.

    Args:
        config: Shape of the model.

    Source: the names ``draft_vocab_size`` and ``d2t`` are those of EAGLE-3 checkpoints (Li et al., arXiv 2503.01840).
    """

    def __init__(self, config: DrafterConfig):
        super().__init__()
        self.config = config
        self.model = LlamaBody(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.output_size, bias=False)
        if config.draft_vocab_size:
            self.d2t = mx.zeros(config.draft_vocab_size, mx.int32)
            self.freeze(recurse=False, keys=["d2t"])
        if config.shared_embedding:
            self.model.embed_tokens.freeze()

    def __call__(self, tokens: mx.array, cache: list | None = None) -> mx.array:
        """Return the logits [B, T, V] for tokens [B, T]."""
        hidden = self.model(tokens, cache)
        if self.config.tie_word_embeddings:
            return self.model.embed_tokens.as_linear(hidden)
        logits = self.lm_head(hidden)
        if self.output_tokens is None:
            return logits
        return over_all_tokens(logits, self.output_tokens, self.config.vocab_size)

    @property
    def output_tokens(self) -> mx.array | None:
        """The token of each row of the head, [K] int32. None if the head has a row for every token."""
        return mx.arange(self.config.output_size) + self.d2t if self.config.draft_vocab_size else None

    @property
    def shared_table(self) -> nn.Module | None:
        """The input embedding if it is the target's."""
        return self.model.embed_tokens if self.config.shared_embedding else None

    @property
    def layers(self) -> list[DecoderLayer]:
        """The transformer layers, under the name that mlx-lm uses."""
        return self.model.layers

    @property
    def args(self) -> DrafterConfig:
        """The config, under the name that mlx-lm uses."""
        return self.config

    @property
    def num_parameters(self) -> int:
        """Number of weights."""
        return self.config.num_parameters

    def set_dtype(
        self,
        dtype: mx.Dtype,
        predicate: Callable[[mx.Dtype], bool] | None = lambda present: mx.issubdtype(present, mx.floating),
    ) -> None:
        """Set the precision of the drafter's own weights. A shared embedding keeps that of the target."""
        shared = self.shared_table.parameters() if self.shared_table else {}
        super().set_dtype(dtype, predicate)
        self.model.embed_tokens.update(shared)

    def save(self, folder: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors`` in the Hugging Face Llama layout.

        Each file is replaced in one step. The caller copies the tokenizer files.
        """
        weights = dict(tree_flatten(self.parameters()))
        if self.config.shared_embedding:
            del weights[EMBEDDING]
        write_atomically(
            Path(folder) / "model.safetensors",
            lambda path: mx.save_safetensors(str(path), weights, metadata={"format": "pt"}),
        )
        write_json(Path(folder) / "config.json", self.config.to_dict())

    @classmethod
    def load(cls, folder: str | Path, dtype: mx.Dtype | None = None, embedding: nn.Module | None = None) -> "Drafter":
        """Read a drafter. For training it must be unquantized. To decode with it, use ``mlxspec.load``.

        Args:
            folder: A folder that ``save`` or ``mlxspec export`` wrote.
            dtype: Precision of the weights. None keeps the stored precision.
            embedding: The target's input embedding, for a drafter that shares it.

        Raises:
            ModelLoadError: A file is missing, or the weights do not fit the config.
        """
        folder = Path(folder)
        try:
            content = read_json(folder / "config.json")
            weights = load_arrays(folder / "model.safetensors")
            if not isinstance(content, dict):
                raise ValueError("config.json does not contain an object")
        except (OSError, RuntimeError, ValueError) as error:
            raise ModelLoadError(
                f"cannot read a drafter from {folder}: {in_one_line(error)}; copy or export it again"
            ) from None
        if content.get("tie_word_embeddings") is None:
            content["tie_word_embeddings"] = "lm_head.weight" not in weights
        drafter = cls(DrafterConfig.from_dict(content))
        if "quantization" in content:
            nn.quantize(drafter, **content["quantization"], class_predicate=lambda path, _: f"{path}.scales" in weights)
        if drafter.config.shared_embedding:
            try:
                drafter.share(embedding)
            except ValueError as error:
                raise ModelLoadError(f"{folder}: {error}; use it with the target that it was made for") from None
        try:
            if drafter.config.shared_embedding:
                weights = {**weights, **drafter.embedding_weights}
            drafter.load_weights(list(weights.items()))
            if drafter.config.draft_vocab_size:
                drafter.d2t = checked_map(drafter.d2t, drafter.config.vocab_size)
        except ValueError as error:
            raise ModelLoadError(
                f"{folder}: the weights do not fit config.json: {in_one_line(error)}; copy or export the drafter again"
            ) from None
        if dtype is not None:
            drafter.set_dtype(dtype)
        mx.eval(drafter.parameters())
        return drafter

    @property
    def embedding_weights(self) -> dict[str, mx.array]:
        """The parameters of the input embedding by name."""
        return dict(tree_flatten({"model": {"embed_tokens": self.model.embed_tokens.parameters()}}))

    def share(self, embedding: nn.Module | None) -> None:
        """Use the target's input embedding.

        Raises:
            ValueError: There is none, or it has another shape.
        """
        config = self.config
        if embedding is None:
            raise ValueError("the drafter uses its target's input embedding; load it together with the target")
        shape = embedding(mx.array([config.vocab_size - 1])).shape
        if shape != (1, config.hidden_size):
            raise ValueError(f"the target's embedding has width {shape[-1]}, and the drafter {config.hidden_size}")
        own: Any = deepcopy(embedding)  # nothing that is done to the drafter may change the target's module
        own.update(tree_map(mx.stop_gradient, embedding.parameters()))  # arrays of its own over the same memory
        self.model.embed_tokens = own.freeze()
