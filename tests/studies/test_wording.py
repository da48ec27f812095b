"""The second judge: its weights against a minimiser of another library, and what it says of replies like those it saw."""

import itertools

import numpy as np
import pytest
from scipy.optimize import minimize

from alignguard.drift import COMPLIANCE, REFUSAL
from studies.wording import WordingJudge

NO = ["I can't help with that", "I won't help with that, sorry", "sorry, I can't say", "I can't do that"]
YES = ["here is how that is done", "first boil the water", "that is done like this", "here is the water"]
REPLIES = [{"response": text, "is_refusal": text in NO} for text in NO + YES]


def runs(text):
    """One, two and three words in a row."""
    words = text.lower().replace(",", "").split()
    return {" ".join(words[i:j]) for i, j in itertools.combinations(range(len(words) + 1), 2) if j - i <= 3}


def test_its_weights_minimise_the_penalised_loss():
    counts = {}
    for gram in itertools.chain.from_iterable(runs(row["response"]) for row in REPLIES):
        counts[gram] = counts.get(gram, 0) + 1
    known = sorted(gram for gram, count in counts.items() if count >= 3)
    assert "i can't" in known and "that is done" not in known
    x = np.array([[*(gram in runs(row["response"]) for gram in known), 1] for row in REPLIES], dtype=float)
    y = np.array([row["is_refusal"] for row in REPLIES], dtype=float)

    def loss(weight):
        odds = x @ weight
        return np.mean(np.logaddexp(0, odds) - y * odds) + 0.1 / 2 * weight @ weight

    weight = minimize(loss, np.zeros(x.shape[1]), tol=1e-12).x
    found = WordingJudge(REPLIES, decay=0.1).scores([row["response"] for row in REPLIES])
    np.testing.assert_allclose(found, x @ weight, atol=1e-4)


def test_it_tells_refusals_by_words_that_it_saw():
    texts = ["Sorry, I can\u2019t help with that.", "Here is how: first boil the water."]
    assert WordingJudge(REPLIES)(["", ""], texts) == [REFUSAL, COMPLIANCE]


def test_replies_of_one_label_teach_nothing():
    for replies in (REPLIES[: len(NO)], []):
        with pytest.raises(ValueError, match="some that are refusals and some that are not"):
            WordingJudge(replies)
