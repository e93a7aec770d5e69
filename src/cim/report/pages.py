"""HTML pages from the templates in this folder; images are embedded, so a page can be moved or sent by itself."""

from base64 import b64encode
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path

import pandas as pd
from jinja2 import Environment, PackageLoader, select_autoescape

from cim.errors import CimError
from cim.files import write_text
from cim.images import open_image


def render(template: str, **values) -> str:
    """A file of report/templates with these values, which are escaped in HTML."""
    environment = Environment(
        loader=PackageLoader("cim.report"), autoescape=select_autoescape(), trim_blocks=True, keep_trailing_newline=True
    )
    return environment.get_template(template).render(values)


def thumbnail(image: str, side: int = 160) -> str | None:
    """A data URI of an image of at most `side` pixels, from its place as a gallery stores it; None if unreadable."""
    try:
        picture = open_image(image)
    except CimError:
        return None
    picture.thumbnail((side, side))
    buffer = BytesIO()
    picture.save(buffer, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{b64encode(buffer.getvalue()).decode()}"


def score_page(frame: pd.DataFrame, path: Path, shown: int = 100) -> None:
    """Write a page of the captions of lowest and highest CIM, with their scores and the images that they retrieved.

    Args:
        frame: as from cim.score_files.
        shown: at most so many captions, half of them the lowest and half the highest.
    """
    good = frame[frame["error"].isna()].sort_values("cim")
    if len(good) > shown:
        good = pd.concat([good.head(shown // 2), good.tail(shown - shown // 2)])
    write_text(path, render("scores.html", rows=good.to_dict("records"), total=len(frame), thumbnail=thumbnail))


def captions_page(
    images: pd.DataFrame, captions: Mapping, references: Mapping[str, str], path: Path, shown: int = 20
) -> None:
    """Write a page of each method's captions of lowest and highest strict CAPTURE, beside the references.

    Args:
        images: of an Evaluation; of each method the first seed is shown.
        captions: method -> seed -> image -> caption.
        shown: at most so many captions of each kind.
    """
    tables = {}
    strict = images[images["mode"] == "strict"].dropna(subset="capture")
    for method, part in strict.groupby("method", sort=False):
        seed = part["seed"].iloc[0]
        part = part[part["seed"] == seed].sort_values("capture", kind="stable")
        part = part.assign(caption=part["image"].map(captions[method][seed]), reference=part["image"].map(references))
        count = min(shown, len(part) // 2) or len(part)
        tables[f"Worst of {method}"] = part.head(count).to_dict("records")
        tables[f"Best of {method}"] = part.tail(count)[::-1].to_dict("records")
    write_text(path, render("captions.html", tables=tables))
