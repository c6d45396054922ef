"""The drafter: a small Llama-architecture language model as MLX modules.

Attribute names are those of Hugging Face's ``LlamaForCausalLM``, so the flattened parameters *are* the
checkpoint layout and nothing is renamed on the way to disk or back.
"""

from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.activations import swiglu
from mlx_lm.models.base import create_attention_mask, scaled_dot_product_attention

from mlxspec.errors import InvalidRequestError, ModelLoadError
from mlxspec.files import read_json, write_atomically, write_json


@dataclass(frozen=True)
class PromptLookup:
    """A drafter without weights: propose what followed the last n-gram the previous time it occurred.

    ``ngram`` is the longest suffix that is looked for, in tokens; shorter ones, down to a single token, are
    the fallback. Source: Saxena, "Prompt Lookup Decoding" (2023).
    """

    ngram: int = 3

    def __post_init__(self):
        if self.ngram < 1:
            raise InvalidRequestError(f"prompt lookup: ngram is {self.ngram}; use 1 or more")


@dataclass(frozen=True)
class DrafterConfig:
    """Shape of a Llama-architecture drafter; the names are those of a Hugging Face ``config.json``."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 1
    eos_token_id: int | None = 2

    def __post_init__(self):
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        for name in (f.name for f in fields(self) if f.type in (int, int | None)):
            value = getattr(self, name)
            if value is not None and value < (0 if name.endswith("token_id") else 1):
                raise InvalidRequestError(f"drafter config: {name} is {value}; it must be positive")
        if self.hidden_size % (2 * self.num_attention_heads):
            raise InvalidRequestError(
                f"drafter config: hidden_size {self.hidden_size} must be an even multiple of "
                f"num_attention_heads {self.num_attention_heads}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise InvalidRequestError(
                f"drafter config: num_attention_heads {self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )

    @classmethod
    def llama2_chat_115m(cls) -> "DrafterConfig":
        """The "Llama 2 Chat Drafter 115M" of Goel et al., arXiv 2403.00858: 116.9 M parameters, untied."""
        return cls(
            vocab_size=32000,
            hidden_size=1024,
            intermediate_size=2816,
            num_hidden_layers=4,
            num_attention_heads=8,
        )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def num_parameters(self) -> int:
        """How many weights a ``Drafter`` of this shape has."""
        attention = 2 * self.hidden_size * (self.hidden_size + self.head_dim * self.num_key_value_heads)
        mlp = 3 * self.hidden_size * self.intermediate_size
        layer = attention + mlp + 2 * self.hidden_size
        tables = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return self.num_hidden_layers * layer + tables + self.hidden_size

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> "DrafterConfig":
        """Read a Hugging Face ``config.json``; a key that is absent takes Hugging Face's default, not mlx-lm's.

        (mlx-lm ties the embeddings of a Llama config that does not say, Hugging Face does not.)
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
            raise ModelLoadError(f"not a Llama config: {error}") from None
        expected = {
            "head_dim": drafter_config.head_dim,
            "attention_bias": False,
            "mlp_bias": False,
            "rope_scaling": None,
        }
        for name, value in expected.items():
            if config.get(name, value) not in (value, None):
                raise ModelLoadError(
                    f"a drafter cannot have {name} {config[name]!r}; load it with mlxspec.load instead"
                )
        if rope.get("rope_type", "default") != "default":
            raise ModelLoadError(
                f"a drafter cannot have rope_type {rope['rope_type']!r}; load it with mlxspec.load instead"
            )
        return drafter_config

    def to_dict(self) -> dict[str, Any]:
        """The ``config.json`` that transformers, mlx-lm and llama.cpp's converter read."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "head_dim": self.head_dim,
            **asdict(self),
        }


class Attention(nn.Module):
    def __init__(self, config: DrafterConfig):
        super().__init__()
        self.config = config
        key_value_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key_value_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, key_value_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.rope = nn.RoPE(config.head_dim, traditional=False, base=config.rope_theta)

    def __call__(self, x: mx.array, mask: Any, cache: Any) -> mx.array:
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
    def __init__(self, config: DrafterConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class DecoderLayer(nn.Module):
    def __init__(self, config: DrafterConfig):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def __call__(self, x: mx.array, mask: Any, cache: Any) -> mx.array:
        x = x + self.self_attn(self.input_layernorm(x), mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class LlamaBody(nn.Module):
    """Everything but the head: token ids [B, L] -> hidden states [B, L, hidden_size]."""

    def __init__(self, config: DrafterConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [DecoderLayer(config) for _ in range(config.num_hidden_layers)]
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def __call__(self, tokens: mx.array, cache: list | None = None, recompute: bool = False) -> mx.array:
        """``recompute`` keeps only the layers' inputs for a backward pass (Chen et al. 2016, arXiv 1604.06174)."""
        x = self.embed_tokens(tokens)
        cache = cache or [None] * len(self.layers)
        mask = create_attention_mask(x, cache[0])
        for layer, layer_cache in zip(self.layers, cache, strict=True):
            run = partial(layer, mask=mask, cache=layer_cache)
            x = (nn.utils.checkpoint(layer, run) if recompute else run)(x)
        return self.norm(x)


