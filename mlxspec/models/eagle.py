"""Drafters that read the target's hidden states: EAGLE heads.

A head is one transformer layer. Row t of a head reads the embedding of token t + 1 and a *feature*, which stands for
the target's hidden state at position t. Its output gives the distribution of token t + 2. In a draft, the head's own
output takes the place of the next feature.

There are two public layouts, and both are read and written here:

- EAGLE-1 (and EAGLE-2, with the same weights): the feature is the target's hidden state after the final norm. ``fc``
  projects the embedding and the feature to the width of the layer. The target's own output head computes the logits.
- EAGLE-3: ``fc`` projects three hidden states of the target to a feature. The attention reads the embedding and the
  feature next to each other. The head has an output head of its own, often with a smaller vocabulary.

Source: Li et al., arXiv 2401.15077 (EAGLE-1) and arXiv 2503.01840 (EAGLE-3).
"""

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models.base import create_attention_mask
from mlx_lm.models.cache import KVCache
from mlx_lm.models.llama import MLP, Attention, ModelArgs

from mlxspec.errors import ModelLoadError, UnsupportedModelError, in_one_line
from mlxspec.files import write_atomically, write_json
from mlxspec.models.attention import model_type
from mlxspec.models.config import completed
from mlxspec.models.parts import Parts, parts_of
from mlxspec.models.vocabulary import checked_map, over_all_tokens

EAGLE1, EAGLE3 = "EAGLE-1", "EAGLE-3"
LAYER_KEY = "eagle_aux_hidden_state_layer_ids"
STATES = 3  # hidden states that an EAGLE-3 head reads by default
GROUP_SIZES = (16, 32, 64, 128)  # of MLX's quantizations


class Layer(nn.Module):
    """The transformer layer of a head. It differs from Llama's in what its attention reads and adds to.

    Args:
        args: Shape of the layer.
        attention_size: Size of the rows that the attention reads.
    """

    def __init__(self, args: ModelArgs, attention_size: int):
        super().__init__()
        self.self_attn = Attention(args)
        if attention_size != args.hidden_size:
            for name in ("q_proj", "k_proj", "v_proj"):
                size = getattr(self.self_attn, name).weight.shape[0]
                setattr(self.self_attn, name, nn.Linear(attention_size, size, bias=args.attention_bias))
        self.mlp = MLP(args)
        self.post_attention_layernorm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)

    def __call__(self, read: mx.array, residual: mx.array, mask: Any, cache: Any) -> mx.array:
        """Return the output [B, L, D] for what the attention reads [B, L, ·] and the residual [B, L, D]."""
        h = residual + self.self_attn(read, mask, cache)
        return h + self.mlp(self.post_attention_layernorm(h))


