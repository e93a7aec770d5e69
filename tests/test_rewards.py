"""The rewards: the authors' vectors, and what must hold for any input."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ortho_group

from cim import rewards


def unit(rng, *shape):
    x = rng.normal(size=shape)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def normalised(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.parametrize("k", [1, 3])
def test_equal_to_the_authors_vectors(reference, k):
    v = np.load(reference / f"rewards_k{k}.npz")
    text, image = normalised(v["text"]), normalised(v["image"])
    found = np.argsort(-(v["query"] @ text.T), axis=1, kind="stable")[:, :k]
    assert (found == v["topk"]).all()
    grc = rewards.gallery_representation_consistency(image[found])
    qir = rewards.query_gallery_image_relevance(image[v["source"]], image[found], rewards.rank_weights(k))
    np.testing.assert_allclose(grc, v["grc"], atol=1e-5)
    np.testing.assert_allclose(qir, v["qir"], atol=1e-5)
    np.testing.assert_allclose(rewards.cim(grc, qir), v["cim"], atol=1e-5)


def slow_rewards(text, image, query, source, k):
    """The published definition on plain lists, one caption and one gallery row at a time: ranks, GRC, QIR."""

    def dot(a, b):
        return sum(x * y for x, y in zip(a, b, strict=True))

    def unit_of(a):
        return [x / dot(a, a) ** 0.5 for x in a]

    texts, images = [unit_of(row) for row in text.tolist()], [unit_of(row) for row in image.tolist()]
    out = []
    for caption, own in zip(query.tolist(), source.tolist(), strict=True):
        rows = sorted(range(len(texts)), key=lambda row: -dot(texts[row], caption))[:k]
        mean = [sum(images[row][d] for row in rows) / k for d in range(len(images[0]))]
        grc = dot(mean, mean) ** 0.5
        qir = sum(0.5**rank * dot(images[own], images[row]) for rank, row in enumerate(rows))
        out.append((rows, grc, qir, grc + qir))
    return map(list, zip(*out, strict=True))


@pytest.mark.parametrize("k", [1, 3, 7])
def test_scores_against_a_gallery_equal_a_slow_implementation(tmp_path, k):
    """Search, gathering and rewards together, on clustered vectors that are not normalised; no reference data needed."""
    import pyarrow as pa

    from cim.gallery.search import ExactSearch
    from cim.gallery.store import Gallery

    rng = np.random.default_rng(k)
    centres = rng.normal(size=(12, 24))
    rows, asked = rng.integers(0, 12, 120), rng.integers(0, 120, 25)
    text = (centres[rows] + 0.4 * rng.normal(size=(120, 24))).astype(np.float16)
    image = (rng.normal(size=(24, 16)).T @ centres[rows].T).T + 0.4 * rng.normal(size=(120, 16))
    query = normalised(text[asked].astype(np.float64) + 0.3 * rng.normal(size=(25, 24)))
    ranks, grc, qir, cim = slow_rewards(text.astype(np.float64), image, query, asked, k)
    table = pa.table({"image_id": [str(i) for i in range(120)]})
    gallery = Gallery(tmp_path, {}, table, text, normalised(image).astype(np.float16), ExactSearch(text))
    found = gallery.search(query.astype(np.float32), k)
    assert found.tolist() == ranks
    retrieved, source = gallery.image_vectors(found), gallery.image_vectors(asked)
    ours = rewards.gallery_representation_consistency(retrieved)
    relevance = rewards.query_gallery_image_relevance(source, retrieved, rewards.rank_weights(k))
    np.testing.assert_allclose(ours, grc, atol=2e-3)  # float16 images
    np.testing.assert_allclose(relevance, qir, atol=2e-3)
    np.testing.assert_allclose(rewards.cim(ours, relevance), cim, atol=4e-3)


@pytest.mark.parametrize("k", [1, 3])
def test_the_index_finds_what_the_authors_find(reference, tmp_path, k):
    import pyarrow as pa

    from cim.gallery.search import ExactSearch
    from cim.gallery.store import Gallery

    v = np.load(reference / f"rewards_k{k}.npz")
    texts, images = normalised(v["text"]).astype(np.float16), normalised(v["image"]).astype(np.float16)
    table = pa.table({"image_id": [str(i) for i in range(len(texts))]})
    gallery = Gallery(tmp_path, {}, table, texts, images, ExactSearch(texts))
    assert (gallery.search(v["query"], k) == v["topk"]).all()


def test_worked_example():
    a, b = np.array([1.0, 0.0]), np.array([0.0, 1.0])
    retrieved = np.stack([[a, a, a], [a, b, a], [b, b, b]])
    source = np.stack([a, a, a])
    grc = rewards.gallery_representation_consistency(retrieved)
    qir = rewards.query_gallery_image_relevance(source, retrieved, rewards.rank_weights(3))
    np.testing.assert_allclose(grc, [1, np.sqrt(5) / 3, 1])
    np.testing.assert_allclose(qir, [1.75, 1.25, 0])
    np.testing.assert_allclose(rewards.cim(grc, qir, beta=2.0), grc + 2 * qir)


seeds = st.integers(0, 2**32 - 1)
sizes = st.tuples(st.integers(1, 6), st.integers(1, 8), st.integers(2, 16))


@given(seeds, sizes)
def test_bounds(seed, size):
    n, k, d = size
    rng = np.random.default_rng(seed)
    retrieved, source, weights = unit(rng, n, k, d), unit(rng, n, d), rewards.rank_weights(k)
    grc = rewards.gallery_representation_consistency(retrieved)
    qir = rewards.query_gallery_image_relevance(source, retrieved, weights)
    assert ((grc >= 0) & (grc <= 1 + 1e-12)).all()
    assert (np.abs(qir) <= weights.sum() + 1e-12).all()


@given(seeds, sizes)
def test_a_rotation_of_the_image_space_changes_nothing(seed, size):
    n, k, d = size
    rng = np.random.default_rng(seed)
    retrieved, source, weights = unit(rng, n, k, d), unit(rng, n, d), rewards.rank_weights(k)
    q = ortho_group.rvs(d, random_state=rng)
    for f in (
        lambda r, s: rewards.gallery_representation_consistency(r),
        lambda r, s: rewards.query_gallery_image_relevance(s, r, weights),
    ):
        np.testing.assert_allclose(f(retrieved @ q, source @ q), f(retrieved, source), atol=1e-9)


@given(seeds, sizes)
def test_the_order_of_the_batch_does_not_matter(seed, size):
    n, k, d = size
    rng = np.random.default_rng(seed)
    retrieved, source, weights = unit(rng, n, k, d), unit(rng, n, d), rewards.rank_weights(k)
    p = rng.permutation(n)
    qir = rewards.query_gallery_image_relevance
    np.testing.assert_allclose(qir(source[p], retrieved[p], weights), qir(source, retrieved, weights)[p])
    # GRC does not see the ranks either; QIR does.
    r = rng.permutation(k)
    grc = rewards.gallery_representation_consistency
    np.testing.assert_allclose(grc(retrieved[:, r]), grc(retrieved))


@given(seeds)
def test_identical_images_are_wholly_consistent_and_relevant(seed):
    source = unit(np.random.default_rng(seed), 4, 8)
    retrieved = np.repeat(source[:, None], 3, axis=1)
    np.testing.assert_allclose(rewards.gallery_representation_consistency(retrieved), 1)
    np.testing.assert_allclose(rewards.query_gallery_image_relevance(source, retrieved, rewards.rank_weights(3)), 1.75)


def test_clipscore_is_clipped_at_zero():
    a = np.array([[1.0, 0.0], [1.0, 0.0]])
    np.testing.assert_allclose(rewards.clipscore(a, np.array([[1.0, 0.0], [-1.0, 0.0]])), [2.5, 0])


def test_self_retrieval_runs_from_first_to_last():
    gallery = np.eye(4)
    text = np.array([[1.0, 0, 0, 0], [0.8, 0.6, 0, 0]])
    np.testing.assert_allclose(rewards.self_retrieval(text, gallery[[0, 1]], gallery), [1, 1 - np.log(2) / np.log(5)])
    worst = rewards.self_retrieval(text[:1], -gallery[:1], gallery)
    np.testing.assert_allclose(worst, 0)
