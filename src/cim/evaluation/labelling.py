"""When are labels better? Fine-tuning by the number, thoroughness and errors of its labels, compared with CIM."""

from collections.abc import Iterable, Mapping, Sequence

import pandas as pd

from cim.evaluation.facts import evaluate
from cim.evaluation.settings import LabelSettings
from cim.evaluation.statistics import with_interval
from cim.runs import in_order, label, with_variant

METRICS = ("all_f1", "all_precision", "all_recall")


def labels_of_methods(
    methods: Iterable[str], sft: Mapping, variants: Mapping, levels: Mapping[str, Mapping], images: int
) -> pd.DataFrame:
    """What each SFT method among these is trained on: columns method, level, images, slip_rate, by the last three.

    Args:
        sft, variants: these groups of parameters.
        levels: annotators by name, in order; others come last under their method's name.
        images: how many images there are to train on.
    """
    order, rows = {name: place for place, name in enumerate(levels)}, []
    for method in methods:
        if method == "sft" or "sft" in variants.get(method, {}):
            own = with_variant({"sft": sft, "variants": variants}, method)[0]["sft"]
            level = next((name for name, chances in levels.items() if chances == own["annotators"]), method)
            rows.append((method, level, own["images"] or images, own["slip_rate"]))
    rows.sort(key=lambda row: (order.get(row[1], len(order)), row[1:]))
    return pd.DataFrame(rows, columns=["method", "level", "images", "slip_rate"])


def compare(counts: Mapping[str, Mapping[int, pd.DataFrame]], settings: LabelSettings) -> pd.DataFrame:
    """F1, precision and recall of all facts of each method, and how far they are above CIM's, with 95 % intervals.

    Differences are paired by image and resampled over images, which all methods share, and each method's seeds.

    Args:
        counts: method -> seed -> cim.evaluation.facts.fact_counts; with method cim.

    Returns:
        Columns method, seeds, metric, value, low, high, difference, difference_low, difference_high, and verdict: the
        method is "above" or "below" CIM, or "not distinguishable" from it, by the difference's interval.
    """
    found = evaluate({"cim": counts["cim"], **counts}, settings.seed, settings.resamples)
    rows = []
    for method in in_order(found):
        for metric in METRICS:
            cell = found[method]["metrics"][metric]
            difference = cell.get("gain", 0.0), *cell.get("gain_interval", (0.0, 0.0))
            verdict = "above" if difference[1] > 0 else "below" if difference[2] < 0 else "not distinguishable"
            rows.append((method, len(counts[method]), metric, cell["value"], *cell["interval"], *difference, verdict))
    columns = ["method", "seeds", "metric", "value", "low", "high"]
    columns += ["difference", "difference_low", "difference_high", "verdict"]
    return pd.DataFrame(rows, columns=columns)


def findings(compared: pd.DataFrame, labelled: pd.DataFrame) -> str:
    """What the study found, in Markdown.

    Args:
        compared, labelled: of `compare` and `labels_of_methods`; method sft is among both.
    """
    f1 = compared[compared["metric"] == "all_f1"].set_index("method")
    points = labelled.join(f1, on="method")
    sft = points.set_index("method").loc["sft"]
    known = [f"{label(name)} {_percent(f1.loc[name])}" for name in ("base", "cim", "cim_on_sft") if name in f1.index]
    text = [f"F1 of all facts: {', '.join(known)}; SFT on all {sft['images']:,} images {_percent(sft)}."]
    for level, own in points[points["slip_rate"] == sft["slip_rate"]].groupby("level", sort=False):
        first = overtakes(own)
        where = f"overtakes CIM with {first:,} labelled images" if first else "does not overtake CIM"
        text.append(f"With `{level}` annotators SFT {where} ({_verdicts(own, 'images', ',')}).")
    slips = points[(points["level"] == sft["level"]) & (points["images"] == sft["images"])]
    if len(slips) > 1:
        found = _verdicts(slips, "slip_rate", "g")
        text.append(f"By slip rate, with all images labelled by `{sft['level']}` annotators: {found}.")
    return " ".join(text)


def overtakes(points: pd.DataFrame) -> int | None:
    """The fewest labelled images from which on every number of them in `points` is above CIM; None where none is."""
    first = None
    for images, verdict in points.sort_values("images", ascending=False)[["images", "verdict"]].itertuples(index=False):
        if verdict != "above":
            break
        first = images
    return first


def _verdicts(points: pd.DataFrame, column: str, form: str) -> str:
    """The values of a column by verdict, such as "below at 48; above at 576 and 1,200"."""
    values = points.sort_values(column).groupby("verdict", sort=False)[column]
    return "; ".join(f"{verdict} at {_listed([format(value, form) for value in own])}" for verdict, own in values)


def _listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def _percent(row: pd.Series) -> str:
    return with_interval({"value": row["value"], "interval": (row["low"], row["high"])})
