"""Several captions of each image: which score tells the better of them, and what choosing by it gains.

Arrays are (images, captions), one row an image with as many captions as every other.
"""

from collections.abc import Mapping, Sequence
from math import comb
from types import SimpleNamespace

import numpy as np
import pandas as pd
from scipy.stats import rankdata
from sklearn.feature_extraction.text import TfidfVectorizer

from cim.data.flickr8k import human_captions
from cim.data.manifest import Manifest
from cim.evaluation.caption_metrics import cider
from cim.evaluation.statistics import Estimate, correlation_of_sums, kendall_within, resample_weights
from cim.rewards import RewardSettings, rank_weights, similarity_weights
from cim.scorer import Scorer
from cim.world import scoring as world
from cim.world.scoring import stated_facts


def quality_of(candidates: pd.DataFrame, manifest: Manifest) -> tuple[np.ndarray, str]:
    """(n,) true quality of each candidate, and its name: F1 of facts where scenes are known, else CIDEr-D."""
    captions, images = candidates["caption"].tolist(), pd.Index(manifest.frame["image_id"])
    rows = images.get_indexer(candidates["image_id"])
    if not manifest.scenes_known:
        return cider(captions, human_captions(manifest.frame), rows), "CIDEr-D"
    return world.quality(captions, manifest.frame["scene"].to_numpy()[rows]), "F1 of facts"


def score_candidates(
    scorer: Scorer, candidates: pd.DataFrame, rewards: Mapping[str, RewardSettings], read: bool = False
) -> dict[str, np.ndarray]:
    """Every score that needs no reference, (n,) by name: GRC, QIR and CIM of the scorer's own settings, CIM of other
    settings by their names, CLIPScore and self-retrieval where the image encoder reads text, likelihood and words;
    with `read`, CIM of the scorer's settings where the gallery is searched by exact facts.

    Args:
        candidates: columns image_id, caption and, if known, likelihood; the scorer has these images.
    """
    captions, ids = candidates["caption"].tolist(), candidates["image_id"].tolist()
    distinct = pd.Index(captions).unique()
    vectors, scorer = scorer.text.encode(distinct.tolist()), scorer.at(scorer.settings)
    # All settings share these embeddings.
    scorer.text = SimpleNamespace(encode=lambda texts: vectors[distinct.get_indexer(texts)])
    own = scorer.retrieval_scores(captions, ids)
    scores = {name: own[name] for name in ("cim", "grc", "qir")}
    scores |= {name: scorer.at(settings).retrieval_scores(captions, ids)["cim"] for name, settings in rewards.items()}
    if read:
        scores["cim, exact facts"] = scorer.at(scorer.settings, FactScorer).retrieval_scores(captions, ids)["cim"]
    if scorer.image.embed_text:
        scores |= scorer.paired_scores(captions, ids).to_dict("series")
    scores |= {"likelihood": candidates["likelihood"]} if "likelihood" in candidates else {}
    scores |= {"words": candidates["caption"].str.split().str.len()}
    # The same images in another order give the same score but for rounding, which must not break the tie.
    return {name: values.to_numpy(float).round(6) for name, values in scores.items()}


