"""CAPTURE and SC-Captioner's scores from scene graphs: as published (paper), and without its accidents (strict).

Both match equal phrases, then synonyms, then by cosine similarity of sentence embeddings.

paper   Phrases are taken in order, each matching the first that is left. One phrase within another counts as a
        synonym ("car" in "carpet"). What stays unmatched is worth its highest similarity to any phrase that
        stayed unmatched on the other side, several to the same one if so.
strict  Every phrase matches at most one: the assignment of most total similarity, where equal phrases and
        synonyms count 1 and others their cosine.

All phrases of a whole run are embedded once, together.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import linear_sum_assignment

from cim.errors import CimError
from cim.evaluation.capture.graphs import SceneGraph
from cim.evaluation.capture.synonyms import WordNet

MODES = ("paper", "strict")
EPSILON = 1e-6  # the public code adds it to every denominator; paper mode must, to equal it
WEIGHTS = {"object": 0.5, "attribute": 0.5, "relation": 0.2}

Encode = Callable[[Sequence[str]], np.ndarray]


@dataclass(frozen=True)
class Sample:
    """One caption beside its reference.

    Attributes:
        extra_objects: what else is known to be in the image; None where there is no such list.
        extra_attributes: everything known to be true of each object.
    """

    candidate: SceneGraph
    reference: SceneGraph
    extra_objects: tuple[str, ...] | None = None
    extra_attributes: Mapping[str, tuple[str, ...]] | None = None

    def phrases(self) -> set[str]:
        """All that is compared, but for the extra attributes: only those of some objects will be."""
        extra = {*(self.extra_objects or ()), *(self.extra_attributes or {})}
        return self.candidate.phrases() | self.reference.phrases() | extra


@dataclass
class Similarity:
    """Cosine similarity and synonymy of phrases, each embedded once."""

    vectors: np.ndarray
    row_of: Mapping[str, int]
    wordnet: WordNet | None
    _alike: dict[tuple[str, str], bool] = field(default_factory=dict)

    @staticmethod
    def of(phrases: Iterable[str], encode: Encode, wordnet: WordNet | None) -> Similarity:
        """Embed the distinct phrases; sorted, so that their order cannot matter."""
        empty = Similarity(np.zeros((0, 1), np.float32), {}, wordnet)
        return empty.with_phrases(phrases, encode)

    @staticmethod
    def of_samples(
        samples: Sequence[Sample], encode: Encode, wordnet: WordNet | None, modes: Sequence[str] = MODES
    ) -> Similarity:
        """Embed all that scoring these samples will compare, in two calls: of the long lists of extra attributes only
        those of objects that the candidates' objects are compared with."""
        similarity = Similarity.of(set().union(*(sample.phrases() for sample in samples)), encode, wordnet)
        words = set()
        for sample in samples:
            extra = sample.extra_attributes or {}
            for mode in modes:
                for _, name, _ in _aligned(sample.candidate.attributes, extra, similarity, mode):
                    words.update(extra[name])
        return similarity.with_phrases(words, encode)

    def with_phrases(self, phrases: Iterable[str], encode: Encode) -> Similarity:
        """This and more phrases; those known are not embedded again."""
        new = sorted(set(phrases) - set(self.row_of))
        if not new:
            return self
        vectors = np.asarray(encode(new), np.float32)
        rows = {phrase: len(self.row_of) + i for i, phrase in enumerate(new)}
        vectors = np.concatenate([self.vectors, vectors]) if len(self.vectors) else vectors
        return Similarity(vectors, {**self.row_of, **rows}, self.wordnet, self._alike)

    def cosine(self, a: Sequence[str], b: Sequence[str]) -> np.ndarray:
        """(len(a), len(b)) cosines."""
        rows, columns = ([self.row_of[phrase] for phrase in part] for part in (a, b))
        return self.vectors[rows] @ self.vectors[columns].T

    def alike(self, a, b, substrings: bool) -> bool:
        """Whether two phrases, or two relations part by part, are equal or synonyms.

        With `substrings` a phrase within another counts too.
        """
        if not isinstance(a, str):
            return all(self.alike(x, y, substrings) for x, y in zip(a, b, strict=True))
        if a == b or (substrings and (a in b or b in a)):
            return True
        if self.wordnet is None:
            return False
        if (known := self._alike.get((a, b))) is None:
            known = self._alike[a, b] = self._alike[b, a] = self.wordnet.alike(a, b)
        return known


