"""The figures of the notebooks; each takes tables and returns a matplotlib figure."""

from __future__ import annotations

import textwrap
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from cim.gallery.shards import open_stored
from cim.runs import LABELS

SCORE_LABELS = {
    "grc": "GRC",
    "qir": "QIR",
    "cim": "CIM = GRC + QIR",
    "clipscore": "CLIPScore",
    "words": "words",
}
COLOURS = dict(
    zip(
        LABELS,
        [
            "#7f7f7f",
            "#8c6d31",
            "#d6b656",
            "#c0392b",
            "#7d3c98",
            "#e08283",
            "#e67e22",
            "#2471a3",
            "#76a5d6",
            "#bbbbbb",
            "#dddddd",
        ],
        strict=True,
    )
)


def style() -> None:
    """One look for all notebooks."""
    sns.set_theme(context="notebook", style="whitegrid", palette="deep", font_scale=0.9)
    # Without this the same figure differs from run to run in its metadata alone.
    plt.rcParams.update(
        {"figure.dpi": 110, "savefig.bbox": "tight", "svg.hashsalt": "cim", "figure.constrained_layout.use": True}
    )


def save(figure: Figure, path: Path) -> None:
    """Write a PNG without a time stamp, so that an unchanged figure is an unchanged file."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, metadata={"Software": None})


def levels_figure(levels: pd.DataFrame, title: str = "") -> Figure:
    """Mean score at each level of fineness (top) and accuracy (bottom), with 95 % intervals."""
    scores = [s for s in SCORE_LABELS if s in set(levels["score"])]
    ladders = [x for x in ("fineness", "accuracy") if x in set(levels["ladder"])]
    figure, axes = plt.subplots(
        len(ladders), len(scores), figsize=(2.7 * len(scores), 3.1 * len(ladders)), squeeze=False
    )
    for i, ladder in enumerate(ladders):
        for j, score in enumerate(scores):
            part = levels[(levels["ladder"] == ladder) & (levels["score"] == score)].sort_values("level")
            ax = axes[i, j]
            error = np.abs(part[["low", "high"]].to_numpy().T - part["mean"].to_numpy())
            ax.errorbar(
                part["level"], part["mean"], yerror_or_none(error), marker="o", color=sns.color_palette()[i], capsize=3
            )
            ax.set_xticks(part["level"], part["label"], rotation=40, ha="right", fontsize=8)
            ax.set_title(SCORE_LABELS[score] if i == 0 else "")
            ax.set_ylabel(("finer →" if ladder == "fineness" else "more accurate →") if j == 0 else "")
    figure.suptitle(title)
    return figure


def yerror_or_none(error: np.ndarray) -> np.ndarray | None:
    """Error bars, or None where an interval is not known."""
    return error if np.isfinite(error).all() else None


def follows_figure(follows: pd.DataFrame) -> Figure:
    """Spearman correlation of each score with caption quality, caption by caption, by ladder."""
    part = follows[follows["correlation"] == "spearman"]
    ladders = list(dict.fromkeys(part["ladder"]))
    figure, axes = plt.subplots(1, len(ladders), figsize=(3.4 * len(ladders), 2.6), sharey=True, squeeze=False)
    for ax, ladder in zip(axes[0], ladders, strict=True):
        cell = part[part["ladder"] == ladder].iloc[::-1]
        ax.axvline(0, color="0.6", lw=1)
        error = np.abs(cell[["low", "high"]].to_numpy().T - cell["value"].to_numpy())
        ax.errorbar(cell["value"], [SCORE_LABELS[x] for x in cell["score"]], xerr=error, fmt="o", capsize=3)
        ax.set_title({"model": "base model's captions"}.get(ladder, ladder))
        ax.set_xlim(-1.05, 1.05)
        ax.set_xlabel("Spearman with quality")
    return figure


def density_figure(density: pd.DataFrame) -> Figure:
    """GRC against the share of the gallery that is searched, one panel per K."""
    ks = sorted(density["k"].unique())
    figure, axes = plt.subplots(1, len(ks), figsize=(2.8 * len(ks), 3), sharey=True, squeeze=False)
    for ax, k in zip(axes[0], ks, strict=True):
        part = density[density["k"] == k]
        sns.lineplot(part, x="rows", y="grc", hue="label", marker="o", ax=ax, legend=ax is axes[0, -1])
        ax.axhline(k**-0.5, ls="--", color="0.5", lw=1)
        ax.set(xscale="log", title=f"K = {k}", xlabel="gallery rows", ylabel="mean GRC")
        ax.set_xticks(sorted(part["rows"].unique()), sorted(part["rows"].unique()), rotation=40)
        ax.xaxis.set_minor_locator(NullLocator())
    axes[0, -1].legend(title="", fontsize=8, bbox_to_anchor=(1.02, 1), loc="upper left")
    axes[0, 0].text(
        0.02, ks[0] ** -0.5 + 0.005, "unrelated images: 1/√K", fontsize=8, transform=axes[0, 0].get_yaxis_transform()
    )
    return figure


def training_figure(log: pd.DataFrame) -> Figure:
    """Reward, GRC, QIR, KL, caption length and variety by step."""
    panels = {
        "reward": "reward",
        "score/grc": "GRC",
        "score/qir": "QIR",
        "kl": "KL from base",
        "variety/words": "words",
        "variety/distinct": "distinct captions in a step",
        "loss": "loss",
        "mean_token_accuracy": "token accuracy",
    }
    shown = {k: v for k, v in panels.items() if k in log and log[k].notna().any()}
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.4 * columns, 2.4 * rows), squeeze=False)
    for ax, (column, label) in zip(axes.flat, shown.items(), strict=False):
        series = log.dropna(subset=[column])
        ax.plot(series["step"], series[column], lw=0.8, alpha=0.4)
        ax.plot(series["step"], series[column].rolling(10, min_periods=1).mean(), lw=2)
        ax.set(title=label, xlabel="step")
    for ax in axes.flat[len(shown) :]:
        ax.set_visible(False)
    return figure


def metrics_figure(table: pd.DataFrame, names: dict[str, str]) -> Figure:
    """One panel a metric, one point a method with its 95 % interval.

    Args:
        table: columns method, metric, value, low, high.
        names: metric -> panel title.
    """
    methods = [m for m in LABELS if m in set(table["method"])]
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(2.7 * columns, (0.32 * len(methods) + 1) * rows), sharey=True, squeeze=False
    )
    for ax, (metric, title) in zip(axes.flat, names.items(), strict=False):
        part = table[table["metric"] == metric].set_index("method").reindex(methods[::-1])
        for y, (method, row) in enumerate(part.iterrows()):
            if np.isfinite(row["value"]):
                ax.plot([row["low"], row["high"]], [y, y], color=COLOURS[method], lw=2)
                ax.plot(row["value"], y, "o", color=COLOURS[method])
        ax.set_yticks(range(len(part)), [LABELS[m] for m in part.index])
        ax.set_title(title)
        ax.grid(axis="y", visible=False)
        if "base" in part.index and np.isfinite(part.loc["base", "value"]):
            ax.axvline(part.loc["base", "value"], color="0.6", lw=1, ls=":")
    for ax in axes.flat[len(names) :]:
        ax.set_visible(False)
    return figure


def relations_figure(relations: dict[str, dict]) -> Figure:
    """Recall of each relation by method, stated exactly; one row a relation, the most common at the top.

    Args:
        relations: as cim.capture.evaluate's metrics have them: method -> relation -> {"stated", "exact", ...}.
    """
    methods = [m for m in LABELS if m in relations and m != "empty"]
    stated = {name: cell["stated"] for name, cell in relations[methods[0]].items()}
    names = sorted(stated, key=stated.get)[-12:]
    figure, ax = plt.subplots(figsize=(7, 0.16 * len(names) * max(3, len(methods)) + 1))
    for i, method in enumerate(methods):
        cells = [relations[method][name]["exact"] for name in names]
        at = np.arange(len(names)) + 0.7 * (0.5 - (i + 0.5) / len(methods))
        value = np.array([c["value"] for c in cells], float)
        error = np.abs(np.array([c["interval"] for c in cells], float).T - value)
        ax.errorbar(value, at, xerr=error, fmt="o", ms=4, color=COLOURS[method], label=LABELS[method])
    ax.set_yticks(range(len(names)), [f"{name} ({stated[name]})" for name in names])
    ax.set(xlabel="recall", xlim=(-0.02, 1.02))
    ax.grid(axis="y", visible=False)
    ax.legend(fontsize=8, bbox_to_anchor=(1.02, 1), loc="upper left")
    return figure


def length_figure(table: pd.DataFrame, names: dict[str, str]) -> Figure:
    """Quality against length: one point a method with both 95 % intervals, one panel a metric.

    Args:
        table: columns method, metric, value, low, high, with "words" among the metrics.
        names: metric -> panel title.
    """
    methods = [m for m in LABELS if m in set(table["method"]) and m != "empty"]
    cells = table.set_index(["method", "metric"])
    figure, axes = plt.subplots(1, len(names), figsize=(3.4 * len(names), 3.2), squeeze=False)
    for ax, (metric, title) in zip(axes[0], names.items(), strict=True):
        for method in methods:
            x, y = cells.loc[(method, "words")], cells.loc[(method, metric)]
            ax.plot([x["low"], x["high"]], [y["value"]] * 2, color=COLOURS[method], lw=1.5)
            ax.plot([x["value"]] * 2, [y["low"], y["high"]], color=COLOURS[method], lw=1.5)
            ax.plot(x["value"], y["value"], "o", color=COLOURS[method], label=LABELS[method])
        ax.set(title=title, xlabel="words a caption")
    axes[0, -1].legend(fontsize=8, bbox_to_anchor=(1.02, 1), loc="upper left")
    return figure


def images_figure(rows: list[tuple[Path, str]], columns: int = 4, width: int = 42) -> Figure:
    """Images with text below each."""
    n = -(-len(rows) // columns)
    figure, axes = plt.subplots(n, columns, figsize=(3.1 * columns, 3.6 * n), squeeze=False)
    for ax, (path, text) in zip(axes.flat, rows, strict=False):
        ax.imshow(open_stored(str(path)))
        wrapped = "\n".join("\n".join(textwrap.wrap(line, width)) for line in text.split("\n"))
        ax.set_title(wrapped, fontsize=7.5, y=-0.03, va="top", loc="left")
    for ax in axes.flat:
        ax.axis("off")
    return figure