class FactScorer(Scorer):
    """Searches the gallery by the facts that captions state, counted exactly (cosine), not by embeddings of text.

    It shows what the text encoder's confusions cost.
    """

    def retrieve(
        self, captions: Sequence[str], image_ids: Sequence[str] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """As Scorer.retrieve."""
        s, facts = self.settings, TfidfVectorizer(analyzer=stated_facts, binary=True, use_idf=False)
        gallery = facts.fit_transform(self.gallery.rows["caption"])
        similarity = (facts.transform(captions) @ gallery.T).toarray()
        if s.exclude_source and image_ids is not None:
            for own in self.gallery.copies(self.gallery_rows(image_ids)).T:
                similarity[own >= 0, own[own >= 0]] = -1
        rows = np.argsort(-similarity, axis=1, kind="stable")[:, : self.k]
        if s.temperature is None:
            return rows, rank_weights(self.k, s.decay)
        return rows, similarity_weights(np.take_along_axis(similarity, rows, 1), s.temperature)


def best_of(n: int, score: np.ndarray, quality: np.ndarray) -> np.ndarray:
    """(images,) expected quality of the caption that scores highest among n drawn without replacement.

    Exact, over all draws: of m captions the r-th best by score (r = 0, 1, ...) is chosen in C(m - 1 - r, n - 1) of
    C(m, n) draws. Captions of equal score share their ranks.
    """
    m = score.shape[1]
    chance = np.cumsum([0.0, *(comb(m - 1 - r, n - 1) / comb(m, n) for r in range(m))])  # of a rank before the r-th
    first, last = (rankdata(-score, kind, axis=1).astype(int) for kind in ("min", "max"))
    return ((chance[last] - chance[first - 1]) / (last - first + 1) * quality).sum(1)


def compare_scores(
    scores: Mapping[str, np.ndarray], quality: np.ndarray, best: list[int], seed: int = 0, resamples: int = 1000
) -> pd.DataFrame:
    """How each score agrees with quality within images, and the mean quality of what it chooses.

    Returns:
        Columns score, metric, value, low, high; metrics are tau, pearson (of deviations from each image's means),
        best_N, and gain_N, the gain of best_N over a random caption, paired by image. Intervals at 95 % over images.
    """
    weights = resample_weights(len(quality), resamples, np.random.default_rng(seed))
    images, rows = np.repeat(np.arange(len(quality)), quality.shape[1]), []
    random = quality.mean(1)
    for name, score in scores.items():
        rng = np.random.default_rng(seed)
        tau = kendall_within(score.ravel(), quality.ravel(), images, rng, resamples)
        x, y = (v - v.mean(1, keepdims=True) for v in (score, quality))
        sums = np.stack([(x * y).sum(1), (x * x).sum(1), (y * y).sum(1)], axis=1)
        cells = {"tau": tau, "pearson": correlation_of_sums(sums, weights).cell()}
        for n in best:
            chosen = best_of(n, score, quality)
            for metric, values in (("best", chosen), ("gain", chosen - random)):
                cells[f"{metric}_{n}"] = Estimate(values.mean(), weights @ values / len(values)).cell()
        rows += [(name, metric, cell["value"], *cell["interval"]) for metric, cell in cells.items()]
    return pd.DataFrame(rows, columns=["score", "metric", "value", "low", "high"])


def choose_setting(
    scores: Mapping[str, Mapping[str, np.ndarray]], settings: Sequence[str], seed: int = 0, resamples: int = 1000
) -> dict:
    """The setting of the reward that agrees best with quality within images, by a random half of them.

    Args:
        scores: model -> name of a setting, or "quality" -> (images, captions).

    Returns:
        The "setting" whose mean tau over models is highest there, and "tau" on the other half: of it and of "cim", the
        scorer's own, by model.
    """
    shuffled = np.random.default_rng(seed).permutation(len(next(iter(scores.values()))["quality"]))
    chosen_on, reported_on = np.split(shuffled, [len(shuffled) // 2])

    def tau(model: str, name: str, rows: np.ndarray) -> dict:
        images = np.repeat(rows, scores[model]["quality"].shape[1])
        pair = (values[rows].ravel() for values in (scores[model][name], scores[model]["quality"]))
        return kendall_within(*pair, images, np.random.default_rng(seed), resamples)

    # A model whose captions are all alike has no tau.
    means = {name: pd.Series([tau(model, name, chosen_on)["value"] for model in scores]).mean() for name in settings}
    best = max(settings, key=lambda name: np.nan_to_num(means[name], nan=-1))
    taus = {name: {model: tau(model, name, reported_on) for model in scores} for name in dict.fromkeys((best, "cim"))}
    return {"setting": best, "tau": taus}
