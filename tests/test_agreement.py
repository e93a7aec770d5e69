"""The study of agreement with people: against slow loops, and on judgements whose right answer is known."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import kendalltau

from cim import rewards
from cim.evaluation import agreement
from cim.evaluation.agreement import Study
from cim.evaluation.settings import Setting
from cim.gallery.transform import ImageTransform
from cim.report import findings

CAPTIONS, SOURCES, ROWS, TEXTS, DIM = 7, 5, 40, 3, 6


def unit(vectors):
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def study():
    rng = np.random.default_rng(0)
    shapes = (CAPTIONS, 4), (SOURCES, DIM), (ROWS, TEXTS, 4), (ROWS, DIM)
    vectors = [unit(rng.normal(size=shape) + 0.5) for shape in shapes]
    return Study(*vectors, np.array([(c, s) for c in range(CAPTIONS) for s in range(SOURCES)]))


def slow_scores(study, s):
    """One pair at a time, by the functions of cim.rewards."""
    texts, images = study.texts[: s.rows], study.images[: s.rows]
    rows = [(i, t) for i, own in enumerate(texts) for t in own]
    if s.text == "first":
        rows = [(i, own[0]) for i, own in enumerate(texts)]
    elif s.text == "mean":
        rows = [(i, unit(own.mean(0))) for i, own in enumerate(texts)]
    transform = ImageTransform.fit(images)
    gallery, sources = (transform.apply(v, s.center, s.whiten) for v in (images, study.sources))
    out = []
    for caption, source in study.pairs:
        similar = np.array([text @ study.captions[caption] for _, text in rows])
        nearest = np.argsort(-similar)[: s.k]
        weights, shares = rewards.rank_weights(len(nearest), s.decay), None
        if s.temperature:
            weights = rewards.similarity_weights(similar[nearest], s.temperature)
            shares = weights[None]
        found = gallery[[rows[r][0] for r in nearest]][None]
        grc = rewards.gallery_representation_consistency(found, shares)[0]
        qir = rewards.query_gallery_image_relevance(sources[source][None], found, weights)[0]
        out.append((grc, qir, rewards.cim(grc, qir, s.beta, s.grc_weight)))
    return np.array(out)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"k": 1},
        {"k": 10, "decay": 0.9, "beta": 0.3, "grc_weight": 0.5},
        {"k": 10, "center": True},
        {"k": 10, "whiten": 0.5, "temperature": 0.1},
        {"k": 1000, "temperature": 0.2},
        {"k": 10, "text": "mean"},
        {"k": 10, "text": "each"},
        {"k": 1000, "text": "each", "temperature": 0.2},
        {"k": 10, "rows": 15, "whiten": 1.0},
    ],
)
def test_the_scores_are_those_of_the_rewards(study, changes):
    setting = Setting(**changes)
    assert study.scores(setting).to_numpy() == pytest.approx(slow_scores(study, setting), abs=1e-5)


JUDGEMENTS = {
    "flickr8k-expert": pd.DataFrame({"image": list("aabb"), "caption": list("xxxy"), "grade": [1.0, 2, 3, 4]}),
    "flickr8k-cf": pd.DataFrame({"image": list("ba"), "caption": list("xz"), "grade": [0.5, 1]}),
}


def test_pairs_are_distinct_and_all_grades_are_kept():
    pairs, grades = agreement.judged_pairs(JUDGEMENTS)
    assert pairs.to_numpy().tolist() == [["a", "x"], ["b", "x"], ["b", "y"], ["a", "z"]]
    assert grades["flickr8k-expert"].to_numpy().tolist() == [[0, "a", 1], [0, "a", 2], [1, "b", 3], [2, "b", 4]]
    assert grades["flickr8k-cf"].to_numpy().tolist() == [[1, "b", 0.5], [3, "a", 1]]


def test_a_half_of_the_images_depends_on_the_seed_alone():
    images = pd.Series([f"image-{i}" for i in range(20)] * 2)
    half = agreement.first_half(images, seed=1)
    assert len(half) == 10
    assert half == agreement.first_half(images[::-1], seed=1) != agreement.first_half(images, seed=2)


def test_agreement_with_known_orders():
    _, grades = agreement.judged_pairs(JUDGEMENTS)
    table = agreement.agreement(pd.DataFrame({"right": [0, 1, 2, 3], "wrong": [3, 2, 1, 0]}), grades)
    assert table["flickr8k-cf"].tolist() == [1, -1]
    # Five of six pairs of grades are ordered; tau-c counts them against n^2 (m - 1) / 2m, n = 4 and m = 3 distinct scores.
    assert table["flickr8k-expert"].tolist() == pytest.approx([5 / (16 / 3), -5 / (16 / 3)])
    assert table["mean"].tolist() == pytest.approx(table[list(JUDGEMENTS)].mean(axis=1).tolist())


def test_whitening_helps_where_a_direction_without_meaning_is_strong():
    rng = np.random.default_rng(1)
    classes = np.eye(4, 8)

    def photos(kinds):
        return unit(classes[kinds] + np.outer(rng.normal(scale=20, size=len(kinds)), np.eye(8)[7]))

    kinds, sources = rng.integers(4, size=200), rng.integers(4, size=30)
    pairs = np.array([(c, s) for c in range(4) for s in range(30)])
    study = Study(unit(classes[:, :4]), photos(sources), unit(classes[kinds, :4])[:, None], photos(kinds), pairs)
    grade = (pairs[:, 0] == sources[pairs[:, 1]]).astype(float)
    raw, white = (
        kendalltau(study.scores(Setting(k=30, decay=1.0, center=True, whiten=w))["qir"], grade).statistic
        for w in (0.0, 1.0)
    )
    assert white > 0.5 > raw + 0.2


def test_intervals_contain_their_values_and_within_compares_captions_of_one_image():
    rng = np.random.default_rng(2)
    image = np.repeat(np.arange(40), 5)
    grade = rng.integers(4, size=200)  # with ties, so that tau-b and tau-c differ
    frame = pd.DataFrame({"pair": np.arange(200), "image": image, "grade": grade})
    grades = dict.fromkeys(agreement.VARIANTS, frame)
    # Right within each image; between images the order is another.
    scores = pd.DataFrame({"score": grade + 10 * rng.permutation(40)[image]})
    cells = agreement.with_intervals(scores, grades, seed=0, resamples=100)["score"]
    for name, cell in cells.items():
        assert cell["tau"]["value"] == agreement.agreement(scores, grades).loc["score", name]
        low, high = cell["tau"]["interval"]
        assert low < cell["tau"]["value"] < high
        assert cell["within"]["value"] == 1 > 3 * cell["tau"]["value"]
    assert cells["flickr8k-expert"]["tau"] != cells["flickr8k-cf"]["tau"]


@pytest.mark.parametrize(
    ("interval", "expected"),
    [([0.6, 0.7], "above"), ([0.1, 0.2], "below"), ([0.3, 0.6], "not distinguishable from")],
)
def test_the_findings_compare_with_clipscore_by_interval(interval, expected):
    cell = {"value": sum(interval) / 2, "interval": interval}
    names = ("published", "chosen", "text similarity to references")
    cells = {name: {b: {"tau": cell, "within": cell} for b in agreement.VARIANTS} for name in names}
    text = findings.judgement_findings(cells, agreement.REPORTED)
    assert f"{expected} its 51.2 on Expert and {expected} its 34.4 on CrowdFlower" in text
