"""The manifest: one Parquet table of images and captions, whatever they come from, and making it from their files."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from cim.errors import CimError
from cim.files import explained, replacing, short_digest

REQUIRED = ("image_id", "image", "caption", "split", "digest")
# What data sets give; `digest`, the images' content_digest, comes last. `scene` and `questions` are JSON or null;
# `template` groups near-duplicates (-1: none). Other columns, all JSON or null: `queries`, further human captions,
# `sentences` of the caption, and `ladders`, for the correlation study; and SC-Captioner's lists of what is true of an
# image, `extra_objects` [object, ...] and `extra_attributes` {object: [attribute, ...]}.
COLUMNS = ("image_id", "image", "caption", "split", "source", "template", "scene", "questions")


@dataclass(frozen=True)
class Manifest:
    """Rows of a manifest, and the folder that their image paths are relative to."""

    frame: pd.DataFrame
    image_root: Path
    name: str = "manifest"

    def split(self, *names: str) -> Self:
        """The rows of these splits, in the manifest's order."""
        have = set(self.frame["split"])
        if missing := [name for name in names if name not in have]:
            raise CimError(f"{self.name}: no split '{missing[0]}'; it has {', '.join(sorted(have))}")
        return self.take(self.frame["split"].isin(names).to_numpy().nonzero()[0])

    def take(self, rows) -> Self:
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

    @property
    def digest(self) -> str:
        """Short SHA-256 of the image_ids and of the images' own digests."""
        return short_digest(self.frame[["image_id", "digest"]].to_numpy().tolist())

    @property
    def scenes_known(self) -> bool:
        """Whether every row has its scene graph, as in the small world."""
        return "scene" in self.frame and bool(self.frame["scene"].notna().all())


def write_manifest(frame: pd.DataFrame, path: Path, image_root: Path | None = None) -> None:
    """Write a manifest; `image_root` is recorded if the images are not in the manifest's folder."""
    table = pa.Table.from_pandas(frame, preserve_index=False)
    if image_root is not None:
        table = table.replace_schema_metadata({**table.schema.metadata, b"image_root": str(image_root).encode()})
    with replacing(path) as partial:
        pq.write_table(table, partial)


def read_manifest(path: Path) -> Manifest:
    """Read a manifest and check it.

    Raises:
        CimError: if the file is missing, lacks a column, repeats an image_id, or names an image outside its folder.
    """
    if not path.exists():
        raise CimError(f"{path}: manifest not found; run stage 'dataset' to write it")
    with explained(f"{path}: not a readable Parquet file", "run stage 'dataset' to write it", pa.ArrowInvalid, OSError):
        table = pq.read_table(path)
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
    if frame.empty:
        raise CimError("dataset: no image is left; check dataset.folder, dataset.images and the numbers of images")
    frame = frame.reindex(columns=[*COLUMNS, *frame.columns.difference(COLUMNS, sort=False)])
    if (twice := frame["image_id"].duplicated(keep="last")).any():
        print(f"dataset: {int(twice.sum())} images are in more than one split or entry; the last one is kept")
        frame = frame[~twice]
    root = Path(os.path.commonpath([path.parent for path in frame["image"]]))
    frame["image"] = [path.relative_to(root).as_posix() for path in frame["image"]]
    return frame.reset_index(drop=True), root
