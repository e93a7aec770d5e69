"""Agreement of retrieval scores with people's judgements, for many settings of the reward.

p judged pairs of n captions and m images; a gallery of N images with t captions each; d and e dimensions of image and
text embeddings, L2-normalised. No judged image may be in the gallery.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pandas as pd
from scipy.stats import kendalltau

from cim.evaluation.settings import Setting
from cim.evaluation.statistics import kendall, kendall_within
from cim.gallery.transform import ImageTransform
from cim.rewards import cim, rank_weights, similarity_weights

VARIANTS = {"flickr8k-expert": "c", "flickr8k-cf": "b"}  # of Kendall's tau, as is customary
# 100 tau as reported for other metrics: Hessel et al. 2021 (arXiv 2104.08718), Sarto et al. 2023 (arXiv 2303.12112).
REPORTED = pd.DataFrame(
    [(30.8, 16.9), (41.8, 22.3), (43.9, 24.6), (51.2, 34.4), (54.3, 36.0)],
    index=["BLEU-4", "METEOR", "CIDEr", "CLIPScore", "PAC-S"],
    columns=list(VARIANTS),
)


@dataclass(frozen=True, eq=False)
class Study:
    """Embeddings of judged captions and images, and of a gallery that is searched with the captions.

    Attributes:
        captions: (n, e) judged captions.
        sources: (m, d) judged images.
        texts: (N, t, e) captions of the gallery's images.
        images: (N, d) the gallery's images.
        pairs: (p, 2) positions in `captions` and `sources`.
    """

    captions: np.ndarray
    sources: np.ndarray
    texts: np.ndarray
    images: np.ndarray
    pairs: np.ndarray

    def scores(self, setting: Setting) -> pd.DataFrame:
        """GRC, QIR and CIM of each pair at any K, columns grc, qir, cim: as the functions of rewards give them."""
        rows, similarity = (found[:, : setting.k] for found in self._search(setting.text, setting.rows))
        gallery, sources = self._vectors(setting.center, setting.whiten, setting.rows)
        if setting.temperature is None:
            ranked = np.broadcast_to(rank_weights(rows.shape[1], setting.decay), rows.shape)
            mean, summed = (_sums(rows, w, gallery) for w in (np.full(rows.shape, 1 / rows.shape[1]), ranked))
        else:
            mean = summed = _sums(rows, similarity_weights(similarity, setting.temperature), gallery)
        caption, source = self.pairs.T
        grc, qir = np.linalg.norm(mean, axis=1)[caption], (summed @ sources.T)[caption, source]
        return pd.DataFrame({"grc": grc, "qir": qir, "cim": cim(grc, qir, setting.beta, setting.grc_weight)})

    @lru_cache(maxsize=1)  # noqa: B019
    def _search(self, text: str, rows: int | None) -> tuple[np.ndarray, np.ndarray]:
        """The whole gallery in the order of each caption."""
        texts = self.texts[:rows]
        if text == "mean":
            texts = texts.mean(axis=1, keepdims=True)
            texts = texts / np.linalg.norm(texts, axis=-1, keepdims=True)
        elif text == "first":
            texts = texts[:, :1]
        similarity = self.captions @ texts.reshape(-1, texts.shape[-1]).T
        order = np.argsort(-similarity, axis=1, kind="stable")
        return order // texts.shape[1], np.take_along_axis(similarity, order, axis=1)

    @lru_cache(maxsize=1)  # noqa: B019
    def _vectors(self, center: bool, whiten: float, rows: int | None) -> tuple[np.ndarray, np.ndarray]:
        """The image embeddings of gallery and sources, transformed as the gallery's first `rows` images say."""
        transform = ImageTransform.fit(self.images[:rows])
        return tuple(transform.apply(vectors, center, whiten) for vectors in (self.images[:rows], self.sources))


def _sums(rows: np.ndarray, weights: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """(n, d) weighted sums of the (n, k) rows of (N, d) vectors; a row may occur more than once."""
    spread = np.zeros((len(rows), len(vectors)), np.float32)  # dense, since k may be as large as N
    np.add.at(spread, (np.arange(len(rows))[:, None], rows), weights.astype(np.float32))
    return spread @ vectors


def judged_pairs(judgements: Mapping[str, pd.DataFrame]) -> tuple[pd.DataFrame, dict[str, pd.DataFrame]]:
    """The distinct pairs of all benchmarks, and the grades by pair.

    Args:
        judgements: benchmark to rows with columns image, caption and grade.

    Returns:
        (pairs, grades): pairs with columns image and caption; by benchmark columns pair (its row), image and grade.
    """
    pairs = pd.concat(judgements.values())[["image", "caption"]].drop_duplicates().reset_index(drop=True)
    place = pairs.assign(pair=pairs.index)
    return pairs, {
        name: rows.merge(place, on=["image", "caption"])[["pair", "image", "grade"]]
        for name, rows in judgements.items()
    }


def first_half(images: pd.Series, seed: int) -> set[str]:
    """A random half of the images."""
    distinct = np.sort(images.unique())
    return set(np.random.default_rng(seed).permutation(distinct)[: len(distinct) // 2])


def agreement(scores: pd.DataFrame, grades: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Kendall's tau of each column of scores (a row a pair): a row a score, a column a benchmark, and their mean."""

    def tau(values: pd.Series, name: str) -> float:
        return kendalltau(values[grades[name]["pair"]], grades[name]["grade"], variant=VARIANTS[name]).statistic

    table = pd.DataFrame({name: scores.apply(tau, name=name) for name in grades})
    return table.assign(mean=table.mean(axis=1))


def with_intervals(
    scores: pd.DataFrame, grades: Mapping[str, pd.DataFrame], seed: int, resamples: int
) -> dict[str, dict[str, dict]]:
    """Cells "tau" and "within" (tau-b over captions of the same image) by score and benchmark.

    All scores share their resamples of images.
    """

    def cells(name: str, values: pd.Series) -> dict[str, dict]:
        rows = grades[name]
        columns = values[rows["pair"]].to_numpy(float), rows["grade"].to_numpy(float), rows["image"].to_numpy()
        return {
            "tau": kendall(*columns, np.random.default_rng(seed), resamples, VARIANTS[name]),
            "within": kendall_within(*columns, np.random.default_rng(seed), resamples),
        }

    return {score: {name: cells(name, values) for name in grades} for score, values in scores.items()}
