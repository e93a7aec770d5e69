"""Captions of every method against the truth: CAPTURE, and where scenes are known every fact counted."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from cim.captioners.text import diversity
from cim.data.flickr8k import human_captions
from cim.data.labels import Labels
from cim.data.manifest import Manifest
from cim.encoders import load_text_encoder
from cim.errors import CimError
from cim.evaluation.caption_metrics import HumanCaptions
from cim.evaluation.capture.evaluate import Captions, Evaluation, Retrieval, agreement
from cim.evaluation.capture.evaluate import evaluate as evaluate_capture
from cim.evaluation.capture.parsers import CACHE, load_parser
from cim.evaluation.capture.readers import load_reader
from cim.evaluation.capture.synonyms import load_wordnet
from cim.evaluation.settings import EvaluateSettings
from cim.evaluation.statistics import Bootstrap, ratio
from cim.files import read_json
from cim.processes import default_device
from cim.runs import BASE, in_order, parse_run
from cim.world.scenes import Scene
from cim.world.scoring import COUNTS, FACTS, score_captions

Metrics = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]


def read_captions(folder: Path) -> Captions:
    """Captions of one split as stage `captions` wrote them, the base model's first.

    Raises:
        CimError: where the base model's captions are missing.
    """
    if not (folder / f"{BASE}.json").is_file():
        raise CimError(f"{folder / BASE}.json: not found; run stage 'captions'")
    captions: dict[str, dict[int, dict[str, str]]] = {}
    for path in sorted(folder.glob("*.json")):
        method, seed = ("base", 0) if path.stem == BASE else parse_run(path.stem)
        captions.setdefault(method, {})[seed] = read_json(path)
    return {method: dict(sorted(captions[method].items())) for method in in_order(captions)}


def capture(
    settings: EvaluateSettings, captions: Captions, labels: Labels, retrieval: Retrieval | None, cache: Path = CACHE
) -> Evaluation:
    """CAPTURE and what goes with it, by the named parser, encoder and reader: see cim.evaluation.capture.evaluate.

    With the factual parser, whose parses are kept in `cache`, metrics hold its agreement with the pattern parser.
    """
    wordnet = load_wordnet() if settings.wordnet else None
    parser = load_parser(settings.parser, wordnet, str(default_device()), cache)
    encode = load_text_encoder(settings.encoder).encode
    reader = load_reader(settings.reader) if settings.reader else None
    bootstrap = settings.seed, settings.resamples
    done = evaluate_capture(captions, labels, parser, encode, wordnet, reader, retrieval, *bootstrap)
    if settings.parser == "factual":
        graphs = (p.parse(list(labels.references.values())) for p in (parser, load_parser("pattern", wordnet)))
        done.metrics["agreement with the pattern parser"] = agreement(*graphs)
    return done


def extremes(images: pd.DataFrame, method: str, shown: int = 4) -> pd.DataFrame:
    """The images of an Evaluation whose captions gained and lost most in strict CAPTURE over the base's, by each
    method's first seed: columns image, gain."""
    first = images[images["mode"] == "strict"].drop_duplicates(["method", "image"])
    wide = first.pivot(index="image", columns="method", values="capture")
    gain = (wide[method] - wide["base"]).dropna().sort_values(ascending=False, kind="stable")
    return pd.concat([gain.head(shown), gain.tail(shown)]).rename("gain").reset_index()


def fact_counts(captions: Mapping[str, str], manifest: Manifest) -> pd.DataFrame:
    """What each caption states and answers, one row an image, sorted by image_id.

    Returns:
        Columns <fact>_<count> for FACTS x COUNTS, yes_right, yes_asked, no_right, no_asked, answered, words, one.

    Raises:
        CimError: where the scenes are not known.
    """
    if not manifest.scenes_known:
        raise CimError("facts are counted against scenes, which these images lack; set ablation.of and labels.of to []")
    truth = manifest.frame.sort_values("image_id")
    scenes, questions = truth["scene"].map(Scene.from_json), truth["questions"].map(json.loads)
    scores = score_captions([captions[i] for i in truth["image_id"]], scenes.tolist(), questions.tolist())
    counts = scores[[f"{fact}_{count}" for fact in FACTS for count in COUNTS]].astype(float)
    for answer in ("yes", "no"):
        verdicts = scores.filter(regex=f"^qa_.*_{answer}$")
        counts[f"{answer}_right"], counts[f"{answer}_asked"] = verdicts.sum(axis=1), verdicts.notna().sum(axis=1)
    return counts.assign(answered=scores.filter(regex="^told_").sum(axis=1), words=scores["words"], one=1.0)


