"""Where the target's probabilities come from in training: the target itself, or what it said once."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxspec.errors import TrainingError
from mlxspec.training.chunked import TeacherProbs, log_softmax

SMALLEST_PROB = 1e-30  # stands for 0 inside logarithms


class OnlineTeacher:
    """The target, resident and in the same graph as the drafter's step.

    Its logits are made chunk by chunk from hidden states where the model is a body and a linear head, which is tried
    out on a few tokens; for a model that does more to its logits (caps or scales them) they are kept whole.
    """

    def __init__(self, target: nn.Module):
        self.target = target
        self._body = getattr(target, "model", None)
        self._head = getattr(target, "lm_head", None) or getattr(
            getattr(self._body, "embed_tokens", None), "as_linear", None
        )
        self.splits = self._is_body_and_head()

    def _is_body_and_head(self) -> bool:
        if self._body is None or self._head is None:
            return False
        tokens = mx.array([[1, 2, 3, 4]])
        try:
            return mx.allclose(self._head(self._body(tokens)), self.target(tokens), rtol=1e-3, atol=1e-3).item()
        except (TypeError, ValueError, AttributeError):  # a body that wants other arguments
            return False

    def states(self, inputs: mx.array, stored: tuple[mx.array, ...]) -> tuple[mx.array, ...]:
        """tokens [B, L] -> hidden states, or whole logits [B, L, V]."""
        return (self._body(inputs) if self.splits else self.target(inputs),)

    def probs(self, temperature: mx.array) -> TeacherProbs:
        def teacher_probs(states: tuple[mx.array, ...], log_q: mx.array) -> tuple[mx.array, mx.array]:
            logits = self._head(states[0]) if self.splits else states[0]
            # A target may pad its vocabulary beyond the drafter's: what is there is not drawn.
            log_p, p = log_softmax(logits[:, : log_q.shape[-1]].astype(mx.float32) / temperature)
            return p, log_p

        return teacher_probs


class CachedTeacher:
    """The k largest log-probabilities of each position and the mass of all others, stored beforehand.

    What is lost is how the target spreads the tail. It is taken to be spread as the drafter spreads its own, which
    makes every loss the loss between distributions of k + 1 events.
    """

    def __init__(self, rows: int, length: int, vocab_size: int, k: int):
        if not 0 < k < vocab_size:
            raise TrainingError(f"teacher_top_k is {k}; use 1 to {vocab_size - 1}, or 0 for the target itself")
        self.k = k
        self.ids = np.zeros((rows, length, k), np.uint16 if vocab_size <= 2**16 else np.uint32)
        self.logprobs = np.zeros((rows, length, k), np.float16)

    def fill(self, chosen: slice, logits: mx.array) -> None:
        """Keep what the target says of some rows: logits [rows, L, V]."""
        log_p, _ = log_softmax(logits.astype(mx.float32))
        ids = mx.argpartition(-log_p, self.k - 1, axis=-1)[..., : self.k]
        self.ids[chosen] = np.array(ids)
        self.logprobs[chosen] = np.array(mx.take_along_axis(log_p, ids, axis=-1)).astype(np.float16)

    def stored(self, rows: list[int]) -> tuple[mx.array, ...]:
        """For a batch: ids and log-probabilities [B, L, k]."""
        return mx.array(self.ids[rows].astype(np.int32)), mx.array(self.logprobs[rows]).astype(mx.float32)

    def states(self, inputs: mx.array, stored: tuple[mx.array, ...]) -> tuple[mx.array, ...]:
        return stored

    def probs(self, temperature: mx.array) -> TeacherProbs:
        return probs_from_top_k


def probs_from_top_k(states: tuple[mx.array, ...], log_q: mx.array) -> tuple[mx.array, mx.array]:
    """ids and log-probabilities [n, k] of the largest, log q [n, V] -> p and log p [n, V]."""
    ids, top_logprobs = states
    top_p = mx.exp(top_logprobs)
    tail = mx.maximum(1 - top_p.sum(-1, keepdims=True), SMALLEST_PROB)
    log_q_top = mx.take_along_axis(log_q, ids, axis=-1)
    q_tail = mx.maximum(1 - mx.exp(log_q_top).sum(-1, keepdims=True), SMALLEST_PROB)
    log_p = mx.put_along_axis(log_q + mx.log(tail / q_tail), ids, top_logprobs, axis=-1)
    return mx.exp(log_p), log_p


Teacher = OnlineTeacher | CachedTeacher
