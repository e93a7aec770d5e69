"""CAPTURE (arXiv 2405.19092) and SC-Captioner's scores (arXiv 2508.06125) from scene graphs, in two modes.

Both match equal phrases, then synonyms, then by cosine similarity of sentence embeddings.

paper   Identical to the public code on given graphs. Phrases are taken in order, each matching the first that is left.
        A phrase within another counts as its synonym ("car" in "carpet"). An unmatched phrase is worth its highest
        similarity to the unmatched phrases of the other side, even where several choose the same one.
strict  Every phrase matches at most one: the one-to-one assignment of highest total similarity, where equal phrases and
        synonyms count 1 and others their cosine.

An item is a phrase, or a relation as a tuple of three phrases.
"""

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Self

import numpy as np
from scipy.optimize import linear_sum_assignment

from cim.evaluation.capture.graphs import SceneGraph
from cim.evaluation.capture.synonyms import WordNet

MODES = ("paper", "strict")
EPSILON = 1e-6  # the public code adds it to every denominator, so paper mode must too
WEIGHTS = {"object": 0.5, "attribute": 0.5, "relation": 0.2}

Encode = Callable[[Sequence[str]], np.ndarray]
Item = str | tuple[str, str, str]


@dataclass(frozen=True)
class Sample:
    """One caption and its reference.

    Attributes:
        extra_objects: further objects of the image; None where there is no such list.
        extra_attributes: all true attributes of each object, likewise.
    """

    candidate: SceneGraph
    reference: SceneGraph
    extra_objects: tuple[str, ...] | None = None
    extra_attributes: Mapping[str, tuple[str, ...]] | None = None


