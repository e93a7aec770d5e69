"""What the readers of published layouts share: finding files and images, and joining rows."""

from __future__ import annotations

import os
from pathlib import Path

import pandas as pd

from cim.data.manifest import COLUMNS, EXTENDED
from cim.errors import CimError
from cim.images import ImageFolder


def find_file(folder: Path, name: str) -> Path:
    """The file of this name, anywhere in the folder.

    Raises:
        CimError: where there is none.
    """
    found = sorted(folder.rglob(name)) if folder.is_dir() else []
    if not found:
        raise CimError(f"{folder / name}: not found; 'cim download' fetches it, or set dataset.folder to its folder")
    return found[0]


def find_image(images: ImageFolder, image: str, where: str) -> Path:
    """The file of an image that a listing names.

    Args:
        where: the listing.

    Raises:
        CimError: where it is missing.
    """
    if (path := images.find(image)) is None:
        raise CimError(f"{where}: image '{image}' is not in {images.folder}; set dataset.images to its folder")
    return path


def row(path: Path, caption: str, split: str, source: str) -> dict:
    """The columns that every row of a manifest has."""
    return {"image_id": path.stem, "image": path, "caption": caption, "split": split, "source": source, "template": -1}


def joined(rows: list[dict]) -> tuple[pd.DataFrame, Path]:
    """Rows as a manifest's frame, and the folder that its paths are relative to.

    An image of two splits keeps the later one, so that no test image is trained on.
    """
    frame = pd.DataFrame(rows).reindex(columns=[*COLUMNS, *EXTENDED, "queries", "ladders"])
    frame = frame[[c for c in frame if c in COLUMNS or frame[c].notna().any()]]
    if (twice := frame["image_id"].duplicated(keep="last")).any():
        print(f"dataset: {int(twice.sum())} images are in more than one split or entry; the last one counts")
        frame = frame[~twice]
    root = Path(os.path.commonpath([path.parent for path in frame["image"]]))
    frame["image"] = [path.relative_to(root).as_posix() for path in frame["image"]]
    return frame.reset_index(drop=True), root
