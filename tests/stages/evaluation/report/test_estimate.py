"""The interval over seeds and images: its formula, and that it holds what it promises."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from stages.evaluation.report.estimate import Estimate, estimate


def crossed(generator: np.random.Generator, seeds: int, images: int, by_seed: float, by_image: float) -> np.ndarray:
    """Gains (seeds, images) of true mean 0: an effect of the seed, one of the image that all seeds share, and a rest."""
    common = generator.normal(0, by_image, images)
    return generator.normal(0, by_seed, (seeds, 1)) + common + generator.normal(0, 0.3, (seeds, images))


def drawn(gains: np.ndarray, generator: np.random.Generator, samples: int = 100) -> np.ndarray:
    """Mean gain of each seed under draws of images."""
    images = gains.shape[1]
    return gains @ generator.multinomial(images, np.full(images, 1 / images), samples).T / images


def test_formula_of_obuchowski_rockette_and_hillis() -> None:
    gain = np.array([0.010, 0.030, 0.026])
    draws = np.array([[0.012, 0.006, 0.014], [0.031, 0.028, 0.033], [0.024, 0.021, 0.030]])
    found = estimate(gain, draws)
    pairs = [np.cov(draws[a], draws[b])[0, 1] for a, b in ((0, 1), (0, 2), (1, 2))]
    by_seeds, common = gain.var(ddof=1) / 3, sum(pairs) / 3
    assert common > 0
    freedom = (by_seeds + common) ** 2 / (by_seeds**2 / 2)
    assert 2 < freedom < 4
    reach = stats.t.ppf(0.975, freedom) * np.sqrt(by_seeds + common)
    assert (found.low, found.high) == pytest.approx((gain.mean() - reach, gain.mean() + reach), rel=1e-12)
    assert found.seed_error == pytest.approx(np.sqrt(by_seeds), rel=1e-12)
    assert found.detectable == pytest.approx(reach * (1 + stats.t.ppf(0.8, freedom) / stats.t.ppf(0.975, freedom)))


@pytest.mark.parametrize(("by_seed", "by_image"), [(0.1, 0.3), (0.02, 1.0), (0.2, 0.0)])
def test_interval_holds_the_truth_about_as_often_as_it_says(by_seed: float, by_image: float) -> None:
    generator = np.random.default_rng(0)
    inside = []
    for _ in range(250):
        gains = crossed(generator, 3, 50, by_seed, by_image)
        found = estimate(gains.mean(1), drawn(gains, generator))
        inside.append(found.low <= 0 <= found.high)
    assert 0.9 <= np.mean(inside) <= 0.985


def test_a_bootstrap_over_three_seeds_would_not_hold_it() -> None:
    """Why the interval is not that of a bootstrap over seeds and images: it holds the truth far too seldom."""
    generator = np.random.default_rng(0)
    inside = []
    for _ in range(250):
        draws = drawn(crossed(generator, 3, 50, 0.2, 0.0), generator)
        chosen = generator.integers(0, 3, (3, draws.shape[1]))
        low, high = np.quantile(np.take_along_axis(draws, chosen, 0).mean(0), [0.025, 0.975])
        inside.append(low <= 0 <= high)
    assert np.mean(inside) < 0.87


def test_one_seed_has_the_interval_of_images_alone() -> None:
    draws = np.linspace(0.01, 0.05, 1001)[None]
    found = estimate(np.array([0.03]), draws)
    assert (found.low, found.high) == pytest.approx((0.011, 0.049))
    assert (found.seed_error, found.detectable) == (None, None)
    assert found.sentence == "gain 3.0 AP, 95 % interval [1.1, 4.9], 1 seed"


def test_equal_seeds_leave_the_images_alone() -> None:
    draws = np.tile(np.random.default_rng(0).normal(0.02, 0.005, 500), (3, 1))
    found = estimate(np.full(3, 0.02), draws)
    assert found.seed_error == 0
    assert found.high - found.mean == pytest.approx(1.959964 * draws[0].std(ddof=1), rel=1e-6)
    assert found.image_error == pytest.approx(draws[0].std(ddof=1))


def test_images_that_pull_the_seeds_apart_make_nothing_surer() -> None:
    gain = np.array([0.01, 0.03])
    noise = np.random.default_rng(0).normal(0, 0.01, 500)
    found = estimate(gain, np.stack([gain[0] + noise, gain[1] - noise]))
    reach = stats.t.ppf(0.975, 1) * gain.std(ddof=1) / np.sqrt(2)
    assert found.high - found.mean == pytest.approx(reach)


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (0.012, 0.03, "gain 2.1 AP, 95 % interval [1.2, 3.0], 3 seeds"),
        (
            -0.01,
            0.03,
            "no gain shown: difference +2.1 AP, 95 % interval [-1.0, 3.0], 3 seeds; a gain of 4.0 would show",
        ),
        (0.0, 0.03, "no gain shown: "),
        (-0.03, -0.01, "worse: difference +2.1 AP, 95 % interval [-3.0, -1.0], 3 seeds"),
    ],
)
def test_sentences(low: float, high: float, said: str) -> None:
    found = Estimate(0.021, low, high, (0.02, 0.021, 0.022), 0.001, 0.002, 0.04)
    assert found.sentence.startswith(said)
    assert found.shown == (low > 0)
    assert found.to_dict()["sentence"] == found.sentence
