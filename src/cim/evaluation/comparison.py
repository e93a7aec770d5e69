"""Methods compared with CIM on the facts that their captions state."""

from collections.abc import Mapping, Sequence
from itertools import product

import pandas as pd

from cim.evaluation.facts import evaluate
from cim.evaluation.statistics import side, with_interval
from cim.runs import in_order, label

METRICS = ("all_f1", "all_precision", "all_recall")


def compare(counts: Mapping[str, Mapping[int, pd.DataFrame]], seed: int, resamples: int) -> pd.DataFrame:
    """F1, precision and recall of all facts of each method, and how far they are above CIM's, with 95 % intervals.

    Differences are paired by image and resampled over images, which all methods share, and each method's seeds.

    Args:
        counts: method -> seed -> cim.evaluation.facts.fact_counts; with method cim.

    Returns:
        Columns method, seeds, metric, value, low, high, difference, difference_low, difference_high, and verdict: the
        method is "above" or "below" CIM, or "not distinguishable" from it, by the difference's interval.
    """
    found = evaluate({"cim": counts["cim"], **counts}, seed, resamples)
    rows = []
    for method, metric in product(in_order(found), METRICS):
        cell = {"gain": 0.0, "gain_interval": (0.0, 0.0)} | found[method]["metrics"][metric]
        numbers = cell["value"], *cell["interval"], cell["gain"], *cell["gain_interval"]
        rows.append((method, len(counts[method]), metric, *numbers, side(cell["gain_interval"])))
    columns = ["method", "seeds", "metric", "value", "low", "high"]
    columns += ["difference", "difference_low", "difference_high", "verdict"]
    return pd.DataFrame(rows, columns=columns)


def findings(compared: pd.DataFrame) -> str:
    """Which methods have a higher and a lower F1 than CIM, in Markdown; `compared` is of `compare`."""
    f1 = compared[compared["metric"] == "all_f1"].assign(name=compared["method"].map(label)).set_index("method")
    rest = f1.drop(index="cim")
    places = [f"{verdict}: {_listed(own['name'].tolist())}" for verdict, own in rest.groupby("verdict", sort=False)]
    cim = f1.loc["cim"]
    return f"F1 of all facts: {cim['name']} {with_interval(cim)}. Compared with it, {'; '.join(places)}."


def verdicts(points: pd.DataFrame, column: str, form: str) -> str:
    """The values of a column by verdict, such as "below at 48; above at 576 and 1,200"."""
    values = points.sort_values(column).groupby("verdict", sort=False)[column]
    return "; ".join(f"{verdict} at {_listed([format(value, form) for value in own])}" for verdict, own in values)


def _listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))
