"""Searching captions: the exact search against a plain product, the approximate ones against the exact one."""

from pathlib import Path

import numpy as np
import pytest
import torch

from cim.errors import CimError
from cim.gallery import search as module
from cim.gallery.search import (
    ExactSearch,
    FaissSearch,
    build_index,
    choose_kind,
    new_index,
    open_search,
    rank_exactly,
)
from cim.processes import computes_in_bfloat16

KINDS = (
    "IVF256,SQ8", "IVF256,SQ4", "HNSW32,SQ8", "SQ8", "IVF16,Flat", "PCAR16,IVF16,PQ8np", "IVF16,PQ8x4fs,RFlat",
    "IVF64_HNSW8,SQ8", "PCA24,Flat",
)  # fmt: skip


def clustered(rng, n, d, clusters=50, spread=0.3):
    """(n, d) float16 unit vectors in clusters, as captions are."""
    centres = rng.normal(size=(clusters, d))
    x = centres[rng.integers(0, clusters, n)] + spread * rng.normal(size=(n, d))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)


def unit(x):
    x = x.astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def queries_near(rng, vectors, n):
    q = vectors[rng.integers(0, len(vectors), n)].astype(np.float32) + 0.05 * rng.normal(size=(n, vectors.shape[1]))
    return (q / np.linalg.norm(q, axis=1, keepdims=True)).astype(np.float32)


def scores_of(q, vectors, rows):
    return np.take_along_axis(q @ unit(vectors).T, rows, 1)


@pytest.mark.parametrize("spread", [0.3, 0.003])  # the second: hundreds of captions that say nearly the same
@pytest.mark.parametrize("short", [True, False])
@pytest.mark.parametrize("n", [3000, 20_005])
def test_the_two_pass_search_is_exact(rng, monkeypatch, n, short, spread):
    monkeypatch.setattr(module, "BLOCK", 2048)  # so few rows would be multiplied at once
    monkeypatch.setattr(module, "computes_in_bfloat16", lambda device: short)
    vectors = clustered(rng, n, 48, spread=spread)
    q = queries_near(rng, vectors, 20)
    found = ExactSearch(vectors).search(q, 4)
    best = -np.sort(-(q @ unit(vectors).T), axis=1)[:, :4]
    # Scores rather than rows: captions that say the same tie. Where hundreds say nearly the same, the coarse pass may
    # drop one that is better by less than it rounds.
    np.testing.assert_allclose(scores_of(q, vectors, found), best, atol=5e-4 if spread < 0.1 else 1e-6)
    assert all(len(set(row)) == 4 for row in found.tolist())


