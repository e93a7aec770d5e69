"""Calibrated rewards: centred and whitened image embeddings, guards against bad captions, and variants of a run."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from cim.captioners.text import repetition
from cim.errors import CimError
from cim.gallery.store import TRANSFORM, load_gallery
from cim.gallery.transform import ImageTransform
from cim.runs import with_variant
from cim.scorer import RewardSettings, Scorer
from cim.train.reward import trl_reward
from cim.train.settings import TrainSettings

CALIBRATED = RewardSettings(k=6, decay=1.0, grc_weight=0.5, beta=2.0, center=True, whiten=0.5)
SOFT = CALIBRATED.model_copy(update={"temperature": 0.1})
WHOLE = SOFT.model_copy(update={"k": None})


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def test_whitening_makes_the_gallery_round(rng):
    vectors = unit(rng.normal(size=(500, 8)) * [5, 3, 2, 1, 1, 1, 0.5, 0.1] + 3).astype(np.float32)
    transform = ImageTransform.fit(vectors)
    np.testing.assert_allclose(transform.mean, vectors.mean(0), atol=1e-6)
    np.testing.assert_allclose(
        transform.variances, np.sort(np.linalg.eigvalsh(np.cov(vectors.T, bias=True)))[::-1], rtol=1e-3
    )
    centred = (vectors - transform.mean) @ (transform.basis * transform.variances**-0.5)
    np.testing.assert_allclose(np.cov(centred.T, bias=True), np.eye(8), atol=0.02)
    np.testing.assert_allclose(transform.apply(vectors, False, 1.0), unit(centred), atol=1e-4)
    assert transform.apply(vectors, False, 0.0) is vectors


def test_centring_changes_no_angle_between_differences(rng):
    vectors = unit(rng.normal(size=(50, 5)) + 2).astype(np.float32)
    centred = ImageTransform.fit(vectors).apply(vectors, True, 0.0)
    np.testing.assert_allclose(centred, unit(vectors - vectors.mean(0)), atol=1e-5)


def test_fewer_images_than_dimensions_leave_directions_out(rng):
    transform = ImageTransform.fit(unit(rng.normal(size=(10, 40))).astype(np.float16))
    assert transform.basis.shape == (40, 9)
    assert (transform.variances > 0).all()
    assert np.isfinite(transform.apply(unit(rng.normal(size=(3, 40))), True, 1.0)).all()


def test_it_is_stored_with_the_gallery(gallery):
    stored = gallery.transform
    fitted = ImageTransform.fit(gallery.images)
    np.testing.assert_array_equal(stored.basis, fitted.basis)
    assert TRANSFORM in gallery.info["files"]


def test_a_gallery_without_it_serves_the_published_reward_only(gallery, encoders, world):
    older = load_gallery(gallery.folder, *encoders)
    older.info["files"] = {name: marks for name, marks in older.info["files"].items() if name != TRANSFORM}
    test = world.split("test")
    for settings in (RewardSettings(), CALIBRATED):
        scorer = Scorer(older, *encoders, settings)
        scorer.add_sources(test)
        if settings is CALIBRATED:
            with pytest.raises(CimError, match="rebuild the gallery"):
                scorer.retrieval_scores(test.captions, test.frame["image_id"])
        else:
            assert len(scorer.retrieval_scores(test.captions, test.frame["image_id"])) == len(test)


@pytest.mark.parametrize("s", [CALIBRATED, SOFT, WHOLE])
@pytest.mark.parametrize(("gathered", "small"), [(1, 0), (16_384, 0), (16_384, 20_000)])
def test_calibrated_scores_equal_a_slow_loop(gallery, encoders, world, monkeypatch, gathered, small, s):
    monkeypatch.setattr("cim.scorer.GATHERED", gathered)
    monkeypatch.setattr("cim.scorer.SMALL", small)
    monkeypatch.setattr("cim.gallery.store.SMALL", small)
    if s is WHOLE and not small:
        with pytest.raises(CimError, match=r"set reward\.k"):
            Scorer(gallery, *encoders, s).k  # noqa: B018
        return
    test = world.split("test")
    ids = test.frame["image_id"].tolist()
    scorer = Scorer(gallery, *encoders, s)
    scorer.add_sources(test)
    scores, rows = scorer.scores_and_rows([*test.captions, ""], [*ids, ids[0]])
    images = gallery.image_vectors(np.arange(len(gallery))).astype(np.float64)
    mean = images.mean(0)
    variances, basis = np.linalg.eigh(np.cov((images - mean).T, bias=True))
    # Directions without variance are left out, as the definition says.
    kept = variances > 1e-6 * variances.max()
    matrix = basis[:, kept] / variances[kept] ** 0.25
    for i, image_id in enumerate(ids):
        source = unit((scorer.source_vectors([image_id])[0] - mean) @ matrix)
        retrieved = [unit((images[row] - mean) @ matrix) for row in rows[i]]
        lambdas, shares = np.ones(len(rows[i])), np.full(len(rows[i]), 1 / len(rows[i]))
        if s.temperature:
            similar = unit(gallery.texts.astype(np.float32))[rows[i]] @ encoders[0].encode([test.captions[i]])[0]
            lambdas = shares = np.exp(similar / s.temperature) / np.exp(similar / s.temperature).sum()
        grc = np.linalg.norm(sum(share * r for share, r in zip(shares, retrieved, strict=True)))
        qir = sum(weight * (source @ r) for weight, r in zip(lambdas, retrieved, strict=True))
        assert scores["grc"][i] == pytest.approx(grc, abs=5e-3)
        assert scores["qir"][i] == pytest.approx(qir, abs=2e-2)
        assert scores["cim"][i] == pytest.approx(0.5 * scores["grc"][i] + 2 * scores["qir"][i])
    assert len(set(rows[0])) == rows.shape[1] == (s.k or len(gallery) - 1)
    assert scores["qir"].iloc[-1] == (-1 if s.temperature else -s.k)


STD = np.std([3, 2, 1])
TRAIN = {
    "split": "train", "steps": 1, "save_every": 1, "images_per_step": 1, "group_size": 2, "lr": 1e-4, "kl": 0.0,
    "temperature": 1.0, "max_completion": 4,
}  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({}, [3, 2, 1]), ({"repetition": 3.0}, [3, 2, 1 - STD]), ({"truncated": "lowest"}, [3, 1, 1]),
     ({"truncated": "lowest", "repetition": 3.0}, [3, 1 - STD, 1 - STD])],
)  # fmt: skip
def test_guards(settings, expected):
    """The second caption is cut off; of the third one's three word pairs one is a repetition."""
    captions = ["a red owl", "a blue", "snow snow snow falls"]
    scorer = SimpleNamespace(retrieval_scores=lambda captions, image_ids: pd.DataFrame({"cim": [3.0, 2.0, 1.0]}))
    reward = trl_reward(scorer, "cim", TrainSettings(**TRAIN, **settings), {0})
    logged = {}
    found = reward(
        completions=[[{"role": "assistant", "content": caption}] for caption in captions],
        completion_ids=[[5, 6, 0], [5, 6, 7], [5, 5, 5, 6, 0]],
        image_id=["a", "a", "a"],
        log_metric=logged.__setitem__,
    )
    np.testing.assert_allclose(found, expected)
    assert logged["score/cim"] == 2.0  # what is logged is not guarded


