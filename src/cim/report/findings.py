"""What the results say: claims checked against them, and text whose numbers come from the metrics files."""

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd

from cim.evaluation.statistics import holm, side, with_interval
from cim.files import read_json
from cim.params import read_params
from cim.report.pages import render
from cim.report.tables import KINDS, capture_table, in_mode, markdown, p_value, readme_table, tau, text, trained_method
from cim.runs import label

UNDECIDED = "undecided"
PAPER, OURS = "paper", "ours"  # who makes a claim
RIVALS = {"grc": PAPER, "qir": PAPER, "sft": PAPER, "self_retrieval": OURS, "clipscore": OURS}
CLAIMED = {"grc": "fineness", "qir": "accuracy"}
# Groups of parameters that two runs share whose results are of the same thing.
STUDIED = ("captioner", "dataset", "encoder", "encoders", "gallery", "model", "reward", "sft", "train")
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
    "labels/images": "SFT against CIM by the number of labelled images and the annotators' thoroughness",
    "labels/slips": "SFT against CIM by the annotators' error rate",
    "labels/annotators": "how much one annotator says of what five say, and how often two contradict each other",
    "ablation/ablation": "F1, precision and recall of the facts that each method's captions state, compared with CIM's",
    "train/*": "reward, its parts, KL divergence, length and diversity by training step; of SFT loss and accuracy",
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
    "labels-study": "make labels",
    "ablation-study": "make ablation",
    "weak-study": "make weak",
    "flickr8k-judgements": "make photos DATA=folder",
    "flickr8k": "make photos-train DATA=folder",
}
PUBLISHED = ("judgements", "labels", "ablation")  # stages that the default run leaves out


def best_evaluation(results: Path, params: Mapping) -> Path:
    """The folder of the evaluation with most seeds: the published study's, if it is of these parameters, else ours."""
    study = results / "study"
    published = read_params(study / "params.yaml") if study.is_dir() else params
    same = all(published[group] == params[group] for group in STUDIED) and published["results"] != params["results"]
    return (study if same else results) / "evaluate"


def read_evaluation(folder: Path) -> tuple[dict, dict]:
    """(facts, capture of the first split) of a folder of stage evaluate."""
    return read_json(folder / "metrics.json"), next(iter(read_json(folder / "capture.json").values()))


def verdicts(correlation: Mapping) -> pd.DataFrame:
    """Whether each score rises with each ladder: columns score, ladder, measured, claimed (by the paper), verdict.

    Yes where it rises over every step to the next grade, paired by image, no where it falls over one.
    """
    rows = []
    for ladder, scores in correlation["spearman"].items():
        for score, cell in scores.items() if ladder != "model" else ():
            holds = "no" if cell["down"] else "yes" if cell["up"] == cell["steps"] else UNDECIDED
            claimed, measured = CLAIMED.get(score) == ladder, f"{cell['up']} of {cell['steps']} steps up"
            rows.append((score, ladder, measured, claimed, holds))
    return pd.DataFrame(rows, columns=["score", "ladder", "measured", "claimed", "verdict"])


def verdict(interval: Sequence[float], at_least: float = 0.0) -> str:
    """What a 95 % interval says of a difference being above `at_least`: yes, no or undecided, as where it is null."""
    return {"above": "yes", "below": "no"}.get(side(np.array(interval, float), at_least), UNDECIDED)


