"""CIM's rewards as pure functions of embeddings (arXiv 2603.01696), and the rival rewards it is compared with.

All embeddings are L2-normalised along their last axis; n captions, k retrieved images, d dimensions.
"""

import numpy as np
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from scipy.special import softmax

from cim.params import Settings, Share


class RewardSettings(Settings):
    """The `reward` group: K images are retrieved; CIM = grc_weight * GRC + beta * QIR; lambda(r) = decay^(r-1).

    Attributes:
        k: None for the whole gallery, which a temperature makes useful.
        temperature: lambda is instead a softmax of the retrieved captions' similarity over it, in GRC too.
        exclude_source: a caption may not retrieve its own source image.
        center: image embeddings without the gallery's mean.
        whiten: 0 to 1; their principal components divided by this power of their standard deviations, centred too.
    """

    k: PositiveInt | None = 3
    beta: NonNegativeFloat = 1.0
    decay: float = Field(0.5, gt=0, le=1)
    temperature: PositiveFloat | None = None
    grc_weight: NonNegativeFloat = 1.0
    exclude_source: bool = True
    center: bool = False
    whiten: Share = 0.0


def gallery_representation_consistency(retrieved: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """GRC, the mean resultant length of each caption's retrieved images: how alike they are.

        GRC(c) = || 1/K sum_r u(x_r) ||

    Args:
        retrieved: (n, k, d) image embeddings.
        weights: (n, k) that sum to 1, in place of 1/K.

    Returns:
        (n,) values in [0, 1]; 1 where all k images point the same way.
    """
    mean = retrieved.mean(axis=1) if weights is None else np.einsum("nk,nkd->nd", weights, retrieved)
    return np.linalg.norm(mean, axis=-1)


def rank_weights(k: int, decay: float = 0.5) -> np.ndarray:
    """lambda(r) = decay^(r-1) for ranks r = 1..k, as (k,); the published schedule halves with each rank."""
    return decay ** np.arange(k, dtype=np.float64)


def similarity_weights(similarity: np.ndarray, temperature: float) -> np.ndarray:
    """lambda by (n, k) similarities of the retrieved captions to the query, instead of by rank; ours, not the paper's.

    Returns:
        (n, k) weights that sum to 1: a softmax of similarity / temperature.
    """
    return softmax(similarity / temperature, axis=-1)


def query_gallery_image_relevance(source: np.ndarray, retrieved: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """QIR, the rank-weighted similarity of the retrieved images to the source image.

        QIR(v, c) = sum_r lambda(r) <u(v), u(x_r)>

    Args:
        source: (n, d) embedding of each caption's source image.
        retrieved: (n, k, d) embeddings of its retrieved images, best first.
        weights: (k,) lambda(r), or (n, k). Ranks' are not normalised: the range is +- their sum (1.75 at K = 3).

    Returns:
        (n,) values in [-sum(weights), sum(weights)].
    """
    return np.einsum(f"nd,nkd,{'k' if weights.ndim == 1 else 'nk'}->n", source, retrieved, weights)


def cim(grc: np.ndarray, qir: np.ndarray, beta: float = 1.0, grc_weight: float = 1.0) -> np.ndarray:
    """The CIM reward Y(v, c) = GRC(c) + beta * QIR(v, c); a weight of GRC other than 1 is ours."""
    return grc_weight * grc + beta * qir


def clipscore(text: np.ndarray, source: np.ndarray, w: float = 2.5) -> np.ndarray:
    """CLIPScore (arXiv 2104.08718): w * max(cos(text, image), 0).

    Args:
        text: (n, d) caption embeddings by the text tower of the image encoder.
        source: (n, d) source image embeddings.

    Returns:
        (n,) values in [0, w].
    """
    return w * np.maximum(np.einsum("nd,nd->n", text, source), 0.0)


def self_retrieval(text: np.ndarray, source: np.ndarray, gallery: np.ndarray) -> np.ndarray:
    """How high the source image ranks among the gallery's images when the caption searches them directly.

        SR(v, c) = 1 - log(rank) / log(N + 1)

    The rank is 1 where no gallery image is nearer to the caption than the source is, N + 1 where all are.
    The logarithm keeps a slope where the reciprocal rank would be flat.

    Args:
        text: (n, d) caption embeddings by the text tower of the image encoder.
        source: (n, d) source image embeddings.
        gallery: (N, d) gallery image embeddings.

    Returns:
        (n,) values in [0, 1].
    """
    own = np.einsum("nd,nd->n", text, source)
    # A margin above rounding, so that a source that is itself in the gallery does not outrank itself.
    rank = 1 + (text @ gallery.T > own[:, None] + 1e-3).sum(axis=1)
    return 1.0 - np.log(rank) / np.log(len(gallery) + 1)