def paper_match(
    candidates: Sequence, references: Sequence, similarity: Similarity, text: Callable[[object], str] = str
) -> tuple[float, float]:
    """How much of the candidates, and how much of the references, finds a match, in phrases.

    Args:
        candidates: phrases, or relations as tuples of phrases.
        text: the phrase that stands for an item in soft matching.
    """
    left, right = list(range(len(candidates))), list(range(len(references)))
    matched = 0
    for same in (operator.eq, lambda a, b: similarity.alike(a, b, substrings=True)):
        for i in list(left):
            j = next((j for j in right if same(candidates[i], references[j])), None)
            if j is not None:
                matched += 1
                left.remove(i)
                right.remove(j)
    if not left or not right:
        return matched, matched
    cosine = similarity.cosine([text(candidates[i]) for i in left], [text(references[j]) for j in right])
    return matched + float(cosine.max(1).sum()), matched + float(cosine.max(0).sum())


def strict_match(
    candidates: Sequence, references: Sequence, similarity: Similarity, text: Callable[[object], str] = str
) -> tuple[float, float]:
    """The total similarity of the best one-to-one assignment, twice, since it is the same from both sides."""
    if not len(candidates) or not len(references):
        return 0.0, 0.0
    total = _assigned(_strict_similarity(candidates, references, similarity, text))[2].sum()
    return float(total), float(total)


def _strict_similarity(candidates, references, similarity: Similarity, text=str) -> np.ndarray:
    cosine = similarity.cosine([text(c) for c in candidates], [text(r) for r in references]).clip(0, 1)
    for i, a in enumerate(candidates):
        for j, b in enumerate(references):
            if similarity.alike(a, b, substrings=False):
                cosine[i, j] = 1.0
    return cosine


