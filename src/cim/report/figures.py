"""The figures of the notebooks: each function takes tables and returns a matplotlib figure."""

import textwrap
import zlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import product
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from cim.errors import CimError
from cim.images import open_image
from cim.report.tables import TITLES, long_table
from cim.runs import in_order, label

SCORE_LABELS = {"grc": "GRC", "qir": "QIR", "cim": "CIM", "clipscore": "CLIPScore", "words": "words"}
COLORS = {
    "base": "#7f7f7f", "sft": "#8c6d31", "sft_perfect": "#d6b656", "cim": "#c0392b", "cim_on_sft": "#7d3c98",
    "grc": "#e08283", "qir": "#e67e22", "self_retrieval": "#2471a3", "clipscore": "#76a5d6", "empty": "#bbbbbb",
    "always_yes": "#dddddd",
}  # fmt: skip
TRAINING = {
    "reward": "reward", "score/grc": "GRC", "score/qir": "QIR", "kl": "KL from base", "variety/words": "words",
    "variety/distinct": "distinct captions in a step", "loss": "loss", "mean_token_accuracy": "token accuracy",
}  # fmt: skip


def color(method: str) -> str:
    """A method's color in every figure; a variant's depends on its name alone."""
    others = sns.color_palette("Dark2").as_hex()
    return COLORS.get(method) or others[zlib.crc32(method.encode()) % len(others)]


def score_label(score: str) -> str:
    """A score's name in figures; a setting of the reward has its own."""
    return SCORE_LABELS.get(score) or label(score)


def style() -> None:
    """One look for all notebooks."""
    sns.set_theme(context="notebook", style="whitegrid", palette="deep", font_scale=0.9)
    plt.rcParams.update({"figure.dpi": 110, "savefig.bbox": "tight", "figure.constrained_layout.use": True})


