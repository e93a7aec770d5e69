"""Oxford-IIIT Pet in its published layout: images/, annotations/list.txt."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd

from cim.data import layout
from cim.errors import CimError
from cim.images import ImageFolder


def read(folder: Path, images: str | None, seed: int) -> tuple[pd.DataFrame, Path]:
    """Splits gallery and test, which alternate within a breed.

    Captions name the breed. Column `ladders` grades captions of an image from "an animal" to the breed (fineness), and
    from the other species over another breed to the right one (accuracy): the paper's motivation study.

    Args:
        images: where the photos are; None for FOLDER/images. The annotations hold segmentation masks of the same
            names, so they must not lie in it.

    Raises:
        CimError: where list.txt is missing or has another layout, or an image is missing.
    """
    folder = folder.expanduser().resolve()
    listing = layout.find_file(folder, "list.txt")
    there = ImageFolder(images or folder / "images")
    pets = _listed(listing)
    breeds = {s: sorted({b for _, b, of in pets if of == s}) for s in ("cat", "dog")}
    rng = np.random.default_rng(seed)
    rows, seen = [], dict[str, int]()
    for image, breed, species in pets:
        seen[breed] = seen.get(breed, -1) + 1
        others = [b for b in breeds[species] if b != breed] or [breed]
        wrong, foreign = others[int(rng.integers(len(others)))], {"cat": "dog", "dog": "cat"}[species]
        named, mistaken = (f"a photo of {_with_article(b)} {species}." for b in (breed, wrong))
        ladders = {
            "fineness": ["a photo of an animal.", f"a photo of a {species}.", named],
            "accuracy": [f"a photo of a {foreign}.", mistaken, named],
        }
        split = "test" if seen[breed] % 2 else "gallery"
        row = layout.row(layout.find_image(there, image, listing.name), named, split, "Oxford-IIIT Pet")
        rows.append(row | {"ladders": json.dumps(ladders)})
    return layout.joined(rows)


def _listed(listing: Path) -> list[tuple[str, str, str]]:
    """(image, breed, species) of each line."""
    pets = []
    for line in listing.read_text(encoding="utf-8").splitlines():
        if line.startswith("#") or not line.strip():
            continue
        try:
            image, _, species, _ = line.split()
            breed = re.sub(r"_\d+$", "", image).replace("_", " ")
            pets.append((image, breed, {"1": "cat", "2": "dog"}[species]))
        except (ValueError, KeyError):
            raise CimError(f"{listing}: should be lines of 'image class species breed', not {line!r}") from None
    return pets


def _with_article(noun: str) -> str:
    return f"{'an' if noun[0].lower() in 'aeiou' else 'a'} {noun}"
