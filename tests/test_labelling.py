"""The study of labels: SFT on fewer images and as a variant, its comparison with CIM, and what one annotator says."""

import json
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from cim.data.manifest import read_manifest
from cim.errors import CimError
from cim.evaluation import annotation, comparison, labelling
from cim.evaluation.capture.graphs import SceneGraph
from cim.evaluation.facts import fact_counts, metrics_of
from cim.evaluation.settings import LabelSettings
from cim.pipeline.compose import compose
from cim.runs import with_variant
from cim.train import sft
from cim.train.__main__ import main
from cim.train.job import INPUTS, Job
from cim.train.preflight import plan
from conftest import ROOT, change

ARTIFACTS = Path("artifacts")
SETTINGS = LabelSettings(
    of=["test"], split="train", held_out=0, levels={"usual": {"name": 0.9}}, annotators=2, seed=0, resamples=2000
)


def test_a_variant_of_sft_trains_on_its_images_and_annotators(workspace, capsys, monkeypatch):
    """By the command that stage sft starts; its weights are those of SFT with the same values."""
    changes = {"images": 8, "annotators": {"colour": 0.0}}
    params = change(variants={"few": {"sft": changes}})
    monkeypatch.setattr(sys, "argv", ["cim.train", "--run", "few-0"])
    main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines if line.startswith("step")] == ["step 1/3", "step 2/3", "step 3/3"]
    few = json.loads((ARTIFACTS / "train/few-0" / INPUTS).read_text())["inputs"]
    assert few["sft"] == params["sft"] | changes
    train = read_manifest(ARTIFACTS / "dataset/manifest.parquet").split("train")
    drawn = np.sort(np.random.default_rng(0).permutation(16)[:8])
    assert list(drawn) != list(range(8))
    assert few["images"] == [train.take(drawn).digest, train.take([]).digest]
    card = (ARTIFACTS / "train/few-0/README.md").read_text()
    assert "Fine-tuned on captions" in card
    assert "images: 8" in card
    sft.train("few-0", params, ARTIFACTS)
    assert "kept: artifacts/train/few-0" in capsys.readouterr().out
    sft.train("sft-0", params | {"sft": params["sft"] | changes}, ARTIFACTS)
    weights = [(ARTIFACTS / "train" / run / "model.safetensors").read_bytes() for run in ("few-0", "sft-0")]
    assert weights[0] == weights[1]
    # Its images are part of what a run was made from, so others train it again.
    for images, expected in ((12, np.sort(np.random.default_rng(0).permutation(16)[:12])), (None, range(16))):
        job = Job("few-0", change(variants={"few": {"sft": changes | {"images": images}}}), ARTIFACTS)
        assert job.images.digest == train.take(expected).digest != few["images"][0]


def test_a_plan_knows_the_labelled_images(workspace):
    params = change(variants={"few": {"sft": {"images": 8}}})
    lines = "\n".join(plan("few-0", params, ARTIFACTS, 1))
    assert "8 images to train on" in lines
    assert "gallery" not in lines
    params["train"]["validation"] = 2
    for images in (15, 17):
        params["variants"]["few"]["sft"]["images"] = images
        with pytest.raises(CimError, match=f"sft.images={images} is more than the 14 images of split 'train'"):
            plan("few-0", params, ARTIFACTS, 1)
    assert "14 images" in "\n".join(plan("cim-0", params, ARTIFACTS, 1))


def test_a_variant_changes_cim_or_sft():
    params = {"reward": {"k": 3}, "sft": {"lr": 1.0, "annotators": {"name": 0.9}}, "train": {}}
    variants = {"few": {"sft": {"annotators": {"size": 1.0}}}, "wide": {"reward": {"k": 9}}}
    changed, method = with_variant(params | {"variants": variants}, "few")
    assert (changed["sft"], changed["reward"], method) == ({"lr": 1.0, "annotators": {"size": 1.0}}, {"k": 3}, "sft")
    assert with_variant(params | {"variants": variants}, "wide")[1] == "cim"
    with pytest.raises(
        CimError,
        match=r"variants.both .* either groups reward, train and encoders \(CIM, or the reward that `of` names\) or "
        r"group sft \(SFT\), not both",
    ):
        with_variant(params | {"variants": {"both": {"sft": {}, "reward": {}}}}, "few")


