"""The gallery on disk: caption embeddings to search by text, image embeddings to compare what is retrieved.

texts.npy      (N, d) float16 caption embeddings, memory-mapped
images.npy     (N, d) float16 image embeddings, memory-mapped
rows.arrow     image_id, image (its path from this folder), caption and digest of each row, memory-mapped
transform.npz  mean and principal components of the image embeddings (cim.gallery.transform)
index.faiss    the index, unless the search is exact; a rebuilt index is index-2.faiss, then index.faiss again
gallery.json   encoders, counts, the kind of index, and a fingerprint of each file
skipped.jsonl  rows that were left out, with the reason
"""

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import pyarrow as pa
from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic refuses typing's before Python 3.12

from cim.encoders import ImageEncoder, TextEncoder
from cim.errors import CimError
from cim.files import read_json
from cim.gallery.search import BLOCK, ExactSearch, FaissSearch, blocks, cosines, gather, open_search, unit
from cim.gallery.transform import ImageTransform

SMALL = 20_000  # rows up to which products with the whole gallery cost less than gathering what is retrieved
TEXTS, IMAGES, ROWS, TRANSFORM = "texts.npy", "images.npy", "rows.arrow", "transform.npz"
INFO, SKIPPED = "gallery.json", "skipped.jsonl"
INDEXES = ("index.faiss", "index-2.faiss")
SCHEMA = pa.schema([(name, pa.string()) for name in ("image_id", "image", "caption", "digest")])


class EncoderInfo(TypedDict):
    """An encoder of a gallery, in gallery.json."""

    spec: str
    dim: int
    digest: str


class IndexInfo(TypedDict):
    """The index of a gallery, which also has `file` and `trained_on` unless the search is exact."""

    kind: str
    reason: str
    effort: int
    candidates: int
    recall: float


class Info(TypedDict):
    """gallery.json."""

    rows: int
    skipped: int
    text_encoder: EncoderInfo
    image_encoder: EncoderInfo
    index: IndexInfo
    files: dict[str, dict[Literal["quick", "whole"], str]]