def claims(correlation: Mapping, facts: Mapping, capture: Mapping) -> list[dict]:
    """What these results can test: "claim", its "source" (paper or ours), what was "measured" and the "verdict"."""
    rows = [
        (f"{r.score.upper()} rises with {r.ladder}", PAPER, r.measured, r.verdict)
        for r in verdicts(correlation).query("claimed").itertuples()
    ]
    compared, strict, counted = _compared(capture, "cim"), in_mode(capture, "strict"), _counted(facts)
    for name, title in (("capture", "CAPTURE"), ("relation_recall", "relation recall")):
        if row := compared.get(name):
            claim = f"CIM raises {title} (strict), p < 0.05 after Holm's correction"
            holds = verdict(row["interval"]) if row["p_holm"] < 0.05 else UNDECIDED
            rows.append((claim, PAPER, _change(strict, "cim", name), holds))
    if "cim" in counted:
        cim = counted["cim"]
        for name, title in (("relation_recall", "relation recall"), ("qa_accuracy", "questions answered")):
            claim = f"CIM beats its base on {title}, counted"
            rows.append((claim, PAPER, _change(counted, "cim", name), verdict(cim[name]["gain_interval"])))
        relative = cim["relation_recall"]["relative"]
        measured = with_interval(relative, digits=0) + " %"
        holds = verdict(relative["interval"], 0.2)
        rows.append(("relation recall, counted, gains at least 20 % relative", PAPER, measured, holds))
        for name in PRECISION:
            claim, low = f"{name.replace('_', ' ')}, counted, does not fall", cim[name]["gain_interval"][0]
            gain = with_interval({"value": cim[name]["gain"], "interval": cim[name]["gain_interval"]}, sign="+")
            measured = f"{_change(counted, 'cim', name)}: {gain}"
            rows.append((claim, OURS, measured, "yes" if low == 0 else verdict(cim[name]["gain_interval"])))
        against = facts["methods"]["cim"].get("against", {})
        rivals = {rival: against[rival]["all_f1"] for rival in RIVALS if rival in against}
        for (rival, paired), p in zip(rivals.items(), holm([cell["p"] for cell in rivals.values()]), strict=True):
            pair = (text("all_f1", own["all_f1"]) for own in (cim, counted[rival]))
            measured = f"{' against '.join(pair)}: {with_interval(paired, sign='+')}, {p_value(p)}"
            claim = f"CIM beats {label(rival)} on F1 of all facts, p < 0.05 after Holm's correction"
            rows.append((claim, RIVALS[rival], measured, verdict(paired["interval"]) if p < 0.05 else UNDECIDED))
    return [dict(zip(("claim", "source", "measured", "verdict"), row, strict=True)) for row in rows]


def correlation_findings(correlation: Mapping) -> str:
    """What stage correlation found, in three to six sentences."""
    rows = verdicts(correlation).to_dict("records")
    held = _by_verdict([row for row in rows if row["claimed"]])
    other = [row for row in rows if not row["claimed"] and row["score"] in ("grc", "cim")]
    return _sentences("correlation.md", **correlation, **held, other=other, tau=tau)


def evaluation_findings(facts: Mapping, capture: Mapping) -> str:
    """What stage evaluate found on the trained method, in three to six sentences."""
    method, strict, counted = trained_method(capture["methods"]), in_mode(capture, "strict"), _counted(facts)
    compared = _compared(capture, method)
    if method in counted:
        gains = {name: counted[method][name].get("gain_interval", (0, 0)) for name in PRECISION}
    else:
        gains = {name: row["interval"] for name, row in compared.items() if name in PRECISION and row["p_holm"] < 0.05}
    best = max(strict, key=lambda m: strict[m]["capture"]["value"] or 0.0)
    return _sentences(
        "evaluation.md",
        label=label(method) if method != "base" else None,
        capture=_change(strict, method, "capture"),
        comparison=compared.get("capture"),
        p_value=p_value,
        counted=bool(counted),
        relations=_change(counted or strict, method, "relation_recall"),
        questions=_change(counted, method, "qa_accuracy") if counted else None,
        always_yes=facts["always_yes"].get("qa_accuracy"),
        fallen=[name.partition("_")[0] for name, gain in gains.items() if verdict(gain) == "no"],
        words=_change(strict, method, "words"),
        best=f"{label(best)}: {text('capture', strict[best]['capture'])}" if best != method else None,
    )


def samples_findings(table: pd.DataFrame, measure: str, attacked: pd.DataFrame, chosen: Mapping) -> str:
    """What stage samples found: for each model the best and the published score, what the best of N gains, and attacks.

    Args:
        table, attacked, chosen: of cim.evaluation.candidates.compare_scores, of cim.evaluation.attacks.preferred, and
            of cim.evaluation.candidates.choose_setting.
    """
    models = {}
    for model, rows in table.groupby("model", sort=False):
        cells = dict(rows.set_index(["score", "metric"]).iterrows())
        most = max(int(metric.removeprefix("gain_")) for _, metric in cells if metric.startswith("gain_"))
        scores = [score for score in rows["score"].unique() if score != "quality"]
        best = max(scores, key=lambda score: np.nan_to_num(cells[score, "tau"]["value"], nan=-1))
        models[model] = best, most, cells
    worst = attacked[attacked["attack"] != "honest"].sort_values("share").groupby("score").last().sort_values("share")
    values = {"models": models, "measure": measure, "chosen": chosen, "worst": list(worst.itertuples())}
    return _sentences("samples.md", **values, number=with_interval)


