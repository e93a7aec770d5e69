"""Captions against several human captions of each image: CIDEr-D, nouns, identification, length and repetition.

Words are those of cim.captioners.text.words. `references` are the human captions of each image, at least one.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import chain, islice

import numpy as np
import pandas as pd
from scipy.sparse import csr_array, diags_array
from scipy.sparse.linalg import norm

from cim.captioners.text import repetition, words
from cim.evaluation.capture.parsers import PatternParser
from cim.evaluation.capture.synonyms import WordNet
from cim.evaluation.statistics import ratio

NGRAM, SIGMA = 4, 6.0  # CIDEr-D's longest n-grams, and its tolerance in length
References = Sequence[Sequence[str]]


def cider(captions: Sequence[str], references: References, images: Sequence[int] | None = None) -> np.ndarray:
    """CIDEr-D (Vedantam et al. 2015), equal to the public code's on the same words.

    Document frequencies are those of the references, one document an image.

    Args:
        images: (n,) the position in `references` of each caption's image; None for one caption an image, in order.

    Returns:
        (n,) values in [0, 10]; tables in papers show 100 times their mean. All are 0 where there is only one image.
    """
    images = range(len(references)) if images is None else images
    ours, theirs = ([words(text) for text in texts] for texts in (captions, chain(*references)))
    bounds = np.cumsum([0, *map(len, references)])
    # Every pair of a caption and a reference of its image, as rows of `ours + theirs`.
    pairs = [(i, len(ours) + j) for i, image in enumerate(images) for j in range(bounds[image], bounds[image + 1])]
    caption, reference = np.transpose(pairs)
    lengths = np.array([len(text) for text in ours + theirs])
    penalty = np.exp(-((lengths[caption] - lengths[reference]) ** 2) / (2 * SIGMA**2))
    image_of = np.repeat(np.arange(len(references)), np.diff(bounds))
    by_image = csr_array((np.ones(len(theirs)), (image_of, np.arange(len(theirs)))))
    total = np.zeros(len(caption))
    for n in range(1, NGRAM + 1):
        counts = _ngram_counts(ours + theirs, n)
        documents = (by_image @ counts[len(ours) :] > 0).sum(axis=0)
        weighted = counts @ diags_array(np.log(len(references) / np.maximum(documents, 1)))
        a, b, norms = weighted[caption], weighted[reference], norm(weighted, axis=1)
        total += np.nan_to_num(ratio((a.minimum(b) * b).sum(axis=1), norms[caption] * norms[reference]))
    return 10 / NGRAM * np.bincount(caption, total * penalty) / np.bincount(caption)


def _ngram_counts(texts: Sequence[list[str]], n: int) -> csr_array:
    """(texts, distinct n-grams) how often each text has each n-gram."""
    found = [(row, " ".join(text[i : i + n])) for row, text in enumerate(texts) for i in range(len(text) - n + 1)]
    frame = pd.DataFrame(found, columns=["row", "ngram"])
    codes, distinct = pd.factorize(frame["ngram"])
    return csr_array((np.ones(len(frame)), (frame["row"].astype(int), codes)), (len(texts), len(distinct)))


def identification_ranks(captions: np.ndarray, references: np.ndarray, counts: Sequence[int]) -> np.ndarray:
    """The rank of each caption's own image, from 1, where it searches the human captions of all images.

    The similarity of an image is that of its most similar caption; the own image is the last of equally similar ones.

    Args:
        captions: (n, d) embeddings of one caption an image, L2-normalised.
        references: (m, d) embeddings of the human captions, image by image.
        counts: (n,) how many of them each image has.
    """
    best = np.maximum.reduceat(captions @ references.T, np.cumsum(counts) - counts, axis=1)
    return (best >= best.diagonal()[:, None]).sum(axis=1)


def nouns(captions: Sequence[str], wordnet: WordNet) -> list[set[str]]:
    """The nouns of each caption: the last word of each object that the pattern parser finds, in its base form."""
    graphs = PatternParser(wordnet).parse(captions)
    return [{wordnet.lemma(name.split()[-1], "n") for name in graph.objects} for graph in graphs]


class HumanCaptions:
    """The human captions of each image, embedded and parsed once for all models that are compared.

    Args:
        encode: from texts to (n, d) embeddings of length 1, for identification.
    """

    def __init__(self, references: References, encode: Callable[[list[str]], np.ndarray], wordnet: WordNet):
        self._references, self._encode, self._wordnet = references, encode, wordnet
        texts = list(chain(*references))
        named = iter(nouns(texts, wordnet))
        self._nouns = [set().union(*islice(named, len(own))) for own in references]
        self._vectors = encode(texts)

    def compare(self, captions: Sequence[str]) -> pd.DataFrame:
        """What `metrics_of` needs of one caption of each image, a row an image; and column rank, of identification."""
        counts = [len(own) for own in self._references]
        ranks = identification_ranks(self._encode(list(captions)), self._vectors, counts)
        stated = nouns(captions, self._wordnet)
        columns = {
            "cider": cider(captions, self._references),
            "nouns_right": [len(own & true) for own, true in zip(stated, self._nouns, strict=True)],
            "nouns_stated": [len(own) for own in stated],
            "nouns_true": [len(true) for true in self._nouns],
            "rank": ranks, "R@1": ranks <= 1, "R@10": ranks <= 10, "ln_rank": np.log(ranks),
            "words": [len(words(caption)) for caption in captions], "repetition": repetition(captions), "one": 1,
        }  # fmt: skip
        return pd.DataFrame(columns, dtype=float)


def metrics_of(totals: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Metrics from summed columns of HumanCaptions.compare: means over images, precision and recall over all nouns."""
    means = ("cider", "R@1", "R@10", "ln_rank", "words", "repetition")
    return {name: ratio(totals[name], totals["one"]) for name in means} | {
        "noun_precision": ratio(totals["nouns_right"], totals["nouns_stated"]),
        "noun_recall": ratio(totals["nouns_right"], totals["nouns_true"]),
    }
