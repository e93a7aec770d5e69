"""What the readers of published layouts share: finding files, and joining rows."""

import os
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from cim.data.manifest import COLUMNS
from cim.errors import CimError


def find_file(folder: Path, name: str) -> Path:
    """The first file of this name anywhere in the folder; a CimError if there is none."""
    if not (found := sorted(folder.rglob(name))):
        raise CimError(f"{folder / name}: not found; get it with 'cim download', or set dataset.folder to its folder")
    return found[0]


def row(path: Path, caption: str, split: str, source: str, **more: str) -> dict:
    """One row of a manifest, its image as a path."""
    own = {"image_id": path.stem, "image": path, "caption": caption, "split": split, "source": source, "template": -1}
    return own | more


def joined(rows: Iterable[dict]) -> tuple[pd.DataFrame, Path]:
    """Rows as a manifest's frame, and the folder that its paths are relative to.

    An image of two splits keeps the later one, so that no test image is trained on.
    """
    frame = pd.DataFrame(list(rows))
    frame = frame.reindex(columns=[*COLUMNS, *frame.columns.difference(COLUMNS, sort=False)])
    if (twice := frame["image_id"].duplicated(keep="last")).any():
        print(f"dataset: {int(twice.sum())} images are in more than one split or entry; the last one is kept")
        frame = frame[~twice]
    root = Path(os.path.commonpath([path.parent for path in frame["image"]]))
    frame["image"] = [path.relative_to(root).as_posix() for path in frame["image"]]
    return frame.reset_index(drop=True), root
