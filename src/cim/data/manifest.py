"""The manifest: one Parquet table of images and captions, whatever they come from."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from cim.errors import CimError
from cim.files import replacing

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
    def scenes_known(self) -> bool:
        """Whether every row has its scene graph, as in the small world."""
        return "scene" in self.frame and bool(self.frame["scene"].notna().all())

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
    with replacing(path) as partial:
        pq.write_table(table, partial)


def with_digests(frame: pd.DataFrame, root: Path) -> pd.DataFrame:
    """The frame with column `digest`, a short SHA-256 of each image file.

    So the manifest changes when an image does, and with it everything that was computed from the image.

    Raises:
        CimError: where an image cannot be read.
    """

    def of(image: str) -> str:
        try:
            with (root / image).open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()[:16]
        except OSError as error:
            raise CimError(f"{root / image}: cannot be read ({error.strerror}); restore the image") from None

    with ThreadPoolExecutor(4) as pool:
        return frame.assign(digest=list(pool.map(of, frame["image"])))


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
