"""Several captions of one image: choosing among them, and how scores agree with their quality."""

import json
from itertools import combinations, pairwise

import numpy as np
import pandas as pd
import pytest

from cim.data.manifest import Manifest
from cim.evaluation import attacks
from cim.evaluation.candidates import (
    FactScorer,
    best_of,
    choose_setting,
    compare_scores,
    quality_of,
    score_candidates,
)
from cim.evaluation.caption_metrics import cider
from cim.report import figures, findings
from cim.scorer import RewardSettings, Scorer
from cim.world.scoring import quality, stated_facts
from conftest import with_copy


def slow_best_of(n, score, quality):
    """Every draw of n captions, one after the other; of equal scores the mean quality."""
    out = []
    for own, good in zip(score, quality, strict=True):
        values = []
        for draw in combinations(range(len(own)), n):
            top = max(own[i] for i in draw)
            values.append(np.mean([good[i] for i in draw if own[i] == top]))
        out.append(np.mean(values))
    return np.array(out)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_best_of_is_the_mean_over_all_draws(rng, n):
    score, quality = rng.normal(size=(20, 5)), rng.normal(size=(20, 5))
    np.testing.assert_allclose(best_of(n, score, quality), slow_best_of(n, score, quality))


def test_equal_scores_choose_at_random():
    score, quality = np.array([[1.0, 1.0, 0.0]]), np.array([[4.0, 0.0, 9.0]])
    # Draws of two: both of the equal ones (2), either with the third (4 or 0).
    assert best_of(2, score, quality) == pytest.approx([2.0])
    assert best_of(3, np.zeros((1, 3)), quality) == pytest.approx([13 / 3])


def test_a_perfect_score_a_random_one_and_its_opposite(rng):
    quality = rng.normal(size=(300, 6))
    table = compare_scores(
        {"perfect": quality, "opposite": -quality, "noise": rng.normal(size=quality.shape)}, quality, [1, 6]
    )
    cells = table.set_index(["score", "metric"])
    value = cells["value"]
    assert value["perfect", "tau"] == value["perfect", "pearson"] == pytest.approx(1)
    assert value["opposite", "tau"] == pytest.approx(-1)
    assert value["perfect", "best_6"] == pytest.approx(quality.max(1).mean())
    assert value["opposite", "best_6"] == pytest.approx(quality.min(1).mean())
    assert value["perfect", "best_1"] == pytest.approx(quality.mean())
    assert value["perfect", "gain_1"] == pytest.approx(0, abs=1e-12)
    for metric in ("tau", "pearson", "gain_6"):
        assert cells.loc[("noise", metric), "low"] < 0 < cells.loc[("noise", metric), "high"]


def test_sampled_captions_are_reproducible_and_their_likelihood_is_the_models(captioner_folder, world, monkeypatch):
    """The likelihood that sampling reports equals the one that a forward pass on the finished caption gives."""
    import torch

    from cim.captioners.generate import sample_captions
    from cim.captioners.models import ModelSettings, load_model, prompt_inputs
    from cim.images import open_image

    settings = ModelSettings(name=str(captioner_folder), prompt="describe the image.")
    model, processor = load_model(settings, torch.device("cpu"))
    test, generated, generate = world.split("test").take(range(3)), [], model.generate

    def recorded(**options):
        generated.append((out := generate(**options)).sequences)
        return out

    monkeypatch.setattr(model, "generate", recorded)
    first = sample_captions(model, processor, test, settings, 4, 48, progress=False)
    pd.testing.assert_frame_equal(first, sample_captions(model, processor, test, settings, 4, 48, progress=False))
    other = sample_captions(model, processor, test, settings, 4, 48, seed=1, progress=False)
    assert first["caption"].tolist() != other["caption"].tolist()
    assert first["image_id"].tolist() == [i for i in test.frame["image_id"] for _ in range(4)]
    ends = {processor.tokenizer.eos_token_id, processor.tokenizer.pad_token_id}
    for row, path, tokens in zip(first.itertuples(), np.repeat(test.image_paths, 4), generated[0], strict=True):
        inputs = prompt_inputs(processor, [open_image(path)], settings)
        prompt = inputs["input_ids"].shape[1]
        answer = tokens[prompt:].tolist()
        answer = answer[: next((i for i, token in enumerate(answer) if token in ends), 48) + 1]
        inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([answer])], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        with torch.inference_mode():
            logits = model(**inputs).logits[0, prompt - 1 : -1].float().log_softmax(-1)
        expected = logits.gather(-1, torch.tensor(answer)[:, None]).mean().item()
        assert row.likelihood == pytest.approx(expected, abs=1e-3)
        assert row.caption == processor.tokenizer.decode(answer, skip_special_tokens=True).strip()