def metrics_of(totals: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Metrics from summed columns of fact_counts, in the order of tables; NaN where nothing is counted."""
    out = {}
    for fact in (*FACTS, "all"):
        parts = FACTS if fact == "all" else [fact]
        stated, correct, recalled, true = (sum(totals[f"{part}_{count}"] for part in parts) for count in COUNTS)
        precision, recall = ratio(correct, stated), ratio(recalled, true)
        # Nothing stated is nothing wrong, but F1 is then 0, not undefined.
        safe = np.nan_to_num(precision)
        f1 = np.nan_to_num(ratio(2 * safe * recall, safe + recall))
        out |= {f"{fact}_precision": precision, f"{fact}_recall": recall, f"{fact}_f1": f1}
    asked = totals["yes_asked"] + totals["no_asked"]
    yes, no = (ratio(totals[f"{answer}_right"], totals[f"{answer}_asked"]) for answer in ("yes", "no"))
    return out | {
        "qa_accuracy": ratio(totals["yes_right"] + totals["no_right"], asked),
        "qa_balanced": (yes + no) / 2,
        "qa_yes": yes,
        "qa_no": no,
        "qa_answered": ratio(totals["answered"], asked),
        "words": ratio(totals["words"], totals["one"]),
    }


def evaluate(
    counts: Mapping[str, Mapping[int, pd.DataFrame]], seed: int, resamples: int, metrics: Metrics = metrics_of,
    subject: str | None = None,
) -> dict[str, dict]:  # fmt: skip
    """Each method's metrics with 95 % intervals over images and seeds, and its gain over the first, paired by image.

    Args:
        counts: method -> seed -> one row an image, such as fact_counts.
        metrics: of the sums of their columns.
        subject: a method that is compared with each of the others.

    Returns:
        {method: {"seeds", "images", "metrics": {name: {"value", "interval", "gain", "gain_interval", "relative"}}}},
        where "relative" is the gain as a share of the first's, {"value", "interval"}; the subject's has "against":
        {other method: {name: {"value", "interval", "p"}}} too, how far it is above the other; p is not corrected.
    """
    tables = {method: np.stack([part.to_numpy() for part in runs.values()]) for method, runs in counts.items()}
    first, images = next(iter(tables)), next(iter(tables.values())).shape[1]
    columns = counts[first][min(counts[first])].columns
    rng = np.random.default_rng(seed)
    bootstrap = Bootstrap(images, {method: len(runs) for method, runs in counts.items()}, resamples, rng)
    found = {
        method: bootstrap.estimates(method, table, lambda sums: metrics(dict(zip(columns, sums.T, strict=True))))
        for method, table in tables.items()
    }
    out = {}
    for method, estimates in found.items():
        cells = {name: estimate.cell() for name, estimate in estimates.items()}
        for name, cell in cells.items() if method != first else ():
            base = found[first][name]
            gain, relative = (estimates[name] - base).cell(), ((estimates[name] - base) / base).cell()
            cell |= {"gain": gain["value"], "gain_interval": gain["interval"], "relative": relative}
        out[method] = {"seeds": list(counts[method]), "images": images, "metrics": cells}
    if subject in out:
        out[subject]["against"] = {
            other: {name: (d := value - its[name]).cell() | {"p": d.p()} for name, value in found[subject].items()}
            for other, its in found.items()
            if other != subject
        }
    return out


def human_counts(captions: Captions, manifest: Manifest, encoder: str) -> dict[str, dict[int, pd.DataFrame]]:
    """What caption_metrics.metrics_of needs of every method and seed, one row an image.

    Args:
        manifest: images with several human captions each, as Flickr8k's.
        encoder: the sentence encoder of identification; one that no reward used.
    """
    encode = load_text_encoder(encoder, precision="bfloat16").encode
    human = HumanCaptions(human_captions(manifest.frame), encode, load_wordnet())
    ids = manifest.frame["image_id"]
    return {m: {seed: human.compare([of[i] for i in ids]) for seed, of in runs.items()} for m, runs in captions.items()}


def always_yes(manifest: Manifest) -> dict[str, float]:
    """The scores on the questions of a reader that always says Yes."""
    answers = [q["answer"] == "yes" for asked in manifest.frame["questions"] for q in json.loads(asked)]
    return {"qa_accuracy": float(np.mean(answers)), "qa_balanced": 0.5}


def collapse(captions: Captions) -> pd.DataFrame:
    """Diversity statistics that reveal collapse: columns method, seed, and those of `diversity`."""
    runs = [(method, seed, of) for method, seeds in captions.items() for seed, of in seeds.items()]
    return pd.DataFrame([{"method": m, "seed": s, **diversity(list(of.values()))} for m, s, of in runs])
