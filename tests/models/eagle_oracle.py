"""EAGLE heads in float64 NumPy, written from the description of their two public layouts. No cache, no batch."""

import numpy as np


def rms_norm(x, weight, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def rotated(x, theta):
    """Rotary embedding of rows 0, 1, … of x [L, heads, d], where component i turns with component i + d/2."""
    half = x.shape[-1] // 2
    angles = np.arange(len(x))[:, None] * theta ** (-np.arange(half) / half)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    first, second = x[..., :half], x[..., half:]
    return np.concatenate([first * cos - second * sin, first * sin + second * cos], -1)


def attention(x, weights, config):
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    size = config["hidden_size"] // heads
    queries, keys, values = (
        (x @ weights[f"self_attn.{name}_proj.weight"].T).reshape(len(x), -1, size) for name in ("q", "k", "v")
    )
    queries, keys = rotated(queries, config["rope_theta"]), rotated(keys, config["rope_theta"])
    mixed = np.zeros_like(queries)
    for head in range(heads):
        group = head * groups // heads
        scores = queries[:, head] @ keys[:, group].T / np.sqrt(size)
        scores[np.triu_indices(len(x), 1)] = -np.inf
        mixed[:, head] = softmax(scores) @ values[:, group]
    return mixed.reshape(len(x), -1) @ weights["self_attn.o_proj.weight"].T


def mlp(x, weights):
    gate, up = x @ weights["mlp.gate_proj.weight"].T, x @ weights["mlp.up_proj.weight"].T
    return (gate / (1 + np.exp(-gate)) * up) @ weights["mlp.down_proj.weight"].T


class EagleOracle:
    """A head with the names of its stored tensors.

    Args:
        weights: The head's tensors as they are stored, and the target's "target.embed" and "target.head".
        config: ``config.json``.
    """

    def __init__(self, weights, config):
        self.weights = {name: np.array(weight, np.float64) for name, weight in weights.items()}
        self.config = config
        self.third = "midlayer.self_attn.q_proj.weight" in weights
        prefix = "midlayer." if self.third else "layers.0."
        self.layer = {n.removeprefix(prefix): w for n, w in self.weights.items() if n.startswith(prefix)}

    def fc(self, x):
        return x @ self.weights["fc.weight"].T + self.weights.get("fc.bias", 0)

    def features(self, states):
        return self.fc(states) if self.third else np.array(states, np.float64)

    def rows(self, tokens, features):
        """What the layer returns for each row: tokens[t] is the token after position t."""
        eps = self.config["rms_norm_eps"]
        embedded = self.weights["target.embed"][np.array(tokens)]
        if self.third:
            normed = rms_norm(features, self.layer["hidden_norm.weight"], eps)
            read = np.concatenate([rms_norm(embedded, self.layer["input_layernorm.weight"], eps), normed], -1)
            residual = normed if self.config.get("norm_before_residual") else features
        else:
            read = residual = self.fc(np.concatenate([embedded, features], -1))
        h = residual + attention(read, self.layer, self.config)
        return h + mlp(rms_norm(h, self.layer["post_attention_layernorm.weight"], eps), self.layer)

    def logits(self, feature):
        """Logits over the target's vocabulary for one output of ``rows``."""
        if self.third:
            feature = rms_norm(feature, self.weights["norm.weight"], self.config["rms_norm_eps"])
        own = self.weights.get("lm_head.weight", self.weights["target.head"]) @ feature
        if "d2t" not in self.weights:
            return own
        every = np.full(len(self.weights["target.head"]), -np.inf)
        every[np.arange(len(own)) + self.weights["d2t"].astype(int)] = own
        return every

    def draft(self, text, states, count):
        """Greedy draft after a text, and the logits of each step. states[t] belongs to text[t]; the last is unused."""
        tokens, features, logits = list(text[1:]), self.features(np.array(states[: len(text) - 1])), []
        drafted = []
        for _ in range(count):
            row = self.rows(tokens, features)[-1] if tokens else np.zeros(self.config["hidden_size"])
            logits.append(self.logits(row))
            drafted.append(int(np.argmax(logits[-1])))
            tokens, features = [*tokens, drafted[-1]], np.concatenate([features, row[None]])
        return drafted, np.array(logits)
