"""Figures from losses."""

import numpy as np
import pytest

from fisherfold.evaluation.scores import worst_share


def test_a_broken_token_shows_where_the_mean_hides_it():
    divergence = np.full((4, 50), 0.2)
    assert worst_share(divergence) == pytest.approx(0.01)
    divergence[1, 3], divergence[2, 7] = 12.0, 10.0
    assert worst_share(divergence) == pytest.approx(22 / (22 + 198 * 0.2))


@pytest.mark.parametrize(("divergence", "share"), [(np.zeros((2, 3)), 0.0), (np.array([[0.1, 0.3]]), 0.75)])
def test_no_divergence_has_no_worst_and_few_tokens_have_one(divergence, share):
    assert worst_share(divergence) == pytest.approx(share)
