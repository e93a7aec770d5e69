"""The gallery: caption embeddings to search by text, image embeddings to compare what is found."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import faiss
import numpy as np
import pandas as pd

from cim.encoders import ImageEncoder, TextEncoder
from cim.errors import CimError
from cim.manifest import Manifest
from cim.settings import require

FILES = ("index.faiss", "images.npy", "rows.parquet")


@dataclass(frozen=True)
class GallerySettings:
    """The `gallery` group: which splits of the manifest can be retrieved."""

    splits: list[str]

    def __post_init__(self):
        require(bool(self.splits), "splits must name at least one split")


@dataclass
class Gallery:
    """A loaded gallery.

    Attributes:
        folder: where it lies.
        info: gallery.json: encoders, dimensions, counts, digests.
        rows: (N rows) image_id, image (path), caption and template, in index order.
        images: (N, d) float16 image embeddings, memory-mapped.
    """

    folder: Path
    info: dict
    rows: pd.DataFrame
    images: np.ndarray
    _index: faiss.Index

    def __post_init__(self):
        self._row_of = {image_id: row for row, image_id in enumerate(self.rows["image_id"])}

    def __len__(self) -> int:
        return len(self.rows)

    def rows_of(self, image_ids) -> np.ndarray:
        """(n,) the gallery row of each image, -1 where it is not in the gallery."""
        return np.array([self._row_of.get(image_id, -1) for image_id in image_ids], dtype=np.int64)

    def text_embeddings(self) -> np.ndarray:
        """(N, d) float32 caption embeddings, as indexed."""
        return self._index.reconstruct_n(0, self._index.ntotal)

    def search(self, queries: np.ndarray, k: int, exclude: np.ndarray | None = None) -> np.ndarray:
        """The k gallery items whose captions are nearest to each query, best first.

        Args:
            queries: (n, d) caption embeddings, L2-normalised.
            exclude: (n,) gallery row that each query may not retrieve, -1 for none.

        Returns:
            (n, k) gallery rows.

        Raises:
            CimError: where the gallery has fewer than k rows to give.
        """
        spare = 0 if exclude is None else 1
        if not 1 <= k <= len(self) - spare:
            raise CimError(
                f"{self.folder}: k is {k}, but the gallery has {len(self)} rows"
                + (", one of them the excluded source image" if spare else "")
                + "; lower k or enlarge the gallery"
            )
        _, found = self._index.search(np.ascontiguousarray(queries, np.float32), k + spare)
        return found if exclude is None else drop_excluded(found, exclude)

    def image_vectors(self, rows: np.ndarray) -> np.ndarray:
        """(*rows.shape, d) float32 image embeddings of these gallery rows."""
        return self.images[rows].astype(np.float32)


def drop_excluded(found: np.ndarray, exclude: np.ndarray) -> np.ndarray:
    """Take the excluded row, or else the last one, out of each row of (n, k + 1) results; returns (n, k)."""
    hit = found == exclude[:, None]
    hit[~hit.any(axis=1), -1] = True
    return found[~hit].reshape(len(found), -1)


def build_gallery(
    manifest: Manifest,
    splits: list[str],
    text_encoder: TextEncoder,
    image_encoder: ImageEncoder,
    folder: Path,
) -> dict:
    """Embed the rows of these splits and write the gallery; return its gallery.json.

    It is written aside and renamed, so that no half-written gallery is ever loaded.

    Raises:
        CimError: for an empty caption or an unreadable image, naming it.
    """
    chosen = manifest.split(*splits)
    empty = [i for i, c in zip(chosen.frame["image_id"], chosen.captions, strict=True) if not str(c or "").strip()]
    if empty:
        raise CimError(
            f"{manifest.name}: image '{empty[0]}' has an empty caption ({len(empty)} in all); mend or drop it"
        )
    folder = Path(folder)
    aside = folder.with_name(folder.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)

    texts = text_encoder.encode(chosen.captions, progress=True)
    index = faiss.IndexFlatIP(text_encoder.dim)
    index.add(texts)
    faiss.write_index(index, str(aside / "index.faiss"))
    images = image_encoder.encode(chosen.image_paths, progress=True)
    np.save(aside / "images.npy", images.astype(np.float16))
    columns = [c for c in ("image_id", "caption", "template", "scene", "queries") if c in chosen.frame]
    # Relative to the workspace: absolute paths would make the same gallery differ from machine to machine.
    rows = chosen.frame[columns].assign(image=[os.path.relpath(p) for p in chosen.image_paths])
    rows.to_parquet(aside / "rows.parquet", index=False)
    info = {
        "rows": len(chosen),
        "splits": list(splits),
        "text_encoder": {"spec": text_encoder.spec, "dim": text_encoder.dim, "digest": text_encoder.digest},
        "image_encoder": {"spec": image_encoder.spec, "dim": image_encoder.dim, "digest": image_encoder.digest},
        "sha256": {name: _sha256(aside / name) for name in FILES},
    }
    (aside / "gallery.json").write_text(json.dumps(info, indent=1) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(aside, folder)
    return info


def load_gallery(
    folder: Path, text_encoder: TextEncoder | None = None, image_encoder: ImageEncoder | None = None
) -> Gallery:
    """Load a gallery and make sure it belongs to these encoders.

    Raises:
        CimError: where a file is missing or is not the one that gallery.json describes, and where the
            gallery was built with other encoders.
    """
    folder = Path(folder)
    try:
        info = json.loads((folder / "gallery.json").read_text())
    except FileNotFoundError:
        raise CimError(f"{folder}: no gallery there; build it with the 'gallery' stage") from None
    except json.JSONDecodeError:
        raise CimError(f"{folder / 'gallery.json'}: not valid JSON; build the gallery again") from None
    for name in FILES:
        if not (folder / name).is_file():
            raise CimError(f"{folder / name}: missing; build the gallery again")
        if _sha256(folder / name) != info["sha256"][name]:
            raise CimError(f"{folder / name}: not the file that gallery.json describes; build the gallery again")
    for what, encoder in (("text_encoder", text_encoder), ("image_encoder", image_encoder)):
        if encoder is None:
            continue
        built = info[what]
        if (built["dim"], built["digest"]) != (encoder.dim, encoder.digest):
            raise CimError(
                f"{folder}: built with {what} '{built['spec']}' ({built['dim']}-d, {built['digest']}), not with "
                f"'{encoder.spec}' ({encoder.dim}-d, {encoder.digest}); build it again or set encoders to match"
            )
    return Gallery(
        folder=folder,
        info=info,
        rows=pd.read_parquet(folder / "rows.parquet"),
        images=np.load(folder / "images.npy", mmap_mode="r"),
        _index=faiss.read_index(str(folder / "index.faiss")),
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
