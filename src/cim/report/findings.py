"""What the results say: claims checked against them, and text whose numbers come from the metrics files."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd

from cim.evaluation.statistics import with_interval
from cim.files import read_json
from cim.report.pages import render
from cim.report.tables import KINDS, above, capture_table, markdown, readme_table, tau, text, trained_method
from cim.runs import label

HOLDS = 0.9  # Spearman of the grades' mean scores: 1 where each grade scores above the one below
CLAIMED = {"grc": ("fineness",), "qir": ("fineness", "accuracy"), "cim": ("fineness", "accuracy")}
PRECISION = [f"{kind}_precision" for kind in KINDS]
FIGURES = {
    "gallery/density": "how similar a gallery image's nearest neighbours are",
    "judgements/agreement": "agreement with people's judgements of captions, on photos that nothing was chosen on",
    "judgements/k": "agreement by the number of retrieved images and their weights",
    "judgements/size": "agreement by the size of the gallery",
    "evaluate/human": "captions compared with several human ones, by method",
    "correlation/levels": "mean scores of captions of rising fineness (top) and accuracy (bottom)",
    "correlation/correlations": "Spearman correlation of each score with caption quality, caption by caption",
    "correlation/density": "GRC against the share of the gallery that is searched",
    "samples/agreement": "agreement of each score with quality, among captions sampled for one image",
    "samples/attacks": "how often each score prefers a caption made to please it",
    "samples/best_of": "quality of the caption that each score chooses among N",
    "train/*": "reward, its parts, KL divergence, length and diversity by training step",
    "evaluate/capture": "CAPTURE and SC-Captioner's scores by method",
    "evaluate/facts": "facts that the captions state, by method",
    "evaluate/questions": "questions answered from the captions, by method",
    "evaluate/relations": "recall of each relation, by method",
    "evaluate/length": "quality against length, by method",
    "evaluate/examples": "images whose captions gained and lost most",
}
COMMANDS = {
    "": "make repro",
    "study": "make study",
    "flickr8k-judgements": "make photos DATA=folder",
    "flickr8k": "make photos-train DATA=folder",
    "photos": "cim pipeline runs/photos correlation -S profile=photos -S dataset.folder=FOLDER",
}


def best_evaluation(results: Path, profile: str) -> Path:
    """The folder of the evaluation with most seeds: the study's in its own profile, else the pipeline's."""
    study = results / "study" / "evaluate"
    return study if profile == "tiny" and study.is_dir() else results / "evaluate"


def read_evaluation(folder: Path) -> tuple[dict, dict]:
    """(facts, capture of the first split) of a folder of stage evaluate."""
    return read_json(folder / "metrics.json"), next(iter(read_json(folder / "capture.json").values()))


def verdicts(correlation: Mapping) -> pd.DataFrame:
    """Whether each score rises with each ladder: columns score, ladder, by_level, claimed (by the paper), holds."""
    rows = [
        (score, ladder, cell["by_level"] or 0.0, ladder in CLAIMED.get(score, ()))
        for ladder, scores in correlation["spearman"].items()
        for score, cell in scores.items()
        if ladder != "model"
    ]
    table = pd.DataFrame(rows, columns=["score", "ladder", "by_level", "claimed"])
    return table.assign(holds=table["by_level"] >= HOLDS)


def claims(correlation: Mapping, facts: Mapping, capture: Mapping) -> list[dict]:
    """The paper's claims that these results can test: "claim", what was "measured" and whether it "holds"."""
    rows = [
        (f"{r.score.upper()} rises with {r.ladder} (by level, at least {HOLDS})", f"{r.by_level:.2f}", r.holds)
        for r in verdicts(correlation).query("claimed").itertuples()
    ]
    compared, strict, counted = _compared(capture, "cim"), _strict(capture), _counted(facts)
    for name, title in (("capture", "CAPTURE"), ("relation_recall", "relation recall")):
        if name in compared:
            holds = compared[name]["difference"] > 0 and compared[name]["p_holm"] < 0.05
            claim = f"CIM raises {title} (strict), p < 0.05 after Holm's correction"
            rows.append((claim, _change(strict, "cim", name), holds))
    if "cim" in counted:
        cim, base = counted["cim"], counted["base"]
        for name, title in (("relation_recall", "relation recall"), ("qa_accuracy", "questions answered")):
            claim = f"CIM beats its base on {title}, counted, intervals apart"
            rows.append((claim, _change(counted, "cim", name), above(cim[name], base[name])))
        relative = cim["relation_recall"]["gain"] / (base["relation_recall"]["value"] or float("nan"))
        rows.append(("relation recall, counted, gains at least 20 % relative", f"{relative:+.0%}", relative >= 0.2))
        for name in PRECISION:
            claim = f"{name.replace('_', ' ')}, counted, does not fall"
            rows.append((claim, _change(counted, "cim", name), not _falls(cim[name]["gain_interval"])))
        for rival in ("grc", "qir", "sft", "self_retrieval", "clipscore"):
            if rival in counted:
                own, other = cim["all_f1"], counted[rival]["all_f1"]
                measured = f"{text('all_f1', own)} against {text('all_f1', other)}"
                rows.append((f"CIM beats {label(rival)} on F1 of all facts", measured, own["value"] > other["value"]))
    return [{"claim": claim, "measured": measured, "holds": bool(holds)} for claim, measured, holds in rows]


