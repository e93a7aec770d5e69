"""Tables of the results page: what results/ holds, beside what the paper reports."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd

from cim.runs import LABELS

HEADLINE = {
    "relation_recall": "relations: recall",
    "relation_precision": "relations: precision",
    "object_recall": "objects: recall",
    "object_precision": "objects: precision",
    "attribute_recall": "attributes: recall",
    "background_recall": "background: recall",
    "qa_accuracy": "questions: accuracy",
    "qa_balanced": "questions: balanced",
}

# arXiv 2603.01696, COCO-LN500: model + CIM, with the gains over the base model as reported there.
REPORTED = {
    "Qwen2.5-VL-7B": {
        "CAPTURE": 48.93,
        "relation QA": 44.15,
        "relation recall gain": "+20.2",
        "relation QA gain": "+20.4",
    },
    "Qwen2-VL-7B": {
        "CAPTURE": 48.64,
        "relation QA": 38.71,
        "relation recall gain": "+10.4",
        "relation QA gain": "+18.2",
    },
    "LLaVA-1.5-7B": {
        "CAPTURE": 48.62,
        "relation QA": 24.98,
        "relation recall gain": "+12.6",
        "relation QA gain": "+10.6",
    },
    "InternVL3-8B": {
        "CAPTURE": 48.90,
        "relation QA": 38.67,
        "relation recall gain": "+10.0",
        "relation QA gain": "+12.2",
    },
}


def clear_of(metrics: dict[str, dict], method: str, other: str, name: str) -> bool:
    """Whether the 95 % interval of `method` lies wholly above that of `other`."""
    return metrics[method]["metrics"][name]["interval"][0] > metrics[other]["metrics"][name]["interval"][1]


def _read(path: Path) -> dict:
    return json.loads(Path(path).read_text())


def _known(cell: dict) -> bool:
    """Whether a figure is defined: None in files and NaN before they are written say that it is not."""
    return not (pd.isna(cell["value"]) or cell["interval"][0] is None)


def _cell(cell: dict, scale: float = 100) -> str:
    low, high = cell["interval"]
    if not _known(cell):
        return "n/a"
    return f"{scale * cell['value']:.1f} [{scale * low:.1f}, {scale * high:.1f}]"


def _correlation(cell: dict) -> str:
    low, high = cell["interval"]
    if not _known(cell):
        return "n/a: it does not vary"
    return f"{cell['value']:.2f} [{low:.2f}, {high:.2f}]"


def correlation_table(path: Path) -> pd.DataFrame:
    """Spearman with quality by ladder and score."""
    found = _read(path)
    rows = [
        {
            "ladder": ladder,
            "score": score,
            "Spearman": _correlation(c),
            "by level": "" if c["by_level"] is None else f"{c['by_level']:.2f}",
        }
        for ladder, scores in found["spearman"].items()
        for score, c in scores.items()
    ]
    return pd.DataFrame(rows).set_index(["ladder", "score"])


def methods_table(path: Path) -> pd.DataFrame:
    """Methods by headline metric, in percent with intervals."""
    found = _read(path)
    rows = {}
    for method in LABELS:
        if method in found["methods"]:
            result = found["methods"][method]
            rows[LABELS[method]] = {
                "seeds": len(result["seeds"]),
                **{title: _cell(result["metrics"][name]) for name, title in HEADLINE.items()},
                "words": _cell(result["metrics"]["words"], 1),
            }
    rows[LABELS["always_yes"]] = {HEADLINE[k]: f"{100 * v:.1f}" for k, v in found["always_yes"].items()}
    return pd.DataFrame(rows).T.fillna("")


def long_table(path: Path) -> pd.DataFrame:
    """Columns method, metric, value, low, high; for figures.metrics_figure."""
    return _long({m: r["metrics"] for m, r in _read(path)["methods"].items() if m != "empty"})


def _long(methods: dict[str, dict[str, dict]]) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {"method": m, "metric": k, "value": c["value"], "low": c["interval"][0], "high": c["interval"][1]}
            for m, cells in methods.items()
            for k, c in cells.items()
        ]
    )


def facts_table(metrics: dict[str, dict], yes: dict[str, float]) -> pd.DataFrame:
    """What evaluation.evaluate found and the always-Yes line: columns method, seeds, metric, value, low, high."""
    rows = [
        (m, len(r["seeds"]), k, c["value"], *c["interval"]) for m, r in metrics.items() for k, c in r["metrics"].items()
    ]
    rows += [("always_yes", 1, k, v, v, v) for k, v in yes.items()]
    return pd.DataFrame(rows, columns=["method", "seeds", "metric", "value", "low", "high"])


def gains_table(metrics: dict[str, dict]) -> pd.DataFrame:
    """What each method gained over the base, fact by fact, and whether the intervals lie apart."""
    rows = []
    for method, result in metrics.items():
        if method in ("base", "empty"):
            continue
        for name in (*HEADLINE, "words"):
            cell, start = result["metrics"][name], metrics["base"]["metrics"][name]
            rows.append(
                {
                    "method": LABELS[method],
                    "metric": HEADLINE.get(name, name),
                    "base": start["value"],
                    "now": cell["value"],
                    "gain": cell["gain"],
                    "gain low": cell["gain_interval"][0],
                    "gain high": cell["gain_interval"][1],
                    "relative": cell["gain"] / start["value"] if start["value"] else float("nan"),
                    "intervals apart": clear_of(metrics, method, "base", name),
                }
            )
    return pd.DataFrame(rows).round(3)


CAPTURE = {
    "capture": "CAPTURE",
    "object_f1": "objects F1",
    "attribute_f1": "attributes F1",
    "relation_f1": "relations F1",
    "relation_recall": "relations R",
    "sc_object_precision": "objects P (sc)",
    "sc_attribute_precision": "attributes P (sc)",
    "cim": "CIM",
    "words": "words",
}


def capture_table(metrics: dict, mode: str) -> pd.DataFrame:
    """Methods by CAPTURE's and SC-Captioner's scores in percent with intervals; CIM and words as they are."""
    rows = {}
    for method, modes in metrics["methods"].items():
        cells = {k: c for k, c in modes[mode].items() if k in CAPTURE}
        rows[LABELS.get(method, method)] = {"seeds": len(metrics["seeds"][method])} | {
            CAPTURE[k]: _cell(cells[k], 1 if k in ("cim", "words") else 100) for k in CAPTURE if k in cells
        }
    return pd.DataFrame(rows).T.fillna("").rename_axis(f"{mode} mode")


def capture_long(metrics: dict, mode: str) -> pd.DataFrame:
    """The same, every score: columns method, metric, value, low, high; for figures.metrics_figure."""
    return _long({m: modes[mode] for m, modes in metrics["methods"].items()})


def comparison_table(metrics: dict, mode: str) -> pd.DataFrame:
    """Each method against the first: paired difference, interval, effect and corrected p."""
    rows = [
        {
            "method": LABELS.get(r["method"], r["method"]),
            "score": CAPTURE[r["field"]],
            "difference": r["difference"],
            "low": r["interval"][0],
            "high": r["interval"][1],
            "effect": r["effect"],
            "p (Holm)": r["p_holm"],
            "images": r["images"],
        }
        for r in metrics["comparisons"]
        if r["mode"] == mode and r["field"] in CAPTURE
    ]
    return pd.DataFrame(rows).round(4)


def metric_table(metrics: dict, mode: str) -> pd.DataFrame:
    """How scores without references follow those with: Kendall's tau-b and its interval, over all captions and over
    those of the same image."""
    rows = [
        {"over": over, "score": r["score"], "with": CAPTURE.get(r["with"], r["with"]), "tau": _correlation(r[key])}
        for key, over in (("kendall", "all captions"), ("kendall_within", "captions of one image"))
        for r in metrics.get("correlations", [])
        if r["mode"] == mode
    ]
    return pd.DataFrame(rows).pivot(index=["over", "score"], columns="with", values="tau") if rows else pd.DataFrame()


def captured(folder: Path) -> dict:
    """What capture.json of an evaluation holds of its first split."""
    return next(iter(_read(Path(folder) / "capture.json").values()))


def beside_the_paper(folder: Path) -> pd.DataFrame:
    """The paper's rows, marked as reported, and ours from an evaluation's folder; units differ, as the page says."""
    found = _read(Path(folder) / "metrics.json")["methods"]
    told = captured(folder)
    rows = [{"source": "reported in the paper", "model": f"{m} + CIM", **values} for m, values in REPORTED.items()]
    if "cim" in found:
        cim = found["cim"]["metrics"]
        rows.append(
            {
                "source": f"measured here, {len(found['cim']['seeds'])} seed(s)",
                "model": "FastVLM, 1.5 M parameters + CIM",
                "CAPTURE": f"{_cell(told['methods']['cim']['paper']['capture'])} (parser: {told['parser']})",
                "relation QA": f"{_cell(cim['qa_accuracy'])} (all questions)",
                "relation recall gain": f"{100 * cim['relation_recall']['gain']:+.1f}",
                "relation QA gain": f"{100 * cim['qa_accuracy']['gain']:+.1f} (all questions)",
            }
        )
    return pd.DataFrame(rows).set_index(["source", "model"])


def claims(evaluation: Path, correlation: Path) -> list[dict]:
    """The paper's claims that these results can test, each with the figures and whether it held."""
    methods = _read(evaluation)["methods"]
    follows = _read(correlation)["spearman"]
    out = []
    for score, ladder in (("grc", "fineness"), ("qir", "fineness"), ("qir", "accuracy"), ("grc", "accuracy")):
        if score in follows.get(ladder, {}):
            value = follows[ladder][score]["by_level"]
            if value is None:  # the score did not vary at all
                value = 0.0
            out.append(
                {
                    "claim": f"{score.upper()} rises with {ladder} (by level, at least 0.9)",
                    "measured": f"{value:.2f}",
                    "held": value >= 0.9,
                }
            )
    if "cim" not in methods:
        return out

    def gain(method: str, name: str) -> str:
        cell, base = methods[method]["metrics"][name], methods["base"]["metrics"][name]
        return f"{_cell(base)} to {_cell(cell)}"

    for name, what in (("relation_recall", "relation recall"), ("qa_accuracy", "questions answered")):
        out.append(
            {
                "claim": f"CIM beats its base on {what}, intervals apart",
                "measured": gain("cim", name),
                "held": clear_of(methods, "cim", "base", name),
            }
        )
    cell, base = methods["cim"]["metrics"]["relation_recall"], methods["base"]["metrics"]["relation_recall"]
    relative = cell["gain"] / base["value"] if base["value"] else float("inf")
    out.append(
        {
            "claim": "relation recall gains at least 20 % relative",
            "measured": f"{relative:+.0%}",
            "held": relative >= 0.2,
        }
    )
    for name, what in (
        ("object_precision", "object"),
        ("attribute_precision", "attribute"),
        ("relation_precision", "relation"),
    ):
        highest = methods["cim"]["metrics"][name]["gain_interval"][1]
        held = highest is not None and highest >= 0
        out.append({"claim": f"{what} precision does not fall", "measured": gain("cim", name), "held": held})
    for rival in ("grc", "qir", "sft", "self_retrieval", "clipscore"):
        if rival in methods:
            ours, theirs = methods["cim"]["metrics"]["all_f1"], methods[rival]["metrics"]["all_f1"]
            out.append(
                {
                    "claim": f"CIM beats {LABELS[rival]} on F1 of all facts",
                    "measured": f"{_cell(ours)} against {_cell(theirs)}",
                    "held": ours["value"] > theirs["value"],
                }
            )
    return out


def readme_table(path: Path) -> str:
    """The README's table in Markdown, percent with 95 % intervals."""
    columns = {
        "object_recall": "objects R",
        "object_precision": "objects P",
        "relation_recall": "relations R",
        "relation_precision": "relations P",
        "qa_accuracy": "questions",
    }
    methods = _read(path)["methods"]
    lines = ["| | seeds | " + " | ".join(columns.values()) + " | words |", "| --- " * (len(columns) + 3) + "|"]
    for method in LABELS:
        if method in methods and method != "empty":
            cells = methods[method]["metrics"]
            row = [LABELS[method], str(len(methods[method]["seeds"])), *(_cell(cells[name]) for name in columns)]
            lines.append("| " + " | ".join([*row, _cell(cells["words"], 1)]) + " |")
    return "\n".join(lines)
