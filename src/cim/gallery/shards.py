"""Sources of a gallery, streamed in shards: Parquet, WebDataset or JSON Lines.

    *.parquet   columns image, caption and optionally image_id. `image` is a path, the bytes, or a struct of both as
                in Hugging Face data sets. Manifests are such files.
    *.tar       WebDataset: KEY.jpg (or png, webp) with KEY.txt, or KEY.json with "caption"
    *.jsonl     {"image": path, "caption": text} per line, optionally "image_id"

A folder stands for its files of these kinds. Paths are relative to `image_root`, or to the folder of the file.
"""

import io
import json
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from cim.data.manifest import Manifest
from cim.errors import CimError
from cim.gallery.store import GallerySettings
from cim.images import SUFFIXES, open_image


@dataclass(frozen=True)
class Record:
    """One captioned image; `image` is its path, or names its place in an archive that held `content`."""

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
    """A part of a source that is read at once; `name` identifies it and changes with its file."""

    name: str
    read: Callable[[], Iterable[Record]]


def gallery_shards(manifest: Manifest, settings: GallerySettings) -> list[Shard]:
    """Shards of the pipeline's gallery: the manifest's splits, then the files in `settings.shards`.

    Raises:
        CimError: for an unknown split, and as shards_of does.
    """
    manifest = manifest.split(*settings.splits)
    ids, captions = manifest.frame["image_id"].tolist(), [_text(c) for c in manifest.captions]
    # Relative to the workspace: absolute paths would make the same gallery differ between machines.
    records = list(map(Record, ids, captions, map(os.path.relpath, manifest.image_paths)))
    rows = settings.shard_rows
    starts = range(0, len(records), rows)
    shards = [Shard(f"{manifest.name}:{start}", partial(list, records[start : start + rows])) for start in starts]
    if settings.shards is None:
        return shards
    source = Path(settings.shards)
    if source.is_dir() and not source_files([source]):
        print(f"{source}: no {', '.join(_READERS)} file, so the gallery holds the manifest's images only", flush=True)
        return shards
    same = settings.image_root in (None, settings.shards)
    return shards + shards_of([source], rows, None if same else Path(settings.image_root))


def shards_of(sources: list[Path], rows: int, image_root: Path | None = None) -> list[Shard]:
    """All shards of these files and folders, in order.

    Args:
        rows: largest number of rows in a shard; a tar file is always one shard.

    Raises:
        CimError: where a source is missing, empty or of an unknown kind, or lacks a column.
    """
    shards: list[Shard] = []
    for path in source_files(sources):
        stat = path.stat()
        name = f"{path}:{stat.st_size}:{stat.st_mtime_ns}"
        for place, read in _READERS[path.suffix](path, image_root or path.parent, rows):
            shards.append(Shard(f"{name}{place}", read))
    if not shards:
        raise CimError(f"{', '.join(map(str, sources))}: no rows in {', '.join(_READERS)} files; give others")
    return shards


def source_files(sources: Iterable[Path]) -> list[Path]:
    """The files of these kinds that the sources are or hold.

    Raises:
        CimError: where a source is missing or a file of another kind.
    """
    files: list[Path] = []
    for source in map(Path, sources):
        files += sorted(p for p in source.iterdir() if p.suffix in _READERS) if source.is_dir() else [source]
    for path in files:
        if not path.is_file() or path.suffix not in _READERS:
            problem = "unknown kind" if path.is_file() else "not found"
            raise CimError(f"{path}: {problem}; give a file or a folder of {', '.join(_READERS)}")
    return files


Parts = Iterator[tuple[str, Callable[[], Iterable[Record]]]]  # of one file: what to add to its name, and the reader


def _parquet(path: Path, root: Path, rows: int) -> Parts:
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise CimError(f"{path}: not a readable Parquet file ({error}); fetch or write it again") from None
    names = file.schema_arrow.names
    if missing := [c for c in ("image", "caption") if c not in names]:
        raise CimError(f"{path}: column '{missing[0]}' is missing; it has {', '.join(names)}")
    columns = [c for c in ("image_id", "image", "caption") if c in names]

    def read(group: int, start: int) -> Iterator[Record]:
        table = pq.ParquetFile(path).read_row_group(group, columns=columns).slice(start, rows)
        for i, row in enumerate(table.to_pylist(), start):
            yield _record(row, root, f"{path}!{group}.{i}")

    for group in range(file.num_row_groups):
        for start in range(0, file.metadata.row_group(group).num_rows, rows):
            yield f":{group}:{start}", partial(read, group, start)


def _jsonl(path: Path, root: Path, rows: int) -> Parts:
    def read(first: int, offset: int) -> Iterator[Record]:
        with path.open("rb") as lines:
            lines.seek(offset)
            for number, line in enumerate(islice(lines, rows), first + 1):
                if line.strip():
                    yield _record(_parse(line, f"{path}:{number}"), root, f"{path}!{number}")

    offset = 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines):
            if number % rows == 0:
                yield f":{number}", partial(read, number, offset)
            offset += len(line)


def _parse(line: bytes, where: str) -> dict:
    try:
        row = json.loads(line)
        image = row["image"] if "image" in row else row["image_path"]  # as in DenseFusion-1M
        return {"image_id": row.get("image_id"), "image": image, "caption": row["caption"]}
    except (ValueError, TypeError, KeyError) as error:
        raise CimError(f'{where}: should be JSON, {{"image": path, "caption": text}} ({error!r})') from None


def _tar(path: Path, root: Path, rows: int) -> Parts:
    def read() -> Iterator[Record]:
        try:
            with tarfile.open(path) as tar:
                for key, members in groupby(tar, lambda member: member.name.rpartition(".")[0]):
                    files = {
                        m.name.rpartition(".")[2].lower(): (m.name, tar.extractfile(m).read())
                        for m in members
                        if m.isfile()
                    }
                    if image := next((files[suffix[1:]] for suffix in SUFFIXES if suffix[1:] in files), None):
                        text = files["txt"][1].decode("utf-8", "replace") if "txt" in files else None
                        if "json" in files and text is None:
                            text = json.loads(files["json"][1]).get("caption")
                        yield Record(key, _text(text), f"{path}!{image[0]}", image[1])
        except (tarfile.TarError, ValueError) as error:
            raise CimError(f"{path}: not a readable tar file ({error}); fetch it again") from None

    yield "", read


def _record(row: dict, root: Path, where: str) -> Record:
    image, content = row["image"], None
    if isinstance(image, dict):
        image, content = image.get("path"), image.get("bytes")
    elif isinstance(image, bytes):
        image, content = None, image
    path = where if content is not None else os.path.relpath(root / str(image))
    return Record(str(row.get("image_id") or image or where), _text(row["caption"]), path, content)


def _text(caption) -> str:
    # Anything but text, such as null or NaN, counts as an empty caption.
    return caption.strip() if isinstance(caption, str) else ""


_READERS = {".parquet": _parquet, ".tar": _tar, ".jsonl": _jsonl}