def correlation_findings(correlation: Mapping) -> str:
    """What stage correlation found, in three to six sentences."""
    table = verdicts(correlation)
    said = [f"{r.score.upper()} by {r.ladder} ({r.by_level:.2f})" for r in table.itertuples()]
    said, claimed, holds = pd.Series(said, dtype=object), table["claimed"], table["holds"]
    return _sentences(
        "correlation.md",
        **correlation,
        holding=said[claimed & holds].tolist(),
        failing=said[claimed & ~holds].tolist(),
        other=said[~claimed & (table["score"] == "grc")].tolist(),
        tau=tau,
    )


def evaluation_findings(facts: Mapping, capture: Mapping) -> str:
    """What stage evaluate found on the trained method, in three to six sentences."""
    method, strict, counted = trained_method(capture["methods"]), _strict(capture), _counted(facts)
    compared = _compared(capture, method)
    if method in counted:
        gains = {name: counted[method][name].get("gain_interval") for name in PRECISION}
    else:
        gains = {name: compared[name]["interval"] for name in PRECISION if name in compared}
    best = max(strict, key=lambda m: strict[m]["capture"]["value"] or 0.0)
    return _sentences(
        "evaluation.md",
        label=label(method) if method != "base" else None,
        capture=_change(strict, method, "capture"),
        comparison=compared.get("capture"),
        counted=bool(counted),
        relations=_change(counted or strict, method, "relation_recall"),
        questions=_change(counted, method, "qa_accuracy") if counted else None,
        always_yes=facts["always_yes"].get("qa_accuracy"),
        fallen=[name.partition("_")[0] for name, gain in gains.items() if _falls(gain)],
        words=_change(strict, method, "words"),
        best=f"{label(best)}: {text('capture', strict[best]['capture'])}" if best != method else None,
    )


