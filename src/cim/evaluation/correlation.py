"""Captions of known quality, and how scores follow it: the paper's motivation study."""

import json
from collections.abc import Mapping, Sequence

import faiss
import numpy as np
import pandas as pd

from cim.data.manifest import Manifest
from cim.errors import CimError
from cim.evaluation.statistics import correlations, mean_with_interval, varies
from cim.gallery.search import unit
from cim.gallery.store import Gallery, drop_excluded
from cim.rewards import gallery_representation_consistency
from cim.world import scoring as world

SCORES = ("grc", "qir", "cim", "clipscore", "words")
GRADE = ["ladder", "level", "label"]
# Labels of the grades from the lowest, by ladder.
PETS = {"fineness": ("animal", "species", "breed"), "accuracy": ("other species", "other breed", "right breed")}
HUMAN = {
    "fineness": ("first two words", "first four words", "one caption", "all captions"),
    "accuracy": ("another image's", "half wrong", "one caption"),
}


def graded_captions(manifest: Manifest, rng: np.random.Generator) -> pd.DataFrame:
    """Captions of every grade for each image of a manifest with ladders, human captions or scene graphs.

    Returns:
        Columns image_id, ladder ("fineness" or "accuracy"), level (higher is better), label, caption
        and quality: graph F1 where the scene is known, else the level.

    Raises:
        CimError: for a manifest with none of them.
    """
    if "ladders" in manifest.frame:
        return _graded(manifest.frame.set_index("image_id")["ladders"].map(json.loads), PETS)
    if parts := next((column for column in ("queries", "sentences") if column in manifest.frame), None):
        return _graded(_human_ladders(manifest, parts, rng), HUMAN)
    if not manifest.scenes_known:
        raise CimError(f"{manifest.name}: the study needs scene graphs or several human captions of each image")
    return world.graded_captions(manifest.frame["image_id"], manifest.frame["scene"], rng)


def _graded(ladders: Mapping[str, Mapping[str, list[str]]], labels: Mapping[str, Sequence[str]]) -> pd.DataFrame:
    """The table of image_id -> ladder -> captions from the lowest grade."""
    rows = [
        (image_id, ladder, level, labels[ladder][level], caption, float(level))
        for image_id, own in ladders.items()
        for ladder, captions in own.items()
        for level, caption in enumerate(captions)
    ]
    return pd.DataFrame(rows, columns=["image_id", *GRADE, "caption", "quality"])


