"""Reading text, and writing files safely: all or nothing, and never over something else."""

import hashlib
import json
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


def write_json(path: Path | str, value: Any, indent: int | None = 1, digits: int | None = None) -> None:
    """Write a JSON file, all or nothing; NaN and infinity, which JSON does not have, become null.

    Args:
        digits: how many decimals numbers are rounded to; None for all.
    """
    number = float if digits is None else lambda text: round(float(text), digits)
    plain = json.loads(json.dumps(value, default=float), parse_float=number, parse_constant=lambda name: None)
    write_text(path, json.dumps(plain, indent=indent, ensure_ascii=False) + "\n")


def write_metrics(path: Path | str, metrics: dict) -> None:
    """Write a metrics file, rounded to five digits so that diffs are readable."""
    write_json(path, metrics, digits=5)


def read_text(path: Path | str) -> str:
    """The content of a text file: UTF-8, or what its byte order mark says.

    Raises:
        CimError: where it cannot be read or decoded.
    """
    with explained(f"{path}: cannot be read", "restore it, or save it as UTF-8", OSError, UnicodeDecodeError):
        content = Path(path).read_bytes()
        return content.decode(json.detect_encoding(content))


def read_json(path: Path | str) -> Any:
    """The content of a JSON file; a CimError where it cannot be read or is not JSON."""
    with explained(f"{path}: not valid JSON", "restore or delete it", ValueError, RecursionError):
        return json.loads(read_text(path))


def valid_text(text: str) -> str:
    """The text with U+FFFD for lone surrogates, such as halves of an emoji that was cut; UTF-8 cannot encode those."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold PATH.lock, a file that is removed at the end.

    Raises:
        CimError: where another process holds it.
    """
    from filelock import FileLock, Timeout  # here, since reading results needs no lock: see binder/requirements.txt

    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{path}.lock", timeout=0)
    with explained(f"{path}: another process is writing it", "wait until it has finished", Timeout):
        lock.acquire()
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def short_digest(value: Any) -> str:
    """Short SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def refuse_folder(path: Path) -> None:
    """Refuse a folder as the name of an output file, before any work starts."""
    if path.is_dir():
        raise CimError(f"{path}: is a folder; give the name of a file")


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
def explained(problem: str, fix: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turn exceptions of these kinds into a CimError: the problem, what the exception says, and how to fix it."""
    try:
        yield
    except kinds as error:
        raise CimError(f"{problem} ({' '.join(str(error).split())}); {fix}") from None