def samples_findings(table: pd.DataFrame, measure: str, attacked: pd.DataFrame) -> str:
    """What stage samples found: for each model the best and the published score, what the best of N gains, and attacks.

    Args:
        table, attacked: of cim.evaluation.candidates.compare_scores and of cim.evaluation.attacks.preferred.
    """
    said = []
    for model, rows in table.groupby("model", sort=False):
        cells = dict(rows.set_index(["score", "metric"]).iterrows())
        most = max(int(metric.removeprefix("gain_")) for _, metric in cells if metric.startswith("gain_"))
        scores = [score for score in rows["score"].unique() if score != "quality"]
        best = max(scores, key=lambda score: cells[score, "tau"]["value"])
        shown = {score: _range(cells[score, "tau"]) for score in (best, "cim")}
        gains = {score: _range(cells[score, f"gain_{most}"], 3) for score in (best, "cim", "quality")}
        said.append(
            f"Captions of `{model}`: {best} agrees best with {measure} within an image (tau {shown[best]}; cim "
            f"{shown['cim']}). The best of {most} by {best} gains {gains[best]} over a random caption, by cim "
            f"{gains['cim']}; by the truth {gains['quality']}."
        )
    worst = attacked[attacked["attack"] != "honest"].sort_values("share").groupby("score").last()
    worst = [f"{r.Index} ({r.attack}: {r.share:.0%})" for r in worst.sort_values("share").itertuples()]
    said.append(f"The attack that each score prefers to the honest caption most often: {', '.join(worst)}.")
    return " ".join(said)


def _range(cell: Mapping, digits: int = 2) -> str:
    return with_interval({"value": cell["value"], "interval": (cell["low"], cell["high"])}, 1, digits)


def claims_findings(rows: Sequence[Mapping], capture: Mapping) -> str:
    """How many claims hold, which do not, and what the trained method gained, in three sentences."""
    failed = [f"{r['claim']} ({r['measured']})" for r in rows if not r["holds"]]
    rest = f"These do not: {'; '.join(failed)}." if failed else "None fails."
    method, strict = trained_method(capture["methods"]), _strict(capture)
    return (
        f"Of the {len(rows)} claims of the paper that these results can test, {len(rows) - len(failed)} hold. {rest} "
        f"With {label(method)}, strict CAPTURE goes from {_change(strict, method, 'capture')} and caption length from "
        f"{_change(strict, method, 'words')} words."
    )


def readme(results: Path, profile: str) -> str:
    """The text of results/README.md: tables, claims, figures, and the stage and command that made each."""
    best = best_evaluation(results, profile)
    facts, capture = read_evaluation(best)
    correlation = read_json(results / "correlation" / "metrics.json")
    figures: dict[str, list] = {command: [] for command in COMMANDS.values()}
    for (name, command), (key, caption) in ((c, f) for c in COMMANDS.items() for f in FIGURES.items()):
        stage, stem = key.split("/")
        paths = sorted((results / name / stage).glob(f"{stem}.png"))
        figures[command] += [(path.relative_to(results), caption, stage) for path in paths]
    checked = pd.DataFrame(claims(correlation, facts, capture)).set_index("claim")
    return render(
        "results.md",
        profile=profile,
        folder=best.relative_to(results),
        table=readme_table(best / "metrics.json") if facts["methods"] else markdown(capture_table(capture, "strict")),
        findings=[correlation_findings(correlation), evaluation_findings(facts, capture)],
        claims=markdown(checked.replace({"holds": {True: "yes", False: "**no**"}})),
        figures=figures,
    )


def _sentences(template: str, **values) -> str:
    return " ".join(render(template, **values).split())


def _compared(capture: Mapping, method: str) -> dict[str, Mapping]:
    """The strict comparisons of a method with the base by field."""
    return {r["field"]: r for r in capture["comparisons"] if (r["method"], r["mode"]) == (method, "strict")}


def _strict(capture: Mapping) -> dict[str, Mapping]:
    return {method: modes["strict"] for method, modes in capture["methods"].items()}


def _counted(facts: Mapping) -> dict[str, Mapping]:
    return {method: found["metrics"] for method, found in facts["methods"].items()}


def _change(methods: Mapping, method: str, name: str) -> str:
    return f"{text(name, methods['base'][name])} to {text(name, methods[method][name])}"


def _falls(gain: Sequence[float | None] | None) -> bool:
    """Whether the interval of a gain lies wholly below 0; an undefined one does not."""
    return gain is not None and not pd.isna(gain[1]) and gain[1] < 0