class Drafter(nn.Module):
    """token ids [B, L] -> logits [B, L, V]; called like any mlx-lm model, with the same caches."""

    def __init__(self, config: DrafterConfig):
        super().__init__()
        self.config = config
        self.model = LlamaBody(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def __call__(self, tokens: mx.array, cache: list | None = None) -> mx.array:
        hidden = self.model(tokens, cache)
        if self.config.tie_word_embeddings:
            return self.model.embed_tokens.as_linear(hidden)
        return self.lm_head(hidden)

    @property
    def layers(self) -> list[nn.Module]:
        return self.model.layers

    @property
    def args(self) -> DrafterConfig:
        """mlx-lm's name for the config, so that a Drafter can be asked what any mlx-lm model can."""
        return self.config

    @property
    def num_parameters(self) -> int:
        return self.config.num_parameters

    @property
    def bytes_per_step(self) -> int:
        """Bytes of weights read to decode one token: all of them, but only one row of an untied embedding."""
        total = sum(weight.nbytes for _, weight in tree_flatten(self.parameters()))
        if self.config.tie_word_embeddings:
            return total
        table = sum(part.nbytes for _, part in tree_flatten(self.model.embed_tokens.parameters()))
        return total - table + table // self.config.vocab_size

    def save(self, folder: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors`` in the Hugging Face Llama layout.

        Each file is written aside and renamed, so a reader never sees half of one. Tokenizer files are the
        caller's business.
        """
        weights = dict(tree_flatten(self.parameters()))
        write_atomically(
            Path(folder) / "model.safetensors",
            lambda path: mx.save_safetensors(str(path), weights, metadata={"format": "pt"}),
        )
        write_json(Path(folder) / "config.json", self.config.to_dict())

    @classmethod
    def load(cls, folder: str | Path, dtype: mx.Dtype | None = None) -> "Drafter":
        """Read an unquantised drafter back for training; ``mlxspec.load`` is the way to decode with one.

        Raises ModelLoadError when a file is missing or the weights are not those of the config.
        """
        folder = Path(folder)
        try:
            config = DrafterConfig.from_dict(read_json(folder / "config.json"))
            weights = mx.load(str(folder / "model.safetensors"))
        except (OSError, RuntimeError, ValueError) as error:
            raise ModelLoadError(f"cannot read a drafter from {folder}: {error}") from None
        drafter = cls(config)
        try:
            drafter.load_weights(list(weights.items()))
        except ValueError as error:
            raise ModelLoadError(f"{folder}: the weights do not fit config.json: {error}") from None
        if dtype is not None:
            drafter.set_dtype(dtype)
        mx.eval(drafter.parameters())
        return drafter
