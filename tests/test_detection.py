"""Areas, shares and their intervals agree with independent references."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest
from sklearn.metrics import roc_auc_score

from bandmask.diagnosis.detection import area, area_interval, mean_interval, share_interval

few_values = st.lists(st.sampled_from([-np.inf, 0.0, 0.5, 1.0, 2.5]), min_size=1, max_size=12)


@given(few_values, few_values)
def test_the_area_is_scikit_learns_ties_included(healthy: list[float], faulty: list[float]) -> None:
    scores = np.array(healthy + faulty).clip(-1)  # scikit-learn takes no infinity
    truth = [0] * len(healthy) + [1] * len(faulty)
    assert area(np.array(healthy), np.array(faulty)) == pytest.approx(roc_auc_score(truth, scores))


def test_the_mean_area_over_faults_has_the_interval_of_a_plain_bootstrap() -> None:
    draw = np.random.default_rng(0)
    healthy = draw.normal(size=80)
    faulty = healthy[:, None] * 0.5 + draw.normal([0.5, 1.5], size=(80, 2))
    value, low, high = area_interval(healthy, faulty)
    assert value == pytest.approx(np.mean([area(healthy, faulty[:, k]) for k in range(2)]))
    picks = draw.integers(80, size=(500, 80))
    plain = [np.mean([area(healthy[p], faulty[p, k]) for k in range(2)]) for p in picks]
    assert (low, high) == pytest.approx(np.quantile(plain, [0.025, 0.975]), abs=0.012)


@given(st.integers(1, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_shares_have_wilsons_interval(counted: tuple[int, int]) -> None:
    hits, count = counted
    share, low, high = share_interval(np.arange(count) < hits)
    reference = binomtest(hits, count).proportion_ci(method="wilson")
    assert share == pytest.approx(hits / count)
    assert (low, high) == pytest.approx((reference.low, reference.high), abs=1e-9)


def test_means_over_faults_are_drawn_by_image() -> None:
    hits = np.repeat(np.arange(40)[:, None] < 20, 13, axis=1)  # 13 faults of one image are no 13 images
    mean, low, high = mean_interval(hits)
    assert mean == 0.5
    assert high - low == pytest.approx(2 * 1.96 * 0.5 / 40**0.5, rel=0.1)


def test_other_images_are_refused() -> None:
    with pytest.raises(ValueError, match="the same images; got 3 and 4"):
        area_interval(np.zeros(3), np.zeros((4, 1)))