def judgement_findings(cells: Mapping[str, Mapping[str, Mapping[str, Mapping]]], reported: pd.DataFrame) -> str:
    """What stage judgements found.

    Args:
        cells: of cim.evaluation.agreement.with_intervals, with scores "published", "chosen" and "text similarity to
            references".
        reported: of cim.evaluation.agreement: 100 tau of other metrics by benchmark.
    """

    def both(score: str, what: str = "tau") -> str:
        return " and ".join(with_interval(cells[score][name][what]) for name in reported)

    places = []
    for name, benchmark in zip(reported, ("Expert", "CrowdFlower"), strict=True):
        clipscore = reported.loc["CLIPScore", name]
        place = side(cells["chosen"][name]["tau"]["interval"], clipscore / 100)
        places.append(f"{place.replace('able', 'able from')} its {clipscore} on {benchmark}")
    return _sentences("judgements.md", both=both, places=places)


def claims_findings(rows: Sequence[Mapping], capture: Mapping) -> str:
    """How many claims hold, which do not and which are open, and what the trained method gained, in a few sentences."""
    method, strict = trained_method(capture["methods"]), in_mode(capture, "strict")
    changes = {name: _change(strict, method, name) for name in ("capture", "words")} if method != "base" else {}
    of = {source: [row for row in rows if row["source"] == source] for source in (PAPER, OURS)}
    return _sentences("claims.md", of=of, **_by_verdict(rows), label=label(method), **changes)


def _by_verdict(rows: Sequence[Mapping]) -> dict[str, list[Mapping]]:
    return {name: [row for row in rows if row["verdict"] == name] for name in ("yes", "no", UNDECIDED)}


def comparison_table(path: Path) -> pd.DataFrame:
    """F1 of all facts of each method of a study, and how far it is above CIM's, in percentage points."""
    table = pd.read_csv(path).query("metric == 'all_f1'")
    above = table[["difference", "difference_low", "difference_high"]].set_axis(["value", "low", "high"], axis=1)
    f1 = table.apply(with_interval, axis=1)
    shown = {"seeds": table["seeds"], "F1 of all facts": f1, "above CIM": above.apply(with_interval, axis=1, sign="+")}
    return pd.DataFrame(shown).set_index(table["method"].map(label))


def readme(results: Path, params: Mapping) -> str:
    """The text of results/README.md: tables, claims, figures, and the stage and command that made each."""
    best = best_evaluation(results, params)
    facts, capture = read_evaluation(best)
    correlation = read_json(results / "correlation" / "metrics.json")
    figures: dict[str, list] = {command: [] for command in COMMANDS.values()}
    for (name, command), (key, caption) in ((c, f) for c in COMMANDS.items() for f in FIGURES.items()):
        stage, stem = key.split("/")
        # A study has a curve for each of its many runs, and only published folders have stages of their own.
        if stage in (("train",) if name else PUBLISHED):
            continue
        paths = sorted((results / name / stage).glob(f"{stem}.png"))
        figures[command] += [(path.relative_to(results), caption, stage) for path in paths]
    checked = pd.DataFrame(claims(correlation, facts, capture)).set_index("claim")
    return render(
        "results.md",
        profile=params["results"]["profile"],
        folder=best.relative_to(results),
        table=readme_table(best / "metrics.json") if facts["methods"] else markdown(capture_table(capture, "strict")),
        findings=[correlation_findings(correlation), evaluation_findings(facts, capture)],
        claims=markdown(checked.replace({"verdict": {"no": "**no**"}})),
        compared={
            command: markdown(comparison_table(path))
            for (name, command), stage in product(COMMANDS.items(), ("labels", "ablation"))
            if name and (path := results / name / stage / f"{stage}.csv").is_file()
        },
        figures=figures,
    )


def _sentences(template: str, **values) -> str:
    return " ".join(render(template, **values).split())


def _compared(capture: Mapping, method: str) -> dict[str, Mapping]:
    """The strict comparisons of a method with the base by field."""
    return {r["field"]: r for r in capture["comparisons"] if (r["method"], r["mode"]) == (method, "strict")}


def _counted(facts: Mapping) -> dict[str, Mapping]:
    return {method: found["metrics"] for method, found in facts["methods"].items()}


def _change(methods: Mapping, method: str, name: str) -> str:
    return f"{text(name, methods['base'][name])} to {text(name, methods[method][name])}"