@dataclass
class Gallery:
    """A loaded gallery of N captioned images; only the rows in use come into memory."""

    folder: Path
    info: Info
    table: pa.Table  # the columns of SCHEMA
    texts: np.ndarray  # (N, d) float16 caption embeddings
    images: np.ndarray  # (N, d) float16 image embeddings
    index: ExactSearch | FaissSearch
    _by_hash: dict[str, pd.Series] = field(default_factory=dict, init=False)

    def __len__(self) -> int:
        return len(self.table)

    @cached_property
    def rows(self) -> pd.DataFrame:
        """The whole table in memory; of a large gallery use `take`."""
        return self.table.to_pandas()

    def take(self, rows: np.ndarray) -> pd.DataFrame:
        """image_id, image (its path from the current folder) and caption of these rows."""
        table = self.table.select(["image_id", "image", "caption"]).take(pa.array(np.asarray(rows).ravel())).to_pandas()
        root = os.path.realpath(self.folder)
        return table.assign(image=[os.path.relpath(os.path.join(root, image)) for image in table["image"]])

    def rows_of(self, values, column: str = "image_id") -> np.ndarray:
        """(n,) first gallery row with each image_id, or content_digest in column `digest`; -1 where there is none."""
        return self.all_rows_of(values, column, 1)[:, 0]

    def all_rows_of(self, values, column: str, most: int | None = None) -> np.ndarray:
        """(n, m) gallery rows with each value in a column, in order, then -1; m is `most`, or as many as any has."""
        if column not in self._by_hash:
            # By hashes, tens of bytes a row: a dictionary of the texts would take hundreds.
            rows = pd.Series(np.arange(len(self)), hashes(self.table[column]))
            self._by_hash[column] = rows.sort_index(kind="stable")
        rows, wanted = self._by_hash[column], hashes(values)
        first, last = (rows.index.searchsorted(wanted, side) for side in ("left", "right"))
        places = first[:, None] + np.arange(most or (last - first).max(initial=1))
        return np.where(places < last[:, None], rows.to_numpy()[places.clip(max=len(self) - 1)], -1)

    def copies(self, rows: np.ndarray) -> np.ndarray:
        """(n, m) all rows that hold the image of each of these n rows, then -1; -1 alone for row -1."""
        # One by one, since `take` would join all parts of the column first.
        digests = [self.table["digest"][row].as_py() if row >= 0 else "" for row in rows.tolist()]
        return self.all_rows_of(digests, "digest")

    def search(self, queries: np.ndarray, k: int, exclude: np.ndarray | None = None) -> np.ndarray:
        """The k gallery rows whose captions are nearest to each query, best first.

        Args:
            queries: (n, d) caption embeddings, L2-normalised.
            exclude: (n,) gallery row whose image each query may not retrieve, in this row or another; -1 for none.

        Returns:
            (n, k) gallery rows.

        Raises:
            CimError: where the gallery has fewer than k rows to retrieve, and for queries of another dimension.
        """
        if queries.shape[1] != self.texts.shape[1]:
            raise CimError(f"{self.folder}: captions have {self.texts.shape[1]} dimensions, queries {queries.shape[1]}")
        exclude = None if exclude is None or (exclude < 0).all() else self.copies(exclude)
        spare = 0 if exclude is None else exclude.shape[1]
        if not 1 <= k <= len(self) - spare:
            own = f", {'one' if spare == 1 else spare} of them the excluded source image" if spare else ""
            rows = f"{len(self)} rows{own}"
            raise CimError(f"{self.folder}: k is {k}, but the gallery has {rows}; lower k or enlarge the gallery")
        found = self.index.search(queries, k + spare)
        return found if exclude is None else drop_excluded(found, exclude)

    def similarity(self, queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """(n, k) cosines of (n, d) queries with the captions of (n, k) rows."""
        if len(self) <= SMALL:
            return np.take_along_axis(queries @ unit(self.texts).T, rows, 1)
        parts = blocks(len(rows), max(1, BLOCK // rows.shape[1]))
        return np.concatenate([cosines(queries[p], self.texts, rows[p]) for p in parts])

    @cached_property
    def transform(self) -> ImageTransform:
        """Centring and whitening fitted on the gallery's images."""
        if TRANSFORM not in self.info["files"]:
            raise CimError(f"{self.folder}: has no {TRANSFORM}, which older galleries lack; rebuild the gallery")
        return ImageTransform(**np.load(self.folder / TRANSFORM))

    def image_vectors(self, rows: np.ndarray) -> np.ndarray:
        """(*rows.shape, d) float32 image embeddings of these rows, L2-normalised."""
        return unit(gather(self.images, np.asarray(rows)))


def drop_excluded(found: np.ndarray, exclude: np.ndarray) -> np.ndarray:
    """Remove excluded rows from (n, k + m) results, and the last ones where that leaves more than k.

    Args:
        exclude: (n, m) rows, or (n,) for m = 1; -1 for none.

    Returns:
        (n, k) rows.
    """
    exclude = exclude.reshape(len(found), -1)
    hit = np.logical_or.reduce([found == rows[:, None] for rows in exclude.T])
    hit |= (~hit).cumsum(axis=1, dtype=np.int32) > found.shape[1] - exclude.shape[1]
    return found[~hit].reshape(len(found), -1)


def hashes(texts: pa.ChunkedArray | Sequence[str]) -> np.ndarray:
    """(n,) 64-bit hashes, the same in every process; two of a million texts share one with a probability of 3e-8."""
    parts = (texts[part] for part in blocks(len(texts)))
    return np.concatenate([np.zeros(0, np.uint64), *(pd.util.hash_array(np.array(part, object)) for part in parts)])


def load_gallery(
    folder: Path, text: TextEncoder | None = None, image: ImageEncoder | None = None, verify: bool = False
) -> Gallery:
    """Load a gallery; it is searched on the text encoder's device.

    Args:
        verify: compare every byte with gallery.json, instead of samples of large files.

    Raises:
        CimError: where a file is missing or differs from gallery.json, and for a gallery of other encoders than these.
    """
    folder = Path(folder)
    info = read_info(folder)
    for name, marks in info["files"].items():
        check_file(folder / name, marks, verify)
    arrays = []
    for file, name, encoder in ((TEXTS, "text_encoder", text), (IMAGES, "image_encoder", image)):
        built = info[name]
        if encoder is not None and (built["dim"], built["digest"]) != (encoder.dim, encoder.digest):
            other = f"'{encoder.spec}' ({encoder.dim}-d, {encoder.digest}); rebuild it or set encoders to match"
            own = f"'{built['spec']}' ({built['dim']}-d, {built['digest']})"
            raise CimError(f"{folder}: built with {name} {own}, not with {other}")
        arrays.append(np.load(folder / file, mmap_mode="c"))
        if (shape := arrays[-1].shape) != (info["rows"], built["dim"]):
            raise CimError(f"{folder / file}: has shape {shape}, not that of gallery.json; rebuild the gallery")
    search = open_search(info["index"], arrays[0], folder, text.device if text else "cpu")
    table = pa.ipc.open_file(pa.memory_map(str(folder / ROWS))).read_all()
    if missing := [name for name in SCHEMA.names if name not in table.column_names]:
        raise CimError(f"{folder / ROWS}: has no column '{missing[0]}', as of an older version; rebuild it")
    return Gallery(folder, info, table, *arrays, search)


def check_file(path: Path, marks: dict[str, str], whole: bool = False) -> None:
    """Compare a gallery's file with its fingerprints in gallery.json; CimError where it is missing or differs."""
    fix = "rebuild it with 'cim gallery index'" if path.name in INDEXES else "rebuild the gallery"
    if not path.is_file():
        raise CimError(f"{path}: missing; {fix}")
    if fingerprint(path, whole) != marks["whole" if whole else "quick"]:
        raise CimError(f"{path}: not the file that gallery.json describes; {fix}")


def read_info(folder: Path) -> dict:
    """gallery.json, checked.

    Raises:
        CimError: where it is missing or not that of a gallery.
    """
    path = Path(folder) / INFO
    if not path.is_file():
        raise CimError(f"{folder}: no gallery there; build one with 'cim gallery build'")
    try:
        TypeAdapter(Info).validate_python(info := read_json(path))
        return info
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise CimError(f"{path}: not that of a gallery ({where}: {error.errors()[0]['msg']}); rebuild it") from None


def write_rows(path: Path, tables: Iterable[pa.Table | pa.RecordBatch]) -> None:
    """Write tables with SCHEMA's columns, one after another."""
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, SCHEMA) as writer:
        for table in tables:
            writer.write(table.select(SCHEMA.names).cast(SCHEMA))


def write_array(path: Path, rows: int, dim: int, arrays: Iterable[np.ndarray]) -> None:
    """Write (n, dim) arrays, one after another, as one float16 .npy of `rows` rows.

    Written block by block: on a full disk a memory map would end in a signal instead of an error.
    """
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f2", "fortran_order": False, "shape": (rows, dim)})
        for array in arrays:
            for block in blocks(len(array)):
                file.write(np.ascontiguousarray(array[block], np.float16).tobytes())


def described(path: Path) -> dict:
    """The fingerprints of a file, as gallery.json keeps them."""
    return {"quick": fingerprint(path), "whole": fingerprint(path, whole=True)}


def fingerprint(path: Path, whole: bool = False) -> str:
    """Size and SHA-256 of a file; above 64 MiB, unless `whole`, of 256 samples, so that any gallery loads quickly."""
    size, sample, samples = path.stat().st_size, 65_536, 256
    digest = hashlib.sha256()
    with path.open("rb") as file:
        if whole or size <= 2**26:
            return f"{size}:{hashlib.file_digest(file, 'sha256').hexdigest()}"
        for i in range(samples):
            file.seek(i * (size - sample) // (samples - 1))
            digest.update(file.read(sample))
    return f"{size}:{digest.hexdigest()}"
