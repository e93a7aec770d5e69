"""Sources of a gallery, streamed in shards: Parquet, WebDataset or JSON Lines.

    *.parquet   columns image, caption and optionally image_id. `image` is a path, the bytes, or a struct of both as
                in Hugging Face data sets. Manifests are such files.
    *.tar       WebDataset: KEY.jpg (or png, webp) with KEY.txt, or KEY.json with "caption"
    *.jsonl     {"image": path, "caption": text} per line, optionally "image_id"

A folder stands for its files of these kinds. Paths are relative to `image_root`, or to the folder of the file; zip
files there are read in place. What an archive holds is read record by record, never as a whole.
"""

import json
import os
import tarfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from cim.data.manifest import Manifest
from cim.errors import CimError
from cim.files import explained, short_digest, valid_text
from cim.gallery.settings import GallerySettings
from cim.images import DAMAGED, SUFFIXES, content_digest, locate, open_image, read_stored

READ = 64  # rows of a Parquet file that are read at once


@dataclass(frozen=True)
class Record:
    """One captioned image.

    Attributes:
        image: its path, or its place FILE!MEMBER in an archive.
        content: of the image file, where reading the archive gave it.
        known_digest: its content_digest, where that is known without reading it.
    """

    image_id: str
    caption: str
    image: str
    content: bytes | None = None
    known_digest: str | None = None

    @property
    def source(self) -> str | bytes:
        """What open_image takes."""
        return self.image if self.content is None else self.content

    def open(self) -> Image.Image:
        """The image as RGB.

        Raises:
            CimError: naming it, where it cannot be read; so does `digest`.
        """
        return open_image(self.source, name=self.image)

    def digest(self) -> str:
        """The image's content_digest."""
        return self.known_digest or content_digest(read_stored(self.source))

    def row(self, folder: str) -> dict[str, str]:
        """Its row in a gallery in this folder."""
        # Relative to the gallery, so that it is valid in any current folder, and the same on any machine.
        place = os.path.relpath(self.image, folder)
        return {"image_id": self.image_id, "image": place, "caption": self.caption, "digest": self.digest()}

    def is_of(self, row: pa.Table, folder: str) -> bool:
        """Whether this row of the gallery in this folder has the same image, by its place or else by its content."""
        held = row.to_pylist()[0]
        with suppress(CimError):  # an image that cannot be read
            return held["image"] == os.path.relpath(self.image, folder) or held["digest"] == self.digest()
        return False


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
    frame = manifest.frame
    images = zip(frame["image_id"], manifest.captions, manifest.image_paths, frame["digest"], strict=True)
    records = [Record(i, _text(text), os.path.relpath(path), known_digest=digest) for i, text, path, digest in images]
    name = f"{manifest.name}:{short_digest([(r.image_id, r.caption, r.known_digest) for r in records])}"
    rows, starts = settings.shard_rows, range(0, len(records), settings.shard_rows)
    shards = [Shard(f"{name}:{start}", partial(list, records[start : start + rows])) for start in starts]
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
        name = f"{path}:{stat.st_size}:{stat.st_mtime_ns}:{image_root}"
        # Resolved, since the parent of a linked folder is not the one that its path names.
        shards += _READERS[path.suffix](path, name, Path(image_root or path.parent).resolve(), rows)
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


def _reading(path: Path, kind: str) -> AbstractContextManager:
    return explained(f"{path}: not a readable {kind} file", "fetch or write it again", *DAMAGED, pa.ArrowException)


def _parquet(path: Path, name: str, root: Path, rows: int) -> Iterator[Shard]:
    with _reading(path, "Parquet"):
        file = pq.ParquetFile(path)
    names = file.schema_arrow.names
    if missing := [c for c in ("image", "caption") if c not in names]:
        raise CimError(f"{path}: column '{missing[0]}' is missing; it has {', '.join(names)}")
    columns = [c for c in ("image_id", "image", "caption") if c in names]

    def read(group: int, start: int) -> Iterator[Record]:
        with _reading(path, "Parquet"):
            # With these options pages are read as they are needed, not a whole row group.
            file = pq.ParquetFile(path, buffer_size=2**20, pre_buffer=False)
            batches = file.iter_batches(READ, [group], columns)
            places = ((batch, i) for batch in batches for i in range(len(batch)))
            for number, (batch, i) in enumerate(islice(places, start, start + rows), start):
                yield _record(batch.slice(i, 1).to_pylist()[0], root, f"{path}!{group}.{number}")

    for group in range(file.num_row_groups):
        for start in range(0, file.metadata.row_group(group).num_rows, rows):
            yield Shard(f"{name}:{group}:{start}", partial(read, group, start))


def _jsonl(path: Path, name: str, root: Path, rows: int) -> Iterator[Shard]:
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
                yield Shard(f"{name}:{number}", partial(read, number, offset))
            offset += len(line)


def _parse(line: bytes, where: str) -> dict:
    try:
        row = json.loads(line)
        # DenseFusion-1M has `image_path`.
        return {**row, "image": row["image"] if "image" in row else row["image_path"], "caption": row["caption"]}
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CimError(f'{where}: should be JSON, {{"image": path, "caption": text}} ({error!r})') from None


def _tar(path: Path, name: str, root: Path, rows: int) -> Iterator[Shard]:
    def read() -> Iterator[Record]:
        with _reading(path, "tar"), tarfile.open(path) as tar:
            # First the headers alone, since the members of a key may lie apart.
            keys: dict[str, dict[str, tarfile.TarInfo]] = defaultdict(dict)
            for member in filter(tarfile.TarInfo.isfile, tar):
                key, _, suffix = member.name.rpartition(".")
                keys[key][f".{suffix.lower()}"] = member
            for key, members in keys.items():
                if image := next(filter(None, map(members.get, SUFFIXES)), None):
                    texts = {s: tar.extractfile(members[s]).read() for s in (".txt", ".json") if s in members}
                    place = valid_text(f"{path}!{image.name}")
                    yield Record(valid_text(key), _caption_of(texts), place, tar.extractfile(image).read())

    yield Shard(name, read)


def _caption_of(texts: dict[str, bytes]) -> str:
    if ".txt" in texts:
        return _text(texts[".txt"].decode("utf-8", "replace"))
    found = json.loads(texts.get(".json", b"null"))
    return _text(found.get("caption")) if isinstance(found, dict) else ""


def _record(row: dict, root: Path, where: str) -> Record:
    image, content = row["image"], None
    if isinstance(image, dict):
        image, content = image.get("path"), image.get("bytes")
    if isinstance(image, bytes):
        image, content = None, image
    place = os.path.relpath(locate(root, str(image))) if content is None else where
    image_id = row.get("image_id")
    if isinstance(image_id, (list, dict)):
        raise CimError(f"{where}: image_id should be text or a number, not {image_id!r}")
    if image_id in (None, "") or image_id != image_id:  # NaN, which pandas writes for a missing one
        image_id = image or where
    return Record(valid_text(str(image_id)), _text(row["caption"]), valid_text(place), content)


def _text(caption) -> str:
    # Anything but text, such as null or NaN, counts as an empty caption.
    return valid_text(caption.strip()) if isinstance(caption, str) else ""


_READERS = {".parquet": _parquet, ".tar": _tar, ".jsonl": _jsonl}