def test_the_profile_is_a_grid_of_levels_images_and_slips():
    params = compose(["profile=labels"], ROOT / "conf")
    methods = dict.fromkeys(run.rpartition("-")[0] for run in params["runs"]["sft"])
    assert params["runs"]["sft"] == [f"{method}-{seed}" for method in methods for seed in range(3)]
    assert set(methods) == {"sft", *params["variants"]}
    table = labelling.labels_of_methods(methods, params["sft"], params["variants"], params["labels"]["levels"], 1200)
    grid = {(level, images, 0.03) for level in ("terse", "usual", "complete") for images in (48, 192, 576, 1200)}
    slips = {("usual", 1200, slip) for slip in (0.0, 0.1, 0.2)}
    assert len(table) == len(grid | slips)
    assert set(table[["level", "images", "slip_rate"]].itertuples(index=False, name=None)) == grid | slips
    assert table["level"].unique().tolist() == ["terse", "usual", "complete"]
    usual = table[table["level"] == "usual"]
    assert usual["method"].tolist() == ["usual_48", "usual_192", "usual_576", "slip_0", "sft", "slip_10", "slip_20"]
    assert not [images for images in table["images"] if images % params["sft"]["batch_size"]]


def test_annotators_of_no_level_have_their_methods_name():
    variants = {"odd": {"sft": {"annotators": {"size": 0.5}}}, "wide": {"reward": {"k": 9}}}
    given = {"annotators": {"name": 0.9}, "slip_rate": 0.1, "images": 4}
    table = labelling.labels_of_methods(["base", "cim", "wide", "odd", "sft"], given, variants, SETTINGS.levels, 10)
    assert table.to_numpy().tolist() == [["sft", "usual", 4, 0.1], ["odd", "odd", 4, 0.1]]


@pytest.fixture
def counts(world, rng):
    """Facts of the test images by the truth with words left out: CIM leaves out a quarter of them."""
    test = world.split("test")

    def run(kept: float):
        thinned = [" ".join(w for w in caption.split() if rng.random() < kept) for caption in test.captions]
        return fact_counts(dict(zip(test.frame["image_id"], thinned, strict=True)), test)

    shares = {"base": 0.4, "sft": 1.0, "even": 0.75, "cim": 0.75}
    return {
        method: {seed: run(kept) for seed in range(1 if method == "base" else 3)} for method, kept in shares.items()
    }


def slow_f1(runs) -> float:
    """F1 over the facts of runs and images, by loops."""
    stated = correct = recalled = true = 0
    for run in runs:
        for _, row in run.iterrows():
            for fact in ("object", "attribute", "relation", "background"):
                stated, correct = stated + row[f"{fact}_stated"], correct + row[f"{fact}_correct"]
                recalled, true = recalled + row[f"{fact}_recalled"], true + row[f"{fact}_true"]
    precision, recall = correct / stated, recalled / true
    return 2 * precision * recall / (precision + recall)


def test_differences_to_cim_are_paired_by_image(counts, rng):
    table = comparison.compare(counts, SETTINGS.seed, SETTINGS.resamples)
    f1 = table[table["metric"] == "all_f1"].set_index("method")
    assert f1.index.tolist() == ["base", "sft", "cim", "even"]
    assert f1.loc["cim", ["difference", "difference_low", "difference_high"]].tolist() == [0, 0, 0]
    assert f1["verdict"].to_dict() == {
        "base": "below", "sft": "above", "cim": "not distinguishable", "even": "not distinguishable",
    }  # fmt: skip
    for method, runs in counts.items():
        assert f1.loc[method, "value"] == pytest.approx(slow_f1(runs.values()))
        assert f1.loc[method, "difference"] == pytest.approx(slow_f1(runs.values()) - slow_f1(counts["cim"].values()))
    drawn = []
    for _ in range(400):
        images = rng.integers(0, 8, 8)
        both = []
        for method in ("sft", "cim"):
            seeds = rng.integers(0, 3, 3)
            sums = sum(counts[method][seed].iloc[images].sum() for seed in seeds)
            both.append(metrics_of(sums)["all_f1"])
        drawn.append(both[0] - both[1])
    expected = np.quantile(drawn, [0.025, 0.975])
    assert f1.loc["sft", ["difference_low", "difference_high"]].tolist() == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize(
    ("verdicts", "first"),
    [("above above above", 1), ("below above above", 10), ("above below above", 100), ("above above below", None),
     ("below not distinguishable", None)],
)  # fmt: skip
def test_sft_overtakes_where_it_stays_above(verdicts, first):
    verdicts = verdicts.replace("not ", "not_").split()
    points = pd.DataFrame({"images": [10**i for i in range(len(verdicts))], "verdict": verdicts})
    assert labelling.overtakes(points.sample(frac=1, random_state=0)) == first


def test_findings_name_the_frontier(counts):
    variants = {"even": {"sft": {"images": 4}}, "slip_0": {"sft": {"slip_rate": 0.0}}}
    counts = counts | {"slip_0": counts["sft"]}
    given = {"annotators": {"name": 0.9}, "slip_rate": 0.1, "images": None}
    labelled = labelling.labels_of_methods(counts, given, variants, SETTINGS.levels, 16)
    text = labelling.findings(comparison.compare(counts, SETTINGS.seed, SETTINGS.resamples), labelled)
    assert (
        "With `usual` annotators SFT overtakes CIM with 16 labelled images (not distinguishable at 4; above at 16)."
        in text
    )
    assert "By slip rate, with 16 images of `usual` annotators: above at 0 and 0.1." in text
    assert text.startswith("F1 of all facts: base ")


