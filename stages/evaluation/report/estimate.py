"""The gain of several seeds on the same images, with one interval for both: other seeds, and other images.

A training seed is to an arm what a reader is to a way of imaging in a study of many readers and many cases: every seed
is measured on every validation image, with help and without. So the analysis is that of such studies, for two ways
(Obuchowski and Rockette, Communications in Statistics - Simulation and Computation 24, 1995, 285-308), with the degrees
of freedom of Hillis (Statistics in Medicine 26, 2007, 596-619). With d_k the gain of seed k of K, on all images:

    variance of the mean gain  V = s^2 / K + max(C, 0)        s: standard deviation of d_k over seeds
    degrees of freedom             V^2 / ((s^2 / K)^2 / (K - 1))
    interval                       mean +- t * sqrt(V)

C is the covariance over images of the gains of two seeds, the mean over all pairs of seeds: what an unlucky choice of
images does to all seeds alike, so that no number of seeds averages it out. It comes from a paired bootstrap over images.
A bootstrap over three seeds would not do: it knows nothing beyond the three, and its variance is a third too small.
Simulated with effects of seed and image of any size, intervals of 95 % held the truth in 92 to 95 of 100 experiments of
three seeds, in 94 to 95 of five, and in only 88 to 95 of two: run three at least.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from stages.evaluation.report.wording import ap, counted, interval, rounded, signed_ap

CONFIDENCE = 0.95
POWER = 0.8


@dataclass(frozen=True)
class Estimate:
    """A mean gain over seeds; AP from 0 to 1."""

    mean: float
    low: float
    high: float
    gains: tuple[float, ...]
    """Of each seed, on all images."""
    image_error: float
    """Standard error of the mean gain by the choice of images alone, by the bootstrap."""
    seed_error: float | None
    """Standard error of the mean gain by the seeds alone; None where one seed was run, and nothing is known of others."""
    detectable: float | None
    """True gain that an experiment of as many seeds and images, spread as these are, would show four times in five."""

    @property
    def shown(self) -> bool:
        """Whether the interval lies above 0."""
        return self.low > 0

    @property
    def sentence(self) -> str:
        """`gain 2.1 AP, 95 % interval [1.2, 3.0], 3 seeds`, or that none is shown."""
        measured = (
            f"{100 * CONFIDENCE:.0f} % interval {interval(self.low, self.high)}, {counted(len(self.gains), 'seed')}"
        )
        if self.shown:
            return f"gain {ap(self.mean)} AP, {measured}"
        if self.high < 0:
            return f"worse: difference {signed_ap(self.mean)} AP, {measured}"
        enough = "" if self.detectable is None else f"; a gain of {ap(self.detectable)} would show four times in five"
        return f"no gain shown: difference {signed_ap(self.mean)} AP, {measured}{enough}"

    def to_dict(self) -> dict[str, Any]:
        """For report.json."""
        numbers = ("mean", "low", "high", "image_error", "seed_error", "detectable")
        told = {name: rounded(getattr(self, name), 4) for name in numbers}
        return {
            **told,
            "gains": [rounded(one, 4) for one in self.gains],
            "shown": self.shown,
            "sentence": self.sentence,
        }


def estimate(gain_K: NDArray[np.float64], drawn_KS: NDArray[np.float64]) -> Estimate:
    """The mean gain of K seeds with its interval. `drawn_KS` is each seed's gain under S draws of images, the same for all.

    Of one seed the interval is the bootstrap's own (percentiles over images), and says nothing about other seeds.
    """
    mean, seeds = float(gain_K.mean()), len(gain_K)
    tails = ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2)
    image_error = float(drawn_KS.mean(0).std(ddof=1))
    gains = tuple(gain_K.tolist())
    if seeds == 1:
        low, high = np.quantile(drawn_KS[0], tails).tolist()
        return Estimate(mean, low, high, gains, image_error, None, None)
    by_seeds = float(gain_K.var(ddof=1)) / seeds
    covariance_KK = np.cov(drawn_KS)
    common = float(covariance_KK[~np.eye(seeds, dtype=bool)].mean())
    variance = by_seeds + max(common, 0.0)
    freedom = variance**2 / (by_seeds**2 / (seeds - 1)) if by_seeds else np.inf
    error = float(np.sqrt(variance))
    reach = float(stdtrit(freedom, tails[1])) * error
    detectable = reach + float(stdtrit(freedom, POWER)) * error
    return Estimate(mean, mean - reach, mean + reach, gains, image_error, float(np.sqrt(by_seeds)), detectable)
