"""Words of captions: how diverse they are, and how they repeat themselves."""

import re
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pandas as pd


def diversity(captions: Sequence[str]) -> dict[str, float]:
    """Statistics that reveal a collapse: shares of distinct captions, of the most common one, and of captions with a
    doubled word ("a red red car"); mean words."""
    counts = pd.Series(list(captions)).value_counts()
    return {
        "distinct": len(counts) / len(captions),
        "most_common": float(counts.iloc[0]) / len(captions),
        "doubled": float(np.mean([any(a == b for a, b in pairwise(words(c))) for c in captions])),
        "words": float(np.mean([len(c.split()) for c in captions])),
    }


def words(caption: str) -> list[str]:
    """The words of a caption.

    >>> words("A man's T-shirt , red .")
    ['a', "man's", 't-shirt', 'red']
    """
    return re.findall(r"[^\W_]+(?:[-'][^\W_]+)*", caption.lower())


def repetition(captions: Sequence[str]) -> np.ndarray:
    """(n,) share of each caption's pairs of successive words that occurred in it before; 0 where there is no pair."""
    pairs = [list(pairwise(words(caption))) for caption in captions]
    return np.array([1 - len(set(own)) / len(own) if own else 0.0 for own in pairs])