@pytest.fixture
def table(rng):
    quality = rng.normal(size=(40, 4))
    scores = {
        "cim": quality + rng.normal(size=quality.shape),
        "words": rng.normal(size=quality.shape),
        "quality": quality,
    }
    parts = {model: compare_scores(scores, quality, [1, 4], resamples=100) for model in ("base-0", "cim-0")}
    return pd.concat(parts, names=["model"]).reset_index("model").reset_index(drop=True)


def test_figures_show_every_model_and_score(table):
    agreement, best = figures.agreement_figure(table, "F1"), figures.best_of_figure(table, "F1")
    assert [ax.get_title() for ax in agreement.axes] == [ax.get_title() for ax in best.axes]
    assert [tick.get_text() for tick in agreement.axes[0].get_yticklabels()] == ["words", "CIM"]
    legend = [text.get_text() for text in best.axes[-1].get_legend().get_texts()]
    assert legend == ["CIM", "words", "quality"]


def test_the_figure_of_agreement_grows_with_its_scores(table):
    """Labels keep their distance; a second row of models takes nothing from the first, where the legend is."""
    few = figures.agreement_figure(table, "F1")
    cells = table[(table["model"] == "cim-0") & (table["score"] == "words")]
    rows = [cells.assign(model=f"m{i}", score=f"score {j}") for i in range(4) for j in range(23)]
    many = figures.agreement_figure(pd.concat(rows), "F1")
    assert few.get_figheight() == pytest.approx(3.4)
    many.canvas.draw()
    axes = [ax for ax in many.axes if ax.get_visible()]
    assert len({round(ax.get_position().width, 3) for ax in axes}) == 1
    assert [ax.get_legend() is not None for ax in axes] == [False, False, True, False]
    boxes = [label.get_window_extent() for label in axes[0].get_yticklabels()]
    assert all(low.y1 < high.y0 for low, high in pairwise(boxes))
    assert all(ax.get_xticklabels()[0].get_visible() for ax in axes)


def test_findings_name_the_best_score_and_the_worst_attack(table):
    attacked = pd.DataFrame(
        [
            ("cim", "honest", 1, 0.5),
            ("cim", "copied", 1, 0.75),
            ("cim", "vague", 1, 0.1),
            ("words", "repeated", 1, 1.0),
        ],
        columns=["score", "attack", "mean", "share"],
    )
    chosen = {
        "setting": "K = 9",
        "tau": {
            name: {"base-0": {"value": tau, "interval": [0.1, 0.9]}} for name, tau in (("K = 9", 0.5), ("cim", 0.4))
        },
    }
    said = findings.samples_findings(table, "F1", attacked, chosen)
    assert "K = 9 agrees best on a random half" in said
    assert "K = 9 0.50 [0.10, 0.90] (base-0); cim 0.40 [0.10, 0.90] (base-0)" in said
    cells = table.set_index(["model", "score", "metric"])["value"]
    assert f"cim agrees best with F1 within an image (tau {cells['base-0', 'cim', 'tau']:.2f}" in said
    assert f"by the truth {cells['cim-0', 'quality', 'gain_4']:.3f}" in said
    assert "cim (copied: 75%), words (repeated: 100%)" in said


def test_the_attack_heatmap_leaves_the_honest_caption_out(rng):
    variants = attacks.attacks(["a red owl sits", "two dogs run"], ["x y", "z"], ["a b"])
    attacked = attacks.preferred(
        variants, lambda texts: {"words": np.array([len(t.split()) for t in texts])}, resamples=100
    )
    [ax, *_] = figures.attacks_figure(attacked).axes
    shown = [tick.get_text() for tick in ax.get_xticklabels()]
    assert "honest" not in shown
    assert "copied" in shown


def test_a_setting_is_chosen_on_one_half_and_reported_on_the_other(rng):
    """The better of two settings is chosen; one that is perfect on the other half only is not."""
    quality = rng.normal(size=(40, 5))
    shuffled = np.random.default_rng(3).permutation(40)
    late = rng.normal(size=quality.shape)
    late[shuffled[20:]] = quality[shuffled[20:]]
    scores = {"good": quality + 0.3 * rng.normal(size=quality.shape), "late": late, "cim": -quality, "words": quality}
    chosen = choose_setting({"m": scores | {"quality": quality}}, ["cim", "good", "late"], seed=3, resamples=100)
    assert chosen["setting"] == "good"
    reported = shuffled[20:]
    alone = compare_scores({"good": scores["good"][reported]}, quality[reported], [1], resamples=100)
    cell = chosen["tau"]["good"]["m"]
    assert cell["value"] == pytest.approx(alone.set_index("metric").loc["tau", "value"])
    assert cell["interval"][0] < cell["value"] < cell["interval"][1]
    assert chosen["tau"]["cim"]["m"]["value"] == pytest.approx(-1)


@pytest.fixture
def scorer(gallery, encoders):
    return Scorer(gallery, *encoders, RewardSettings())


