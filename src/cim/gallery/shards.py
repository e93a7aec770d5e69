"""Where a large gallery's images and captions come from: shards of Parquet, WebDataset or JSON Lines, streamed.

    *.parquet   columns image and caption, image_id where there is one. `image` is a path, or the bytes
                themselves, or a struct of both as Hugging Face data sets have it. Manifests are such files.
    *.tar       WebDataset: KEY.jpg (or png, webp) beside KEY.txt, or KEY.json with "caption"
    *.jsonl     one {"image": path, "caption": text} a line, "image_id" where there is one

A folder stands for the files of these kinds in it. Paths are relative to `image_root`, or to the folder
that the file lies in.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from cim.data.manifest import Manifest
from cim.errors import CimError
from cim.images import SUFFIXES, open_image


@dataclass(frozen=True)
class Record:
    """One captioned image; `image` says where it lies, `content` its bytes where it is not a file of its own."""

    image_id: str
    caption: str
    image: str
    content: bytes | None = None

    def open(self) -> Image.Image:
        """The image as RGB.

        Raises:
            CimError: naming it, where it cannot be read.
        """
        return open_image(self.image if self.content is None else io.BytesIO(self.content), name=self.image)


@dataclass(frozen=True)
class Shard:
    """A part of a source, read at once; `name` says which, and changes when the file does."""

    name: str
    read: Callable[[], Iterator[Record]]


def shards_of(sources: list[Path], rows: int, image_root: Path | None = None) -> list[Shard]:
    """All shards of these files and folders, in order.

    Args:
        rows: at most so many rows a shard; a tar file is one shard whatever it holds.

    Raises:
        CimError: where a source is missing, is of no known kind, or lacks a column.
    """
    shards: list[Shard] = []
    for path in (file for source in sources for file in _files(Path(source))):
        root = Path(image_root) if image_root is not None else path.parent
        stat = path.stat()
        mark = f"{path}:{stat.st_size}:{stat.st_mtime_ns}"
        shards += _KINDS[path.suffix](path, mark, root, rows)
    if not shards:
        raise CimError(f"{', '.join(map(str, sources))}: no rows there; give files with images and captions")
    return shards


def shards_of_manifest(manifest: Manifest, rows: int) -> list[Shard]:
    """Shards of a manifest in memory."""
    ids, captions = manifest.frame["image_id"].tolist(), manifest.captions
    # Relative to the workspace: absolute paths would make the same gallery differ from machine to machine.
    paths = [os.path.relpath(path) for path in manifest.image_paths]

    def reader(start: int) -> Callable[[], Iterator[Record]]:
        part = slice(start, start + rows)
        return lambda: map(Record, ids[part], map(_text, captions[part]), paths[part])

    return [Shard(f"{manifest.name}:{start}", reader(start)) for start in range(0, len(manifest), rows)]


def open_stored(image: str) -> Image.Image:
    """An image by what a gallery says of where it lies: a file, or FILE!MEMBER within a tar file.

    Raises:
        CimError: where it cannot be read, or lies in a Parquet file, whose images are not opened singly.
    """
    archive, inside, member = image.partition("!")
    if not inside:
        return open_image(image)
    if not archive.endswith(".tar"):
        raise CimError(f"{image}: images within Parquet files cannot be opened one by one")
    try:
        with tarfile.open(archive) as tar:
            return open_image(io.BytesIO(tar.extractfile(member).read()), name=image)
    except (OSError, KeyError, tarfile.TarError) as error:
        raise CimError(f"{image}: cannot be read ({error})") from None


def _files(source: Path) -> list[Path]:
    if source.is_dir():
        found = sorted(p for p in source.iterdir() if p.suffix in _KINDS)
        if not found:
            raise CimError(f"{source}: no {', '.join(_KINDS)} file there")
        return found
    if not source.is_file():
        raise CimError(f"{source}: not found; give a file or a folder of {', '.join(_KINDS)}")
    if source.suffix not in _KINDS:
        raise CimError(f"{source}: unknown kind; there are {', '.join(_KINDS)}")
    return [source]


def _parquet(path: Path, mark: str, root: Path, rows: int) -> list[Shard]:
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise CimError(f"{path}: not a readable Parquet file ({error}); fetch or write it again") from None
    names = file.schema_arrow.names
    if missing := [c for c in ("image", "caption") if c not in names]:
        raise CimError(f"{path}: column '{missing[0]}' is missing; it has {', '.join(names)}")
    columns = [c for c in ("image_id", "image", "caption") if c in names]

    def reader(group: int, start: int) -> Callable[[], Iterator[Record]]:
        def read() -> Iterator[Record]:
            table = pq.ParquetFile(path).read_row_group(group, columns=columns).slice(start, rows)
            for i, row in enumerate(table.to_pylist()):
                yield _record(row, root, f"{path}!{group}.{start + i}")

        return read

    shards = []
    for group in range(file.num_row_groups):
        for start in range(0, file.metadata.row_group(group).num_rows, rows):
            shards.append(Shard(f"{mark}:{group}:{start}", reader(group, start)))
    return shards


def _jsonl(path: Path, mark: str, root: Path, rows: int) -> list[Shard]:
    offsets, position = [], 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines):
            if number % rows == 0:
                offsets.append((number, position))
            position += len(line)

    def reader(first: int, offset: int) -> Callable[[], Iterator[Record]]:
        def read() -> Iterator[Record]:
            with path.open("rb") as lines:
                lines.seek(offset)
                for number, line in zip(range(first + 1, first + rows + 1), lines, strict=False):
                    if line.strip():
                        yield _record(parse_line(line, f"{path}:{number}"), root, f"{path}!{number}")

        return read

    return [Shard(f"{mark}:{first}", reader(first, offset)) for first, offset in offsets]


def parse_line(line: bytes | str, where: str) -> dict:
    """One JSON object with image and caption.

    Raises:
        CimError: where it is not one.
    """
    try:
        row = json.loads(line)
    except ValueError as error:
        raise CimError(f"{where}: not JSON ({error})") from None
    if isinstance(row, dict) and "image_path" in row:  # as DenseFusion-1M has it
        row.setdefault("image", row["image_path"])
    if not isinstance(row, dict) or "image" not in row or "caption" not in row:
        raise CimError(f'{where}: should be {{"image": path, "caption": text}}')
    return row


def _tar(path: Path, mark: str, root: Path, rows: int) -> list[Shard]:
    def read() -> Iterator[Record]:
        try:
            with tarfile.open(path) as tar:
                key, found = None, {}
                for member in tar:
                    stem, _, suffix = member.name.rpartition(".")
                    if stem != key:
                        yield from _sample(path, key, found)
                        key, found = stem, {}
                    if member.isfile():
                        found[f".{suffix.lower()}"] = (member.name, tar.extractfile(member).read())
                yield from _sample(path, key, found)
        except tarfile.TarError as error:
            raise CimError(f"{path}: not a readable tar file ({error}); fetch it again") from None

    return [Shard(mark, read)]


def _sample(path: Path, key: str | None, found: dict[str, tuple[str, bytes]]) -> Iterator[Record]:
    image = next((found[suffix] for suffix in SUFFIXES if suffix in found), None)
    if image is None:
        return
    if ".txt" in found:
        caption = found[".txt"][1].decode("utf-8", "replace")
    else:
        caption = json.loads(found.get(".json", ("", b"{}"))[1]).get("caption")
    yield Record(key, _text(caption), f"{path}!{image[0]}", image[1])


def _record(row: dict, root: Path, where: str) -> Record:
    image, content = row["image"], None
    if isinstance(image, dict):
        image, content = image.get("path"), image.get("bytes")
    elif isinstance(image, bytes):
        image, content = None, image
    if content is not None:
        return Record(str(row.get("image_id") or image or where), _text(row["caption"]), where, content)
    path = os.path.relpath(root / str(image))
    return Record(str(row.get("image_id") or image), _text(row["caption"]), path)


def _text(caption) -> str:
    # Anything that is not text, null and NaN among it, counts as an empty caption.
    return caption.strip() if isinstance(caption, str) else ""


_KINDS = {".parquet": _parquet, ".tar": _tar, ".jsonl": _jsonl}
