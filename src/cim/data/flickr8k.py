"""Flickr8k's layout: Images/ and captions.txt with the header "image,caption", several lines an image."""

import csv
import json
from pathlib import Path

import pandas as pd

from cim.data import layout
from cim.errors import CimError


def read(folder: Path, images: str | None) -> tuple[pd.DataFrame, Path]:
    """All photos of `images`, or of FOLDER/Images, as split gallery.

    The first caption of a photo is its gallery caption; the others are its `queries` for the correlation study.
    Listed photos that are missing are counted and left out.

    Raises:
        CimError: if captions.txt is missing or has another layout, or none of its photos is there.
    """
    folder = folder.expanduser().resolve()
    photos = Path(images).expanduser().resolve() if images else folder / "Images"
    captions = read_captions(folder / "captions.txt")
    found = {image: texts for image, texts in captions.items() if (photos / image).is_file()}
    if not found:
        raise CimError(f"{photos}: none of the {len(captions)} photos in captions.txt is there; set dataset.images")
    if missing := len(captions) - len(found):
        print(f"dataset: {missing} of {len(captions)} photos are not in {photos}; left out")
    return layout.joined(
        layout.row(photos / image, first, "gallery", "flickr8k", queries=json.dumps(others))
        for image, (first, *others) in found.items()
    )


def read_captions(listing: Path) -> dict[str, list[str]]:
    """The captions of each image, without empty ones; a CimError that names the first line in another layout."""
    if not listing.is_file():
        raise CimError(f"{listing}: not found; the folder should be in Flickr8k's layout (Images/, captions.txt)")
    captions: dict[str, list[str]] = {}
    with listing.open(newline="", encoding="utf-8-sig") as lines:
        for number, row in enumerate(csv.reader(lines), start=1):
            if number == 1 and row != ["image", "caption"]:
                raise CimError(f"{listing}: the first line should be 'image,caption'")
            if row and (len(row) < 2 or not row[0].strip()):
                raise CimError(f"{listing}: line {number} should be 'image,caption'")
            if number > 1 and (caption := ",".join(row[1:]).strip()):
                captions.setdefault(row[0].strip(), []).append(caption)
    if not captions:
        raise CimError(f"{listing}: holds no captions")
    return captions
