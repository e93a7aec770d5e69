"""Intervals and correlations against scipy and against what is known exactly."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats as scipy_stats

from cim.data.manifest import Manifest
from cim.evaluation import correlation, statistics
from cim.evaluation import facts as evaluation
from cim.scorer import RewardSettings, Scorer
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


def counts_of(n: int, **values) -> pd.DataFrame:
    columns = {f"{f}_{c}": 1.0 for f in FACTS for c in COUNTS} | {
        "yes_right": 1.0, "yes_asked": 2.0, "no_right": 0.0, "no_asked": 3.0, "answered": 2.0, "words": 7.0, "one": 1.0,
    }  # fmt: skip
    return pd.DataFrame(columns | values, index=range(n))


def test_metrics_by_hand():
    runs = {"base": {0: counts_of(4)}, "cim": {0: counts_of(4, relation_correct=0.0, relation_recalled=0.0)}}
    found = evaluation.evaluate(runs, 0, 200)
    base, cim = found["base"]["metrics"], found["cim"]["metrics"]
    assert base["relation_f1"]["value"] == 1
    assert cim["relation_f1"]["value"] == 0
    assert cim["relation_recall"]["gain"] == -1
    assert cim["relation_recall"]["gain_interval"] == [-1, -1]
    assert cim["relation_recall"]["relative"] == {"value": -1, "interval": [-1, -1]}
    assert cim["all_recall"]["value"] == 0.75
    assert base["qa_accuracy"]["value"] == pytest.approx(1 / 5)
    assert base["qa_balanced"]["value"] == pytest.approx((1 / 2 + 0) / 2)
    assert base["qa_answered"]["value"] == pytest.approx(2 / 5)
    assert "against" not in found["base"]


def test_the_subject_is_compared_with_every_other_paired_by_image(rng):
    recalled = rng.integers(0, 2, 60).astype(float)
    runs = {name: {0: counts_of(60, relation_recalled=recalled * share)} for name, share in
            {"base": 0.2, "cim": 0.8, "grc": 0.7}.items()}  # fmt: skip
    found = evaluation.evaluate(runs, 0, 500, subject="cim")
    against = found["cim"]["against"]
    assert list(against) == ["base", "grc"]
    cell = against["grc"]["relation_recall"]
    assert cell["value"] == pytest.approx(0.1 * recalled.mean())
    # Of the same images: far narrower than the two intervals, which overlap.
    own, other = (found[name]["metrics"]["relation_recall"]["interval"] for name in ("cim", "grc"))
    assert own[0] < other[1]
    assert cell["interval"][0] > 0
    assert cell["p"] < 0.001
    gained = found["cim"]["metrics"]["relation_recall"]
    assert against["base"]["relation_recall"]["interval"] == gained["gain_interval"]
    # Both are a constant times the same images' recall, so their ratio is 4 in every resample.
    assert gained["relative"]["value"] == pytest.approx(3)
    assert gained["relative"]["interval"] == pytest.approx([3, 3])


def test_seeds_that_differ_widen_the_interval(rng):
    n = 50
    recalled = rng.integers(0, 2, n).astype(float)
    alike = {s: counts_of(n, relation_recalled=recalled) for s in range(3)}
    unlike = {s: counts_of(n, relation_recalled=recalled * (s > 0)) for s in range(3)}
    width = []
    for runs in (alike, unlike):
        found = evaluation.evaluate({"base": {0: alike[0]}, "cim": runs}, 0, 1000)["cim"]
        assert found["seeds"] == [0, 1, 2]
        low, high = found["metrics"]["relation_recall"]["interval"]
        width.append(high - low)
    assert width[1] > 1.5 * width[0]


@pytest.mark.parametrize("n", [2, 3, 5])
def test_the_error_of_a_mean_over_few_seeds_is_not_too_small(rng, n):
    """Seeds that differ and images that do not: the standard error is s / sqrt(n), s with n - 1 in its denominator."""
    of_seeds = rng.normal(10, 1, n)
    counts = np.broadcast_to(of_seeds[:, None, None], (n, 4, 1))
    bootstrap = statistics.Bootstrap(4, {"cim": n}, 20_000, rng)
    found = bootstrap.estimates(
        "cim", np.concatenate([counts, np.ones_like(counts)], 2), lambda s: {"m": s[..., 0] / s[..., 1]}
    )
    assert found["m"].value == pytest.approx(of_seeds.mean())
    assert found["m"].samples.std() == pytest.approx(of_seeds.std(ddof=1) / np.sqrt(n), rel=0.03)


def test_a_bootstrap_counts_images_and_seeds_as_drawn(rng):
    bootstrap = statistics.Bootstrap(4, {"a": 1, "b": 2}, 50, rng)
    counts = rng.integers(0, 5, (2, 4, 2)).astype(float)
    found = bootstrap.estimates("b", counts, lambda sums: {"share": statistics.ratio(sums[..., 0], sums[..., 1])})
    for r in range(50):
        drawn = np.einsum("s,i,sic->c", bootstrap.seeds["b"][r], bootstrap.images[r], counts)
        np.testing.assert_allclose(found["share"].samples[r], drawn[0] / drawn[1] if drawn[1] else np.nan)
    assert found["share"].value == pytest.approx(counts[..., 0].sum() / counts[..., 1].sum())
    difference = found["share"] - found["share"]
    assert difference.cell() == {"value": 0, "interval": [0, 0]}


def test_cells_are_printed_with_their_intervals():
    cell = {"value": 0.5, "interval": [0.25, 0.75]}
    assert statistics.with_interval(cell) == "50.0 [25.0, 75.0]"
    assert statistics.with_interval(cell, 1, 2) == "0.50 [0.25, 0.75]"
    for undefined in ({"value": None, "interval": [None, None]}, {"value": 0.5, "interval": [np.nan, np.nan]}):
        assert statistics.with_interval(undefined) == "n/a"


def test_graded_captions_have_the_quality_they_should(world, rng):
    table = correlation.graded_captions(world.split("test"), rng)
    for _, part in table.groupby("ladder"):
        means = part.groupby("level")["quality"].mean()
        assert means.is_monotonic_increasing
    assert (table[table["label"] == "0 errors"]["quality"] == 1).all()


def test_summary_finds_a_score_that_follows_and_one_that_does_not(world, rng):
    table = correlation.graded_captions(world.split("test"), rng)
    table["grc"], table["qir"] = table["quality"], rng.normal(size=len(table))
    _, follows = correlation.summarize(table, rng, 200)
    rows = follows[follows["correlation"] == "spearman"].set_index(["ladder", "score"])
    assert rows.loc[("fineness", "grc"), "value"] == pytest.approx(1)
    assert rows.loc[("fineness", "qir"), "up"] < rows.loc[("fineness", "qir"), "steps"]
    _, follows = correlation.summarize(table.assign(grc=table["level"], qir=-table["level"]), rng, 200)
    assert follows.query("score == 'grc'").eval("up == steps and not down").all()
    assert follows.query("score == 'qir'").eval("down == steps and not up").all()
    assert abs(rows.loc[("fineness", "qir"), "value"]) < 0.5


def test_grc_of_unrelated_images_is_near_one_over_the_root_of_k(tmp_path, rng):
    import pyarrow as pa

    from cim.gallery.search import ExactSearch
    from cim.gallery.store import Gallery

    vectors = rng.normal(size=(3000, 64)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    unrelated, texts = vectors[rng.permutation(3000)], vectors.astype(np.float16)
    digests = [str(i // 2) for i in range(3000)]  # each image in two rows
    gallery = Gallery(tmp_path, {}, pa.table({"digest": digests}), texts, unrelated, ExactSearch(texts))
    none, queries = np.full(200, -1), {"q": vectors[:200]}
    table = correlation.grc_by_density(gallery, queries, none, [0.001, 1.0], [3, 5], rng)
    assert set(table[table["fraction"] == 0.001]["k"]) == set()  # three rows: too few for k + 1
    for k, grc in table.set_index("k")["grc"].items():
        assert grc == pytest.approx(k**-0.5, abs=0.02)
    own = np.arange(200)
    table = correlation.grc_by_density(gallery, queries, own, [1.0], [1], rng)
    nearest = gallery.search(vectors[:200], 1, own)
    assert not (nearest // 2 == own[:, None] // 2).any()
    assert table["grc"].tolist() == [pytest.approx(1)]


def test_rounding_breaks_no_tie(rng):
    score, judged = rng.integers(0, 3, 60).astype(float), rng.integers(0, 3, 60).astype(float)
    images, nearly = np.repeat(np.arange(10), 6), score + 1e-8 * rng.normal(size=60)
    for measure in (statistics.kendall, statistics.kendall_within):
        exact, rounded = (measure(s, judged, images, np.random.default_rng(0), 50) for s in (score, nearly))
        assert exact == rounded


def test_captions_of_no_image_have_no_tau():
    none = np.zeros(0)
    for measure in (statistics.kendall, statistics.kendall_within):
        assert np.isnan(measure(none, none, none, np.random.default_rng(0), 5)["value"])


def test_equal_values_but_for_rounding_are_not_significant(rng):
    assert statistics.Estimate(1e-16, 1e-17 * rng.normal(size=99)).p() == 1
    assert statistics.Estimate(1e-16, 0.1 * rng.normal(size=99)).p() == 1
    assert np.isnan(statistics.Estimate(1.0, np.full(9, np.nan)).p())


def test_rounding_is_no_variation(rng):
    assert not statistics.varies(1 + 1e-8 * rng.normal(size=40))
    assert statistics.varies(1 + 1e-4 * rng.normal(size=40))


def test_p_agrees_with_a_t_test_over_images_and_grows_with_the_spread_of_seeds(rng):
    def p(values):
        """Of the mean of (seeds, images) values."""
        bootstrap = statistics.Bootstrap(values.shape[1], {"cim": len(values)}, 5000, np.random.default_rng(0))
        counts = np.stack([values, np.ones_like(values)], axis=2)
        return bootstrap.estimates("cim", counts, lambda sums: {"mean": sums[..., 0] / sums[..., 1]})["mean"].p()

    one = rng.normal(0.2, 1, (1, 80))
    assert p(one) == pytest.approx(scipy_stats.ttest_1samp(one[0], 0).pvalue, abs=0.02)
    assert p(one + 1) < 1e-12
    # The same mean of each image, by seeds that agree and by seeds that do not.
    assert p(np.repeat(one, 4, axis=0)) == pytest.approx(p(one), rel=0.2)
    assert p(one + np.array([[-1.0], [-0.5], [0.5], [1.0]])) > 3 * p(one)
    assert statistics.Estimate(0.0, np.zeros(9)).p() == 1


def test_holm():
    assert statistics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert statistics.holm([0.6, 0.7]) == [1.0, 1.0]
    assert statistics.holm([]) == []


def test_the_source_image_may_be_retrieved_or_not(world, gallery, encoders):
    train = world.split("train")
    scorer = Scorer(gallery, *encoders, RewardSettings(k=2))
    scorer.add_sources(train)
    captions = train.captions, train.frame["image_id"].tolist()
    left_in = scorer.at(RewardSettings(k=2, exclude_source=False)).retrieval_scores(*captions)
    assert scorer.settings == RewardSettings(k=2)
    assert left_in["qir"].mean() > scorer.retrieval_scores(*captions)["qir"].mean()


def test_human_captions_become_ladders(rng):
    queries = {f"i{n}": [f"one two three four five {n}", f"six seven {n}"] for n in range(4)} | {"short": ["alone"]}
    frame = pd.DataFrame({"image_id": list(queries), "queries": [json.dumps(q) for q in queries.values()]})
    table = correlation.graded_captions(Manifest(frame, Path()), rng).set_index(["image_id", "ladder", "label"])[
        "caption"
    ]
    assert "short" not in table.index.get_level_values(0)
    assert table["i1", "fineness", "first two words"] == "one two"
    assert table["i1", "fineness", "all captions"] == "one two three four five 1 six seven 1"
    assert table["i1", "accuracy", "another image's"] != table["i1", "accuracy", "one caption"]


def test_spearman_metrics_are_those_of_the_table():
    columns = ["ladder", "score", "correlation", "value", "low", "high", "steps", "up", "down"]
    rows = [
        ("fineness", "grc", "pearson", 0.1, 0.0, 0.2, 5, 4, 0),
        ("fineness", "grc", "spearman", 0.4, 0.3, 0.5, 5, 4, 0),
    ]
    metrics = correlation.spearman_metrics(pd.DataFrame(rows, columns=columns))
    assert metrics == {"fineness": {"grc": {"value": 0.4, "interval": [0.3, 0.5], "steps": 5, "up": 4, "down": 0}}}
