"""When are labels better? Fine-tuning by the number, thoroughness and errors of its labels, compared with CIM."""

from collections.abc import Iterable, Mapping

import pandas as pd

from cim.evaluation.comparison import verdicts
from cim.evaluation.statistics import with_interval
from cim.runs import label, with_variant


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


def findings(compared: pd.DataFrame, labelled: pd.DataFrame) -> str:
    """What the study found, in Markdown, by comparison.compare and `labels_of_methods`; method sft is among both."""
    f1 = compared[compared["metric"] == "all_f1"].set_index("method")
    points = labelled.join(f1, on="method")
    sft = points.set_index("method").loc["sft"]
    known = [name for name in ("base", "cim", "cim_on_sft") if name in f1.index]
    known = [f"{label(name)} {with_interval(f1.loc[name])}" for name in known]
    text = [f"F1 of all facts: {', '.join(known)}; SFT on {sft['images']:,} images {with_interval(sft)}."]
    for level, own in points[points["slip_rate"] == sft["slip_rate"]].groupby("level", sort=False):
        first = overtakes(own)
        where = f"overtakes CIM with {first:,} labelled images" if first else "does not overtake CIM"
        text.append(f"With `{level}` annotators SFT {where} ({verdicts(own, 'images', ',')}).")
    slips = points[(points["level"] == sft["level"]) & (points["images"] == sft["images"])]
    if len(slips) > 1:
        found = verdicts(slips, "slip_rate", "g")
        text.append(f"By slip rate, with {sft['images']:,} images of `{sft['level']}` annotators: {found}.")
    return " ".join(text)


def overtakes(points: pd.DataFrame) -> int | None:
    """The fewest labelled images from which on every number of them in `points` is above CIM; None where none is."""
    points = points.sort_values("images", ascending=False)
    return min(points["images"][(points["verdict"] == "above").cummin()], default=None)