class Similarity:
    """Cosine similarity and synonymy of phrases, each embedded once.

    Args:
        encode: from phrases to (n, d) embeddings of length 1.
        wordnet: for synonyms; None for none.
    """

    def __init__(self, phrases: Iterable[str], encode: Encode, wordnet: WordNet | None):
        self._encode, self._wordnet = encode, wordnet
        self._rows: dict[str, int] = {}
        self._vectors = np.zeros((0, 1), np.float32)
        self.add(phrases)

    @staticmethod
    def of_samples(samples: Sequence[Sample], encode: Encode, wordnet: WordNet | None) -> Self:
        """Embed all that scoring these samples compares, in two calls.

        Of the long lists of extra attributes, the second call takes only those of the objects that are compared.
        """
        phrases: set[str] = set()
        words: set[str] = set()
        for sample in samples:
            phrases |= sample.candidate.phrases() | sample.reference.phrases()
            phrases.update(sample.extra_objects or (), sample.extra_attributes or ())
        similarity = Similarity(phrases, encode, wordnet)
        for sample, mode in product(samples, MODES):
            extra = sample.extra_attributes or {}
            words.update(*(extra[o] for _, o, _ in _aligned(sample.candidate.attributes, extra, similarity, mode)))
        similarity.add(words)
        return similarity

    def add(self, phrases: Iterable[str]) -> None:
        """Embed the phrases that are new, in sorted order, so that the order of the input cannot matter."""
        if new := sorted(set(phrases) - self._rows.keys()):
            vectors = np.asarray(self._encode(new), np.float32)
            self._rows |= {phrase: row for row, phrase in enumerate(new, len(self._rows))}
            self._vectors = np.concatenate([self._vectors.reshape(-1, vectors.shape[1]), vectors])

    def cosine(self, a: Sequence[Item], b: Sequence[Item]) -> np.ndarray:
        """(len(a), len(b)) cosines; a relation is embedded as one phrase."""
        rows, columns = ([self._rows[i if isinstance(i, str) else " ".join(i)] for i in items] for items in (a, b))
        return self._vectors[rows] @ self._vectors[columns].T

    def alike(self, a: Item, b: Item, substrings: bool) -> bool:
        """Whether two items are equal or synonyms, in every part; `substrings` accepts a phrase within another."""
        if not isinstance(a, str):
            return all(self.alike(x, y, substrings) for x, y in zip(a, b, strict=True))
        if a == b or (substrings and (a in b or b in a)):
            return True
        return self._wordnet is not None and self._wordnet.alike(a, b)

    def assign(self, a: Sequence[Item], b: Sequence[Item]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The one-to-one assignment of highest total similarity: 1 for equal items and synonyms, else the cosine.

        Returns:
            Positions in a, positions in b, and similarities in [0, 1] of the pairs.
        """
        table = self.cosine(a, b).clip(0, 1)
        for i, j in np.ndindex(table.shape):
            if self.alike(a[i], b[j], substrings=False):
                table[i, j] = 1
        rows, columns = linear_sum_assignment(table, maximize=True)
        return rows, columns, table[rows, columns]


def paper_match(candidates: Sequence[Item], references: Sequence[Item], similarity: Similarity) -> tuple[float, float]:
    """How many of the candidates, and how many of the references, find a match; partial matches count in part."""
    left, right = list(candidates), list(references)
    for same in (operator.eq, partial(similarity.alike, substrings=True)):
        for item in list(left):
            if (match := next((other for other in right if same(item, other)), None)) is not None:
                left.remove(item)
                right.remove(match)
    matched = len(candidates) - len(left)
    if not left or not right:
        return matched, matched
    cosine = similarity.cosine(left, right)
    return matched + float(cosine.max(1).sum()), matched + float(cosine.max(0).sum())


def strict_match(candidates: Sequence[Item], references: Sequence[Item], similarity: Similarity) -> tuple[float, float]:
    """The total similarity of the best one-to-one assignment, twice, since both sides have the same."""
    total = float(similarity.assign(candidates, references)[2].sum())
    return total, total


def score(sample: Sample, similarity: Similarity, mode: str) -> dict[str, float]:
    """CAPTURE and, where the sample has extended lists, SC-Captioner's scores (fields sc_...), each in [0, 1].

    Where there is nothing to compare, paper mode gives what the public code would (0), or NaN where that drops the
    sample; strict mode gives NaN for the precision of an empty caption or the recall of an empty reference.
    """
    match = {"paper": paper_match, "strict": strict_match}[mode]
    candidate, reference = sample.candidate, sample.reference
    out: dict[str, float] = {}
    for kind, ours, true in (
        ("object", candidate.objects, reference.objects),
        ("attribute", candidate.attribute_words, reference.attribute_words),
        ("relation", candidate.relations, reference.relations),
    ):
        found, recalled = match(ours, true, similarity)
        out |= _fields(kind, _share(found, len(ours), mode), _share(recalled, len(true), mode), mode)
    out["capture"] = _capture(out)
    if sample.extra_objects is not None:
        known = tuple(dict.fromkeys([*reference.objects, *sample.extra_objects]))
        found, _ = match(candidate.objects, known, similarity)
        out |= _fields("sc_object", _share(found, len(candidate.objects), mode), out["object_recall"], mode)
    if sample.extra_attributes is not None:
        precision = _attributes(candidate.attributes, sample.extra_attributes, similarity, mode)
        recall = _attributes(reference.attributes, candidate.attributes, similarity, mode)
        out |= _fields("sc_attribute", precision, recall, mode)
    return out


def relations_recalled(sample: Sample, similarity: Similarity) -> list[tuple[str, float, float]]:
    """For each relation of the reference: its word, whether the caption states the same triple (1 or 0; synonyms
    count), and what strict mode credits."""
    ours, true = sample.candidate.relations, sample.reference.relations
    credit = {j: float(value) for _, j, value in zip(*similarity.assign(ours, true), strict=True)}
    stated = [any(similarity.alike(own, triple, substrings=False) for own in ours) for triple in true]
    return [(triple[1], float(stated[j]), credit.get(j, 0.0)) for j, triple in enumerate(true)]


def _aligned(asked: Mapping, given: Mapping, similarity: Similarity, mode: str) -> list[tuple[str, str, float]]:
    """(asked object, given object, similarity): whose attributes are compared. Objects without attributes are left out.

    Paper mode takes the most similar given object, strict mode that of a one-to-one assignment.
    """
    names, others = ([name for name, words in side.items() if words] for side in (asked, given))
    if not names or not others:
        return []
    if mode == "paper":
        cosine = similarity.cosine(names, others)
        triples = zip(range(len(names)), cosine.argmax(1), cosine.max(1), strict=True)
    else:
        triples = zip(*similarity.assign(names, others), strict=True)
    return [(names[i], others[j], float(value)) for i, j, value in triples]


def _attributes(asked: Mapping, given: Mapping, similarity: Similarity, mode: str) -> float:
    """Share of the asked attributes found at the aligned objects, weighted by the similarity of the objects.

    Paper mode weights the denominator too; strict mode counts attributes of an unaligned object as missed.
    """
    found = weight = 0.0
    for name, other, alike in _aligned(asked, given, similarity, mode):
        if mode == "paper":
            matched = float(similarity.cosine(asked[name], given[other]).max(1).sum())
        else:
            matched, _ = strict_match(asked[name], given[other], similarity)
        found += alike * matched
        weight += alike * len(asked[name])
    whole = weight if mode == "paper" else sum(map(len, asked.values()))
    return _share(found, whole, mode) if whole else float("nan")


def _share(part: float, whole: float, mode: str) -> float:
    if mode == "paper":
        return part / (whole + EPSILON)
    return part / whole if whole else float("nan")


def _fields(kind: str, precision: float, recall: float, mode: str) -> dict[str, float]:
    """Both and their F1, for which strict mode takes one undefined value as 0."""
    f1 = float("nan")
    if mode == "paper":
        f1 = 2 * precision * recall / (precision + recall + EPSILON)
    elif not (np.isnan(precision) and np.isnan(recall)):
        p, r = np.nan_to_num(precision), np.nan_to_num(recall)
        f1 = float(2 * p * r / (p + r)) if p + r else 0.0
    return {f"{kind}_precision": precision, f"{kind}_recall": recall, f"{kind}_f1": f1}


def _capture(fields: Mapping[str, float]) -> float:
    """The weighted mean of the F1s that are defined."""
    defined = [kind for kind in WEIGHTS if not np.isnan(fields[f"{kind}_f1"])]
    weight = sum(WEIGHTS[kind] for kind in defined)
    return sum(WEIGHTS[kind] * fields[f"{kind}_f1"] for kind in defined) / weight if weight else float("nan")
