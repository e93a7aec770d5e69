"""Anybody's captions on a benchmark: every score with its interval, methods compared image by image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from cim.capture.labels import Labels
from cim.capture.matching import MODES, Encode, Sample, Similarity, score
from cim.capture.parsers import Parser
from cim.capture.readers import AlwaysYes, Reader, question_scores, read_all
from cim.capture.significance import holm, paired_permutation
from cim.capture.synonyms import WordNet
from cim.statistics import interval, resample_weights


@dataclass(frozen=True)
class Evaluation:
    """What came out.

    Attributes:
        metrics: for metrics.json.
        images: one row a method, mode and image, with every score.
        questions: one row a method and question; empty where no reader was asked.
    """

    metrics: dict
    images: pd.DataFrame
    questions: pd.DataFrame


def evaluate(
    captions: Mapping[str, Mapping[str, str]],
    labels: Labels,
    parser: Parser,
    encode: Encode,
    wordnet: WordNet,
    reader: Reader | None = None,
    seed: int = 0,
    resamples: int = 10_000,
) -> Evaluation:
    """Score the captions of each method, in both modes, and compare the methods with the first.

    Args:
        captions: method to {image: caption}, for every image of the labels.
    """
    ids = list(labels.references)
    references = parser.parse([labels.references[i] for i in ids])
    samples = {
        method: [
            Sample(candidate, reference, labels.extra_objects.get(i), labels.extra_attributes.get(i))
            for i, candidate, reference in zip(ids, parser.parse([of[i] for i in ids]), references, strict=True)
        ]
        for method, of in captions.items()
    }
    # Methods share most of their phrases with the references: all are embedded together.
    similarity = Similarity.of_samples([sample for part in samples.values() for sample in part], encode, wordnet)
    tables = []
    for method, part in samples.items():
        for mode in MODES:
            frame = pd.DataFrame([score(sample, similarity, mode) for sample in part])
            frame.insert(0, "words", [len(captions[method][i].split()) for i in ids])
            tables.append(frame.assign(method=method, mode=mode, image=ids))
    images = pd.concat(tables, ignore_index=True)
    fields = [c for c in images if c not in ("method", "mode", "image")]

    rng = np.random.default_rng(seed)
    weights = resample_weights(len(ids), resamples, rng)
    values = {
        (method, mode): part.set_index("image").loc[ids, fields].to_numpy(float)
        for (method, mode), part in images.groupby(["method", "mode"], sort=False)
    }
    metrics: dict = {
        "benchmark": labels.name,
        "images": len(ids),
        "parser": parser.name,
        "synonyms": wordnet.source,
        "resamples": resamples,
        "seed": seed,
        "methods": {},
        "comparisons": [],
    }
    sums = {key: _resampled_means(value, weights) for key, value in values.items()}
    for method in captions:
        metrics["methods"][method] = {
            mode: {
                field: {
                    "value": float(np.nanmean(column)) if (~np.isnan(column)).any() else None,
                    "interval": interval(sums[method, mode][:, j]),
                    "left_out": int(np.isnan(column).sum()),
                }
                for j, (field, column) in enumerate(zip(fields, values[method, mode].T, strict=True))
            }
            for mode in MODES
        }
    first, *others = captions
    for other in others:
        for mode in MODES:
            metrics["comparisons"] += _compare(first, other, mode, fields, values, sums, rng, resamples)
    for row, corrected in zip(metrics["comparisons"], holm([row["p"] for row in metrics["comparisons"]]), strict=True):
        row["p_holm"] = corrected

    questions = []
    if labels.questions:
        yes = read_all(AlwaysYes(), labels.references, labels.questions)
        metrics["questions"] = {"always yes": question_scores(yes)}
        if reader is not None:
            metrics["reader"] = reader.name
            for method, of in {**captions, "empty captions": dict.fromkeys(ids, "")}.items():
                rows = read_all(reader, of, labels.questions)
                metrics["questions"][method] = question_scores(rows)
                questions.append(pd.DataFrame(rows).assign(method=method))
    return Evaluation(metrics, images, pd.concat(questions) if questions else pd.DataFrame())


def _resampled_means(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(resamples, fields) means over the images where a field is defined."""
    defined = ~np.isnan(values)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (weights @ np.where(defined, values, 0.0)) / (weights @ defined.astype(float))


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
    """How `other` differs from `first`, paired by image."""
    rows = []
    for j, field in enumerate(fields):
        difference = values[other, mode][:, j] - values[first, mode][:, j]
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
                "p": paired_permutation(difference, rng, resamples),
                "images": len(difference),
            }
        )
    return rows


def table(metrics: dict, mode: str) -> pd.DataFrame:
    """The headline fields of every method in percent with 95 % intervals, for a terminal."""
    fields = ["capture", "object_f1", "attribute_f1", "relation_f1", "relation_recall"]
    fields += ["sc_object_f1", "sc_attribute_f1"]
    rows = {}
    for method, modes in metrics["methods"].items():
        cells = {}
        for field in fields:
            if (cell := modes[mode].get(field)) and cell["value"] is not None:
                low, high = cell["interval"]
                cells[field] = f"{100 * cell['value']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
        rows[method] = {**cells, "words": f"{modes[mode]['words']['value']:.1f}"}
    return pd.DataFrame(rows).T.fillna("")
