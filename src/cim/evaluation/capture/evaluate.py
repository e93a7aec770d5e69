"""Captions on a benchmark: every score with its interval, and methods compared image by image."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, product
from typing import NamedTuple

import numpy as np
import pandas as pd

from cim.data.labels import Labels
from cim.evaluation.capture.graphs import SceneGraph
from cim.evaluation.capture.matching import MODES, Encode, Sample, Similarity, relations_recalled, score
from cim.evaluation.capture.parsers import Parser
from cim.evaluation.capture.readers import YES, Reader, question_scores, read_all
from cim.evaluation.capture.synonyms import WordNet
from cim.evaluation.statistics import Bootstrap, Estimate, holm, kendall, kendall_within, ratio, varies

RETRIEVAL = ("grc", "qir", "cim")
QUALITY = ("capture", "object_f1", "attribute_f1", "relation_f1", "relation_recall")
RARE = 10  # a relation that fewer references state is not listed by itself

Captions = Mapping[str, Mapping[int, Mapping[str, str]]]  # method -> seed -> image -> caption
Runs = Mapping[tuple[str, int], Sequence[str]]  # (method, seed) -> one caption an image
Retrieval = Callable[[Sequence[str], Sequence[str]], pd.DataFrame]


class Evaluation(NamedTuple):
    """The results of an evaluation.

    Attributes:
        metrics: the content of metrics.json.
        images: one row a method, seed, mode and image, with every score.
        questions: one row a method, seed and question; empty without a reader.
    """

    metrics: dict
    images: pd.DataFrame
    questions: pd.DataFrame


def evaluate(
    captions: Captions, labels: Labels, parser: Parser, encode: Encode, wordnet: WordNet | None,
    reader: Reader | None = None, retrieval: Retrieval | None = None, seed: int = 0, resamples: int = 10_000,
) -> Evaluation:  # fmt: skip
    """Score the captions of each method, in both modes, and compare the methods with the first.

    A bootstrap resample draws images, the same for every method, and each method's seeds.

    Args:
        captions: of every image of the labels, by method and seed.
        wordnet: for synonyms; None where the captions' words have none.
        retrieval: GRC, QIR and CIM of (captions, images), to be correlated with the other scores.
    """
    ids, seeds = list(labels.references), {method: sorted(runs) for method, runs in captions.items()}
    runs = {(method, s): [captions[method][s][i] for i in ids] for method, own in seeds.items() for s in own}
    references = parser.parse(list(labels.references.values()))
    samples = {
        run: [
            Sample(graph, reference, labels.extra_objects.get(i), labels.extra_attributes.get(i))
            for i, graph, reference in zip(ids, parser.parse(texts), references, strict=True)
        ]
        for run, texts in runs.items()
    }
    # Methods share most of their phrases with the references: all are embedded together.
    similarity = Similarity.of_samples([*chain.from_iterable(samples.values())], encode, wordnet)
    images = pd.concat(_image_scores(runs, ids, samples, similarity, retrieval), ignore_index=True)
    rng = np.random.default_rng(seed)
    bootstrap = Bootstrap(len(ids), {method: len(own) for method, own in seeds.items()}, resamples, rng)
    fields = list(images.columns.drop(["method", "seed", "mode", "image"]))
    by_mode = images.groupby(["method", "mode"], sort=False)
    values = {key: rows[fields].to_numpy(float).reshape(-1, len(ids), len(fields)) for key, rows in by_mode}
    means = {key: _means(bootstrap, key[0], value, fields) for key, value in values.items()}
    metrics: dict = {
        "benchmark": labels.name, "images": len(ids), "parser": parser.name,
        "synonyms": wordnet.source if wordnet else "none", "resamples": resamples, "seed": seed, "seeds": seeds,
        "methods": {method: {} for method in seeds},
        "comparisons": _comparisons(list(seeds), fields, values, bootstrap),
        "relations": _by_relation(samples, seeds, similarity, bootstrap),
    }  # fmt: skip
    for (method, mode), cells in means.items():
        missing = dict(zip(fields, np.isnan(values[method, mode]).sum((0, 1)).tolist(), strict=True))
        metrics["methods"][method][mode] = {f: mean.cell() | {"left_out": missing[f]} for f, mean in cells.items()}
    if retrieval is not None:
        metrics["correlations"] = _correlations(images, rng, min(resamples, 200))
    answers = pd.DataFrame()
    if labels.questions:
        always = [(answer, YES) for asked in labels.questions.values() for answer in asked.values()]
        metrics["questions"] = {"always yes": question_scores(pd.DataFrame(always, columns=["expected", "given"]))}
        if reader is not None:
            metrics["reader"] = reader.name
            answers = pd.concat(
                read_all(reader, of, labels.questions).assign(method=method, seed=s)
                for method, own in {**captions, "empty captions": {0: dict.fromkeys(ids, "")}}.items()
                for s, of in own.items()
            )
            metrics["questions"] |= {m: question_scores(part) for m, part in answers.groupby("method", sort=False)}
    return Evaluation(metrics, images, answers)


def _image_scores(
    runs: Runs, ids: list[str], samples: Mapping, similarity: Similarity, retrieval: Retrieval | None
) -> Iterator[pd.DataFrame]:
    """A table for each run and mode, one row an image."""
    for (method, s), texts in runs.items():
        common = pd.DataFrame({"words": [len(text.split()) for text in texts]})
        if retrieval is not None:
            common = common.join(retrieval(texts, ids)[list(RETRIEVAL)])
        for mode in MODES:
            scores = common.join(pd.DataFrame([score(sample, similarity, mode) for sample in samples[method, s]]))
            yield scores.assign(method=method, seed=s, mode=mode, image=ids)


def _means(bootstrap: Bootstrap, method: str, values: np.ndarray, fields: Sequence[str]) -> dict[str, Estimate]:
    """Means over what is defined of (seeds, images, fields): a ratio of two sums."""
    counts = np.concatenate([np.nan_to_num(values), ~np.isnan(values)], axis=2)
    return bootstrap.estimates(
        method, counts, lambda sums: dict(zip(fields, ratio(*np.split(sums, 2, axis=-1)).T, strict=True))
    )


def _comparisons(methods: Sequence[str], fields: Sequence[str], values: Mapping, bootstrap: Bootstrap) -> list[dict]:
    """How each method differs from the first on the images where both are defined; intervals and p know of images and
    seeds."""
    first, *others = methods
    by_image = {key: ratio(np.nansum(value, axis=0), (~np.isnan(value)).sum(0)) for key, value in values.items()}
    rows = []
    for method, mode in product(others, MODES):
        differences = by_image[method, mode] - by_image[first, mode]  # (images, fields)
        # The precision of attributes, for example, is undefined where a caption has none.
        common = np.where(np.isnan(differences), np.nan, 0.0)
        ours, theirs = (_means(bootstrap, m, values[m, mode] + common, fields) for m in (method, first))
        for field, difference in zip(fields, differences.T, strict=True):
            difference = difference[~np.isnan(difference)]
            if not len(difference):
                continue
            estimate = ours[field] - theirs[field]
            rows.append(
                {
                    "method": method, "against": first, "mode": mode, "field": field, "images": len(difference),
                    "difference": float(estimate.value), "interval": estimate.cell()["interval"],
                    # Cohen's d, paired by image
                    "effect": float(difference.mean() / difference.std(ddof=1)) if varies(difference) else 0.0,
                    "p": estimate.p() if len(difference) > 1 else 1.0,
                }
            )  # fmt: skip
    corrected = holm([row["p"] for row in rows])
    return [row | {"p_holm": p} for row, p in zip(rows, corrected, strict=True)]


def _by_relation(samples: Mapping, seeds: Mapping, similarity: Similarity, bootstrap: Bootstrap) -> dict:
    """Recall of each relation that is not rare: exact (equal, or synonyms part by part), and as CAPTURE credits it.

    Returns:
        {method: {relation: {"stated", "exact": {"value", "interval"}, "soft": {...}}}}, where `stated` counts the
        references' triples.
    """
    references = [sample.reference for sample in next(iter(samples.values()))]
    stated = pd.Series([triple[1] for graph in references for triple in graph.relations], dtype=object).value_counts()
    out: dict = {}

    def recalls(sums: np.ndarray) -> dict[str, np.ndarray]:
        return {kind: ratio(sums[..., place], sums[..., 0]) for place, kind in ((1, "exact"), (2, "soft"))}

    for method, own in seeds.items():
        counts = {name: np.zeros((len(own), len(references), 3)) for name in stated.index[stated >= RARE]}
        for s, i in product(range(len(own)), range(len(references))):
            for name, exact, soft in relations_recalled(samples[method, own[s]][i], similarity):
                if name in counts:
                    counts[name][s, i] += 1, exact, soft
        out[method] = {}
        for name, table in counts.items():
            found = bootstrap.estimates(method, table, recalls)
            out[method][name] = {"stated": int(stated[name]), **{kind: recall.cell() for kind, recall in found.items()}}
    return out


def _correlations(images: pd.DataFrame, rng: np.random.Generator, resamples: int) -> list[dict]:
    """Kendall's tau-b of scores that need no reference with those that do, over the captions of all methods and images
    and over pairs of captions of the same image."""
    rows = []
    for mode, name, field in product(MODES, (*RETRIEVAL, "words"), QUALITY):
        both = images[images["mode"] == mode].dropna(subset=[name, field])
        pair = both[name].to_numpy(float), both[field].to_numpy(float), both["image"].to_numpy()
        taus = {"kendall": kendall(*pair, rng, resamples), "kendall_within": kendall_within(*pair, rng, resamples)}
        rows.append({"mode": mode, "score": name, "with": field, "captions": len(both), "resamples": resamples, **taus})
    return rows


def agreement(first: Sequence[SceneGraph], second: Sequence[SceneGraph]) -> dict[str, float]:
    """F1 of equal objects, (object, attribute) pairs and relations in two parsers' graphs of the same captions."""
    out = {}
    for kind, field in (("objects", "objects"), ("attributes", "pairs"), ("relations", "relations")):
        sides = [[set(getattr(graph, field)) for graph in graphs] for graphs in (first, second)]
        both = sum(len(a & b) for a, b in zip(*sides, strict=True))
        total = sum(map(len, chain(*sides)))
        out[kind] = 2 * both / total if total else float("nan")
    return out
