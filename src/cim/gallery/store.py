"""The gallery on disk: caption embeddings to search by text, image embeddings to compare what is retrieved.

texts.npy      (N, d) float16 caption embeddings, memory-mapped
images.npy     (N, d) float16 image embeddings, memory-mapped
rows.arrow     image_id, image and caption of each row, memory-mapped
transform.npz  mean and principal components of the image embeddings (cim.gallery.transform)
index.faiss    the index, unless the search is exact; a rebuilt index is index-2.faiss, then index.faiss again
gallery.json   encoders, counts, the kind of index, and a fingerprint of each file
skipped.jsonl  rows that were left out, with the reason
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
from pydantic import PositiveInt

from cim.encoders import ImageEncoder, TextEncoder
from cim.errors import CimError
from cim.files import read_json
from cim.gallery.search import ExactSearch, FaissSearch, blocks, gather, open_search
from cim.gallery.transform import ImageTransform
from cim.params import Names, Settings, Share

TEXTS, IMAGES, ROWS, TRANSFORM = "texts.npy", "images.npy", "rows.arrow", "transform.npz"
INFO, SKIPPED = "gallery.json", "skipped.jsonl"
INDEXES = ("index.faiss", "index-2.faiss")
SCHEMA = pa.schema([("image_id", pa.string()), ("image", pa.string()), ("caption", pa.string())])


class BuildSettings(Settings):
    """How a gallery is built."""

    index: str = "auto"  # exact, auto (by size), or any string that faiss.index_factory takes
    recall: Share = 0.99  # an approximate index is tuned until it finds this share of the exact nearest captions
    shard_rows: PositiveInt = 10_000  # rows embedded between two checkpoints
    max_skipped: Share = 0.0  # share of unreadable images and empty captions that may be left out


class GallerySettings(BuildSettings):
    """The `gallery` group: how the gallery is built, and from what."""

    splits: Names  # splits of the manifest that can be retrieved
    shards: str | None = None  # file or folder of more captioned images, in the formats of cim.gallery.shards
    image_root: str | None = None  # what their image paths are relative to; None or `shards` itself: their own folder


@dataclass
class Gallery:
    """A loaded gallery of N captioned images; only the rows in use come into memory."""

    folder: Path
    info: dict  # gallery.json
    table: pa.Table  # columns image_id, image (its path) and caption
    texts: np.ndarray  # (N, d) float16 caption embeddings
    images: np.ndarray  # (N, d) float16 image embeddings
    index: ExactSearch | FaissSearch

    def __len__(self) -> int:
        return len(self.table)

    @cached_property
    def rows(self) -> pd.DataFrame:
        """The whole table in memory; of a large gallery use `take`."""
        return self.table.to_pandas()

    def take(self, rows: np.ndarray) -> pd.DataFrame:
        """image_id, image and caption of these rows."""
        return self.table.take(pa.array(np.asarray(rows).ravel())).to_pandas()

    def rows_of(self, image_ids) -> np.ndarray:
        """(n,) gallery row of each image, -1 where it is not in the gallery."""
        wanted = np.asarray(image_ids, dtype=object)
        hashes, order = self._sorted_ids
        if not len(wanted) or not len(order):
            return np.full(len(wanted), -1)
        place = np.searchsorted(hashes, pd.util.hash_array(wanted)).clip(max=len(order) - 1)
        rows = order[place].astype(np.int64)
        same = self.table["image_id"].take(pa.array(rows)).to_numpy(zero_copy_only=False) == wanted
        return np.where(same, rows, -1)

    @cached_property
    def _sorted_ids(self) -> tuple[np.ndarray, np.ndarray]:
        """Sorted hashes of the image ids and their rows: 16 bytes per row, where a dictionary takes hundreds."""
        hashes = id_hashes(self.table)
        order = np.argsort(hashes, kind="stable")
        return hashes[order], order

    def text_embeddings(self) -> np.ndarray:
        """(N, d) float32 caption embeddings, L2-normalised, all in memory."""
        return _unit(self.texts)

    def search(self, queries: np.ndarray, k: int, exclude: np.ndarray | None = None) -> np.ndarray:
        """The k gallery rows whose captions are nearest to each query, best first.

        Args:
            queries: (n, d) caption embeddings, L2-normalised.
            exclude: (n,) gallery row that each query may not retrieve, -1 for none.

        Returns:
            (n, k) gallery rows.

        Raises:
            CimError: where the gallery has fewer than k rows to retrieve, and for queries of another dimension.
        """
        if queries.shape[1] != self.texts.shape[1]:
            raise CimError(f"{self.folder}: captions have {self.texts.shape[1]} dimensions, queries {queries.shape[1]}")
        spare = 0 if exclude is None else 1
        if not 1 <= k <= len(self) - spare:
            rows = f"{len(self)} rows" + (", one of them the excluded source image" if spare else "")
            raise CimError(f"{self.folder}: k is {k}, but the gallery has {rows}; lower k or enlarge the gallery")
        found = self.index.search(queries, k + spare)
        return found if exclude is None else drop_excluded(found, exclude)

    @cached_property
    def transform(self) -> ImageTransform:
        """Centring and whitening fitted on the gallery's images."""
        if TRANSFORM not in self.info["files"]:
            raise CimError(f"{self.folder}: has no {TRANSFORM}, which older galleries lack; rebuild the gallery")
        return ImageTransform.read(self.folder / TRANSFORM)

    def image_vectors(self, rows: np.ndarray) -> np.ndarray:
        """(*rows.shape, d) float32 image embeddings of these rows, L2-normalised."""
        return _unit(gather(self.images, np.asarray(rows)))


