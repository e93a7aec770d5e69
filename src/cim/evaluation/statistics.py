"""Bootstrap intervals over images, vectorised."""

from __future__ import annotations

import numpy as np
from scipy.stats import kendalltau, rankdata

LEVEL = 0.95


def resample_weights(n: int, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """(resamples, n) how often each of n items is drawn in each bootstrap resample."""
    return rng.multinomial(n, np.full(n, 1 / n), size=resamples).astype(np.float64)


def interval(samples: np.ndarray) -> list[float]:
    """[low, high], the central 95 % of bootstrap samples; NaNs (empty denominators) are passed over."""
    if np.isnan(samples).all():
        return [float("nan"), float("nan")]
    tail = (1 - LEVEL) / 2
    return [float(q) for q in np.nanquantile(samples, [tail, 1 - tail])]


def varies(values: np.ndarray) -> bool:
    """Whether values differ by more than the rounding of float32 vectors; else they correlate with nothing."""
    return bool(np.ptp(values) > 1e-6 * max(1.0, np.abs(values).max()))


def correlations(
    score: np.ndarray, quality: np.ndarray, images: np.ndarray, rng: np.random.Generator, resamples: int = 1000
) -> dict[str, dict]:
    """Pearson and Spearman correlation with bootstrap intervals over images (all captions of one image together).

    Args:
        score, quality: (n,) per caption.
        images: (n,) which image each caption is of.

    Returns:
        {"pearson": {"value", "interval"}, "spearman": {...}}.
    """
    _, codes = np.unique(images, return_inverse=True)
    weights = resample_weights(codes.max() + 1, resamples, rng)[:, codes]
    out = {}
    for name, (x, y) in {
        "pearson": (score, quality),
        # Ranks are those of the full sample; ranking each resample anew moves the interval in the third digit.
        "spearman": (rankdata(score), rankdata(quality)),
    }.items():
        x, y = (x - x.mean()) / x.std(), (y - y.mean()) / y.std()
        total = weights.sum(1)
        mx, my = weights @ x / total, weights @ y / total
        cov = weights @ (x * y) / total - mx * my
        samples = cov / np.sqrt((weights @ x**2 / total - mx**2) * (weights @ y**2 / total - my**2))
        out[name] = {"value": float((x * y).mean()), "interval": interval(samples)}
    return out


def kendall(
    score: np.ndarray,
    judged: np.ndarray,
    images: np.ndarray,
    rng: np.random.Generator,
    resamples: int = 1000,
    variant: str = "b",
) -> dict:
    """Kendall's tau with its bootstrap interval over images (all captions of one image together).

    Args:
        score, judged: (n,) per caption.
        images: (n,) which image each caption is of.
        variant: "b" corrects for ties; "c" is what captioning metrics report on graded judgements.

    Returns:
        {"value", "interval"}; NaN where one of both does not vary.
    """
    if len(score) < 2 or not varies(score) or not varies(judged):
        return {"value": float("nan"), "interval": [float("nan"), float("nan")]}
    names, codes = np.unique(images, return_inverse=True)
    order = np.argsort(codes, kind="stable")
    members = np.split(order, np.cumsum(np.bincount(codes))[:-1])
    samples = np.full(resamples, np.nan)
    for r in range(resamples):
        drawn = np.concatenate([members[i] for i in rng.integers(len(names), size=len(names))])
        if np.ptp(score[drawn]) and np.ptp(judged[drawn]):
            samples[r] = kendalltau(score[drawn], judged[drawn], variant=variant).statistic
    return {"value": float(kendalltau(score, judged, variant=variant).statistic), "interval": interval(samples)}


def kendall_within(
    score: np.ndarray, judged: np.ndarray, images: np.ndarray, rng: np.random.Generator, resamples: int = 1000
) -> dict:
    """Kendall's tau-b over pairs of captions of the same image only, with its bootstrap interval over images.

    That is what a reward is used for in GRPO: an advantage compares captions of one image.

    Args:
        score, judged: (n,) per caption.
        images: (n,) which image each caption is of.

    Returns:
        {"value", "interval"}; NaN where no two captions of an image differ in both.
    """
    _, codes = np.unique(images, return_inverse=True)
    order = np.argsort(codes, kind="stable")
    # Of an image: concordant less discordant pairs, and the pairs without a tie in either.
    counts = np.zeros((codes.max() + 1, 3))
    for image, members in enumerate(np.split(order, np.cumsum(np.bincount(codes))[:-1])):
        first, second = np.triu_indices(len(members), 1)
        x, y = (np.sign(v[members][first] - v[members][second]) for v in (score, judged))
        counts[image] = (x * y).sum(), (x != 0).sum(), (y != 0).sum()

    def tau(totals: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore", divide="ignore"):
            return totals[..., 0] / np.sqrt(totals[..., 1] * totals[..., 2])

    weights = resample_weights(len(counts), resamples, rng)
    return {"value": float(tau(counts.sum(0))), "interval": interval(tau(weights @ counts))}


def mean_with_interval(values: np.ndarray, rng: np.random.Generator, resamples: int = 1000) -> dict:
    """{"value", "interval"} of a mean over items."""
    samples = resample_weights(len(values), resamples, rng) @ values / len(values)
    return {"value": float(values.mean()), "interval": interval(samples)}
