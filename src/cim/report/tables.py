"""Tables from the files of stage evaluate: `facts` is what metrics.json holds, `capture` a split of capture.json."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import pandas as pd

from cim.evaluation.statistics import with_interval
from cim.files import read_json
from cim.runs import label

KINDS = ("object", "attribute", "relation")
# (sc) marks SC-Captioner's scores, which also credit what is true and not in the reference.
TITLES = {
    f"{prefix}{kind}_{what}": f"{title}: {what.replace('f1', 'F1')}{mark}"
    for prefix, mark in {"": "", "sc_": " (sc)"}.items()
    for kind, title in {**{k: f"{k}s" for k in KINDS}, "background": "background", "all": "all facts"}.items()
    for what in ("precision", "recall", "f1")
} | {
    "qa_accuracy": "questions", "qa_balanced": "questions: balanced", "qa_yes": "questions: right where Yes",
    "qa_no": "questions: right where No", "capture": "CAPTURE", "grc": "GRC", "qir": "QIR", "cim": "CIM",
    "words": "words", "cider": "CIDEr-D", "R@1": "R@1", "R@10": "R@10", "ln_rank": "ln rank",
    "repetition": "repetition", "noun_precision": "nouns: precision", "noun_recall": "nouns: recall",
}  # fmt: skip
PLAIN = {"grc": 2, "qir": 2, "cim": 2, "words": 1, "ln_rank": 2}  # digits of what is no share
HEADLINE = ("object_recall", "object_precision", "relation_recall", "relation_precision", "qa_accuracy")
FACTS = (*HEADLINE, "attribute_recall", "background_recall", "qa_balanced")
CAPTURE = (
    "capture", "object_f1", "attribute_f1", "relation_f1", "relation_recall", "sc_object_precision",
    "sc_attribute_precision", "cim", "words",
)  # fmt: skip
HUMAN = ("R@1", "R@10", "ln_rank", "cider", "noun_precision", "noun_recall", "repetition", "words")
BENCHMARK = (*CAPTURE, "sc_object_f1", "sc_attribute_f1", "grc", "qir")  # for a terminal: what papers report, too
# arXiv 2603.01696, COCO-LN500: model + CIM, with the gains over the base model as reported there.
REPORTED = pd.DataFrame(
    [
        ("Qwen2.5-VL-7B + CIM", 48.93, 44.15, "+20.2", "+20.4"),
        ("Qwen2-VL-7B + CIM", 48.64, 38.71, "+10.4", "+18.2"),
        ("LLaVA-1.5-7B + CIM", 48.62, 24.98, "+12.6", "+10.6"),
        ("InternVL3-8B + CIM", 48.90, 38.67, "+10.0", "+12.2"),
    ],
    columns=["model", "CAPTURE", "relation QA", "relation recall gain", "relation QA gain"],
).assign(source="reported in the paper")


def text(name: str, cell: Mapping) -> str:
    """A metric's "value [low, high]": shares in percent, others as they are."""
    return with_interval(cell, 1, PLAIN[name]) if name in PLAIN else with_interval(cell)


def tau(cell: Mapping) -> str:
    """A correlation's "value [low, high]"."""
    return with_interval(cell, 1, 2, "n/a: it does not vary")


