"""Worst-case training: documents on which the drafter does badly get a larger weight in the loss.

Both methods give each document of a step a factor. The factors are computed before the step, from the state of the
method, and multiply the weights of the document's positions. The losses of the step then update the state. So the
adversary ascends and the drafter descends in the same step.

All processes know all rows of a step and get the sums of its losses. So each computes the same state, in NumPy, since
it is small: two numbers for each task, or one for each token of the vocabulary.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlxspec.errors import InvalidRequestError
from mlxspec.settings import option
from mlxspec.training.batches import MOST_TASKS, Batches, StepDocuments
from mlxspec.training.losses import Loss

METHODS = {"groups": 0.01, "likelihood-ratio": 0.1}  # with the default of their rate


@dataclass(frozen=True)
class Robust:
    """Settings of worst-case training. Raises InvalidRequestError for a value outside its range."""

    method: str | None = option(
        None,
        "Worst-case training: give more weight to tasks with a high loss (`groups`), or to documents whose tokens "
        "predict a high loss (`likelihood-ratio`, needs no tasks).",
        choices=lambda: list(METHODS),
        key="robust",
    )
    rate: float | None = option(
        None,
        "For robust: step size of the weights of the tasks, by default 0.01, or of the adversary, by default 0.1.",
        key="robust_rate",
    )
    kl_penalty: float = option(
        0.5,
        "For likelihood-ratio: weight of the KL penalty. A larger value keeps the weights of the documents more equal.",
        key="robust_penalty",
    )

    def __post_init__(self) -> None:
        if self.method not in (None, *METHODS):
            raise InvalidRequestError(f"robust is {self.method!r}; use one of {', '.join(METHODS)}, or leave it out")
        for name, value in (("rate", self.step_size), ("penalty", self.kl_penalty)):
            if not 0 < value < math.inf:
                raise InvalidRequestError(f"robust_{name} is {value}; use a positive number")

    @property
    def step_size(self) -> float:
        """The rate, or its default for the method."""
        return METHODS.get(self.method or "", 1.0) if self.rate is None else self.rate

    def check_tasks(self, tasks: Collection[str | None]) -> None:
        """Raise InvalidRequestError if ``groups`` is the method and the documents do not belong to several tasks."""
        if self.method == "groups" and not 1 < len(tasks) <= MOST_TASKS:
            raise InvalidRequestError(
                f"robust is groups, but the number of tasks is {len(tasks)}; give 2 to {MOST_TASKS} tasks with "
                '"task" on each line or a file for each task, or use robust = "likelihood-ratio"'
            )

    @property
    def inputs(self) -> dict[str, Any]:
        """The settings as inputs of a stage. Empty without a method."""
        if not self.method:
            return {}
        return {"robust": self.method, "robust_rate": self.step_size, "robust_penalty": self.kl_penalty}


class GroupWeights:
    """Group DRO: each task g has a weight w_g ∝ w_g·exp(η·loss_g). The objective is Σ w_g·loss_g.

    loss_g is the mean loss of the task's tokens in a step. A step may lack rare tasks. Then their last loss counts.
    Otherwise a frequent task would gain weight only because it is in more steps. The objective is right on average over
    steps, since each token of a task has the same factor in all steps: the task's weight, divided by the mean number of
    its tokens in a step.

    Args:
        settings: The settings. Their rate is η.
        tasks: Names of the tasks.
        tokens: Mean number of learned tokens of each task in a step [tasks].
        by_rejection: Whether the loss of a document is 1 minus its acceptance rate.

    Attributes:
        state: Logarithm of each task's weight, and its last loss, NaN before the first: [2, tasks]. The weights sum to
            1.

    Source: Sagawa et al. 2020, arXiv 1911.08731, algorithm 1.
    """

    def __init__(self, settings: Robust, tasks: list[str], tokens: np.ndarray, by_rejection: bool = False):
        self.settings, self.tasks, self.by_rejection = settings, tasks, by_rejection
        self.tokens = np.where(tokens > 0, tokens, 1)
        self.state = np.full((2, len(tokens)), [[-math.log(len(tokens))], [math.nan]], np.float32)

    @property
    def weights(self) -> np.ndarray:
        """Each task's weight [tasks]."""
        return np.exp(self.state[0].astype(float))

    def factors(self, documents: StepDocuments) -> np.ndarray:
        """Return the factor of each document of a step [D]."""
        return (self.weights / self.tokens)[documents.tasks] * documents.learned

    def update(self, documents: StepDocuments, sums: np.ndarray) -> dict[str, float]:
        """Raise the weights of the tasks with a high loss. A task that no step has had counts with the mean loss.

        Args:
            documents: The documents of the step.
            sums: Weighted sums of the loss and the acceptance rates over each document, [D, 1 + rates].

        Returns:
            The weight of each task in the step, by its name.
        """
        metrics = {f"weight/{task}": float(weight) for task, weight in zip(self.tasks, self.weights, strict=True)}
        logs, losses = self.state.astype(float)
        found = document_losses(documents, sums, self.by_rejection)
        shares, found = (documents.task_sums(values, len(losses)) for values in (documents.shares, found))
        losses = np.where(shares > 0, found / np.where(shares > 0, shares, 1), losses)
        known = ~np.isnan(losses)
        if known.any():
            logs = logs + self.settings.step_size * np.where(known, losses, losses[known].mean())
            logs = logs - logs.max() - np.log(np.exp(logs - logs.max()).sum())
            self.state = np.stack([logs, losses]).astype(np.float32)
        return metrics