def graph(objects: str, attributes=(), relations=()) -> SceneGraph:
    given = {name: words.split() for name, words in dict(attributes).items()}
    return SceneGraph.of({"objects": objects.split(), "attributes": given, "relations": relations})


def test_what_one_caption_says_of_all():
    """Objects car, dog, tree: two of three and one of three. Facts: four and three of seven."""
    one = graph("car dog", {"car": "red"}, [("car", "near", "dog")])
    other = graph("tree", {"tree": "big old"})
    row = annotation.said_by_one([(one, other)]).iloc[0]
    assert row["object_share"] == pytest.approx((2 / 3 + 1 / 3) / 2)
    assert row["fact_share"] == pytest.approx((4 / 7 + 3 / 7) / 2)
    assert (row["compared"], row["contradicted"]) == (0, 0)


@pytest.mark.parametrize(
    ("a", "b", "compared", "contradicted"),
    [
        ("red", "blue", 1, 1),
        ("red", "red", 1, 0),
        ("red", "red blue", 1, 0),
        ("gray", "grey", 1, 0),
        ("two", "2", 1, 0),
        ("two", "three", 1, 1),
        ("big", "large", 1, 0),
        ("big red", "little blue", 2, 2),
        ("big red", "tiny red", 2, 1),
        ("red", "big", 0, 0),
        ("wet", "dry", 0, 0),  # of no kind
    ],
)
def test_contradictions(a, b, compared, contradicted):
    pair = graph("car", {"car": a}), graph("car", {"car": b})
    row = annotation.said_by_one([pair]).iloc[0]
    assert (row["compared"], row["contradicted"]) == (compared, contradicted)
    assert annotation.said_by_one([(graph("car", {"car": a}), graph("bus", {"bus": b}))]).iloc[0]["compared"] == 0


def test_shares_and_contradictions_equal_a_slow_computation(rng):
    words = ["red", "blue", "big", "small", "two", "wet"]

    def random_graph() -> SceneGraph:
        objects = [name for name in "abc" if rng.random() < 0.6]
        attributes = {name: [w for w in words if rng.random() < 0.3] for name in objects}
        relations = [(a, "on", b) for a, b in combinations(objects, 2) if rng.random() < 0.5]
        return SceneGraph.of({"objects": objects, "attributes": attributes, "relations": relations})

    images = [[random_graph() for _ in range(4)] for _ in range(40)]
    images.append([graph("")] * 4)
    kinds = {"colour": {"red", "blue"}, "size": {"big", "small"}, "number": {"two"}}
    table = annotation.said_by_one(images)
    for own, row in zip(images, table.itertuples(), strict=True):
        facts = [
            {*g.objects} | {*g.relations} | {(name, w) for name in g.attributes for w in g.attributes[name]}
            for g in own
        ]
        union = {fact for stated in facts for fact in stated}
        shares = [sum(fact in stated for fact in union) / len(union) for stated in facts] if union else [0]
        assert row.fact_share == pytest.approx(np.mean(shares))
        assert row.any_fact == bool(union)
        compared = contradicted = 0
        for i, j in combinations(range(4), 2):
            for name in "abc":
                for of_kind in kinds.values():
                    first, second = (of_kind & {*g.attributes.get(name, ())} for g in (own[i], own[j]))
                    compared += bool(first and second)
                    contradicted += bool(first and second and not first & second)
        assert (row.compared, row.contradicted) == (compared, contradicted)
    cells = annotation.one_annotator(table, seed=0, resamples=200)
    assert cells["facts"]["value"] == pytest.approx(table["fact_share"][:40].sum() / table["any_fact"].sum())
    assert cells["contradictions"]["value"] == pytest.approx(table["contradicted"].sum() / table["compared"].sum())
    for cell in cells.values():
        assert cell["interval"][0] < cell["value"] < cell["interval"][1]
    assert "% (people)" in annotation.one_annotator_text({"people": cells})


def test_objects_that_are_alike_are_one():
    people = graph("man hat", {"man": "big"}), graph("guy", {"guy": "small"}, [("guy", "in", "hat")])
    alike = {"man", "guy"}
    row = annotation.said_by_one([people], lambda a, b: a == b or {a, b} == alike).iloc[0]
    assert row["object_share"] == pytest.approx((2 / 2 + 1 / 2) / 2)
    assert (row["compared"], row["contradicted"]) == (1, 1)
    assert annotation.said_by_one([people]).iloc[0]["compared"] == 0


def test_nobody_says_anything():
    cells = annotation.one_annotator(annotation.said_by_one([[graph(""), graph("")]]), seed=0, resamples=100)
    assert all(np.isnan(cell["value"]) for cell in cells.values())
    assert "n/a" in annotation.one_annotator_text({"people": cells})