def save(figure: Figure, path: Path) -> None:
    """Write a PNG without a time stamp or version, so that an unchanged figure is an unchanged file."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, metadata={"Software": None})


def _panels(n: int, columns: int, width: float, height: float, **options) -> tuple[Figure, list[Axes]]:
    """A figure with n panels of this size in inches, in rows of at most `columns`."""
    columns = max(1, min(columns, n))
    rows = max(1, -(-n // columns))
    figure, axes = plt.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False, **options)
    for ax in axes.flat[n:]:
        ax.set_visible(False)
    return figure, list(axes.flat[:n])


def error_bars(cells: pd.DataFrame, value: str = "value") -> np.ndarray:
    """(2, n) lengths of the error bars of columns low and high."""
    return np.abs(cells[["low", "high"]].to_numpy(float).T - cells[value].to_numpy(float))


def points(ax: Axes, cells: pd.DataFrame, names: Iterable[str], shift: float = 0, **options) -> None:
    """Values with their intervals, a row each from the bottom, named at the left."""
    ax.errorbar(cells["value"], np.arange(len(cells)) + shift, xerr=error_bars(cells), fmt="o", **options)
    ax.set_yticks(range(len(cells)), [*names])
    ax.grid(axis="y", visible=False)


def _legend(ax: Axes) -> None:
    ax.legend(title="", fontsize=8, bbox_to_anchor=(1.02, 1), loc="upper left")


def levels_figure(levels: pd.DataFrame, title: str = "") -> Figure:
    """Mean score at each level of fineness (top) and accuracy (bottom), with 95 % intervals."""
    scores = [s for s in SCORE_LABELS if s in set(levels["score"])]
    ladders = [x for x in ("fineness", "accuracy") if x in set(levels["ladder"])]
    figure, axes = _panels(len(ladders) * len(scores), len(scores), 2.7, 3.1)
    for i, (ladder, score) in enumerate(product(ladders, scores)):
        part = levels[(levels["ladder"] == ladder) & (levels["score"] == score)].sort_values("level")
        row, column = divmod(i, len(scores))
        axes[i].errorbar(part["level"], part["mean"], error_bars(part, "mean"), marker="o", color=f"C{row}", capsize=3)
        axes[i].set_xticks(part["level"], part["label"], rotation=40, ha="right", fontsize=8)
        axes[i].set_title(SCORE_LABELS[score] if row == 0 else "")
        axes[i].set_ylabel({"fineness": "finer →", "accuracy": "more accurate →"}[ladder] if column == 0 else "")
    figure.suptitle(title)
    return figure


def follows_figure(follows: pd.DataFrame) -> Figure:
    """Spearman correlation of each score with caption quality, caption by caption, by ladder."""
    ladders = dict(tuple(follows[follows["correlation"] == "spearman"].groupby("ladder", sort=False)))
    figure, axes = _panels(len(ladders), len(ladders), 3.4, 2.6, sharey=True)
    for ax, (ladder, part) in zip(axes, ladders.items(), strict=True):
        part = part.iloc[::-1]
        ax.axvline(0, color="0.6", lw=1)
        ax.errorbar(part["value"], part["score"].map(SCORE_LABELS), xerr=error_bars(part), fmt="o", capsize=3)
        ax.set_title({"model": "base model's captions"}.get(ladder, ladder))
        ax.set(xlim=(-1.05, 1.05), ylim=(-0.5, len(part) - 0.5), xlabel="Spearman with quality")
    return figure


def density_figure(density: pd.DataFrame) -> Figure:
    """GRC against the share of the gallery that is searched, one panel per K."""
    ks = sorted(density["k"].unique())
    figure, axes = _panels(len(ks), len(ks), 2.8, 3, sharey=True)
    for ax, k in zip(axes, ks, strict=True):
        part = density[density["k"] == k]
        sns.lineplot(part, x="rows", y="grc", hue="label", marker="o", ax=ax, legend=ax is axes[-1])
        ax.axhline(k**-0.5, ls="--", color="0.5", lw=1, label="unrelated images: 1/√K")
        ax.set(xscale="log", title=f"K = {k}", xlabel="gallery rows", ylabel="mean GRC")
        ax.set_xticks(part["rows"].unique(), part["rows"].unique(), rotation=40)
        ax.xaxis.set_minor_locator(NullLocator())
    if axes:  # none where every K is too large for the gallery
        _legend(axes[-1])
    return figure


def training_figure(log: pd.DataFrame) -> Figure:
    """Reward, GRC, QIR, KL, caption length and diversity by step: each value, and the mean of the last ten."""
    shown = [column for column in TRAINING if column in log and log[column].notna().any()]
    figure, axes = _panels(len(shown), 3, 3.4, 2.4)
    for ax, column in zip(axes, shown, strict=True):
        series = log.dropna(subset=[column])
        ax.plot(series["step"], series[column], lw=0.8, alpha=0.4)
        ax.plot(series["step"], series[column].rolling(10, min_periods=1).mean(), lw=2)
        ax.set(title=TRAINING[column], xlabel="step")
    return figure


def metrics_figure(table: pd.DataFrame, metrics: Sequence[str]) -> Figure:
    """One panel a metric, one point a method with its 95 % interval, a dotted line at the base model's value.

    Args:
        table: columns method, metric, value, low, high; metrics that it lacks are left out.
    """
    methods = in_order(set(table["method"]))[::-1]
    metrics = [metric for metric in metrics if metric in set(table["metric"])]
    figure, axes = _panels(len(metrics), 4, 2.7, 0.32 * len(methods) + 1, sharey=True)
    for ax, metric in zip(axes, metrics, strict=True):
        part = table[table["metric"] == metric].set_index("method").reindex(methods)
        for y, (method, row) in enumerate(part.iterrows()):
            ax.plot([row["low"], row["high"]], [y, y], color=color(method), lw=2)
            ax.plot(row["value"], y, "o", color=color(method))
        ax.axvline(part["value"].get("base", np.nan), color="0.6", lw=1, ls=":")
        ax.set_yticks(range(len(part)), [*map(label, methods)])
        ax.set(title=TITLES[metric], ylim=(-0.6, len(part) - 0.4))
        ax.locator_params(axis="x", nbins=3)
        ax.grid(axis="y", visible=False)
    return figure


def relations_figure(relations: Mapping[str, Mapping]) -> Figure:
    """Exact recall of the twelve most common relations by method; one row a relation, the most common at the top.

    Args:
        relations: `relations` of an evaluation's metrics: method -> relation -> {"stated", "exact", ...}.
    """
    methods = in_order(set(relations) - {"empty"})
    stated = {name: cell["stated"] for name, cell in relations[methods[0]].items()}
    names = sorted(stated, key=stated.get)[-12:]
    figure, ax = plt.subplots(figsize=(7, 0.16 * len(names) * max(3, len(methods)) + 1))
    for i, method in enumerate(methods):
        cells = long_table({method: {name: relations[method][name]["exact"] for name in names}})
        shift = 0.7 * (0.5 - (i + 0.5) / len(methods))
        shown = [f"{name} ({stated[name]})" for name in names]
        points(ax, cells, shown, shift, ms=4, color=color(method), label=label(method))
    ax.set(xlabel="recall", xlim=(-0.02, 1.02))
    _legend(ax)
    return figure


def length_figure(table: pd.DataFrame, metrics: Sequence[str]) -> Figure:
    """Quality against length: one point a method with both 95 % intervals, one panel a metric.

    Args:
        table: columns method, metric, value, low, high, with "words" among the metrics.
    """
    methods = in_order(set(table["method"]) - {"empty"})
    cells = table.set_index(["method", "metric"])
    figure, axes = _panels(len(metrics), len(metrics), 3.4, 3.2)
    for ax, metric in zip(axes, metrics, strict=True):
        for method in methods:
            x, y = cells.loc[[(method, "words")]], cells.loc[[(method, metric)]]
            options = {"fmt": "o", "color": color(method), "label": label(method)}
            ax.errorbar(x["value"], y["value"], xerr=error_bars(x), yerr=error_bars(y), **options)
        ax.set(title=TITLES[metric], xlabel="words a caption")
    _legend(axes[-1])
    return figure


def agreement_figure(table: pd.DataFrame, measure: str) -> Figure:
    """Correlation of each score with quality within images: one panel a model, with 95 % intervals.

    Args:
        table: columns model, score, metric, value, low, high, as cim.evaluation.candidates.compare_scores gives.
    """
    table = table[table["score"] != "quality"]
    models, scores = table["model"].unique(), table["score"].unique()[::-1]
    figure, axes = _panels(len(models), 3, 4, max(3.4, 0.2 * len(scores) + 0.9), sharey=True, sharex=True)
    for ax, model in zip(axes, models, strict=True):
        for metric, name, shift in (("tau", "Kendall's tau", 0.12), ("pearson", "Pearson", -0.12)):
            part = table[(table["model"] == model) & (table["metric"] == metric)].set_index("score").loc[scores]
            points(ax, part, map(score_label, scores), shift, capsize=2, ms=4, label=name)
        ax.axvline(0, color="0.6", lw=1)
        ax.set(title=f"captions of {model}", xlabel=f"with {measure}")
        ax.tick_params(labelbottom=True)
    _legend(axes[:3][-1])
    return figure


def comparison_figure(table: pd.DataFrame) -> Figure:
    """How far each method is above CIM: one row a method, one panel a metric, with 95 % intervals.

    Args:
        table: columns method, metric, difference, difference_low, difference_high, as of cim.evaluation.comparison.
    """
    table = table[table["method"] != "cim"]
    metrics, methods = table["metric"].unique(), table["method"].unique()[::-1]
    figure, axes = _panels(len(metrics), len(metrics), 3.4, 0.3 * len(methods) + 1, sharey=True)
    for ax, metric in zip(axes, metrics, strict=True):
        part = 100 * table[table["metric"] == metric].set_index("method").loc[methods].filter(like="difference")
        part.columns = ["value", "low", "high"]
        points(ax, part, map(label, methods), capsize=2, ms=4)
        ax.axvline(0, color="0.6", lw=1)
        ax.set(title=TITLES[metric], xlabel="points above CIM", ylim=(-0.5, len(part) - 0.5))
    return figure


def attacks_figure(table: pd.DataFrame) -> Figure:
    """How often each score prefers each attack to the honest caption, as cim.evaluation.attacks.preferred gives it."""
    share = table[table["attack"] != "honest"].pivot(index="score", columns="attack", values="share")
    share = share.loc[table["score"].unique(), [a for a in table["attack"].unique() if a != "honest"]]
    share.index = share.index.map(score_label)
    figure, ax = plt.subplots(figsize=(7.5, 0.35 * len(share) + 1.4))
    sns.heatmap(100 * share, annot=True, fmt=".0f", cmap="Reds", vmin=0, vmax=100, cbar=False, ax=ax)
    ax.set(xlabel="attack, preferred in % of images", ylabel="")
    return figure


def best_of_figure(table: pd.DataFrame, measure: str) -> Figure:
    """Mean quality of the caption that each score chooses among N: one panel a model; arguments as agreement_figure."""
    best = table[table["metric"].str.startswith("best_")]
    numbers = best["metric"].str.removeprefix("best_").astype(int)
    best = best.assign(n=numbers, score=best["score"].map(score_label))
    models, names = best["model"].unique(), best["score"].unique()
    palette = dict(zip(names, sns.color_palette("husl", len(names)), strict=True)) | {"quality": "black"}
    figure, axes = _panels(len(models), 3, 3.6, 3.4, sharey=True)
    for ax, model in zip(axes, models, strict=True):
        part = best[best["model"] == model]
        shown = {"palette": palette, "style": "score", "markers": True, "dashes": False, "legend": ax is axes[:3][-1]}
        sns.lineplot(part, x="n", y="value", hue="score", ax=ax, **shown)
        ax.set_xscale("log", base=2)
        ax.set_xticks(sorted(part["n"].unique()), sorted(part["n"].unique()))
        ax.set(title=f"captions of {model}", xlabel="N", ylabel=f"{measure} of the chosen")
    _legend(axes[:3][-1])
    return figure


def images_figure(rows: Sequence[tuple[Path, str]], columns: int = 4, width: int = 42) -> Figure:
    """Images with text below each, wrapped at `width` characters; blank where an archive of bytes held the image."""
    figure, axes = _panels(len(rows), columns, 3.1, 3.6)
    for ax, (path, text) in zip(axes, rows, strict=True):
        with suppress(CimError):
            ax.imshow(open_image(path))
        wrapped = "\n".join("\n".join(textwrap.wrap(line, width)) for line in text.split("\n"))
        ax.set_title(wrapped, fontsize=7.5, y=-0.03, va="top", loc="left", parse_math=False)
        ax.axis("off")
    return figure
