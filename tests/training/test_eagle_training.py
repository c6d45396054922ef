"""Training EAGLE heads. The oracle drafts from every position on its own, in float64."""

import json

import mlx.core as mx
import numpy as np
import pytest

from mlxspec.models.eagle import EAGLE1, EAGLE3
from mlxspec.training.losses import Loss
from mlxspec.training.objectives import STEP_DECAY, Batch, eagle_objective
from mlxspec.training.teachers import OnlineTeacher
from tests.models.eagle_oracle import EagleOracle, softmax
from tests.models.test_eagle import SMALLER, VOCAB, random_head, states_of, stored, target

STEPS = 3


def expected_rates(head, model, text, folder):
    """Σ min(p, q) of each draft step for a draft from each position of one document, along the document's tokens."""
    head.save(folder)
    tables = {"target.embed": model.model.embed_tokens.weight, "target.head": model.lm_head.weight}
    reference = EagleOracle({**stored(folder), **tables}, json.loads((folder / "config.json").read_text()))
    true = reference.features(states_of(model, head, text))
    p = softmax(np.array(model(mx.array([text]))[0], np.float64))
    rates = [[] for _ in range(STEPS)]
    for row in range(len(text) - 2):  # the first row of a draft
        features = true[: row + 1]
        for step in range(min(STEPS, len(text) - 2 - row)):
            last = reference.rows(text[1 : row + step + 2], features)[-1]
            rates[step].append(np.minimum(p[row + step + 1], softmax(reference.logits(last))).sum())
            features = np.concatenate([features, last[None]])
    return rates


@pytest.mark.parametrize(("layout", "tokens"), [(EAGLE1, None), (EAGLE1, SMALLER), (EAGLE3, None), (EAGLE3, SMALLER)])
def test_the_unrolled_loss_is_that_of_drafts_from_every_position(tmp_path, layout, tokens):
    model = target()
    head = random_head(model, layout, tokens=tokens)
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, VOCAB, 9).tolist(), rng.integers(0, VOCAB, 5).tolist()
    ids = mx.array([[*first, *second, 0]])
    documents = mx.array([[0] * 9 + [1] * 5])
    counted = mx.array([[1] * 8 + [0] + [1] * 4 + [0]])  # positions whose next token is of the same document
    batch = Batch(ids, documents, counted / 14, (), mx.array(1.0), mx.random.key(0))
    teacher = OnlineTeacher(model, True, head.reads(6))
    value, rates = eagle_objective(Loss("tvd"), teacher, STEPS)(head, batch)
    both = [[sum(step) for step in expected_rates(head, model, text, tmp_path)] for text in (first, second)]
    expected = np.sum(both, axis=0)
    np.testing.assert_allclose(np.array(rates) * 14, expected, atol=1e-4)
    shares = np.array([STEP_DECAY**step for step in range(STEPS)])
    counts = np.array([9 + 5 - 4 - 2 * step for step in range(STEPS)])
    losses = (counts - expected) / 14  # TVD = 1 − Σ min(p, q)
    if tokens is None:
        assert abs(value.item() - (shares / shares.sum() * losses).sum()) < 1e-4
    assert 0 < value.item() < 1
