"""Oxford-IIIT Pet in its published layout: images/, annotations/list.txt."""

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd

from cim.data import manifest
from cim.errors import CimError
from cim.files import read_text
from cim.images import ImageFolder

SPECIES = {"1": "cat", "2": "dog"}


def read(folder: Path, images: str | None, seed: int) -> tuple[pd.DataFrame, Path]:
    """Photos of `images`, or of FOLDER/images, as splits gallery and test, which alternate within a breed.

    Captions name the breed. Column `ladders` grades captions of an image from "an animal" to the breed (fineness), and
    from the other species over another breed to the right one (accuracy): the paper's motivation study. The folder of
    photos must not contain the annotations, which hold segmentation masks of the same names.

    Raises:
        CimError: if list.txt is missing or has another layout, or an image is missing or ambiguous.
    """
    pets = _listed(manifest.find_file(folder, "list.txt"))
    paths = ImageFolder(images or folder / "images").paths([image for image, *_ in pets])
    breeds = {s: sorted({breed for _, breed, species in pets if species == s}) for s in SPECIES.values()}
    rng = np.random.default_rng(seed)
    rows, seen = [], dict.fromkeys((breed for _, breed, _ in pets), 0)
    for path, (_, breed, species) in zip(paths, pets, strict=True):
        others = [b for b in breeds[species] if b != breed] or [breed]
        named, mistaken = _photo(breed, species), _photo(others[int(rng.integers(len(others)))], species)
        ladders = {
            "fineness": ["a photo of an animal.", f"a photo of a {species}.", named],
            "accuracy": [f"a photo of a {'dog' if species == 'cat' else 'cat'}.", mistaken, named],
        }
        split = "test" if seen[breed] % 2 else "gallery"
        seen[breed] += 1
        rows.append(manifest.row(path, named, split, "Oxford-IIIT Pet", ladders=json.dumps(ladders)))
    return manifest.joined(rows)


def _listed(listing: Path) -> list[tuple[str, str, str]]:
    """(image, breed, species) of each line."""
    pets = []
    for line in read_text(listing).splitlines():
        if match := re.fullmatch(r"((\S+)_\d+) \d+ ([12]) \d+", line.strip()):
            pets.append((match[1], match[2].replace("_", " "), SPECIES[match[3]]))
        elif line.strip() and not line.startswith("#"):
            raise CimError(f"{listing}: should be lines of 'image class species breed', not {line!r}")
    return pets


def _photo(breed: str, species: str) -> str:
    return f"a photo of {'an' if breed[0].lower() in 'aeiou' else 'a'} {breed} {species}."
