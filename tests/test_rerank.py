"""Best of N: of several captions of each image the one that the reward prefers."""

import numpy as np
import pandas as pd
import pytest

from cim.cli.__main__ import main
from cim.evaluation.attacks import nearest_captions
from cim.score_files import best_captions
from conftest import error_of, with_copy, write_jsonl


def test_the_best_of_each_image_comes_first():
    rows = [
        ("a", 1.0, None),
        ("b", 5.0, None),
        ("a", 3.0, None),
        ("a", 3.0, None),
        ("b", 9.0, "unreadable"),
        ("c", np.nan, "bad"),
    ]
    scores = pd.DataFrame(rows, columns=["image_id", "cim", "error"])
    assert best_captions(scores).index.tolist() == [1, 2]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_rerank_keeps_one_caption_an_image(gallery, world, tmp_path, capsys, suffix):
    test = world.split("test").take(range(4))
    wrong = np.roll(test.captions, 1)
    rows = [
        {"image": str(path), "caption": caption}
        for path, true, other in zip(test.image_paths, test.captions, wrong, strict=True)
        for caption in (other, true, "")
    ]
    source, out = write_jsonl(tmp_path / "candidates.jsonl", rows), tmp_path / f"best.{suffix}"
    main(["rerank", str(source), "--gallery", str(gallery.folder), "--out", str(out), "-k", "2", "--by", "qir"])
    read = pd.read_parquet if suffix == "parquet" else lambda path: pd.read_json(path, lines=True)
    best, scores = read(out), read(out.with_stem("best-all"))
    assert len(scores) == 12
    assert best["image_id"].tolist() == [str(path) for path in test.image_paths]
    assert best["qir"].tolist() == scores.groupby("image_id", sort=False)["qir"].max().tolist()
    assert "12 candidates" in capsys.readouterr().out


def test_rerank_names_candidates_that_have_no_score(gallery, world, tmp_path, capsys):
    path = world.split("test").image_paths[0]
    rows = [{"image": str(path), "caption": "an owl."}, {"image": "missing.png", "caption": "a bee."}]
    source, out = write_jsonl(tmp_path / "candidates.jsonl", rows), tmp_path / "best.jsonl"
    command = ["rerank", source, "--gallery", gallery.folder, "--out", out, "-k", 2]
    assert "1 rows have no score, see their 'error' in" in error_of(capsys, *command)
    assert pd.read_json(out, lines=True)["caption"].tolist() == ["an owl."]


def test_the_nearest_caption_is_that_of_the_most_similar_image(gallery):
    rows = np.array([3, 0, 7])
    vectors = gallery.image_vectors(rows)
    assert nearest_captions(gallery, vectors, np.full(3, -1)) == gallery.take(rows)["caption"].tolist()
    # The image itself does not count.
    near, next_near = np.argsort(-vectors @ gallery.image_vectors(np.arange(len(gallery))).T, axis=1)[:, 1:3].T
    own = np.array([3, -1, 7])
    assert nearest_captions(gallery, vectors, own) == gallery.take(np.where(own < 0, rows, near))["caption"].tolist()
    # Nor does another row that holds it.
    gallery = with_copy(gallery, near[0], 3)
    expected = gallery.take([next_near[0], rows[1], near[2]])["caption"].tolist()
    assert nearest_captions(gallery, vectors, own) == expected
