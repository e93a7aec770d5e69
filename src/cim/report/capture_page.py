"""A page of the worst and the best captions beside their references."""

from __future__ import annotations

from html import escape
from pathlib import Path

import pandas as pd

from cim.data.labels import Labels
from cim.evaluation.capture.evaluate import Captions

_HEAD = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>The worst and the best captions</title>
<style>
body { font: 15px/1.4 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; width: 100% } td, th { text-align: left; vertical-align: top; padding: .5rem }
tr { border-top: 1px solid #ddd } td { width: 45% } td:first-child { width: 10%; white-space: nowrap }
</style>
"""


def page(images: pd.DataFrame, captions: Captions, labels: Labels, path: Path, shown: int = 20) -> None:
    """Write an HTML page: of every method the captions of lowest and highest strict CAPTURE, beside the references."""
    parts = [
        _HEAD,
        "<h1>The worst and the best captions</h1><p>By strict CAPTURE; of each method the first seed.</p>",
    ]
    strict = images[images["mode"] == "strict"].dropna(subset="capture")
    for method, part in strict.groupby("method", sort=False):
        first = part["seed"].iloc[0]
        ranked = part[part["seed"] == first].sort_values("capture", kind="stable")
        count = min(shown, len(ranked) // 2) or len(ranked)
        for title, rows in (("Worst", ranked.head(count)), ("Best", ranked.tail(count)[::-1])):
            parts.append(f"<h2>{title} of {escape(str(method))}</h2><table>")
            parts.append("<tr><th>image, CAPTURE<th>caption<th>reference")
            for row in rows.itertuples():
                said = escape(captions[method][first][row.image]) or "<i>empty</i>"
                true = escape(labels.references[row.image])
                parts.append(f"<tr><td>{escape(row.image)}<br>{row.capture:.3f}<td>{said}<td>{true}")
            parts.append("</table>")
    path.write_text("\n".join(parts) + "\n</html>\n", encoding="utf-8")