def _assigned(similarity: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rows, columns = linear_sum_assignment(similarity, maximize=True)
    return rows, columns, similarity[rows, columns]


def score(sample: Sample, similarity: Similarity, mode: str) -> dict[str, float]:
    """CAPTURE and, where the sample has extended lists, SC-Captioner's scores (fields sc_...), each in [0, 1].

    Where nothing is there to be compared, paper mode gives what the public code would (0), or NaN where it drops
    the sample; strict mode gives NaN for a precision of nothing said or a recall of nothing to say.
    """
    match = {"paper": paper_match, "strict": strict_match}[mode]
    candidate, reference = sample.candidate, sample.reference
    out: dict[str, float] = {}
    recalled: dict[str, float] = {}
    for kind, said, true, text in (
        ("object", candidate.objects, reference.objects, str),
        ("attribute", candidate.attribute_words, reference.attribute_words, str),
        ("relation", candidate.relations, reference.relations, " ".join),
    ):
        found, recalled[kind] = match(said, true, similarity, text)
        out |= _fields(kind, found, len(said), recalled[kind], len(true), mode)
    out["capture"] = _capture(out, mode)
    if sample.extra_objects is not None:
        known = tuple(dict.fromkeys([*reference.objects, *sample.extra_objects]))
        found, _ = match(candidate.objects, known, similarity)
        out |= _fields("sc_object", found, len(candidate.objects), recalled["object"], len(reference.objects), mode)
    if sample.extra_attributes is not None:
        attributes = _paper_attributes if mode == "paper" else _strict_attributes
        recall = attributes(reference.attributes, candidate.attributes, similarity)
        precision = attributes(candidate.attributes, sample.extra_attributes, similarity)
        out |= {"sc_attribute_precision": precision, "sc_attribute_recall": recall}
        out["sc_attribute_f1"] = _f1(precision, recall, mode)
    return out


def relations_recalled(sample: Sample, similarity: Similarity) -> list[tuple[str, float, float]]:
    """Each relation that the reference states: the word for it, whether the caption states the same triple (1 or 0,
    synonyms counted), and what strict mode credits."""
    said, true = sample.candidate.relations, sample.reference.relations
    if not said or not true:
        return [(triple[1], 0.0, 0.0) for triple in true]
    rows, columns, alike = _assigned(_strict_similarity(said, true, similarity, " ".join))
    credit = dict(zip(columns.tolist(), alike.tolist(), strict=True))
    counterpart = dict(zip(columns.tolist(), rows.tolist(), strict=True))
    return [
        (
            triple[1],
            float(j in counterpart and similarity.alike(said[counterpart[j]], triple, substrings=False)),
            credit.get(j, 0.0),
        )
        for j, triple in enumerate(true)
    ]


def score_all(samples: Sequence[Sample], encode: Encode, wordnet: WordNet | None, mode: str) -> list[dict[str, float]]:
    """The scores of every sample; all their phrases are embedded once.

    Args:
        encode: from phrases to (n, d) embeddings of length 1.

    Raises:
        CimError: for an unknown mode.
    """
    if mode not in MODES:
        raise CimError(f"mode '{mode}' is not known; there are {', '.join(MODES)}")
    similarity = Similarity.of_samples(samples, encode, wordnet, [mode])
    return [score(sample, similarity, mode) for sample in samples]


def _aligned(asked: Mapping, given: Mapping, similarity: Similarity, mode: str) -> list[tuple[str, str, float]]:
    """Which given object's attributes each asked object's are compared with, and how alike the two objects are.

    Paper mode takes the most similar one, strict mode the one of a one-to-one assignment. Objects without attributes
    take no part.
    """
    names = [name for name, words in asked.items() if words]
    others = [name for name, words in given.items() if words]
    if not names or not others:
        return []
    if mode == "paper":
        cosine = similarity.cosine(names, others)
        nearest = cosine.argmax(1)
        return [(name, others[j], float(cosine[i, j])) for i, (name, j) in enumerate(zip(names, nearest, strict=True))]
    rows, columns, alike = _assigned(_strict_similarity(names, others, similarity))
    return [(names[i], others[j], float(value)) for i, j, value in zip(rows, columns, alike, strict=True)]


def _paper_attributes(asked: Mapping, given: Mapping, similarity: Similarity) -> float:
    """Share of the asked attributes that the most similar given object has, both weighted by that similarity."""
    weight, found = 0.0, 0.0
    for name, other, alike in _aligned(asked, given, similarity, "paper"):
        weight += alike * len(asked[name])
        found += alike * float(similarity.cosine(asked[name], given[other]).max(1).sum())
    return found / (weight + EPSILON) if weight else float("nan")


def _strict_attributes(asked: Mapping, given: Mapping, similarity: Similarity) -> float:
    """Share of the asked attributes found at the object assigned to theirs; what has no counterpart is not found."""
    total = sum(map(len, asked.values()))
    if not total:
        return float("nan")
    found = 0.0
    for name, other, alike in _aligned(asked, given, similarity, "strict"):
        said = _strict_similarity(asked[name], given[other], similarity)
        found += alike * float(_assigned(said)[2].sum())
    return found / total


def _fields(kind: str, found: float, said: int, recalled: float, true: int, mode: str) -> dict[str, float]:
    if mode == "paper":
        precision, recall = found / (said + EPSILON), recalled / (true + EPSILON)
    else:
        precision = found / said if said else float("nan")
        recall = recalled / true if true else float("nan")
    return {f"{kind}_precision": precision, f"{kind}_recall": recall, f"{kind}_f1": _f1(precision, recall, mode)}


def _f1(precision: float, recall: float, mode: str) -> float:
    if mode == "paper":
        return 2 * precision * recall / (precision + recall + EPSILON)
    if np.isnan(precision) and np.isnan(recall):
        return float("nan")  # nothing to say and nothing said
    precision, recall = np.nan_to_num(precision), np.nan_to_num(recall)
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


def _capture(fields: Mapping[str, float], mode: str) -> float:
    """The weighted mean of the F1s; in strict mode over those that are defined."""
    values = {kind: fields[f"{kind}_f1"] for kind in WEIGHTS}
    if mode == "strict":
        values = {kind: value for kind, value in values.items() if not np.isnan(value)}
    weight = sum(WEIGHTS[kind] for kind in values)
    return sum(WEIGHTS[kind] * value for kind, value in values.items()) / weight if weight else float("nan")
