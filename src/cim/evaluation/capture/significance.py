"""Whether two methods differ on the same images: permutation tests, corrected for their number."""

from __future__ import annotations

import numpy as np


def paired_permutation(differences: np.ndarray, rng: np.random.Generator, resamples: int = 10_000) -> float:
    """Two-sided p of a mean paired difference: how often random signs give one as large.

    Counts the observed one as one of the resamples, so that no p is 0.
    """
    observed = abs(differences.mean())
    exceeding = 0
    for start in range(0, resamples, 1000):
        signs = rng.choice([-1.0, 1.0], (min(1000, resamples - start), len(differences)))
        # A margin for rounding: the observed signs themselves must count.
        exceeding += int((np.abs(signs @ differences) / len(differences) >= observed - 1e-12).sum())
    return (exceeding + 1) / (resamples + 1)


def holm(p: list[float]) -> list[float]:
    """Holm's correction of many p values for their number."""
    if not p:
        return []
    order = np.argsort(p)
    steps = np.asarray(p)[order] * np.arange(len(p), 0, -1)
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(1.0, np.maximum.accumulate(steps))
    return corrected.tolist()