def _human_ladders(manifest: Manifest, parts: str, rng: np.random.Generator) -> dict[str, dict[str, list[str]]]:
    """More, fewer, truncated, half-wrong and foreign captions of images with two or more in column `parts`."""
    queries = manifest.frame.set_index("image_id")[parts].dropna().map(json.loads)
    queries = {image_id: own for image_id, own in queries.items() if len(own) >= 2}
    if len(queries) < 3:
        needed = {"queries": "three captions", "sentences": "two sentences"}[parts]
        raise CimError(f"{manifest.name}: fewer than three images have {needed} or more")
    # A derangement by rotation of a random order: no image gets its own caption as the foreign one.
    ids, order = list(queries), rng.permutation(len(queries))
    foreign = {ids[a]: queries[ids[b]][0] for a, b in zip(order, np.roll(order, 1), strict=True)}
    out = {}
    for image_id, own in queries.items():
        words, other = own[0].split(), foreign[image_id].split()
        half = " ".join(words[: len(words) // 2] + other[len(other) // 2 :])
        fineness = [" ".join(words[:2]), " ".join(words[:4]), own[0], " ".join(own)]
        out[image_id] = {"fineness": fineness, "accuracy": [foreign[image_id], half, own[0]]}
    return out


def model_captions(manifest: Manifest, captions: list[str]) -> pd.DataFrame:
    """The same table for captions that a model wrote, ladder "model"; CimError where the scenes are not known."""
    if not manifest.scenes_known:
        raise CimError("parameters: correlation.model_captions needs images whose scenes are known; set it to false")
    table = pd.DataFrame({"image_id": manifest.frame["image_id"], "ladder": "model", "level": 0, "label": "base model"})
    return table.assign(caption=captions, quality=world.quality(captions, manifest.frame["scene"]))


def summarize(table: pd.DataFrame, rng: np.random.Generator, resamples: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """How the scores of graded captions (columns of SCORES) follow the grades.

    Returns:
        (levels, follows): the mean of each score at each level with its interval; and for each ladder
        and score Pearson and Spearman correlation with quality, caption by caption, with intervals, and
        how many `steps` there are from a level to the next, and over how many the score rises (`up`) and
        falls (`down`): the interval of the difference, paired by image, lies above or below 0.
    """
    scores = [s for s in SCORES if s in table]
    levels, follows = [], []
    for ladder, part in table.groupby("ladder", sort=False):
        for (level, label), cell in part.groupby(["level", "label"]):
            for score in scores:
                mean = mean_with_interval(cell[score].to_numpy(float), rng, resamples)
                levels.append((ladder, level, label, score, mean["value"], *mean["interval"]))
        for score in scores:
            values = part[score].to_numpy(float)
            if not varies(values):  # e.g. words where every caption is as long
                continue
            found = correlations(values, part["quality"].to_numpy(), part["image_id"].to_numpy(), rng, resamples)
            steps = _steps(part, score, rng, resamples)
            follows += [(ladder, score, k, c["value"], *c["interval"], *steps) for k, c in found.items()]
    columns = ["ladder", "score", "correlation", "value", "low", "high", "steps", "up", "down"]
    return pd.DataFrame(levels, columns=[*GRADE, "score", "mean", "low", "high"]), pd.DataFrame(
        follows, columns=columns
    )


def _steps(part: pd.DataFrame, score: str, rng: np.random.Generator, resamples: int) -> tuple[int, int, int]:
    """(steps, up, down) of a score on one ladder."""
    differences = part.pivot_table(score, "image_id", "level").diff(axis=1).iloc[:, 1:]
    intervals = [mean_with_interval(d.dropna().to_numpy(), rng, resamples)["interval"] for _, d in differences.items()]
    return len(intervals), sum(low > 0 for low, _ in intervals), sum(high < 0 for _, high in intervals)


def spearman_metrics(follows: pd.DataFrame) -> dict[str, dict[str, dict]]:
    """Spearman with quality for a metrics file: {ladder: {score: {"value", "interval", "steps", "up", "down"}}}."""
    out: dict = {}
    for r in follows[follows["correlation"] == "spearman"].itertuples():
        cell = {"value": r.value, "interval": [r.low, r.high], "steps": r.steps, "up": r.up, "down": r.down}
        out.setdefault(r.ladder, {})[r.score] = cell
    return out


def grc_by_density(
    gallery: Gallery, queries: dict[str, np.ndarray], exclude: np.ndarray, fractions: list[float], ks: list[int],
    rng: np.random.Generator,
) -> pd.DataFrame:  # fmt: skip
    """Mean GRC of captions of each label when only a random fraction of the gallery can be retrieved.

    Args:
        queries: label -> (n, d) caption embeddings.
        exclude: (n,) gallery row whose image each query may not retrieve; -1 for none.

    Returns:
        Columns label, fraction, rows, k, grc; without combinations that need more rows than the fraction holds.
    """
    texts, exclude = unit(gallery.texts), gallery.copies(exclude)
    spare, out = exclude.shape[1], []
    for fraction in fractions:
        kept = np.sort(rng.choice(len(gallery), max(1, round(fraction * len(gallery))), replace=False))
        index = faiss.IndexFlatIP(texts.shape[1])
        index.add(texts[kept])
        for k in (k for k in ks if k + spare <= len(kept)):
            for label, vectors in queries.items():
                found = drop_excluded(kept[index.search(vectors, k + spare)[1]], exclude)
                grc = gallery_representation_consistency(gallery.image_vectors(found))
                out.append((label, fraction, len(kept), k, float(grc.mean())))
    return pd.DataFrame(out, columns=["label", "fraction", "rows", "k", "grc"])
