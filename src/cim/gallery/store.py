"""The gallery on disk: caption embeddings to search by text, image embeddings to compare what is found.

    texts.npy     (N, d) float16 caption embeddings, memory-mapped
    images.npy    (N, d) float16 image embeddings, memory-mapped
    rows.arrow    image_id, image and caption of each row, memory-mapped
    index.faiss   where the captions are not searched exactly: see cim.index
    gallery.json  encoders, counts, the kind of index, and a fingerprint of each file

`cim.gallery_build` writes it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from pydantic import PositiveInt, field_validator

from cim.encoders import ImageEncoder, TextEncoder
from cim.errors import CimError
from cim.gallery.search import KINDS, Search, blocks, gather, open_search
from cim.params import Names, Settings, Share, require

TEXTS, IMAGES, ROWS, INDEX, INFO = "texts.npy", "images.npy", "rows.arrow", "index.faiss", "gallery.json"


class GallerySettings(Settings):
    """The `gallery` group: which splits of the manifest can be retrieved, and how the captions are searched.

    Attributes:
        index: one of cim.index.KINDS, or auto.
        recall: an approximate index is tuned until it finds this share of the exact nearest captions.
        shard_rows: rows embedded between two checkpoints.
        max_skipped: the share of unreadable images and empty captions that may be left out; with 0 the first
            one is an error.
        shards: more captioned images, in files or folders that cim.sources reads.
        image_root: what the paths in the shards are relative to, if not to their own folder.
    """

    splits: Names
    index: str = "auto"
    recall: Share = 0.99
    shard_rows: PositiveInt = 10_000
    max_skipped: Share = 0.0
    shards: list[str] = []
    image_root: str | None = None

    @field_validator("index")
    @classmethod
    def _known(cls, index: str) -> str:
        require(index in (*KINDS, "auto"), f"index must be auto or one of {', '.join(KINDS)}")
        return index


@dataclass
class Gallery:
    """A loaded gallery; only what is looked at comes into memory.

    Attributes:
        folder: where it lies.
        info: gallery.json.
        table: (N rows) image_id, image (where it lies) and caption.
        texts: (N, d) float16 caption embeddings.
        images: (N, d) float16 image embeddings.
        index: what searches the captions.
    """

    folder: Path
    info: dict
    table: pa.Table
    texts: np.ndarray
    images: np.ndarray
    index: Search

    def __len__(self) -> int:
        return len(self.table)

    @cached_property
    def rows(self) -> pd.DataFrame:
        """The whole table in memory; for a large gallery ask `take` for what you need."""
        return self.table.to_pandas()

    def take(self, rows: np.ndarray) -> pd.DataFrame:
        """image_id, image and caption of these rows."""
        return self.table.take(pa.array(np.asarray(rows).ravel())).to_pandas()

    def rows_of(self, image_ids) -> np.ndarray:
        """(n,) the gallery row of each image, -1 where it is not in the gallery."""
        asked = np.asarray(image_ids, dtype=object)
        hashes, order = self._id_hashes
        if not len(asked) or not len(order):
            return np.full(len(asked), -1)
        place = np.searchsorted(hashes, pd.util.hash_array(asked)).clip(max=len(order) - 1)
        rows = order[place].astype(np.int64)
        same = self.table["image_id"].take(pa.array(rows)).to_numpy(zero_copy_only=False) == asked
        return np.where(same, rows, -1)

    @cached_property
    def _id_hashes(self) -> tuple[np.ndarray, np.ndarray]:
        """Sorted hashes of the image ids and their rows: 16 bytes a row, where a dictionary of them takes hundreds."""
        hashes = id_hashes(self.table)
        order = np.argsort(hashes, kind="stable")
        return hashes[order], order

    def text_embeddings(self) -> np.ndarray:
        """(N, d) float32 caption embeddings, each of length 1, all in memory."""
        return _unit(self.texts)

    def search(self, queries: np.ndarray, k: int, exclude: np.ndarray | None = None) -> np.ndarray:
        """The k gallery items whose captions are nearest to each query, best first.

        Args:
            queries: (n, d) caption embeddings, L2-normalised.
            exclude: (n,) gallery row that each query may not retrieve, -1 for none.

        Returns:
            (n, k) gallery rows.

        Raises:
            CimError: where the gallery has fewer than k rows to give, and for queries of another dimension.
        """
        if queries.shape[1] != self.texts.shape[1]:
            raise CimError(f"{self.folder}: captions have {self.texts.shape[1]} dimensions, queries {queries.shape[1]}")
        spare = 0 if exclude is None else 1
        if not 1 <= k <= len(self) - spare:
            raise CimError(
                f"{self.folder}: k is {k}, but the gallery has {len(self)} rows"
                + (", one of them the excluded source image" if spare else "")
                + "; lower k or enlarge the gallery"
            )
        found = self.index.search(queries, k + spare)
        return found if exclude is None else drop_excluded(found, exclude)

    def image_vectors(self, rows: np.ndarray) -> np.ndarray:
        """(*rows.shape, d) float32 image embeddings of these gallery rows, each of length 1."""
        return _unit(gather(self.images, np.asarray(rows)))


def _unit(vectors: np.ndarray) -> np.ndarray:
    # float16 rounds lengths too.
    vectors = vectors.astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def drop_excluded(found: np.ndarray, exclude: np.ndarray) -> np.ndarray:
    """Take the excluded row, or else the last one, out of each row of (n, k + 1) results; returns (n, k)."""
    hit = found == exclude[:, None]
    hit[~hit.any(axis=1), -1] = True
    return found[~hit].reshape(len(found), -1)


def id_hashes(table: pa.Table) -> np.ndarray:
    """(N,) 64-bit hashes of the image ids, the same in every process."""
    ids = table["image_id"]
    parts = [pd.util.hash_array(ids[b].to_numpy(zero_copy_only=False).astype(object)) for b in blocks(len(ids))]
    return np.concatenate(parts) if parts else np.zeros(0, np.uint64)


def load_gallery(
    folder: Path, text_encoder: TextEncoder | None = None, image_encoder: ImageEncoder | None = None
) -> Gallery:
    """Load a gallery and make sure it belongs to these encoders; it is searched where the text encoder computes.

    Raises:
        CimError: where a file is missing or is not the one that gallery.json describes, and where the
            gallery was built with other encoders.
    """
    folder = Path(folder)
    info = read_info(folder)
    for name in info["files"]:
        check_file(folder, info, name)
    for what, encoder in (("text_encoder", text_encoder), ("image_encoder", image_encoder)):
        if encoder is not None:
            check_encoder(folder, info, what, encoder)
    texts, images = np.load(folder / TEXTS, mmap_mode="r"), np.load(folder / IMAGES, mmap_mode="r")
    table = pa.ipc.open_file(pa.memory_map(str(folder / ROWS))).read_all()
    shapes = {TEXTS: texts.shape, IMAGES: images.shape, ROWS: (len(table),)}
    expected = {
        TEXTS: (info["rows"], info["text_encoder"]["dim"]),
        IMAGES: (info["rows"], info["image_encoder"]["dim"]),
        ROWS: (info["rows"],),
    }
    for name, shape in shapes.items():
        if shape != expected[name]:
            raise CimError(f"{folder / name}: has shape {shape}, not {expected[name]}; build the gallery again")
    built = info["index"]
    device = text_encoder.device if text_encoder is not None else torch.device("cpu")
    index = open_search(built["kind"], texts, folder / INDEX, built["effort"], built["candidates"], device)
    return Gallery(folder, info, table, texts, images, index)


def read_info(folder: Path) -> dict:
    """gallery.json.

    Raises:
        CimError: where it is missing or not JSON.
    """
    try:
        return json.loads((Path(folder) / INFO).read_text())
    except FileNotFoundError:
        raise CimError(f"{folder}: no gallery there; build one with 'cim gallery build'") from None
    except json.JSONDecodeError:
        raise CimError(f"{Path(folder) / INFO}: not valid JSON; build the gallery again") from None


def check_encoder(folder: Path, info: dict, what: str, encoder: TextEncoder | ImageEncoder) -> None:
    """Make sure that the gallery's text_encoder or image_encoder is this one.

    Raises:
        CimError: naming both.
    """
    built = info[what]
    if (built["dim"], built["digest"]) != (encoder.dim, encoder.digest):
        raise CimError(
            f"{folder}: built with {what} '{built['spec']}' ({built['dim']}-d, {built['digest']}), not with "
            f"'{encoder.spec}' ({encoder.dim}-d, {encoder.digest}); build it again or set encoders to match"
        )


def check_file(folder: Path, info: dict, name: str, whole: bool = False) -> None:
    """Make sure that a file is there and is the one that gallery.json describes; `whole` reads all of it.

    Raises:
        CimError: naming it.
    """
    path = Path(folder) / name
    if not path.is_file():
        raise CimError(f"{path}: missing; build the gallery again")
    if fingerprint(path, whole) != info["files"][name]["whole" if whole else "quick"]:
        raise CimError(f"{path}: not the file that gallery.json describes; build the gallery again")


def fingerprint(path: Path, whole: bool = False) -> str:
    """Size and SHA-256 of a file; of one above 64 MiB, unless `whole`, of 256 samples spread over it.

    So a gallery of any size loads in a moment, and a file that is cut, swapped or written anew is still told apart.
    """
    size, sample, samples = path.stat().st_size, 65_536, 256
    digest = hashlib.sha256()
    with path.open("rb") as file:
        if whole or size <= 2**26:
            return f"{size}:{hashlib.file_digest(file, 'sha256').hexdigest()}"
        for i in range(samples):
            file.seek(i * (size - sample) // (samples - 1))
            digest.update(file.read(sample))
    return f"{size}:{digest.hexdigest()}"
