"""Writing the files of a gallery: by plain writing, block by block, so that a full disk is an error and no more."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa

from cim.errors import CimError
from cim.gallery import fingerprint
from cim.index import blocks

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


def write_json(path: Path, value: dict) -> None:
    """Write aside and rename, so that no half of it is ever read."""
    aside = path.with_suffix(".partial")
    aside.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(aside, path)


@contextmanager
def clear_disk_errors(folder: Path) -> Iterator[None]:
    """Turn a full disk into one line that says what to do; other errors pass."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        # FAISS reports a short write as a RuntimeError.
        if not full and not (isinstance(error, RuntimeError) and "fwrite" in str(error)):
            raise
        raise CimError(
            f"{folder}: the disk is full ({error}); free some space and run the same again, it goes on where it stopped"
        ) from None
