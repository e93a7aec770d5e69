"""The manifest: one Parquet table of images and captions, whatever they come from."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, UnidentifiedImageError

from cim.errors import CimError

# What a row holds. `scene` and `questions` are JSON or null; `template` groups near-duplicates (-1: none).
COLUMNS = ("image_id", "image", "caption", "split", "source", "template", "scene", "questions")
REQUIRED = ("image_id", "image", "caption", "split")
# SC-Captioner's lists of what may be said of an image, as JSON or null: [object, ...] and {object: [attribute, ...]}.
EXTENDED = ("extra_objects", "extra_attributes")


@dataclass(frozen=True)
class Manifest:
    """Rows of a manifest, and the folder that their image paths are relative to."""

    frame: pd.DataFrame
    image_root: Path
    name: str = "manifest"

    def split(self, *names: str) -> Manifest:
        """The rows of these splits, in the manifest's order."""
        have = set(self.frame["split"])
        for name in names:
            if name not in have:
                raise CimError(f"{self.name}: no split '{name}'; it has {', '.join(sorted(have))}")
        rows = self.frame[self.frame["split"].isin(names)].reset_index(drop=True)
        return Manifest(rows, self.image_root, self.name)

    def take(self, rows) -> Manifest:
        """The rows at these positions."""
        return Manifest(self.frame.iloc[rows].reset_index(drop=True), self.image_root, self.name)

    def __len__(self) -> int:
        return len(self.frame)

    @property
    def image_paths(self) -> list[Path]:
        return [self.image_root / image for image in self.frame["image"]]

    @property
    def captions(self) -> list[str]:
        return self.frame["caption"].tolist()


def write_manifest(frame: pd.DataFrame, path: Path, image_root: Path | None = None) -> None:
    """Write a manifest; `image_root` is recorded where the images are not in the manifest's folder."""
    table = pa.Table.from_pandas(frame, preserve_index=False)
    if image_root is not None:
        table = table.replace_schema_metadata(
            {**(table.schema.metadata or {}), b"image_root": str(image_root).encode()}
        )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".partial")
    pq.write_table(table, aside)
    os.replace(aside, path)


def read_manifest(path: Path) -> Manifest:
    """Read a manifest and check it.

    Raises:
        CimError: where the file is missing, lacks a column, repeats an image_id, or names an image
            that lies outside its folder.
    """
    path = Path(path)
    if not path.is_file():
        raise CimError(f"{path}: manifest not found; make it with the 'dataset' stage")
    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise CimError(
            f"{path}: not a readable Parquet file ({error}); make it again with the 'dataset' stage"
        ) from None
    if missing := [c for c in REQUIRED if c not in table.column_names]:
        raise CimError(f"{path}: column '{missing[0]}' is missing; a manifest needs {', '.join(REQUIRED)}")
    frame = table.to_pandas()
    root = Path((table.schema.metadata or {}).get(b"image_root", str(path.parent).encode()).decode())
    if (twice := frame["image_id"].duplicated()).any():
        raise CimError(f"{path}: image_id '{frame['image_id'][twice].iloc[0]}' occurs more than once")
    for image in frame["image"]:
        if os.path.isabs(image) or os.path.normpath(image).startswith(".."):
            raise CimError(f"{path}: image path '{image}' leaves the data folder {root}; use paths inside it")
    return Manifest(frame, root, str(path))


def open_image(source: Path | str | BinaryIO, name: str = "") -> Image.Image:
    """The image as RGB, fully decoded.

    Args:
        source: a path or an open file.
        name: what to call it in an error, where it is not a path.

    Raises:
        CimError: naming the file, where it is missing or cannot be decoded.
    """
    name = name or source
    try:
        with Image.open(source) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise CimError(f"{name}: image not found; mend the manifest or restore the file") from None
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise CimError(f"{name}: unreadable image ({error}); replace it or take it out of the data set") from None
