"""The small world: its splits, its English and the reader of it."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cim.data.manifest import Manifest
from cim.evaluation.facts import fact_counts, metrics_of
from cim.world import language, reader, scoring
from cim.world.scenes import Scene, SceneObject, compose_splits, random_scene
from cim.world.vocabulary import FAMILIES, FAMILY_OF, INVERSE, NAMES, generalisations

seeds = st.integers(0, 2**32 - 1)
SCENE = Scene(
    (SceneObject("owl", "red", "large", (0, 0)), SceneObject("bee", "blue", "small", (0, 1)), SceneObject("car", "green", "small", (1, 1))),
    "beach",
)  # fmt: skip


def facts(caption, scene):
    return scoring.count_facts(reader.read_caption(caption), scene)


def test_sixty_objects_in_families_of_three_grades():
    assert len(NAMES) == len(set(NAMES)) >= 60
    assert len(FAMILIES) >= 5
    assert generalisations("owl") == ("owl", "bird", "animal")


def test_splits_share_no_scene(rng):
    placed = compose_splits(rng, pretrain=50, train=40, test=10, looks=2, gallery_variants=4, objects=(2, 3))
    scenes = {s: {scene for scene, split, _ in placed if split == s} for s in ("pretrain", "train", "gallery", "test")}
    assert [sum(split == s for _, split, _ in placed) for s in ("pretrain", "train", "test")] == [50, 40, 10]
    for a in scenes:
        for b in scenes:
            assert a == b or not scenes[a] & scenes[b]
    templates = {s: {template for _, split, template in placed if split == s} for s in ("train", "test")}
    assert not templates["train"] & templates["test"]


@given(seeds)
def test_a_scene_survives_json(seed):
    scene = random_scene(np.random.default_rng(seed))
    assert Scene.from_json(scene.to_json()) == scene


@given(seeds)
def test_the_reader_reads_all_that_the_writer_writes(seed):
    rng = np.random.default_rng(seed)
    scene = random_scene(rng)
    counts = facts(language.describe(scene, rng), scene)
    for fact in scoring.FACTS:
        assert (
            counts[f"{fact}_stated"]
            == counts[f"{fact}_correct"]
            == counts[f"{fact}_recalled"]
            == counts[f"{fact}_true"]
        )


@given(seeds, st.floats(0, 1))
def test_leaving_out_is_never_wrong(seed, p):
    rng = np.random.default_rng(seed)
    scene = random_scene(rng)
    # Families are distinct within a scene; kinds are not, and "the animal" may then mean another one.
    detail = language.Detail(object=p, name=p, colour=p, size=p, relation=p, background=p)
    counts = facts(language.describe(scene, rng, detail), scene)
    for fact in ("attribute", "relation", "background"):
        assert counts[f"{fact}_stated"] == counts[f"{fact}_correct"]


@given(seeds, st.integers(1, 5))
def test_errors_lower_precision(seed, errors):
    rng = np.random.default_rng(seed)
    scene = random_scene(rng)
    counts = facts(language.describe(language.corrupt(scene, rng, errors), rng), scene)
    assert sum(counts[f"{f}_correct"] for f in scoring.FACTS) < sum(counts[f"{f}_stated"] for f in scoring.FACTS)


def test_no_more_facts_than_there_are_can_be_false():
    false, all_false = (language.corrupt(SCENE, np.random.default_rng(0), errors) for errors in (99, 11))
    assert false == all_false
    assert false.background != SCENE.background


@pytest.mark.parametrize(
    ("caption", "objects", "relations", "background"),
    [
        ("A large red owl is left of a small blue bee.", [("owl", ["red"], ["large"]), ("bee", ["blue"], ["small"])], [(0, "left of", 1)], []),
        ("a bee is to the right of an owl. the background is a sandy shore.", [("bee", [], []), ("owl", [], [])], [(1, "left of", 0)], ["beach"]),
        ("there is a sea creature and a thing.", [("sea creature", [], []), ("thing", [], [])], [], []),
        ("an owl is above and to the left of a car. the bird is red.", [("owl", [], []), ("car", [], [])], [(0, "above left of", 1)], []),
        ("crown crown . the the", [], [], []),
        ("", [], [], []),
        ("an owl is left of an owl.", [("owl", [], []), ("owl", [], [])], [(0, "left of", 1)], []),
    ],
)  # fmt: skip
def test_reading(caption, objects, relations, background):
    graph = reader.read_caption(caption)
    assert [(o.noun, list(o.colours), list(o.sizes)) for o in graph.objects] == objects
    assert list(graph.relations) == relations
    assert list(graph.backgrounds) == background


def test_saying_a_thing_twice_is_a_false_object():
    counts = facts("there is an owl and an owl.", SCENE)
    assert (counts["object_stated"], counts["object_correct"], counts["object_recalled"]) == (2, 1, 1)


def test_a_coarse_noun_is_right_but_recalls_nothing():
    counts = facts("there is a bird.", SCENE)
    assert (counts["object_stated"], counts["object_correct"], counts["object_recalled"]) == (1, 1, 0)


@pytest.mark.parametrize(
    ("question", "caption", "expected"),
    [
        ("is the bird an owl?", "there is an owl.", "yes"),
        ("is the bird an owl?", "there is an eagle.", "no"),
        ("is the bird an owl?", "there is a bird.", "n/a"),
        ("is the bird an owl?", "there is an owl and an eagle.", "n/a"),
        ("is the bird an owl?", "there is an eagle and an owl.", "n/a"),
        ("is the bird an owl?", "there is an owl and a bird.", "yes"),
        ("is the owl red?", "there is a red bird.", "yes"),
        ("is the owl red?", "there is a blue owl.", "no"),
        ("is the owl red?", "there is an owl.", "n/a"),
        ("is the owl large?", "there is a big owl.", "yes"),
        ("is the owl left of the bee?", "a bee is right of an owl.", "yes"),
        ("is the owl left of the bee?", "an owl is right of a bee.", "no"),
        ("is the owl left of the bee?", "an owl is above and left of a bee.", "no"),
        ("is the owl left of the bee?", "there is an owl and a bee.", "n/a"),
        ("is the background snow?", "the background is a beach.", "no"),
        ("is the background snow?", "", "n/a"),
    ],
)
def test_answers(question, caption, expected):
    assert reader.answer(question, reader.read_caption(caption)) == expected


def test_an_unknown_question_is_refused():
    with pytest.raises(ValueError, match="not a question"):
        reader.answer("what is this?", reader.read_caption("there is an owl."))


def test_questions_are_balanced_and_answered_by_a_full_caption(rng):
    scenes = [random_scene(rng) for _ in range(40)]
    asked = language.ask(scenes, rng)
    answers = [q["answer"] for row in asked for q in row]
    assert answers.count("yes") == answers.count("no")
    assert all(len(row) == 5 for row in asked)
    for scene, row in zip(scenes, asked, strict=True):
        graph = reader.read_caption(language.describe(scene, rng))
        assert [reader.answer(q["question"], graph) for q in row] == [q["answer"] for q in row]


def test_graph_f1_is_one_for_the_full_caption_and_zero_for_silence(rng):
    scores = scoring.score_captions([language.describe(SCENE, rng), ""], [SCENE, SCENE], [[], []])
    np.testing.assert_allclose(scoring.graph_f1(scores), [1, 0])


ANSWERS = ("qa_accuracy", "qa_yes", "qa_no", "qa_answered")


def test_true_captions_answer_every_question_and_silence_none(world):
    test = world.split("test")
    full = dict(zip(test.frame["image_id"], test.captions, strict=True))
    for captions, share in ((full, 1), (dict.fromkeys(full, ""), 0)):
        found = metrics_of(fact_counts(captions, test).sum())
        assert {name: found[name] for name in ANSWERS} == dict.fromkeys(ANSWERS, share)


def test_questions_are_counted_by_their_right_answers():
    asked = [("is the owl red?", "yes"), ("is the bee red?", "no"), ("is the background snow?", "no")]
    questions = [{"question": question, "answer": answer, "kind": str(i)} for i, (question, answer) in enumerate(asked)]
    frame = pd.DataFrame({"image_id": ["a"], "scene": [SCENE.to_json()], "questions": [json.dumps(questions)]})
    for caption, shares in (
        ("there is a red owl.", (1 / 3, 1, 0, 1 / 3)),
        ("there is a blue owl and a blue bee.", (1 / 3, 0, 1 / 2, 2 / 3)),
    ):
        found = metrics_of(fact_counts({"a": caption}, Manifest(frame, Path())).sum())
        assert [found[name] for name in ANSWERS] == pytest.approx(shares)


def test_relations_have_inverses():
    assert all(INVERSE[INVERSE[r]] == r for r in INVERSE)
    assert all(name in FAMILY_OF for name in NAMES)


def test_the_manifest_of_the_world(world):
    frame = world.frame
    assert set(frame["split"]) == {"pretrain", "train", "gallery", "test"}
    assert frame["image_id"].is_unique
    assert frame.loc[frame["split"] == "test", "questions"].map(lambda q: len(json.loads(q))).eq(5).all()
    assert not frame["caption"].str.strip().eq("").any()


def test_a_data_set_without_test_scenes(raw_data, tmp_path):
    from cim.data.dataset import DatasetSettings, make_dataset
    from cim.data.manifest import read_manifest
    from cim.errors import CimError

    settings = DatasetSettings(source="world", folder=str(raw_data), pretrain=2)
    made = make_dataset(settings, tmp_path / "d")
    assert len(read_manifest(made)) == 2
    # One that fails costs nothing.
    with pytest.raises(CimError):
        make_dataset(settings.model_copy(update={"folder": str(tmp_path / "none")}), tmp_path / "d")
    assert all(path.is_file() for path in read_manifest(made).image_paths)


def test_missing_drawings_are_named(tmp_path):
    from cim.errors import CimError
    from cim.world.dataset import paint

    (tmp_path / "owl.png").write_bytes(b"not an image")
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(CimError, match=r"owl\.png: cannot be read .*; run 'cim data'"):
            paint(folder, SCENE, np.random.default_rng(0))


def test_the_same_seed_draws_the_same_data(raw_data, tmp_path):
    from cim.data.dataset import DatasetSettings, make_dataset
    from cim.data.manifest import read_manifest

    settings = DatasetSettings(source="world", folder=str(raw_data), pretrain=8, train=3, test=2)
    one, two = (read_manifest(make_dataset(settings, tmp_path / name)) for name in ("one", "two"))
    assert set(one.frame["split"]) == {"pretrain", "train", "gallery", "test"}
    assert one.frame.equals(two.frame)
    for a, b in zip(one.image_paths, two.image_paths, strict=True):
        assert a.read_bytes() == b.read_bytes()


def test_a_text_tower_reads_the_captions_of_as_many_images_as_it_is_given(monkeypatch):
    """And none of the images that are held out; without a number those of all others."""
    import open_clip
    import torch

    from cim.world import encoder

    torch.manual_seed(0)
    images, batches = 40, []
    monkeypatch.setattr(encoder, "minimize", lambda optimizers, loss_of, rows, *_: batches.append([*rows]))
    text = {"context_length": 64, "vocab_size": 49408, "width": 8, "heads": 1, "layers": 1}
    trunk = {"timm_model_name": "test_resnet", "timm_pool": "", "timm_proj": "mlp", "image_size": 32}
    model = open_clip.CustomTextCLIP(embed_dim=8, vision_cfg=trunk, text_cfg=text)
    pooled = torch.randn(images, model.visual.trunk.num_features)
    settings = encoder.EncoderTrainingSettings(
        trunk="test_resnet", embed_dim=8, seed=0, batch_size=8, crop_epochs=1, scene_epochs=1, trunk_lr=1e-3,
        clip_steps=60, clip_batch=4, clip_lr=1e-3, text_towers=[8],
    )  # fmt: skip
    for captioned in (8, 8, None):
        encoder.train_clip(model, pooled, ["an owl."] * images, settings, captioned)
    first, again, whole = ({row for batch in drawn for row in batch.tolist()} for drawn in batches)
    known = images - images // 20
    assert first == again  # drawn by the seed alone
    assert len(first) == 8
    assert first < set(range(known)) == whole
    assert first != set(range(8))
