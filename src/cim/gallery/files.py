"""Writing the files of a gallery: by plain writing, block by block, so that a full disk is an error and no more."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa

from cim.gallery.search import blocks
from cim.gallery.store import fingerprint

SCHEMA = pa.schema([("image_id", pa.string()), ("image", pa.string()), ("caption", pa.string())])


def write_rows(path: Path, tables: Iterable[pa.Table]) -> None:
    """Write tables with SCHEMA's columns below each other."""
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, SCHEMA) as writer:
        for table in tables:
            writer.write_table(table.select(SCHEMA.names).cast(SCHEMA))


def write_array(path: Path, rows: int, dim: int, arrays: Iterable[np.ndarray]) -> None:
    """Write (n, dim) arrays below each other as one float16 .npy.

    By plain writing, block by block: on a full disk a memory map would end in a signal instead of an error.
    """
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f2", "fortran_order": False, "shape": (rows, dim)})
        for array in arrays:
            for block in blocks(len(array)):
                file.write(np.ascontiguousarray(array[block], np.float16).tobytes())


def described(path: Path) -> dict:
    """What gallery.json keeps of a file, to know it again."""
    return {"quick": fingerprint(path), "whole": fingerprint(path, whole=True)}