def p_value(p: float) -> str:
    """A p value with two digits, as in p = 0.13, or p < 0.001."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def long_table(methods: Mapping[str, Mapping[str, Mapping]]) -> pd.DataFrame:
    """Columns method, metric, value, low, high of {method: {metric: {"value", "interval"}}}, for figures."""
    rows = [(m, name, c["value"], *c["interval"]) for m, cells in methods.items() for name, c in cells.items()]
    columns = ["method", "metric", "value", "low", "high"]
    return pd.DataFrame(rows, columns=columns).astype(dict.fromkeys(columns[2:], float))


def _counted(facts: Mapping) -> tuple[dict[str, Mapping], dict[str, Sequence[int]]]:
    """Metrics and seeds by method and, where facts hold one, of the always-Yes line, whose intervals are its values."""
    found = facts["methods"]
    if facts.get("always_yes"):
        yes = {name: {"value": value, "interval": [value, value]} for name, value in facts["always_yes"].items()}
        found = found | {"always_yes": {"metrics": yes, "seeds": [0]}}
    return {m: r["metrics"] for m, r in found.items()}, {m: r["seeds"] for m, r in found.items()}


def facts_long(facts: Mapping) -> pd.DataFrame:
    """The long table of counted facts and questions answered, with column seeds, how many there are."""
    cells, seeds = _counted(facts)
    table = long_table(cells)
    table.insert(1, "seeds", table["method"].map({method: len(of) for method, of in seeds.items()}))
    return table


def in_mode(capture: Mapping, mode: str) -> dict[str, Mapping]:
    """CAPTURE's and SC-Captioner's scores by method, as cells."""
    return {method: modes[mode] for method, modes in capture["methods"].items()}


def capture_long(capture: Mapping) -> pd.DataFrame:
    """The long table of the strict mode's scores."""
    return long_table(in_mode(capture, "strict"))


def _wide(methods: Mapping[str, Mapping], seeds: Mapping[str, Sequence], names: Sequence[str]) -> pd.DataFrame:
    """Methods by metrics, as text."""
    rows = {
        label(m): {"seeds": len(seeds[m])} | {TITLES[n]: text(n, cells[n]) for n in names if n in cells}
        for m, cells in methods.items()
    }
    return pd.DataFrame(rows).T.fillna("")


def facts_table(facts: Mapping, names: Sequence[str] = FACTS) -> pd.DataFrame:
    """Methods by counted facts and questions answered, in percent with intervals."""
    return _wide(*_counted(facts), (*names, "words"))


def capture_table(capture: Mapping, mode: str, names: Sequence[str] = CAPTURE) -> pd.DataFrame:
    """Methods by CAPTURE's and SC-Captioner's scores in percent with intervals; GRC, QIR, CIM and words as they are."""
    return _wide(in_mode(capture, mode), capture["seeds"], names).rename_axis(f"{mode} mode")


def human_table(human: Mapping) -> pd.DataFrame:
    """Methods by how their captions compare with several human ones; shares and CIDEr-D times 100, with intervals."""
    return _wide(*_counted(human), HUMAN)


def gains_table(facts: Mapping, names: Sequence[str] = (*FACTS, "words")) -> pd.DataFrame:
    """Each method's gain over the base, metric by metric, and its paired interval."""
    rows = []
    for method, name in ((m, n) for m in facts["methods"] if m not in ("base", "empty") for n in names):
        cell, base = (facts["methods"][m]["metrics"][name] for m in (method, "base"))
        gain = cell["gain"], *cell["gain_interval"], cell["relative"]["value"]
        rows.append((label(method), TITLES[name], base["value"], cell["value"], *gain))
    columns = ["method", "metric", "base", "value", "gain", "gain low", "gain high", "relative"]
    return pd.DataFrame(rows, columns=columns).round(3)


def comparison_table(capture: Mapping, mode: str = "strict") -> pd.DataFrame:
    """Each method against the first: paired difference, interval, effect (Cohen's d) and corrected p."""
    rows = [
        (label(r["method"]), TITLES[r["field"]], r["difference"], *r["interval"], r["effect"], r["p_holm"], r["images"])
        for r in capture["comparisons"]
        if r["mode"] == mode and r["field"] in CAPTURE
    ]
    columns = ["method", "score", "difference", "low", "high", "effect", "p (Holm)", "images"]
    return pd.DataFrame(rows, columns=columns).round(4)


def metric_table(capture: Mapping, mode: str = "strict") -> pd.DataFrame:
    """Kendall's tau-b of scores without references with those that need them, over all captions and within images."""
    rows = [
        (over, r["score"], TITLES[r["with"]], tau(r[key]))
        for key, over in (("kendall", "all captions"), ("kendall_within", "captions of one image"))
        for r in capture.get("correlations", [])
        if r["mode"] == mode
    ]
    table = pd.DataFrame(rows, columns=["over", "score", "with", "tau"])
    return table.pivot(index=["over", "score"], columns="with", values="tau")


