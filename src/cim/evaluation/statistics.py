"""Bootstrap intervals over images and seeds, correlations and tests.

In correlations `score`, `quality` and `judged` are (n,) values per caption and `images` is (n,), the image of each
caption; a resample draws images with all their captions. A cell is {"value", "interval"}, as metrics files hold it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Self

import numpy as np
import pandas as pd
from scipy.stats import kendalltau, norm, rankdata

TAIL = (1 - 0.95) / 2  # of a 95 % interval


class Estimate(NamedTuple):
    """A value and its (resamples,) bootstrap samples; NaN where it is undefined. Differences keep the pairing."""

    value: float
    samples: np.ndarray

    def __sub__(self, other: Self) -> Self:
        return Estimate(self.value - other.value, self.samples - other.samples)

    def __truediv__(self, other: Self) -> Self:
        return Estimate(ratio(self.value, other.value), ratio(self.samples, other.samples))

    def cell(self) -> dict:
        """{"value", "interval"}, the interval at 95 %."""
        return {"value": float(self.value), "interval": interval(self.samples)}

    def p(self) -> float:
        """Two-sided p of the value against 0: of its z, with the standard error of the samples.

        It knows of what was resampled, images and seeds, and is not bounded by the number of resamples.
        """
        known = self.samples[~np.isnan(self.samples)]
        error = known.std() if len(known) else np.nan
        # Up to rounding: the sums of equal captions differ by 1e-16.
        value = self.value if abs(self.value) > 1e-9 else 0.0
        return float(value == 0) if error <= 1e-9 else float(2 * norm.sf(abs(value) / error))


class Bootstrap:
    """Resamples of images, which all methods share, and of each method's seeds, drawn in the order of `seeds`.

    The interval of a method with one seed knows of images only.

    Args:
        images: how many images there are.
        seeds: method -> how many seeds it has.
    """

    def __init__(self, images: int, seeds: Mapping[str, int], resamples: int, rng: np.random.Generator):
        self.images = resample_weights(images, resamples, rng)
        # Of n seeds n - 1 are drawn, or the variance between few of them would come out at (n - 1) / n of what it is.
        self.seeds = {m: resample_weights(n, resamples, rng, draws=max(n - 1, 1)) for m, n in seeds.items()}

    def estimates(
        self, method: str, counts: np.ndarray, metrics: Callable[[np.ndarray], dict[str, np.ndarray]]
    ) -> dict[str, Estimate]:
        """Metrics that are functions of sums over images and seeds.

        Args:
            counts: (seeds, images, columns).
            metrics: from (..., columns) sums to named (...) values.
        """
        drawn = zip(self.seeds[method].T, counts, strict=True)
        samples = metrics(sum(times[:, None] * (self.images @ part) for times, part in drawn))
        return {name: Estimate(value, samples[name]) for name, value in metrics(counts.sum((0, 1))).items()}


def resample_weights(n: int, resamples: int, rng: np.random.Generator, draws: int | None = None) -> np.ndarray:
    """(resamples, n) how often each of n items is drawn in each bootstrap resample of n or `draws` draws."""
    return rng.multinomial(draws or n, np.full(n, 1 / n), size=resamples).astype(np.float64)


def interval(samples: np.ndarray) -> list[float]:
    """[low, high], the central 95 % of bootstrap samples; NaNs (empty denominators) are ignored."""
    return [np.nan, np.nan] if np.isnan(samples).all() else np.nanquantile(samples, [TAIL, 1 - TAIL]).tolist()


def side(interval: Sequence[float], of: float = 0.0) -> str:
    """Where an interval lies: "above" or "below" `of`, or "not distinguishable" from it, as where it is undefined."""
    low, high = interval
    return "above" if low > of else "below" if high < of else "not distinguishable"


def ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b, NaN where b is not positive."""
    return np.divide(a, b, out=np.full(np.shape(a), np.nan), where=np.greater(b, 0))


def with_interval(
    cell: Mapping | pd.Series, scale: float = 100, digits: int = 1, undefined: str = "n/a", sign: str = "-"
) -> str:
    """A cell, or a table's row with value, low and high, as "value [low, high]", by default a share in percent.

    Args:
        sign: "+" for a difference, whose numbers have a sign where they are positive too.
    """
    numbers = cell["value"], *(cell["interval"] if "interval" in cell else (cell["low"], cell["high"]))
    if any(map(pd.isna, numbers)):
        return undefined
    value, low, high = (f"{scale * number:{sign}.{digits}f}" for number in numbers)
    return f"{value} [{low}, {high}]"