def test_k_as_large_as_the_gallery(rng, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 64)
    vectors = clustered(rng, 130, 16)
    found = ExactSearch(vectors).search(queries_near(rng, vectors, 3), 130)
    assert (np.sort(found, axis=1) == np.arange(130)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_approximate_searches_reach_the_recall_they_are_tuned_to(rng, tmp_path, kind):
    vectors = clustered(rng, 6000, 32)
    path = tmp_path / "index.faiss"
    tuned = build_index(vectors, kind, 0.99, path)
    assert tuned["recall"] >= 0.99
    assert not list(tmp_path.glob("*.partial"))
    search = open_search({"kind": kind, "file": path.name, **tuned}, vectors, tmp_path)
    assert isinstance(search, FaissSearch)
    parameter = "nprobe" if "IVF" in kind else "efSearch" if kind.startswith("HNSW") else None
    assert search.parameter == parameter
    q = queries_near(rng, vectors, 100)
    found, exact = search.search(q, 3), ExactSearch(vectors).search(q, 3)
    assert (found[:, :, None] == exact[:, None, :]).any(1).mean() >= 0.97
    # What is found is in the exact order.
    scores = scores_of(q, vectors, found)
    assert (np.diff(scores, axis=1) <= 1e-6).all()


def test_probing_too_few_lists_still_gives_k_rows(rng, tmp_path, capsys):
    vectors = clustered(rng, 400, 16)
    build_index(vectors, "IVF32,SQ8", 0.99, tmp_path / "index.faiss")
    info = {"kind": "IVF32,SQ8", "file": "index.faiss", "effort": 1, "candidates": 32}
    search = open_search(info, vectors, tmp_path)
    q = queries_near(rng, vectors, 10)
    found = search.search(q, 60)
    assert (found >= 0).all()
    assert "fewer than 60; searched exactly" in capsys.readouterr().out
    np.testing.assert_allclose(
        scores_of(q, vectors, found)[:, :1], scores_of(q, vectors, ExactSearch(vectors).search(q, 1)), atol=1e-6
    )


@pytest.mark.parametrize(
    "kind", ["ivf", "nonsense", "", "PQ7", "LSH", "IVF16", "IVF0,SQ8", "HNSW0", "IVF99999999999,SQ8"]
)
def test_a_kind_that_faiss_refuses_is_one_error_that_names_the_parameter(kind):
    with pytest.raises(CimError, match=f"parameter index: FAISS refuses '{kind}' for 32 dimensions") as error:
        new_index(kind, 32)
    assert "\n" not in str(error.value)
    assert "use exact, auto or another string" in str(error.value)


@pytest.mark.parametrize("kind", ["IVF16,SQ8", "PQ8", "IDMap,Flat"])
def test_a_gallery_that_an_index_cannot_be_built_from(rng, tmp_path, kind):
    with pytest.raises(CimError, match=f"parameter index: FAISS cannot build '{kind}' from 8 rows") as error:
        build_index(clustered(rng, 8, 32), kind, 0.99, tmp_path / "index.faiss")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_an_index_that_does_not_fit_on_the_disk(rng, tmp_path, monkeypatch):
    """FAISS reports a short write as a RuntimeError."""

    def full(index, path):
        Path(path).write_bytes(b"half")
        raise RuntimeError("Error in write_index\n(ret == size) failed: fwrite failed: No space left on device")

    monkeypatch.setattr(module.faiss, "write_index", full)
    with pytest.raises(
        CimError, match=r"index\.faiss: cannot be written \(.*No space left on device\); free some space"
    ):
        build_index(clustered(rng, 8, 32), "Flat", 0.99, tmp_path / "index.faiss")
    assert not list(tmp_path.iterdir())


def test_an_index_of_two_rows(rng, tmp_path):
    assert build_index(clustered(rng, 2, 32), "HNSW8,Flat", 0.99, tmp_path / "index.faiss")["recall"] == 1


def test_captions_that_many_images_share_are_found_whichever_row_is(rng, tmp_path):
    """A third of the rows has one of four captions: which three rows of hundreds are found says nothing."""
    vectors = clustered(rng, 3000, 32)
    vectors[::3] = vectors[[1, 2, 4, 5]][rng.integers(0, 4, 1000)]
    tuned = build_index(vectors, "IVF64,SQ8", 0.99, tmp_path / "index.faiss")
    assert tuned["recall"] >= 0.99
    assert tuned["effort"] < 64


def test_an_index_grows(rng, tmp_path):
    vectors = clustered(rng, 3000, 32)
    build_index(vectors[:2000], "IVF16,SQ8", 0.99, tmp_path / "a.faiss")
    tuned = build_index(vectors, "IVF16,SQ8", 0.99, tmp_path / "b.faiss", former=tmp_path / "a.faiss")
    search = open_search({"kind": "IVF16,SQ8", "file": "b.faiss", **tuned}, vectors, tmp_path)
    assert (search.search(unit(vectors[2000:]), 1)[:, 0] == np.arange(2000, 3000)).mean() > 0.97


def test_ranking_passes_over_what_is_no_candidate(rng):
    vectors = torch.eye(4)
    rows = torch.tensor([[2, -1, 0], [-1, 3, 1]])
    ranked = rank_exactly(torch.tensor([[1.0, 0, 0.5, 0], [0, 0.2, 0, 0.9]]), rows, vectors, 2)
    assert ranked.tolist() == [[0, 2], [3, 1]]


def test_the_kind_follows_size_and_memory():
    gib = 2**30
    assert choose_kind(5_000, 384, 8 * gib)[0] == "exact"
    assert choose_kind(1_000_000, 384, 24 * gib)[0] == "IVF4096,SQ8"
    kind, reason = choose_kind(10_000_000, 768, 24 * gib)
    assert kind == "IVF16384,SQ4"
    assert "14.3 GiB" in reason


@pytest.mark.parametrize("kind", ["IVF16,SQ8", "HNSW32,SQ8"])
def test_a_damaged_or_foreign_index_is_refused(rng, tmp_path, kind):
    vectors = clustered(rng, 500, 16)
    path = tmp_path / "index.faiss"
    info = {"kind": kind, "file": path.name, **build_index(vectors, kind, 0.99, path)}
    with pytest.raises(CimError, match=r"index\.faiss: index of \(500, 16\) vectors.*gallery has \(400, 16\)"):
        open_search(info, vectors[:400], tmp_path)
    with pytest.raises(CimError, match=r"gallery has \(500, 8\)"):
        open_search(info, np.ascontiguousarray(vectors[:, :8]), tmp_path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(CimError, match="unreadable FAISS index"):
        open_search(info, vectors, tmp_path)
    path.unlink()
    with pytest.raises(CimError, match="unreadable FAISS index"):
        open_search(info, vectors, tmp_path)


@pytest.mark.parametrize("instructions", ["_is_avx512_bf16_supported", "_is_amx_tile_supported", None])
def test_bfloat16_is_used_where_the_processor_computes_in_it(monkeypatch, instructions):
    """oneDNN emulates it on other processors, two to four times slower than float32."""
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda name=name: name == instructions)
    assert computes_in_bfloat16(torch.device("cpu")) == (instructions is not None)
