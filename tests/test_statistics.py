"""Intervals and correlations against scipy and against what is known exactly."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats

from cim.evaluation import correlation, facts as evaluation, statistics
from cim.report import tables as report
from cim.world.scoring import COUNTS, FACTS


def test_the_bootstrap_interval_is_that_of_scipy(rng):
    x = rng.exponential(size=200)
    ours = statistics.mean_with_interval(x, rng, 5000)
    theirs = scipy_stats.bootstrap((x,), np.mean, n_resamples=5000, method="percentile", rng=np.random.default_rng(1))
    assert ours["value"] == pytest.approx(x.mean())
    np.testing.assert_allclose(ours["interval"], theirs.confidence_interval, atol=0.02)


def test_correlations_are_those_of_scipy(rng):
    x = rng.normal(size=300)
    y = x + rng.normal(size=300)
    found = statistics.correlations(x, y, np.arange(300), rng, 2000)
    assert found["pearson"]["value"] == pytest.approx(scipy_stats.pearsonr(x, y).statistic)
    assert found["spearman"]["value"] == pytest.approx(scipy_stats.spearmanr(x, y).statistic)
    theirs = scipy_stats.pearsonr(x, y).confidence_interval()
    np.testing.assert_allclose(found["pearson"]["interval"], [theirs.low, theirs.high], atol=0.03)


def test_captions_of_one_image_are_not_counted_as_many(rng):
    x, y = rng.normal(size=50), rng.normal(size=50)
    few = statistics.correlations(x, y, np.arange(50), rng)["pearson"]["interval"]
    copies = statistics.correlations(np.repeat(x, 10), np.repeat(y, 10), np.repeat(np.arange(50), 10), rng)["pearson"][
        "interval"
    ]
    np.testing.assert_allclose(copies, few, atol=0.06)


def test_intervals_cover(rng):
    hits = sum(
        low <= 0 <= high
        for low, high in (statistics.mean_with_interval(rng.normal(size=60), rng, 400)["interval"] for _ in range(300))
    )
    assert 0.89 < hits / 300 <= 0.99


def counts_of(values: dict, n: int, method: str, seed: int = 0) -> pd.DataFrame:
    columns = {f"{f}_{c}": 1.0 for f in FACTS for c in COUNTS} | {
        "yes_right": 1.0, "yes_asked": 2.0, "no_right": 0.0, "no_asked": 3.0, "told": 2.0, "words": 7.0, "one": 1.0,
    }  # fmt: skip
    return pd.DataFrame({"method": method, "seed": seed, "image_id": [f"i{i}" for i in range(n)], **columns, **values})


def test_metrics_by_hand():
    counts = pd.concat(
        [counts_of({}, 4, "base"), counts_of({"relation_correct": 0.0, "relation_recalled": 0.0}, 4, "cim")]
    )
    found = evaluation.evaluate(counts, 0, 200)
    base, cim = found["base"]["metrics"], found["cim"]["metrics"]
    assert base["relation_f1"]["value"] == 1
    assert cim["relation_f1"]["value"] == 0
    assert cim["relation_recall"]["gain"] == -1
    assert cim["all_recall"]["value"] == 0.75
    assert base["qa_accuracy"]["value"] == pytest.approx(1 / 5)
    assert base["qa_balanced"]["value"] == pytest.approx((1 / 2 + 0) / 2)
    assert base["qa_told"]["value"] == pytest.approx(2 / 5)
    assert report.clear_of(found, "base", "cim", "relation_recall")
    assert not report.clear_of(found, "cim", "base", "object_recall")


def test_seeds_that_differ_widen_the_interval(rng):
    n = 50
    told = rng.integers(0, 2, n).astype(float)
    base = counts_of({"relation_recalled": told}, n, "base")
    alike = [counts_of({"relation_recalled": told}, n, "cim", s) for s in range(3)]
    unlike = [counts_of({"relation_recalled": told * (s > 0)}, n, "cim", s) for s in range(3)]
    width = []
    for runs in (alike, unlike):
        low, high = evaluation.evaluate(pd.concat([base, *runs]), 0, 1000)["cim"]["metrics"]["relation_recall"][
            "interval"
        ]
        width.append(high - low)
    assert width[1] > 1.5 * width[0]


def test_graded_captions_have_the_quality_they_should(world, rng):
    table = correlation.graded_captions(world.split("test"), rng)
    for _, part in table.groupby("ladder"):
        means = part.groupby("level")["quality"].mean()
        assert means.is_monotonic_increasing
    assert (table[table["label"] == "0 errors"]["quality"] == 1).all()


def test_summary_finds_a_score_that_follows_and_one_that_does_not(world, rng):
    table = correlation.graded_captions(world.split("test"), rng)
    table["grc"], table["qir"] = table["quality"], rng.normal(size=len(table))
    _, follows = correlation.summarise(table, rng, 200)
    rows = follows[follows["correlation"] == "spearman"].set_index(["ladder", "score"])
    assert rows.loc[("fineness", "grc"), "value"] == pytest.approx(1)
    assert rows.loc[("fineness", "grc"), "by_level"] > 0.9
    assert abs(rows.loc[("fineness", "qir"), "value"]) < 0.5


def test_grc_of_unrelated_images_is_near_one_over_the_root_of_k(tmp_path, rng):
    import pyarrow as pa

    from cim.gallery.store import Gallery
    from cim.gallery.search import ExactSearch

    vectors = rng.normal(size=(3000, 64)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    unrelated, texts = vectors[rng.permutation(3000)], vectors.astype(np.float16)
    table = pa.table({"image_id": [str(i) for i in range(3000)]})
    gallery = Gallery(tmp_path, {}, table, texts, unrelated, ExactSearch(texts))
    table = correlation.grc_by_density(gallery, {"q": vectors[:200]}, None, [0.001, 1.0], [3, 5], rng)
    assert set(table[table["fraction"] == 0.001]["k"]) == set()  # three rows: too few for k + 1
    for k, grc in table.set_index("k")["grc"].items():
        assert grc == pytest.approx(k**-0.5, abs=0.02)


def test_rounding_is_no_variation(rng):
    assert not statistics.varies(1 + 1e-8 * rng.normal(size=40))
    assert statistics.varies(1 + 1e-4 * rng.normal(size=40))
