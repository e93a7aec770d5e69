"""A page of captions, their scores and what they retrieved."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable
from html import escape
from io import BytesIO
from pathlib import Path

import pandas as pd

from cim.errors import CimError
from cim.score_files import SCORES


def page(frame: pd.DataFrame, open_image: Callable, path: Path, shown: int = 100) -> None:
    """An HTML page of itself alone: the worst and the best captions by CIM with thumbnails of what they retrieved.

    Args:
        open_image: from what a row says of where an image lies to the image, as cim.sources.open_stored.
        shown: at most so many captions, half of them the lowest and half the highest.
    """
    good = frame[frame["error"].isna()].sort_values("cim")
    if len(good) > shown:
        good = pd.concat([good.head(shown // 2), good.tail(shown - shown // 2)])

    def figure(image: str, text: str) -> str:
        return f"<figure>{_thumbnail(image, open_image)}<figcaption>{escape(text)}</figcaption></figure>"

    body = []
    for row in good.to_dict("records"):
        scores = " ".join(f"<b>{name.upper()}</b> {row[name]:.3f}" for name in SCORES)
        found = "".join(figure(item["image"], item["caption"]) for item in row["retrieved"])
        body.append(
            f"<section>{figure(row['image'], row['image_id'])}<div><p>{escape(row['caption']) or '<i>empty</i>'}</p>"
            f"<p class=scores>{scores}</p></div><div class=found>{found}</div></section>"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_PAGE.format(count=len(good), total=len(frame), body="\n".join(body)), encoding="utf-8")


def _thumbnail(image: str, open_image: Callable, side: int = 160) -> str:
    try:
        picture = open_image(image)
    except CimError:
        return "<span class=missing>not to be opened</span>"
    picture.thumbnail((side, side))
    buffer = BytesIO()
    picture.save(buffer, "JPEG", quality=80)
    return f'<img alt="" src="data:image/jpeg;base64,{b64encode(buffer.getvalue()).decode()}">'


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Captions and what they retrieve</title>
<style>
body {{ font: 15px/1.4 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: #222 }}
section {{ display: grid; grid-template-columns: 11rem 1fr 34rem; gap: 1rem }}
section {{ padding: 1rem 0; border-top: 1px solid #ddd }}
figure {{ margin: 0; width: 10.5rem }} img {{ max-width: 100%; border-radius: 4px }}
figcaption {{ font-size: 12px; color: #666; max-height: 6em; overflow: auto; overflow-wrap: anywhere }}
.found {{ display: flex; gap: .5rem; flex-wrap: wrap }} .scores {{ color: #555 }}
.missing {{ color: #a00; font-size: 12px }}
@media (max-width: 60rem) {{ section {{ grid-template-columns: 1fr }} }}
</style>
<h1>Captions and what they retrieve</h1>
<p>{count} of {total} captions, from the lowest CIM to the highest: the image and its caption, the scores,
and on the right the images whose captions are nearest to it.</p>
{body}
</html>
"""