def _unit(vectors: np.ndarray) -> np.ndarray:
    # Rounding to float16 changed the lengths too.
    vectors = vectors.astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def drop_excluded(found: np.ndarray, exclude: np.ndarray) -> np.ndarray:
    """Remove the excluded row, or else the last one, from each row of (n, k + 1) results; returns (n, k)."""
    hit = found == exclude[:, None]
    hit[~hit.any(axis=1), -1] = True
    return found[~hit].reshape(len(found), -1)


def id_hashes(table: pa.Table) -> np.ndarray:
    """(N,) 64-bit hashes of the image ids, the same in every process."""
    ids = table["image_id"]
    parts = [pd.util.hash_array(ids[b].to_numpy(zero_copy_only=False).astype(object)) for b in blocks(len(ids))]
    return np.concatenate([np.zeros(0, np.uint64), *parts])


def load_gallery(
    folder: Path,
    text_encoder: TextEncoder | None = None,
    image_encoder: ImageEncoder | None = None,
    verify: bool = False,
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
        path = folder / name
        if not path.is_file():
            raise CimError(f"{path}: missing; rebuild the gallery")
        if fingerprint(path, whole=verify) != marks["whole" if verify else "quick"]:
            raise CimError(f"{path}: not the file that gallery.json describes; rebuild the gallery")
    arrays = []
    for name, file, encoder in (("text_encoder", TEXTS, text_encoder), ("image_encoder", IMAGES, image_encoder)):
        built = info[name]
        if encoder is not None and (built["dim"], built["digest"]) != (encoder.dim, encoder.digest):
            raise CimError(
                f"{folder}: built with {name} '{built['spec']}' ({built['dim']}-d, {built['digest']}), not with "
                f"'{encoder.spec}' ({encoder.dim}-d, {encoder.digest}); rebuild it or set encoders to match"
            )
        arrays.append(np.load(folder / file, mmap_mode="r"))
        if (shape := arrays[-1].shape) != (info["rows"], built["dim"]):
            raise CimError(f"{folder / file}: has shape {shape}, not that of gallery.json; rebuild the gallery")
    index = info["index"]
    device = text_encoder.device if text_encoder is not None else "cpu"
    path = folder / index.get("file", "")
    search = open_search(index["kind"], arrays[0], path, index["effort"], index["candidates"], device)
    return Gallery(folder, info, read_rows(folder / ROWS), *arrays, search)


def read_info(folder: Path) -> dict:
    """gallery.json.

    Raises:
        CimError: where it is missing or not JSON.
    """
    try:
        return read_json(Path(folder) / INFO)
    except FileNotFoundError:
        raise CimError(f"{folder}: no gallery there; build one with 'cim gallery build'") from None
    except ValueError:
        raise CimError(f"{Path(folder) / INFO}: not valid JSON; rebuild the gallery") from None


def read_rows(path: Path) -> pa.Table:
    """The memory-mapped table of a gallery's rows."""
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def write_rows(path: Path, tables: Iterable[pa.Table]) -> None:
    """Write tables with SCHEMA's columns, one after another."""
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, SCHEMA) as writer:
        for table in tables:
            writer.write_table(table.select(SCHEMA.names).cast(SCHEMA))


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
