"""Completes a model's config.json, so that mlx-lm reads it as transformers does.

The two libraries differ in two ways. transformers 5 nests the settings of rotary embedding in ``rope_parameters``,
where most of mlx-lm's models do not look. And they have different defaults for keys that config.json leaves out.
"""

import dataclasses
import importlib
import logging
from collections.abc import Collection
from typing import Any

from mlx_lm.utils import MODEL_REMAPPING
from transformers import AutoConfig

PLAIN_ROPE = (None, "default")  # types of rotary embedding without scaling
# Names that a few of mlx-lm's models have for these settings.
ROPE_NAMES = {
    "rope_theta": ("rope_theta", "rotary_emb_base"),
    "partial_rotary_factor": ("partial_rotary_factor", "rotary_pct"),
}
MULTIPLYING = ("linear", "dynamic", "yarn")  # types whose factor multiplies the context that the model was trained with
CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length", "seq_length")


def completed(config: dict[str, Any], tensors: Collection[str]) -> dict[str, Any]:
    """Add the keys that mlx-lm's model needs and the config lacks.

    Args:
        config: The content of config.json, or a part of it that has a ``model_type``.
        tensors: Names of the stored tensors.

    Returns:
        A completed copy. Existing keys are unchanged, except that ``rope_parameters`` take precedence over the older
        keys, as in transformers.
    """
    complete = {**config, **rope_keys(config)}
    if isinstance(text := config.get("text_config"), dict) and "model_type" in text:
        complete["text_config"] = completed(text, tensors)
    known = keys_of_mlx_lm(complete)
    if "tie_word_embeddings" in known and complete.get("tie_word_embeddings") is None:
        # The libraries' defaults differ, so the tensors decide.
        complete["tie_word_embeddings"] = not any(name.endswith("lm_head.weight") for name in tensors)
    defaults = transformers_view(config)
    defaults |= {**rope_keys(defaults), **older_keys({**defaults, **config})}
    for name in known - {"max_position_embeddings"}:  # a context that the config does not declare is no limit
        if complete.get(name) is None and defaults.get(name) is not None:
            complete[name] = defaults[name]
    if "rope_scaling" in known:
        complete.setdefault("rope_scaling", None)  # some models require the key
    return complete


def rope_keys(config: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of rotary embedding under the names that mlx-lm's models read."""
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict):
        return {}
    full = rope.get("full_attention", rope)  # one set of settings for all layers, or one for each kind of layer
    sliding = rope.get("sliding_attention")
    if not isinstance(full, dict):
        return {}
    found = {key: full[name] for name, keys in ROPE_NAMES.items() if name in full for key in keys}
    if full.get("rope_type") not in PLAIN_ROPE:
        found["rope_scaling"] = {key: value for key, value in full.items() if key not in ROPE_NAMES}
    if isinstance(sliding, dict) and "rope_theta" in sliding:
        found["rope_local_base_freq"] = sliding["rope_theta"]
    return found


def older_keys(config: dict[str, Any]) -> dict[str, Any]:
    """Return settings under older names, which mlx-lm reads and transformers no longer writes."""
    found = {"n_ctx": config["n_positions"]} if "n_positions" in config else {}
    layers = config.get("layer_types")
    if isinstance(layers, list) and "full_attention" in layers and "sliding_attention" in layers:
        found["sliding_window_pattern"] = layers.index("full_attention") + 1
    return found


def keys_of_mlx_lm(config: dict[str, Any]) -> set[str]:
    """Return the config keys that mlx-lm's model reads, or an empty set if mlx-lm has no such model."""
    kind = str(config.get("model_type"))
    try:
        module = importlib.import_module(f"mlx_lm.models.{MODEL_REMAPPING.get(kind, kind)}")
        return {field.name for field in dataclasses.fields(module.ModelArgs)}
    except (ImportError, TypeError, AttributeError):
        return set()


def transformers_view(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config with transformers' defaults, or an empty one if transformers does not know the model."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)  # transformers warns about keys that it does not know
    try:
        return AutoConfig.for_model(**config).to_dict()
    except Exception:  # a malformed config may raise anything; mlx-lm reports the problem later
        return {}
    finally:
        logging.disable(level)


def declared_context(config: dict[str, Any]) -> int | None:
    """Return the maximum number of positions that a config declares, or None if it declares none.

    Scaled rotary embedding multiplies the context that the model was trained with. Some configs state the product,
    others the trained context, so the larger number counts.
    """
    text_config = config.get("text_config")
    for part in (config, text_config if isinstance(text_config, dict) else {}):
        stated = next((part[name] for name in CONTEXT_NAMES if type(part.get(name)) is int and part[name] > 0), None)
        if stated is not None:
            return max(stated, stretched_context(part, stated))
    return None


def stretched_context(config: dict[str, Any], stated: int) -> int:
    """Return the context after rope scaling, in positions. It is 0 without scaling.

    Args:
        config: The config, or its ``text_config``.
        stated: The context that the config states, in positions.
    """
    scaling = rope_keys(config).get("rope_scaling") or config.get("rope_scaling")
    if not isinstance(scaling, dict) or scaling.get("rope_type", scaling.get("type")) not in MULTIPLYING:
        return 0
    factor, trained = scaling.get("factor"), scaling.get("original_max_position_embeddings") or stated
    if isinstance(factor, int | float) and isinstance(trained, int) and 0 < factor * trained < 2**31:
        return int(factor * trained)
    return 0
