"""Caption quality of models against the ground truth, with intervals over images and seeds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from pydantic import Field

from cim.captioners.generate import diversity
from cim.data.manifest import Manifest
from cim.errors import CimError
from cim.evaluation.capture.evaluate import Evaluation
from cim.evaluation.statistics import interval, resample_weights
from cim.params import Names, Settings
from cim.runs import BASE, LABELS, parse_run
from cim.world.scenes import Scene
from cim.world.scoring import COUNTS, FACTS, score_captions

# Metrics in the order of tables; each is a ratio of sums over images, so it is exact under resampling.
METRICS = (
    *(f"{fact}_{kind}" for fact in (*FACTS, "all") for kind in ("precision", "recall", "f1")),
    "qa_accuracy",
    "qa_balanced",
    "qa_yes",
    "qa_no",
    "qa_told",
    "words",
)


class EvaluateSettings(Settings):
    """The `evaluate` group."""

    splits: Names
    parser: Literal["world", "pattern", "factual"]
    encoder: str
    seed: int
    resamples: int = Field(ge=100)
    reader: str | None = None
    wordnet: bool = True


def read_captions(folder: Path) -> pd.DataFrame:
    """What stage `captions` wrote for one split; columns method, seed, image_id, caption, the base model first.

    Raises:
        CimError: where there are none.
    """
    files = sorted(folder.glob("*.json"), key=lambda path: (path.stem != BASE, path.stem))
    if not files or files[0].stem != BASE:
        raise CimError(f"{folder / BASE}.json: not found; stage 'captions' writes it")
    parts = []
    for path in files:
        method, seed = ("base", 0) if path.stem == BASE else parse_run(path.stem)
        said = json.loads(path.read_text(encoding="utf-8"))
        parts.append(pd.DataFrame({"method": method, "seed": seed, "image_id": said.keys(), "caption": said.values()}))
    table = pd.concat(parts, ignore_index=True)
    order = [method for method in LABELS if method in set(table["method"])]
    return table.sort_values("method", key=lambda column: column.map(order.index), kind="stable", ignore_index=True)


def capture(
    settings: EvaluateSettings, split: Manifest, name: str, captions: pd.DataFrame, gallery: Path
) -> Evaluation:
    """CAPTURE and all that goes with it, of the captions of one split, with GRC, QIR and CIM beside.

    Args:
        captions: as read_captions gives them.
        gallery: the folder of a gallery.
    """
    from cim.data.labels import labels_of
    from cim.encoders import load_text_encoder
    from cim.evaluation.capture.evaluate import evaluate as judge
    from cim.evaluation.capture.parsers import CachedParser, load_parser
    from cim.evaluation.capture.readers import load_reader
    from cim.evaluation.capture.synonyms import load_wordnet
    from cim.processes import default_device
    from cim.scorer import load_scorer

    wordnet = load_wordnet() if settings.wordnet else None
    parser = CachedParser(load_parser(settings.parser, wordnet, str(default_device())), Path(".cache/parses"))
    scorer = load_scorer(gallery)
    scorer.add_sources(split)
    return judge(
        by_method(captions),
        labels_of(split, name),
        parser,
        load_text_encoder(settings.encoder).encode,
        wordnet,
        load_reader(settings.reader) if settings.reader else None,
        scorer.retrieval_scores,
        settings.seed,
        settings.resamples,
    )


def extremes(images: pd.DataFrame, method: str, shown: int = 4) -> pd.DataFrame:
    """The images whose captions gained and lost most in strict CAPTURE over the base's, first seeds; best first.

    Returns:
        Columns image, gain.
    """
    strict = images[images["mode"] == "strict"]
    first = strict[strict["seed"] == strict.groupby("method")["seed"].transform("min")]
    wide = first.pivot(index="image", columns="method", values="capture")
    gain = (wide[method] - wide["base"]).dropna().sort_values(ascending=False, kind="stable")
    return pd.concat([gain.head(shown), gain.tail(shown)]).rename("gain").reset_index()


def by_method(captions: pd.DataFrame) -> dict[str, dict[int, dict[str, str]]]:
    """The same as {method: {seed: {image_id: caption}}}, which cim.capture takes."""
    out: dict[str, dict[int, dict[str, str]]] = {}
    for (method, seed), part in captions.groupby(["method", "seed"], sort=False):
        out.setdefault(method, {})[int(seed)] = dict(zip(part["image_id"], part["caption"], strict=True))
    return out


def with_controls(captions: pd.DataFrame) -> pd.DataFrame:
    """Add the line of empty captions, which tells what a question's form alone gives away."""
    ids = captions.loc[captions["method"] == "base", "image_id"]
    empty = pd.DataFrame({"method": "empty", "seed": 0, "image_id": ids, "caption": ""})
    return pd.concat([captions, empty], ignore_index=True)