@pytest.mark.parametrize(
    ("caption", "share"),
    [("", 0), ("owl", 0), ("a red owl", 0), ("snow snow snow", 1 / 2), ("a b a b a b", 3 / 5), ("A b a B", 1 / 3)],
)
def test_repetition(caption, share):
    assert repetition([caption])[0] == pytest.approx(share)


PARAMS = {"reward": {"k": 3, "beta": 1.0}, "train": {"kl": 0.1}, "variants": {"wide": {"reward": {"k": 30}}}}


def test_a_variant_is_cim_with_other_values():
    params, reward = with_variant(PARAMS, "wide")
    assert (params["reward"], params["train"], reward) == ({"k": 30, "beta": 1.0}, {"kl": 0.1}, "cim")
    assert PARAMS["reward"]["k"] == 3


def test_a_variant_of_another_reward():
    variants = {"small": {"of": "clipscore", "encoders": {"text_tower": "t"}}}
    params, reward = with_variant(PARAMS | {"encoders": {"image": "i"}, "variants": variants}, "small")
    assert (params["encoders"], params["reward"], reward) == (
        {"image": "i", "text_tower": "t"},
        PARAMS["reward"],
        "clipscore",
    )


@pytest.mark.parametrize(("method", "reward"), [("qir", "qir"), ("cim_on_sft", "cim"), ("sft", "sft")])
def test_known_methods_keep_the_parameters(method, reward):
    assert with_variant(PARAMS, method) == (PARAMS, reward)


@pytest.mark.parametrize(
    ("variants", "method", "message"),
    [({}, "wide", "method 'wide' is unknown.*clipscore"), ({"cim": {}}, "cim", "variants.cim needs a name of its own"),
     ({"wide": {"model": {}}}, "wide", "variants.wide"), ({"wide": {"of": "grc", "sft": {}}}, "wide", "not both")],
)  # fmt: skip
def test_variants_that_are_refused(variants, method, message):
    with pytest.raises(CimError, match=message):
        with_variant(PARAMS | {"variants": variants}, method)
