"""Writing files safely: all or nothing, never over something that is not ours, full disks reported in one line."""

import errno
import hashlib
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cim.errors import CimError


@contextmanager
def replacing(path: Path | str) -> Iterator[Path]:
    """Yield a path to write to; at the end it is renamed to `path`, so that no reader ever sees half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    try:
        yield partial
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_text(path: Path | str, text: str) -> None:
    """Write a text file, all or nothing."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path | str, value: Any, indent: int | None = 1) -> None:
    """Write a JSON file, all or nothing."""
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=False) + "\n")


def write_metrics(path: Path | str, metrics: dict) -> None:
    """Write a metrics file, rounded to five digits so that diffs are readable; NaN becomes null."""
    write_json(path, _rounded(metrics))


def _rounded(value):
    if isinstance(value, dict):
        return {str(k): _rounded(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(v) for v in value]
    if isinstance(value, (int, str)) or not hasattr(value, "__float__"):
        return value
    return None if math.isnan(value) else round(float(value), 5)


def read_json(path: Path | str) -> Any:
    """The content of a JSON file."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def short_digest(value: Any) -> str:
    """Short SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def refuse_foreign(folder: Path, mark: str, what: str) -> None:
    """Refuse to write a folder that holds something else.

    Args:
        mark: a file that each folder of this kind holds.
        what: the kind of folder, for the message.

    Raises:
        CimError: where `folder` is a file, or is neither empty nor marked.
    """
    if folder.exists() and not folder.is_dir():
        raise CimError(f"{folder}: is a file; choose another name for the {what}")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / mark).is_file():
        raise CimError(f"{folder}: is not empty and not a {what} (it has no {mark}); choose another folder")


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
            f"{folder}: the disk is full ({error}); free some space and run the same command again to resume"
        ) from None
