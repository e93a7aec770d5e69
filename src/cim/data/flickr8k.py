"""Flickr8k's layout: Images/ and captions.txt with the header "image,caption", several lines an image."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pandas as pd

from cim.data.manifest import COLUMNS
from cim.errors import CimError


def read(folder: Path, images: str | None) -> tuple[pd.DataFrame, Path]:
    """All photos as split gallery.

    The first caption of a photo is its gallery caption; the others are kept as a JSON list in an extra column,
    `queries`, for the correlation study. Photos that are missing are counted and left out.

    Args:
        images: where the photos are; None for FOLDER/Images.

    Raises:
        CimError: where captions.txt is missing or has another layout, or none of its photos is there.
    """
    folder = folder.expanduser().resolve()
    photos = Path(images).expanduser().resolve() if images else folder / "Images"
    captions = read_captions(folder / "captions.txt")
    there = {image: texts for image, texts in captions.items() if (photos / image).is_file()}
    if not there:
        raise CimError(f"{photos}: none of the {len(captions)} photos that captions.txt names is there")
    if len(there) < len(captions):
        print(f"dataset: {len(captions) - len(there)} of {len(captions)} photos are not in {photos}; left out")
    rows = [
        (Path(image).stem, image, texts[0], "gallery", "flickr8k", -1, None, None, json.dumps(texts[1:]))
        for image, texts in there.items()
    ]
    return pd.DataFrame(rows, columns=[*COLUMNS, "queries"]), photos


def read_captions(listing: Path) -> dict[str, list[str]]:
    """The captions of each image, in the file's order; empty ones are left out.

    Raises:
        CimError: naming the line that has another layout.
    """
    if not listing.is_file():
        raise CimError(f"{listing}: not found; the folder should be in Flickr8k's layout (Images/, captions.txt)")
    captions: dict[str, list[str]] = {}
    with listing.open(newline="", encoding="utf-8-sig") as lines:
        reader = csv.reader(lines)
        if next(reader, None) != ["image", "caption"]:
            raise CimError(f"{listing}: the first line should be 'image,caption'")
        for number, row in enumerate(reader, start=2):
            if not row:
                continue
            if len(row) < 2 or not row[0].strip():
                raise CimError(f"{listing}: line {number} should be 'image,caption'")
            if caption := ",".join(row[1:]).strip():
                captions.setdefault(row[0].strip(), []).append(caption)
    return captions