def correlation_table(correlation: Mapping) -> pd.DataFrame:
    """Spearman with quality by ladder and score, from the correlation study's metrics.json."""
    rows = [
        (ladder, score, tau(c), f"{c['up']} up, {c['down']} down of {c['steps']}" if c["steps"] else "")
        for ladder, scores in correlation["spearman"].items()
        for score, c in scores.items()
    ]
    return pd.DataFrame(rows, columns=["ladder", "score", "Spearman", "steps"]).set_index(["ladder", "score"])


def paper_table(capture: Mapping) -> pd.DataFrame:
    """The paper's results on COCO-LN500 as reported, and those measured here, which have other units."""
    rows = [REPORTED]
    if "cim" in capture["methods"]:
        cells, base = (capture["methods"][method]["paper"] for method in ("cim", "base"))
        gain = cells["relation_recall"]["value"] - base["relation_recall"]["value"]
        own = {
            "source": f"measured here, {len(capture['seeds']['cim'])} seed(s)",
            "model": "this pipeline's + CIM",
            "CAPTURE": f"{text('capture', cells['capture'])} (parser: {capture['parser']})",
            "relation recall gain": f"{100 * gain:+.1f}",
        }
        if "cim" in (asked := capture.get("questions", {})):
            after, before = (asked[method]["accuracy"] for method in ("cim", "base"))
            own["relation QA"] = f"{100 * after:.1f} (all questions)"
            own["relation QA gain"] = f"{100 * (after - before):+.1f} (all questions)"
        rows.append(pd.DataFrame([own]))
    return pd.concat(rows).astype(object).fillna("").set_index(["source", "model"])


def trained_method(methods: Iterable[str]) -> str:
    """The method that summaries are about: cim, else the first that is trained, else the base."""
    return next((m for m in ("cim", *methods) if m in methods and m not in ("base", "empty")), "base")


def summary(facts: Mapping, capture: Mapping) -> dict[str, float]:
    """The trained method in five scalars, so that `dvc metrics show` fits a terminal of 80 columns.

    Strict CAPTURE, its gain over the base, recall of relations and questions answered correctly (qa), all in percent,
    and words a caption; what is not known is left out.
    """
    method = trained_method(capture["methods"])
    cells, base = (capture["methods"][m]["strict"] for m in (method, "base"))
    counted = facts["methods"].get(method, {"metrics": {}})["metrics"]
    accuracy = capture.get("questions", {}).get(method, {}).get("accuracy")
    shares = {
        "capture": cells["capture"]["value"],
        "gain": cells["capture"]["value"] - base["capture"]["value"],
        "relations": counted.get("relation_recall", cells["relation_recall"])["value"],
        "qa": counted.get("qa_accuracy", {"value": accuracy})["value"],
        "words": cells["words"]["value"] / 100,
    }
    return {name: round(100 * value, 1) for name, value in shares.items() if not pd.isna(value)}


def headline(capture: Mapping) -> pd.DataFrame:
    """Strict CAPTURE of each method in percent, for `dvc plots show`: columns method, metric, value."""
    table = capture_long(capture).query("metric == 'capture'")[["method", "metric", "value"]]
    return table.assign(method=table["method"].map(label), value=(100 * table["value"]).round(1))


def markdown(table: pd.DataFrame) -> str:
    """A table in Markdown, its index first."""
    rows = [["", *table.columns], ["---"] * (1 + table.shape[1]), *table.reset_index().to_numpy()]
    return "\n".join(f"| {' | '.join(map(str, row))} |".replace("|  |", "| |") for row in rows)


def readme_table(path: Path) -> str:
    """The headline table of stage evaluate's metrics.json in Markdown; R is recall, P precision."""
    table = facts_table(read_json(path), HEADLINE).drop([label("empty"), label("always_yes")], errors="ignore")
    return markdown(table.rename(columns=lambda c: c.replace(": recall", " R").replace(": precision", " P")))
