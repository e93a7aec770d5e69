"""Captions made to please a reward instead of describing the image, and how often each score prefers them."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import chain

import numpy as np
import pandas as pd

from cim.evaluation.statistics import Estimate, resample_weights
from cim.gallery.search import ExactSearch
from cim.gallery.store import Gallery, drop_excluded

HONEST = "honest"
STUFFED = 12  # words of the stuffed caption


def attacks(captions: Sequence[str], copied: Sequence[str], corpus: Sequence[str]) -> dict[str, list[str]]:
    """Variants of each caption by name, the caption itself first.

    Args:
        captions: true captions, one an image; of two images at least.
        copied: for each image, the caption of the gallery image that is most similar to it.
        corpus: the gallery's captions, whose most frequent words of four letters or more are stuffed into one.
    """
    n = len(captions)
    counts = Counter(chain.from_iterable(set(re.findall(r"\w{4,}", text.lower())) for text in corpus))
    stuffed = " ".join(word for word, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:STUFFED])
    return {
        HONEST: list(captions),
        "vague": ["there is something in the picture."] * n,
        "stuffed": [stuffed] * n,
        "repeated": [" ".join([caption] * 3) for caption in captions],
        "fragment": [" ".join(caption.split()[:3]) for caption in captions],
        "over-long": [" ".join([captions[i], captions[i - 1], captions[i - 2]]) for i in range(n)],
        "copied": list(copied),
        "another's": [captions[i - 1] for i in range(n)],
    }


def nearest_captions(gallery: Gallery, sources: np.ndarray, own: np.ndarray) -> list[str]:
    """The caption of the gallery image that is most similar to each of (n, d) source embeddings.

    Args:
        own: (n,) gallery row of each source image, which does not count, -1 for none.
    """
    own = gallery.copies(own)
    found = ExactSearch(gallery.images).search(sources, 1 + own.shape[1])
    return gallery.take(drop_excluded(found, own))["caption"].tolist()


def preferred(
    variants: Mapping[str, Sequence[str]],
    score: Callable[[Sequence[str]], Mapping[str, np.ndarray]],
    seed: int = 0,
    resamples: int = 1000,
) -> pd.DataFrame:
    """How often each score puts an attack above the honest caption of the same image; equal scores count half.

    Args:
        variants: as `attacks` gives them.
        score: scores by name, each (n,), of one caption an image.

    Returns:
        Columns score, attack, mean (of the score), share, low, high; the share of the honest caption is 0.5. The
        largest share over all attacks says how far a score can be gamed.
    """
    scores = {attack: score(captions) for attack, captions in variants.items()}
    honest = scores[HONEST]
    weights = resample_weights(len(variants[HONEST]), resamples, np.random.default_rng(seed))
    rows = []
    for name in honest:
        for attack, values in scores.items():
            above = (np.sign(values[name] - honest[name]) + 1) / 2
            cell = Estimate(above.mean(), weights @ above / len(above)).cell()
            rows.append((name, attack, values[name].mean(), cell["value"], *cell["interval"]))
    return pd.DataFrame(rows, columns=["score", "attack", "mean", "share", "low", "high"])