def mean_with_interval(values: np.ndarray, rng: np.random.Generator, resamples: int = 1000) -> dict:
    """The cell of a mean over items."""
    samples = resample_weights(len(values), resamples, rng) @ values / len(values)
    return Estimate(values.mean(), samples).cell()


def varies(values: np.ndarray) -> bool:
    """Whether values differ by more than float32 rounding; a constant correlates with nothing."""
    return bool(np.ptp(values) > 1e-6 * max(1.0, np.abs(values).max()))


def correlations(
    score: np.ndarray, quality: np.ndarray, images: np.ndarray, rng: np.random.Generator, resamples: int = 1000
) -> dict[str, dict]:
    """Cells "pearson" and "spearman"."""
    _, codes = np.unique(images, return_inverse=True)
    weights = resample_weights(codes.max() + 1, resamples, rng)[:, codes]
    total = weights.sum(1)
    out = {}
    # Ranks are those of the full sample; ranking each resample anew moves the interval in the third digit.
    for name, (x, y) in {"pearson": (score, quality), "spearman": (rankdata(score), rankdata(quality))}.items():
        x, y = (x - x.mean()) / x.std(), (y - y.mean()) / y.std()
        mx, my = weights @ x / total, weights @ y / total
        cov = weights @ (x * y) / total - mx * my
        samples = cov / np.sqrt((weights @ x**2 / total - mx**2) * (weights @ y**2 / total - my**2))
        out[name] = Estimate((x * y).mean(), samples).cell()
    return out


def kendall(
    score: np.ndarray, judged: np.ndarray, images: np.ndarray, rng: np.random.Generator, resamples: int = 1000,
    variant: str = "b",
) -> dict:  # fmt: skip
    """The cell of Kendall's tau, NaN where one side does not vary.

    Args:
        variant: "b" corrects for ties; "c" is what captioning metrics report on graded judgements.
    """
    samples = np.full(resamples, np.nan)
    if len(score) < 2 or not varies(score) or not varies(judged):
        return Estimate(np.nan, samples).cell()
    score, judged = _with_ties(score, judged)
    members = list(pd.Series(images).groupby(images).indices.values())
    for r in range(resamples):
        drawn = np.concatenate([members[i] for i in rng.integers(len(members), size=len(members))])
        if np.ptp(score[drawn]) and np.ptp(judged[drawn]):
            samples[r] = kendalltau(score[drawn], judged[drawn], variant=variant).statistic
    return Estimate(kendalltau(score, judged, variant=variant).statistic, samples).cell()


def kendall_within(
    score: np.ndarray, judged: np.ndarray, images: np.ndarray, rng: np.random.Generator, resamples: int = 1000
) -> dict:
    """The cell of Kendall's tau-b over pairs of captions of the same image, which an advantage in GRPO compares."""
    if not len(score):
        return Estimate(np.nan, np.full(resamples, np.nan)).cell()
    score, judged = _with_ties(score, judged)
    counts = []  # of an image: concordant less discordant pairs, and the pairs without a tie in each of the two
    for members in pd.Series(images).groupby(images).indices.values():
        first, second = np.triu_indices(len(members), 1)
        x, y = (np.sign(v[members][first] - v[members][second]) for v in (score, judged))
        counts.append([(x * y).sum(), (x != 0).sum(), (y != 0).sum()])
    return correlation_of_sums(np.array(counts, float), resample_weights(len(counts), resamples, rng)).cell()


def _with_ties(*values: np.ndarray) -> list[np.ndarray]:
    """Values without the digits in which equal ones may differ: sums in another order differ by 1e-8."""
    return [part.round(6) for part in values]


def correlation_of_sums(sums: np.ndarray, weights: np.ndarray) -> Estimate:
    """A correlation by each image's sums of products and of both squares, (images, 3); `weights` draw images."""
    totals = sums.sum(0), weights @ sums
    return Estimate(*(ratio(total[..., 0], np.sqrt(total[..., 1] * total[..., 2])) for total in totals))


def holm(p: list[float]) -> list[float]:
    """Holm's correction of several p values for their number."""
    order = np.argsort(p)
    steps = np.asarray(p, float)[order] * np.arange(len(p), 0, -1)
    return np.minimum(1.0, np.maximum.accumulate(steps))[np.argsort(order)].tolist()