def test_every_score_of_candidates_is_that_of_a_plain_scorer(gallery, encoders, world, rng):
    """At the setting that it names; captions may repeat, of one image and of several, and be empty."""
    train = world.split("train").take(range(4))
    ids, own, others = train.frame["image_id"].tolist(), train.captions, np.roll(train.captions, 1).tolist()
    frame = pd.DataFrame({"image_id": [*ids, *ids, *ids, ids[0]], "caption": [*own, *others, *own, ""]})
    frame["likelihood"] = rng.normal(size=len(frame))
    asked = frame["caption"].tolist(), frame["image_id"].tolist()
    settings = RewardSettings(k=2)

    def plain(settings, kind=Scorer):
        scorer = kind(gallery, *encoders, settings)
        scorer.add_sources(train)
        return scorer

    scorer, rewards = plain(settings), {"wide": RewardSettings(k=6, decay=0.9), "soft": RewardSettings(temperature=0.1)}
    scores = score_candidates(scorer, frame, rewards, read=True)
    expected = plain(settings).retrieval_scores(*asked).to_dict("series")
    expected |= {name: plain(of).retrieval_scores(*asked)["cim"] for name, of in rewards.items()}
    expected |= {"cim, exact facts": plain(settings, FactScorer).retrieval_scores(*asked)["cim"]}
    expected |= plain(settings).paired_scores(*asked).to_dict("series")
    expected |= {"likelihood": frame["likelihood"], "words": [len(caption.split()) for caption in asked[0]]}
    assert set(scores) == set(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(scores[name], values, atol=1e-5, err_msg=name)
    assert len({tuple(values.round(3)) for values in scores.values()}) == len(scores)
    assert scorer.text is encoders[0]
    assert set(scores) - set(score_candidates(scorer, frame.drop(columns="likelihood"), {})) == {
        "wide", "soft", "cim, exact facts", "likelihood",
    }  # fmt: skip


def test_the_quality_of_candidates_is_that_of_their_own_image(world):
    test = world.split("test")
    rows = [2, 0, 2, 1]
    said = [test.captions[2], test.captions[1], "there is a thing.", test.captions[1]]
    candidates = pd.DataFrame({"image_id": test.frame["image_id"].iloc[rows], "caption": said})
    found, name = quality_of(candidates, test)
    assert name == "F1 of facts"
    assert found.tolist() == [quality([c], test.frame["scene"].iloc[[i]])[0] for i, c in zip(rows, said, strict=True)]
    assert found[0] == found[3] == 1 > found[1] > found[2]
    human = test.frame.drop(columns="scene").assign(queries=json.dumps(["a bird."]))
    found, name = quality_of(candidates, Manifest(human, test.image_root))
    references = [[caption, "a bird."] for caption in test.captions]
    assert name == "CIDEr-D"
    assert found.tolist() == cider(said, references, np.array(rows)).tolist()
    assert found[0] > found[1]


@pytest.mark.parametrize("temperature", [None, 0.2])
@pytest.mark.parametrize("exclude", [True, False])
def test_retrieval_by_exact_facts(scorer, world, temperature, exclude):
    """Against a slow count: the cosine of two sets is the number of facts they share over the root of their sizes."""
    settings = scorer.settings.model_copy(update={"exclude_source": exclude, "temperature": temperature, "k": 4})
    by_facts = scorer.at(settings, FactScorer)
    train = world.split("train").take(range(5))
    ids = train.frame["image_id"].tolist()
    scorer.add_sources(train)
    rows, weights = by_facts.retrieve(train.captions, ids)
    gallery = [set(stated_facts(caption)) for caption in scorer.gallery.rows["caption"]]
    for i, (caption, image) in enumerate(zip(train.captions, ids, strict=True)):
        facts = set(stated_facts(caption))
        cosine = np.array([len(facts & other) / np.sqrt(len(facts) * len(other)) for other in gallery])
        if exclude:
            cosine[scorer.gallery_rows([image])[0]] = -1
        np.testing.assert_allclose(cosine[rows[i]], np.sort(cosine)[::-1][:4], atol=1e-6)
        if temperature:
            expected = np.exp(cosine[rows[i]] / temperature)
            np.testing.assert_allclose(weights[i], expected / expected.sum(), rtol=1e-4)
    own = scorer.gallery_rows(ids)[:, None] == rows
    assert own.any() != exclude
    if temperature is None:
        np.testing.assert_allclose(weights, [1, 0.5, 0.25, 0.125])
    assert by_facts.retrieval_scores(train.captions, ids)["cim"].notna().all()
    if exclude:
        copy = rows[0, 0]
        by_facts.gallery = with_copy(scorer.gallery, copy, scorer.gallery_rows(ids)[0])
        assert copy not in by_facts.retrieve(train.captions[:1], ids[:1])[0]


def test_facts_of_a_caption():
    facts = stated_facts("a big red owl is left of a car. the background is snow.")
    stated = {("owl",), ("owl", "red"), ("owl", "large"), ("car",), ("owl", "left of", "car"), ("background", "snow")}
    assert set(facts) == stated
