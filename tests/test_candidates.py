"""Several captions of one image: choosing among them, and how scores agree with their quality."""

from itertools import combinations

import numpy as np
import pandas as pd
import pytest

from cim.evaluation import attacks
from cim.evaluation.candidates import best_of, compare_scores
from cim.report import figures, findings


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


def test_sampled_captions_are_reproducible_and_their_likelihood_is_the_models(captioner_folder, world):
    """The likelihood that sampling reports equals the one that a forward pass on the finished caption gives."""
    import torch

    from cim.captioners.generate import sample_captions
    from cim.captioners.models import ModelSettings, load_model, prompt_inputs
    from cim.images import open_image

    settings = ModelSettings(name=str(captioner_folder), prompt="describe the image.")
    model, processor = load_model(settings, torch.device("cpu"))
    test = world.split("test").take(range(3))
    first = sample_captions(model, processor, test, settings, 4, 48, progress=False)
    pd.testing.assert_frame_equal(first, sample_captions(model, processor, test, settings, 4, 48, progress=False))
    other = sample_captions(model, processor, test, settings, 4, 48, seed=1, progress=False)
    assert first["caption"].tolist() != other["caption"].tolist()
    assert first["image_id"].tolist() == [i for i in test.frame["image_id"] for _ in range(4)]
    row, end = first.iloc[0], processor.tokenizer.eos_token_id
    inputs = prompt_inputs(processor, [open_image(test.image_paths[0])], settings)
    answer = processor.tokenizer(row["caption"], add_special_tokens=False)["input_ids"]
    answer = answer[:48] if len(answer) >= 48 else [*answer, end]
    prompt = inputs["input_ids"].shape[1]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([answer])], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with torch.inference_mode():
        logits = model(**inputs).logits[0, prompt - 1 : -1].float().log_softmax(-1)
    expected = logits.gather(-1, torch.tensor(answer)[:, None]).mean().item()
    assert row["likelihood"] == pytest.approx(expected, abs=1e-3)


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
    assert [tick.get_text() for tick in agreement.axes[0].get_yticklabels()] == ["words", "CIM = GRC + QIR"]
    legend = [text.get_text() for text in best.axes[-1].get_legend().get_texts()]
    assert legend == ["CIM = GRC + QIR", "words", "quality"]


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
    said = findings.samples_findings(table, "F1", attacked)
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