class LikelihoodRatios:
    """Parametric likelihood ratios: an adversary gives each document x a ratio r(x), without tasks.

    The adversary is linear in the frequencies f(x) of the document's tokens, scaled to norm 1:
    r(x) ∝ exp(ψ·f(x)). It is normalized within the step: Σ share·r = 1, where a document's share is that of its learned
    tokens. For n documents of the same length, r is the softmax times n. The drafter minimizes
    Σ share·r·loss − τ·KL and the adversary maximizes it by gradient ascent, with KL = Σ share·r·log r.

    Args:
        settings: The settings. Their rate is the step size of ψ, and their penalty is τ.
        vocab_size: Size of the vocabulary.
        by_rejection: Whether the loss of a document is 1 minus its acceptance rate.

    Attributes:
        state: The adversary's parameters ψ [V].

    Source: Michel, Hashimoto and Neubig 2022, arXiv 2204.06340.
    """

    def __init__(self, settings: Robust, vocab_size: int, by_rejection: bool = False):
        self.settings, self.by_rejection = settings, by_rejection
        self.state = np.zeros(vocab_size, np.float32)

    def factors(self, documents: StepDocuments) -> np.ndarray:
        """Return the ratio r of each document of a step [D]."""
        owners, tokens, frequencies = self._features(documents)
        scores = np.bincount(owners, frequencies * self.state[tokens], len(documents.shares))
        exponentials = np.exp(scores - scores.max())
        return exponentials / max((documents.shares * exponentials).sum(), 1e-30)

    def update(self, documents: StepDocuments, sums: np.ndarray) -> dict[str, float]:
        """Take a step of gradient ascent.

        Args:
            documents: The documents of the step.
            sums: Weighted sums of the loss and the acceptance rates over each document, [D, 1 + rates].

        Returns:
            The KL divergence of the step's ratios from 1, and the largest ratio.
        """
        owners, tokens, frequencies = self._features(documents)
        losses = document_losses(documents, sums, self.by_rejection)
        shares, ratios = documents.shares, self.factors(documents)
        logs, probs, known = np.log(np.maximum(ratios, 1e-30)), shares * ratios, shares > 0
        gains = losses / np.where(known, shares, 1) - self.settings.kl_penalty * logs
        gradient = probs * (gains - (probs * gains).sum())  # of the scores
        ascent = np.bincount(tokens, frequencies * gradient[owners], len(self.state))
        self.state = (self.state + self.settings.step_size * ascent).astype(np.float32)
        return {"ratio_kl": float((probs * logs)[known].sum()), "largest_ratio": float(ratios[known].max(initial=0))}

    def _features(self, documents: StepDocuments) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the features that are not 0: document, token and frequency, each [features].

        The first token of a document does not count, since the first token of a row has no position that predicts it.
        """
        rows, size = documents.rows, len(self.state)
        inside = rows.documents[:, 1:] == rows.documents[:, :-1]
        pairs = documents.places[inside] * size + rows.ids[:, 1:][inside]
        pairs, counts = np.unique(pairs, return_counts=True)
        owners, tokens = pairs // size, pairs % size
        norms = np.sqrt(np.bincount(owners, counts**2, len(documents.shares)))
        return owners, tokens, counts / norms[owners]


Weighting = GroupWeights | LikelihoodRatios
UNIFORM = Robust()  # all tokens have the same weight


def new_weighting(settings: Robust, batches: Batches, vocab_size: int, loss: Loss) -> Weighting | None:
    """Return the state of worst-case training at the first step, or None without a method.

    Args:
        settings: The settings.
        batches: The batches.
        vocab_size: Size of the vocabulary.
        loss: The loss. If it is a surrogate, acceptance rates replace it.
    """
    if settings.method == "groups":
        return GroupWeights(settings, batches.tasks, batches.task_tokens(), loss.is_surrogate)
    return LikelihoodRatios(settings, vocab_size, loss.is_surrogate) if settings.method else None


def document_losses(documents: StepDocuments, sums: np.ndarray, by_rejection: bool) -> np.ndarray:
    """Return the weighted sum of each document's losses, [D].

    Args:
        documents: The documents of the step.
        sums: Weighted sums of the loss and the acceptance rates over each document, [D, 1 + rates].
        by_rejection: Whether to use 1 minus the acceptance rate, the mean over the draft steps, instead of the loss.
    """
    return documents.shares - sums[:, 1:].mean(-1) if by_rejection else sums[:, 0]
