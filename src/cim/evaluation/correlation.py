"""Captions of known quality, for the study of what the rewards follow."""

from __future__ import annotations

import json
from typing import Annotated

import faiss
import numpy as np
import pandas as pd
from pydantic import Field, PositiveInt
from scipy.stats import spearmanr

from cim.data.manifest import Manifest
from cim.errors import CimError
from cim.evaluation.statistics import correlations, mean_with_interval, varies
from cim.gallery.store import Gallery, drop_excluded
from cim.params import Settings
from cim.rewards import gallery_representation_consistency

SCORES = ("grc", "qir", "cim", "clipscore", "words")


class CorrelationSettings(Settings):
    """The `correlation` group."""

    split: str
    images: int = Field(ge=3)
    seed: int
    resamples: PositiveInt
    fractions: list[Annotated[float, Field(gt=0, le=1)]]
    ks: list[PositiveInt]
    model_captions: bool = False


FINER = ("animal", "species", "breed")  # of the pets
TRUER = ("other species", "other breed", "right breed")
COLUMNS = ("image_id", "ladder", "level", "label", "caption")


def graded_captions(manifest: Manifest, rng: np.random.Generator) -> pd.DataFrame:
    """Captions of every grade for each image of a manifest with scene graphs or with human captions.

    Returns:
        Columns image_id, ladder ("fineness" or "accuracy"), level (higher is better), label, caption
        and quality: graph F1 where the scene is known, else the level.
    """
    if "ladders" in manifest.frame:
        return given_ladders(manifest)
    if "queries" in manifest.frame:
        return human_ladders(manifest, rng)
    if not manifest.scenes_known:
        raise CimError(f"{manifest.name}: the study needs scene graphs or several human captions of each image")
    from cim.world import ladders

    return ladders.graded_captions(manifest.frame["image_id"], manifest.frame["scene"], rng)


def given_ladders(manifest: Manifest) -> pd.DataFrame:
    """The ladders that the manifest itself holds, coarsest and most wrong first; quality is the grade."""
    rows = [
        (image_id, ladder, level, {"fineness": FINER, "accuracy": TRUER}[ladder][level], caption)
        for image_id, text in zip(manifest.frame["image_id"], manifest.frame["ladders"], strict=True)
        for ladder, captions in json.loads(text).items()
        for level, caption in enumerate(captions)
    ]
    table = pd.DataFrame(rows, columns=COLUMNS)
    return table.assign(quality=table["level"].astype(float))


def human_ladders(manifest: Manifest, rng: np.random.Generator) -> pd.DataFrame:
    """More, fewer, truncated, half-wrong and foreign human captions; image_ids and captions as in the manifest.

    Images with fewer than two captions beside the gallery's are left out.
    """
    queries = {i: json.loads(q) for i, q in zip(manifest.frame["image_id"], manifest.frame["queries"], strict=True)}
    queries = {i: q for i, q in queries.items() if len(q) >= 2}
    if len(queries) < 3:
        raise CimError(f"{manifest.name}: fewer than three images have three captions or more")
    ids = list(queries)
    # A derangement by rotation of a random order: no image is its own stranger.
    order = rng.permutation(len(ids))
    stranger = {ids[a]: ids[b] for a, b in zip(order, np.roll(order, 1), strict=True)}
    rows = []
    for image_id, own in queries.items():
        one, foreign = own[0], queries[stranger[image_id]][0]
        words, other = one.split(), foreign.split()
        half = " ".join(words[: len(words) // 2] + other[len(other) // 2 :])
        rows += [
            (image_id, "fineness", 0, "first two words", " ".join(words[:2])),
            (image_id, "fineness", 1, "first four words", " ".join(words[:4])),
            (image_id, "fineness", 2, "one caption", one),
            (image_id, "fineness", 3, "all captions", " ".join(own)),
            (image_id, "accuracy", 0, "another image's", foreign),
            (image_id, "accuracy", 1, "half wrong", half),
            (image_id, "accuracy", 2, "one caption", one),
        ]
    table = pd.DataFrame(rows, columns=COLUMNS)
    return table.assign(quality=table["level"].astype(float))


def model_captions(manifest: Manifest, captions: list[str]) -> pd.DataFrame:
    """The same table for captions that a model wrote, ladder "model".

    Raises:
        CimError: where the scenes are not known, without which such captions have no grade.
    """
    if not manifest.scenes_known:
        raise CimError("parameters: correlation.model_captions needs images whose scenes are known; set it to false")
    from cim.world import ladders

    table = pd.DataFrame({"image_id": manifest.frame["image_id"], "ladder": "model", "level": 0, "label": "base model"})
    return table.assign(caption=captions, quality=ladders.quality(captions, manifest.frame["scene"]))


def summarise(table: pd.DataFrame, rng: np.random.Generator, resamples: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What follows what.

    Args:
        table: graded captions with columns of SCORES.

    Returns:
        (levels, follows): the mean of each score at each level with its interval; and for each ladder
        and score Pearson and Spearman correlation with quality, caption by caption, with intervals,
        and `by_level`, Spearman of the level means with the level.
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
            means = part.groupby("level")[score].mean()
            by_level = float(spearmanr(means.index, means).statistic) if len(means) > 1 else float("nan")
            for kind in ("pearson", "spearman"):
                follows.append((ladder, score, kind, found[kind]["value"], *found[kind]["interval"], by_level))
    return (
        pd.DataFrame(levels, columns=["ladder", "level", "label", "score", "mean", "low", "high"]),
        pd.DataFrame(follows, columns=["ladder", "score", "correlation", "value", "low", "high", "by_level"]),
    )


def grc_by_density(
    gallery: Gallery,
    queries: dict[str, np.ndarray],
    exclude: np.ndarray | None,
    fractions: list[float],
    ks: list[int],
    rng: np.random.Generator,
) -> pd.DataFrame:
    """Mean GRC of captions of each label when only a random fraction of the gallery can be retrieved.

    Args:
        queries: label -> (n, d) caption embeddings.
        exclude: (n,) gallery row that each query may not retrieve, or None.

    Returns:
        Columns label, fraction, rows, k, grc. Combinations that the thinned gallery is too small for are left out.
    """
    texts = gallery.text_embeddings()
    out = []
    for fraction in fractions:
        kept = np.sort(rng.choice(len(gallery), max(1, round(fraction * len(gallery))), replace=False))
        index = faiss.IndexFlatIP(texts.shape[1])
        index.add(texts[kept])
        for k in ks:
            if k + 1 > len(kept):
                continue
            for label, vectors in queries.items():
                found = kept[index.search(vectors, k + 1)[1]]
                found = found[:, :k] if exclude is None else drop_excluded(found, exclude)
                grc = gallery_representation_consistency(gallery.image_vectors(found))
                out.append((label, fraction, len(kept), k, float(grc.mean())))
    return pd.DataFrame(out, columns=["label", "fraction", "rows", "k", "grc"])