class Eagle(nn.Module):
    """An EAGLE head. Its rows are described at the top of the module.

    Args:
        args: Shape of the layer, as mlx-lm reads it from ``config.json``. The vocabulary is the target's.
        layout: ``EAGLE1`` or ``EAGLE3``.
        read_layers: Numbers of the target's layers whose inputs an EAGLE-3 head reads. None for layers 2, L/2 and L − 3
            of L.
        draft_vocab_size: Number of tokens that an EAGLE-3 head can output, K. None for all tokens of the target.
        norm_before_residual: Whether the residual of an EAGLE-3 head is the normalized feature.
    """

    def __init__(
        self,
        args: ModelArgs,
        layout: str = EAGLE3,
        read_layers: Sequence[int] | None = None,
        draft_vocab_size: int | None = None,
        norm_before_residual: bool = False,
    ):
        super().__init__()
        self.args, self.layout, self.norm_before_residual = args, layout, norm_before_residual
        self.draft_vocab_size = draft_vocab_size
        self.read_layers = None if read_layers is None else tuple(read_layers)
        size = args.hidden_size
        if layout == EAGLE1:
            self.fc = nn.Linear(2 * size, size)
            self.layers = [Layer(args, size)]
            return
        self.fc = nn.Linear(self.width_read, size, bias=False)
        self.midlayer = Layer(args, 2 * size)
        self.midlayer.input_layernorm = nn.RMSNorm(size, eps=args.rms_norm_eps)
        self.midlayer.hidden_norm = nn.RMSNorm(size, eps=args.rms_norm_eps)
        self.norm = nn.RMSNorm(size, eps=args.rms_norm_eps)
        self.lm_head = nn.Linear(size, draft_vocab_size or args.vocab_size, bias=False)
        if draft_vocab_size:
            self.d2t = mx.zeros(draft_vocab_size, mx.int32)
            self.freeze(recurse=False, keys=["d2t"])

    @property
    def layer(self) -> Layer:
        """The transformer layer."""
        return self.layers[0] if self.layout == EAGLE1 else self.midlayer

    def make_cache(self) -> list[KVCache]:
        """Return a cache for the layer, as mlx-lm's models do."""
        return [KVCache()]

    @property
    def output_tokens(self) -> mx.array | None:
        """The token of each row of the output head, [K] int32. None if it has a row for every token."""
        return mx.arange(self.draft_vocab_size) + self.d2t.astype(mx.int32) if self.draft_vocab_size else None

    @property
    def width_read(self) -> int:
        """Number of values F of the target's hidden states that the head reads at a position."""
        count = 1 if self.layout == EAGLE1 else STATES if self.read_layers is None else len(self.read_layers)
        return count * self.args.hidden_size

    def layers_read(self, layer_count: int) -> tuple[int, ...]:
        """Return the numbers of the target's layers whose inputs the head reads. None of them for EAGLE-1.

        Args:
            layer_count: Number of the target's layers.
        """
        if self.layout == EAGLE1:
            return ()
        return self.read_layers or (2, layer_count // 2, layer_count - 3)

    def features(self, states: mx.array) -> mx.array:
        """Return the features [B, L, D] for the target's hidden states [B, L, F] that the head reads."""
        states = states.astype(self.layer.post_attention_layernorm.weight.dtype)
        return states if self.layout == EAGLE1 else self.fc(states)

    def __call__(self, embedded: mx.array, features: mx.array, cache: Any = None, mask: Any = None) -> mx.array:
        """Return the next features [B, L, D]. ``logits`` computes the distribution of a token from them.

        Args:
            embedded: Embedding of the token after each row, [B, L, D].
            features: Feature of each row, [B, L, D].
            cache: The KV cache of the layer, or None.
            mask: The attention mask. None for the cache's own mask.
        """
        embedded = embedded.astype(features.dtype)
        mask = create_attention_mask(features, cache) if mask is None else mask
        if self.layout == EAGLE1:
            x = self.fc(mx.concatenate([embedded, features], axis=-1))
            return self.layer(x, x, mask, cache)
        normed = self.midlayer.hidden_norm(features)
        read = mx.concatenate([self.midlayer.input_layernorm(embedded), normed], axis=-1)
        return self.layer(read, normed if self.norm_before_residual else features, mask, cache)

    def outputs(self, features: mx.array) -> mx.array:
        """Return what the output head reads, [B, L, D], for the features that the layer returned."""
        return features if self.layout == EAGLE1 else self.norm(features)

    def logits(self, features: mx.array, target_head: Any) -> mx.array:
        """Return the logits [B, L, V] for the features [B, L, D] that the layer returned.

        Args:
            features: The features.
            target_head: The target's output head.
        """
        if self.layout == EAGLE1:
            return target_head(self.outputs(features))
        logits = self.lm_head(self.outputs(features))
        if self.output_tokens is None:
            return logits
        return over_all_tokens(logits, self.output_tokens, self.args.vocab_size)

    @property
    def num_parameters(self) -> int:
        """Number of weights."""
        return sum(weight.size for weight in dict(tree_flatten(self.trainable_parameters())).values())

    @property
    def config(self) -> dict[str, Any]:
        """The content of ``config.json``."""
        args = {name: value for name, value in vars(self.args).items() if value is not None and name != "layer_types"}
        own: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}
        if self.layout == EAGLE3:
            own["architectures"] = ["LlamaForCausalLMEagle3"]
            own["draft_vocab_size"] = self.draft_vocab_size or self.args.vocab_size
        if self.norm_before_residual:
            own["norm_before_residual"] = True
        for module in self.modules():
            if isinstance(module, nn.QuantizedLinear):  # all are quantized alike
                own["quantization"] = {"group_size": module.group_size, "bits": module.bits, "mode": module.mode}
        if self.read_layers:  # twice, since engines look in different places (``layers_in``)
            own[LAYER_KEY] = list(self.read_layers)
            own["eagle_config"] = {LAYER_KEY: [layer - 1 for layer in self.read_layers]}
        return {**args, **own}

    def save(self, folder: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors`` in the layout of the head."""
        weights = dict(tree_flatten(self.parameters()))
        if self.draft_vocab_size:
            known = np.zeros(self.args.vocab_size, bool)
            known[np.array(self.output_tokens)] = True
            weights["t2d"] = mx.array(known)
            weights["d2t"] = self.d2t.astype(mx.int64)
        write_atomically(
            Path(folder) / "model.safetensors",
            lambda path: mx.save_safetensors(str(path), weights, metadata={"format": "pt"}),
        )
        write_json(Path(folder) / "config.json", self.config)


def is_eagle(tensors: Collection[str]) -> bool:
    """Return whether these are the names of the tensors of an EAGLE head."""
    return "fc.weight" in tensors and any(name.startswith(("midlayer.", "layers.0.")) for name in tensors)


def read_eagle(folder: Path, config: dict[str, Any], files: Sequence[Path]) -> Eagle:
    """Read an EAGLE head lazily.

    Args:
        folder: The folder of the head, for messages.
        config: The content of ``config.json``.
        files: The safetensors files.

    Raises:
        ModelLoadError: The config and the tensors are not those of a head in a known layout.
    """
    weights: dict[str, mx.array] = {}
    for file in files:
        weights |= mx.load(str(file))  # type: ignore[arg-type]
    if "layers.0.hidden_norm.weight" in weights:  # the name of vLLM's speculators
        weights = {name.replace("layers.0.", "midlayer.", 1): weight for name, weight in weights.items()}
    layout = EAGLE3 if "midlayer.hidden_norm.weight" in weights else EAGLE1
    try:
        args = ModelArgs.from_dict({**completed(config, weights), "num_hidden_layers": 1, "layer_types": None})
        weights = own_weights(weights, layout, args)
        head = Eagle(
            args,
            layout,
            layers_in(config),
            weights["d2t"].size if "d2t" in weights else None,
            bool(config.get("norm_before_residual")),
        )
        if "quantization" in config:
            if config["quantization"]["group_size"] not in GROUP_SIZES:  # MLX would divide by 0
                raise ValueError(f"group_size is {config['quantization']['group_size']}")
            nn.quantize(head, **config["quantization"], class_predicate=lambda path, _: f"{path}.scales" in weights)
        for name, module in head.named_modules():  # configs do not say reliably which of them have a bias
            if isinstance(module, nn.Linear | nn.QuantizedLinear):
                module.pop("bias", None)
                if f"{name}.bias" in weights:
                    module.bias = mx.zeros(module.weight.shape[0])
        head.load_weights(list(weights.items()))
        for name, weight in weights.items():
            if name != "d2t" and weight.dtype != mx.uint32 and not mx.issubdtype(weight.dtype, mx.floating):
                raise ValueError(f"{name} has the type {weight.dtype}")
        some = mx.zeros((1, 1, args.hidden_size))
        head(some, head.features(mx.zeros((1, 1, head.width_read))))  # not evaluated; fails where a draft would
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ModelLoadError(
            f"{folder} is not an {layout} head that mlxspec can read: {in_one_line(error)}; check config.json and the "
            "weights, or use another head"
        ) from None
    return head


def own_weights(weights: dict[str, mx.array], layout: str, args: ModelArgs) -> dict[str, mx.array]:
    """Return the weights that a head has for itself. The others follow from these, or are the target's.

    Raises:
        ValueError: The target's embedding in the head has another shape, or the map to its tokens is damaged.
    """
    shape = (args.vocab_size, args.hidden_size)
    targets = ("embed_tokens.weight", "lm_head.weight") if layout == EAGLE1 else ("embed_tokens.weight",)
    for name in targets:
        if name in weights and weights[name].shape != shape:
            raise ValueError(f"{name} has the shape {weights[name].shape}, and the target's would have {shape}")
    own = {name: weight for name, weight in weights.items() if name not in ("t2d", *targets) and "inv_freq" not in name}
    if "d2t" in own:
        own["d2t"] = checked_map(own["d2t"], args.vocab_size)
    return own


def layers_in(config: dict[str, Any]) -> list[int] | None:
    """Return the numbers of the target's layers whose inputs a head reads, or None if its config names none.

    At the top of a config, the numbers are those of layers whose inputs are read, as in vLLM. In ``eagle_config``, they
    are those of layers whose outputs are read, as in SGLang.
    """
    nested = config.get("eagle_config")
    inputs, outputs = config.get(LAYER_KEY), nested.get(LAYER_KEY) if isinstance(nested, dict) else None
    layers = inputs or outputs
    if not layers:
        return None
    if not isinstance(layers, list) or not all(type(layer) is int for layer in layers):
        raise ValueError(f"{LAYER_KEY} is {layers!r} instead of a list of layer numbers")
    return layers if inputs else [layer + 1 for layer in layers]


def fitting_parts(head: Eagle, target: nn.Module) -> Parts:
    """Return the parts of a target that a head uses.

    Raises:
        UnsupportedModelError: The parts cannot be told apart, or the head was made for another target.
    """
    parts = parts_of(target)
    if parts is None:
        raise UnsupportedModelError(
            f"an EAGLE head cannot draft for {model_type(target)}, which computes its logits in more steps than a body "
            "and an output head; use a draft model or prompt lookup"
        )
    layers, (vocab_size, size) = len(parts.body.layers), sizes_of(parts)
    args = head.args
    wrong = next((layer for layer in head.layers_read(layers) if not 0 <= layer < layers), None)
    if args.hidden_size != size:
        reason = f"it has a width of {args.hidden_size}, and the target of {size}"
    elif args.vocab_size != vocab_size:
        reason = f"it has a vocabulary of {args.vocab_size}, and the target of {vocab_size}"
    elif wrong is not None:
        raise UnsupportedModelError(
            f"the {head.layout} head reads layer {wrong}, and the target has {layers} layers; use a head for this "
            "target, or set read_layers to train one"
        )
    else:
        return parts
    raise UnsupportedModelError(f"the {head.layout} head is for another target: {reason}; use a head for this one")


def sizes_of(parts: Parts) -> tuple[int, int]:
    """Return the size of a target's vocabulary and the width of its hidden states."""
    hidden = parts.body(mx.array([[0]]))
    return parts.head(hidden).shape[-1], hidden.shape[-1]
