"""Where the target's probabilities come from in training: from the target itself, at every step."""

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from mlxspec.training.chunked import TeacherProbs, log_softmax


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

    def stored(self, choice: Sequence[tuple[int, int]]) -> tuple[mx.array, ...]:
        """Nothing: it is asked within the step."""
        return ()

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
