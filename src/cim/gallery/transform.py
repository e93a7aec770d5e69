"""Centring and whitening of image embeddings, fitted on a gallery's images and stored with them.

Image embeddings of natural photos share a large mean, and few directions hold most of their variance. Cosines of raw
embeddings therefore lie close together; removing the mean, and dividing by a power of the variances, spreads them.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np

from cim.gallery.search import blocks

ROWS = 100_000  # rows, evenly spaced, that a large gallery is fitted on


@dataclass(frozen=True)
class ImageTransform:
    """Mean and principal components of N embeddings of dimension d, with r <= min(d, N - 1) components.

    Attributes:
        mean: (d,) float32.
        basis: (d, r) float32, principal directions as columns.
        variances: (r,) float32, the variance along each, descending; directions without variance are left out.
    """

    mean: np.ndarray
    basis: np.ndarray
    variances: np.ndarray

    @classmethod
    def fit(cls, vectors: np.ndarray) -> Self:
        """Fit to (N, d) embeddings, in any float type and normally memory-mapped."""
        vectors = vectors[:: -(-len(vectors) // ROWS)]
        n, dim = vectors.shape
        total, second = np.zeros(dim), np.zeros((dim, dim))
        for part in blocks(n):
            block = vectors[part].astype(np.float32)
            total += block.sum(0, dtype=np.float64)
            second += block.T @ block
        mean = total / n
        values, vectors = np.linalg.eigh(second / n - np.outer(mean, mean))
        # Rounding leaves about 1e-7 of the largest variance where there is none.
        kept = np.flatnonzero(values > 1e-6 * max(values[-1], 1e-6))[::-1][: n - 1]
        return cls(*(np.ascontiguousarray(a, np.float32) for a in (mean, vectors[:, kept], values[kept])))

    def apply(self, vectors: np.ndarray, center: bool, whiten: float) -> np.ndarray:
        """Transform (n, d) unit vectors and give them unit length again.

        Args:
            center: subtract the gallery's mean; whitening always does.
            whiten: 0 for none, 1 for full whitening; each principal direction is divided by variance^(whiten / 2).

        Returns:
            (n, d) float32, (n, r) where whitened. A vector that equals the mean becomes zero.
        """
        if not center and not whiten:
            return vectors
        vectors = vectors - self.mean
        if whiten:
            vectors = vectors @ (self.basis * self.variances ** (-whiten / 2))
        return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