def image_counts(captions: pd.DataFrame, manifest: Manifest) -> pd.DataFrame:
    """What each caption states and answers, as counts; one row a caption, in the order given."""
    truth = manifest.frame.set_index("image_id")
    scenes = {i: Scene.from_json(s) for i, s in truth["scene"].items()}
    questions = {i: json.loads(q) for i, q in truth["questions"].items()}
    ids = captions["image_id"]
    scores = score_captions(captions["caption"].tolist(), [scenes[i] for i in ids], [questions[i] for i in ids])
    out = scores[[f"{fact}_{count}" for fact in FACTS for count in COUNTS]].astype(float)
    for given in ("yes", "no"):
        columns = [c for c in scores if c.startswith("qa_") and c.endswith(f"_{given}")]
        out[f"{given}_right"] = scores[columns].sum(axis=1)
        out[f"{given}_asked"] = scores[columns].notna().sum(axis=1)
    out["told"] = scores[[c for c in scores if c.startswith("told_")]].sum(axis=1)
    out["words"] = scores["words"]
    out["one"] = 1.0
    return pd.concat([captions[["method", "seed", "image_id"]].reset_index(drop=True), out], axis=1)


def metrics_of(totals: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """METRICS from summed counts; arrays of any one shape in, the same shape out, NaN where nothing is counted."""

    def over(a, b):
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(b > 0, a / b, np.nan)

    t = {**totals, **{f"all_{c}": sum(totals[f"{fact}_{c}"] for fact in FACTS) for c in COUNTS}}
    out = {}
    for fact in (*FACTS, "all"):
        # Nothing stated is nothing wrong, but F1 is then 0, not undefined.
        precision, recall = (
            over(t[f"{fact}_correct"], t[f"{fact}_stated"]),
            over(t[f"{fact}_recalled"], t[f"{fact}_true"]),
        )
        safe = np.nan_to_num(precision)
        f1 = np.nan_to_num(over(2 * safe * recall, safe + recall))
        out |= {f"{fact}_precision": precision, f"{fact}_recall": recall, f"{fact}_f1": f1}
    asked = t["yes_asked"] + t["no_asked"]
    yes, no = over(t["yes_right"], t["yes_asked"]), over(t["no_right"], t["no_asked"])
    out |= {
        "qa_accuracy": over(t["yes_right"] + t["no_right"], asked),
        "qa_balanced": (yes + no) / 2,
        "qa_yes": yes,
        "qa_no": no,
        "qa_told": over(t["told"], asked),
        "words": over(t["words"], t["one"]),
    }
    return out


def evaluate(counts: pd.DataFrame, seed: int, resamples: int, against: str = "base") -> dict[str, dict]:
    """Each method's metrics with 95 % intervals, and its gain over `against`, paired over images.

    A bootstrap resample draws images, the same for every method, and within a method draws its seeds.

    Returns:
        {method: {"seeds": [...], "images": n, "metrics": {name: {"value", "interval", "gain",
        "gain_interval"}}}}.
    """
    rng = np.random.default_rng(seed)
    names = [c for c in counts if c not in ("method", "seed", "image_id")]
    ids = sorted(counts["image_id"].unique())
    weights = resample_weights(len(ids), resamples, rng)

    def bootstrap(method: str) -> tuple[list[int], dict, dict]:
        runs = {
            s: p.set_index("image_id").loc[ids, names].to_numpy(float)
            for s, p in counts[counts["method"] == method].groupby("seed")
        }
        stacked = np.stack(list(runs.values()))  # (seeds, images, counts)
        drawn = resample_weights(len(runs), resamples, rng)
        totals = np.einsum("bs,bi,sic->bc", drawn, weights, stacked, optimize=True)
        value = metrics_of(dict(zip(names, stacked.sum((0, 1)), strict=True)))
        samples = metrics_of(dict(zip(names, totals.T, strict=True)))
        return [int(s) for s in runs], value, samples

    _, base_value, base_samples = bootstrap(against)
    out = {}
    for method in counts["method"].unique():
        seeds, value, samples = bootstrap(method) if method != against else ([0], base_value, base_samples)
        cells = {}
        for name in METRICS:
            cell = {"value": float(value[name]), "interval": interval(samples[name])}
            if method != against:
                cell["gain"] = float(value[name] - base_value[name])
                cell["gain_interval"] = interval(samples[name] - base_samples[name])
            cells[name] = cell
        out[method] = {"seeds": seeds, "images": len(ids), "metrics": cells}
    return out


def always_yes(manifest: Manifest) -> dict[str, float]:
    """What a reader that always says Yes would score on the questions."""
    answers = [q["answer"] for asked in manifest.frame["questions"] for q in json.loads(asked)]
    yes = float(np.mean([a == "yes" for a in answers]))
    return {"qa_accuracy": yes, "qa_balanced": 0.5}


def collapse(captions: pd.DataFrame) -> pd.DataFrame:
    """What shows a collapse, for each method and seed: distinct captions, the most common one's share, words."""
    rows = [
        {"method": m, "seed": s, **diversity(p["caption"])}
        for (m, s), p in captions.groupby(["method", "seed"], sort=False)
    ]
    return pd.DataFrame(rows)
