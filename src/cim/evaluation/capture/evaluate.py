"""Anybody's captions on a benchmark: every score with its interval, methods compared image by image."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from cim.data.labels import Labels
from cim.evaluation.capture.matching import MODES, Encode, Sample, Similarity, relations_recalled, score
from cim.evaluation.capture.parsers import Parser
from cim.evaluation.capture.readers import AlwaysYes, Reader, question_scores, read_all
from cim.evaluation.capture.significance import holm, paired_permutation
from cim.evaluation.capture.synonyms import WordNet
from cim.evaluation.statistics import interval, kendall, kendall_within, resample_weights

KEYS = ("method", "seed", "mode", "image")
RETRIEVAL = ("grc", "qir", "cim")
QUALITY = ("capture", "object_f1", "attribute_f1", "relation_f1", "relation_recall")
PERMUTATIONS = 10_000  # at least, since the smallest p is one in so many and is multiplied by the number of tests
RARE = 10  # a relation that fewer references state is not listed by itself

Captions = Mapping[str, Mapping[int, Mapping[str, str]]]  # method -> seed -> image -> caption
Retrieval = Callable[[Sequence[str], Sequence[str]], pd.DataFrame]


@dataclass(frozen=True)
class Evaluation:
    """What came out.

    Attributes:
        metrics: for metrics.json.
        images: one row a method, seed, mode and image, with every score.
        questions: one row a method, seed and question; empty where no reader was asked.
    """

    metrics: dict
    images: pd.DataFrame
    questions: pd.DataFrame


def evaluate(
    captions: Captions,
    labels: Labels,
    parser: Parser,
    encode: Encode,
    wordnet: WordNet | None,
    reader: Reader | None = None,
    retrieval: Retrieval | None = None,
    seed: int = 0,
    resamples: int = 10_000,
) -> Evaluation:
    """Score the captions of each method, in both modes, and compare the methods with the first.

    A bootstrap resample draws images, the same for every method, and within a method draws its seeds.

    Args:
        captions: for every image of the labels, by method and seed.
        wordnet: for synonyms; None for none, where the captions' words are known to have none.
        retrieval: GRC, QIR and CIM of (captions, images), which are then held against the other scores.
    """
    ids = list(labels.references)
    references = parser.parse([labels.references[i] for i in ids])
    samples = {
        (method, s): [
            Sample(candidate, reference, labels.extra_objects.get(i), labels.extra_attributes.get(i))
            for i, candidate, reference in zip(ids, parser.parse([of[i] for i in ids]), references, strict=True)
        ]
        for method, seeds in captions.items()
        for s, of in seeds.items()
    }
    # Methods share most of their phrases with the references: all are embedded together.
    similarity = Similarity.of_samples([sample for part in samples.values() for sample in part], encode, wordnet)
    images = _image_scores(captions, ids, samples, similarity, retrieval)
    fields = [c for c in images if c not in KEYS]

    rng = np.random.default_rng(seed)
    weights = resample_weights(len(ids), resamples, rng)
    values = {
        key: np.stack([part.set_index("image").loc[ids, fields].to_numpy(float) for _, part in rows.groupby("seed")])
        for key, rows in images.groupby(["method", "mode"], sort=False)
    }  # (method, mode) -> (seeds, images, fields)
    # One draw of seeds a method: its modes and fields are of the same resamples.
    drawn = {method: resample_weights(len(seeds), resamples, rng) for method, seeds in captions.items()}
    sums = {key: _resampled_means(value, weights, drawn[key[0]]) for key, value in values.items()}
    metrics: dict = {
        "benchmark": labels.name,
        "images": len(ids),
        "parser": parser.name,
        "synonyms": wordnet.source if wordnet else "none",
        "resamples": resamples,
        "seed": seed,
        "seeds": {method: sorted(seeds) for method, seeds in captions.items()},
        "methods": {},
        "comparisons": [],
    }
    for method in captions:
        metrics["methods"][method] = {
            mode: {
                field: _cell(values[method, mode][:, :, j], sums[method, mode][:, j]) for j, field in enumerate(fields)
            }
            for mode in MODES
        }
    first, *others = captions
    for other in others:
        for mode in MODES:
            metrics["comparisons"] += _compare(first, other, mode, fields, values, sums, rng, resamples)
    for row, corrected in zip(metrics["comparisons"], holm([row["p"] for row in metrics["comparisons"]]), strict=True):
        row["p_holm"] = corrected
    metrics["relations"] = _by_relation(samples, similarity, drawn, weights)
    if retrieval is not None:
        metrics["correlations"] = _correlations(images, rng, min(resamples, 200))

    questions = []
    if labels.questions:
        yes = read_all(AlwaysYes(), labels.references, labels.questions)
        metrics["questions"] = {"always yes": question_scores(yes)}
        if reader is not None:
            metrics["reader"] = reader.name
            for method, seeds in {**captions, "empty captions": {0: dict.fromkeys(ids, "")}}.items():
                parts = [
                    pd.DataFrame(read_all(reader, of, labels.questions)).assign(method=method, seed=s)
                    for s, of in seeds.items()
                ]
                metrics["questions"][method] = question_scores(pd.concat(parts).to_dict("records"))
                questions += parts
    return Evaluation(metrics, images, pd.concat(questions) if questions else pd.DataFrame())


def _image_scores(
    captions: Captions, ids: list[str], samples: Mapping, similarity: Similarity, retrieval: Retrieval | None
) -> pd.DataFrame:
    tables = []
    for (method, s), part in samples.items():
        said = [captions[method][s][i] for i in ids]
        same = pd.DataFrame({"words": [len(caption.split()) for caption in said]})
        if retrieval is not None:
            same = same.join(retrieval(said, ids)[list(RETRIEVAL)])
        for mode in MODES:
            scores = pd.DataFrame([score(sample, similarity, mode) for sample in part])
            tables.append(same.join(scores).assign(method=method, seed=s, mode=mode, image=ids))
    return pd.concat(tables, ignore_index=True)


def _cell(values: np.ndarray, samples: np.ndarray) -> dict:
    defined = ~np.isnan(values)
    return {
        "value": float(values[defined].mean()) if defined.any() else None,
        "interval": interval(samples),
        "left_out": int((~defined).sum()),
    }


def _resampled_means(values: np.ndarray, images: np.ndarray, seeds: np.ndarray) -> np.ndarray:
    """(resamples, fields) means of (seeds, images, fields) over what is defined.

    Args:
        images: (resamples, images) how often each is drawn; seeds likewise.
    """
    defined = ~np.isnan(values)
    filled = np.where(defined, values, 0.0)
    found, counted = np.zeros((2, len(images), values.shape[2]))
    for s in range(len(values)):
        found += seeds[:, s, None] * (images @ filled[s])
        counted += seeds[:, s, None] * (images @ defined[s].astype(float))
    with np.errstate(invalid="ignore", divide="ignore"):
        return found / counted


def _compare(
    first: str,
    other: str,
    mode: str,
    fields: Sequence[str],
    values: Mapping,
    sums: Mapping,
    rng: np.random.Generator,
    resamples: int,
) -> list[dict]:
    """How `other` differs from `first`, paired by image; where there are several seeds, by the mean over them."""
    rows = []
    for j, field in enumerate(fields):
        difference = _mean_over_seeds(values[other, mode][:, :, j]) - _mean_over_seeds(values[first, mode][:, :, j])
        difference = difference[~np.isnan(difference)]
        if not len(difference):
            continue
        spread = difference.std(ddof=1) if len(difference) > 1 else 0.0
        rows.append(
            {
                "method": other,
                "against": first,
                "mode": mode,
                "field": field,
                "difference": float(difference.mean()),
                "interval": interval(sums[other, mode][:, j] - sums[first, mode][:, j]),
                # Cohen's d of the paired differences.
                "effect": float(difference.mean() / spread) if spread else 0.0,
                "p": paired_permutation(difference, rng, max(resamples, PERMUTATIONS)),
                "images": len(difference),
            }
        )
    return rows


def _mean_over_seeds(values: np.ndarray) -> np.ndarray:
    defined = ~np.isnan(values)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(defined, values, 0.0).sum(0) / defined.sum(0)


def _by_relation(samples: Mapping, similarity: Similarity, drawn: Mapping, weights: np.ndarray) -> dict:
    """Recall of each relation that is not rare: exact (equal, or synonyms part by part), and as CAPTURE credits it.

    Returns:
        {method: {relation: {"stated", "exact": {"value", "interval"}, "soft": {...}}}}, where `stated` counts the
        references' triples.
    """
    tables: dict[tuple[str, str], list[np.ndarray]] = {}
    first = next(iter(samples.values()))
    stated = pd.Series([r[1] for sample in first for r in sample.reference.relations], dtype=object).value_counts()
    listed = [relation for relation, count in stated.items() if count >= RARE]
    for (method, _), part in samples.items():
        found = {relation: np.zeros((len(part), 3)) for relation in listed}
        for i, sample in enumerate(part):
            for relation, exact, soft in relations_recalled(sample, similarity):
                if relation in found:
                    found[relation][i] += (1, exact, soft)
        for relation, table in found.items():
            tables.setdefault((method, relation), []).append(table)
    out: dict = {}
    for (method, relation), parts in tables.items():
        totals = sum(drawn[method][:, s, None] * (weights @ table) for s, table in enumerate(parts))
        whole = np.sum(parts, axis=(0, 1))
        with np.errstate(invalid="ignore", divide="ignore"):
            cells = {
                name: {"value": float(whole[k] / whole[0]), "interval": interval(totals[:, k] / totals[:, 0])}
                for k, name in ((1, "exact"), (2, "soft"))
            }
        out.setdefault(method, {})[relation] = {"stated": int(stated[relation]), **cells}
    return out


def _correlations(images: pd.DataFrame, rng: np.random.Generator, resamples: int) -> list[dict]:
    """How what needs no reference follows what does: Kendall's tau-b over the captions of all methods and images, and
    over pairs of captions of the same image."""
    rows = []
    for mode, part in images.groupby("mode", sort=False):
        for name in (*RETRIEVAL, "words"):
            for field in QUALITY:
                both = part[part[[name, field]].notna().all(axis=1)]
                pair = [both[column].to_numpy(float) for column in (name, field)]
                of = both["image"].to_numpy()
                rows.append(
                    {
                        "mode": mode,
                        "score": name,
                        "with": field,
                        "captions": len(both),
                        "resamples": resamples,
                        "kendall": kendall(*pair, of, rng, resamples),
                        "kendall_within": kendall_within(*pair, of, rng, resamples),
                    }
                )
    return rows


def agreement(first: Sequence, second: Sequence) -> dict[str, float]:
    """How far two parsers' graphs of the same captions agree: F1 of equal objects, attributes and relations.

    Attributes agree where object and attribute do.
    """

    def parts(graph) -> dict[str, set]:
        pairs = {(name, word) for name, words in graph.attributes.items() for word in words}
        return {"objects": set(graph.objects), "attributes": pairs, "relations": set(graph.relations)}

    sides = [[parts(graph) for graph in graphs] for graphs in (first, second)]
    out = {}
    for kind in ("objects", "attributes", "relations"):
        both = sum(len(a[kind] & b[kind]) for a, b in zip(*sides, strict=True))
        total = sum(len(part[kind]) for side in sides for part in side)
        out[kind] = 2 * both / total if total else float("nan")
    return out


def table(metrics: dict, mode: str) -> pd.DataFrame:
    """The headline fields of every method in percent with 95 % intervals, for a terminal."""
    fields = ["capture", "object_f1", "attribute_f1", "relation_f1", "relation_recall"]
    fields += ["sc_object_f1", "sc_attribute_f1", *RETRIEVAL]
    rows = {}
    for method, modes in metrics["methods"].items():
        cells = {}
        for field in fields:
            if (cell := modes[mode].get(field)) and cell["value"] is not None:
                low, high = cell["interval"]
                cells[field] = f"{100 * cell['value']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
        rows[method] = {
            "seeds": len(metrics["seeds"][method]),
            **cells,
            "words": f"{modes[mode]['words']['value']:.1f}",
        }
    return pd.DataFrame(rows).T.fillna("")
