"""`cim download`: published data, whose licence and size are told before anything is fetched.

Files are fetched with progress, go on where they were cut off, and are checked against their publisher's checksum
where one is known. Data sets of the hub are fetched by huggingface_hub, which does the same.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import requests
from tqdm.auto import tqdm

from cim.errors import CimError

BLOCK = 1 << 16  # what a cut loses at most


@dataclass(frozen=True)
class Archive:
    """A file to fetch and unpack; md5 is None where its publisher states none that we know."""

    url: str
    md5: str | None

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]


@dataclass(frozen=True)
class Source:
    """A data set: what it is, under which licence, and where it comes from.

    Attributes:
        hub: a data set of the hub, with the patterns of the files wanted.
        archives: files elsewhere.
    """

    what: str
    licence: str
    hub: tuple[str, tuple[str, ...]] | None = None
    archives: tuple[Archive, ...] = ()


COCO = "http://images.cocodataset.org/zips/"
PETS = "https://www.robots.ox.ac.uk/~vgg/data/pets/data/"
SOURCES = {
    "sc-captioner": Source(
        "RefinedCaps, COCO-LN500 and DOCCI500: captions and test sets, no images",
        "Apache-2.0; captions of Localized Narratives and DOCCI CC BY 4.0",
        hub=("zl2048/SC-Captioner-data", ("llamafactory_json/*",)),
    ),
    "coco-train": Source(
        "COCO 2017 training images, which RefinedCaps is of",
        "images under their own Flickr licences, annotations CC BY 4.0",
        archives=(Archive(f"{COCO}train2017.zip", "cced6f7f71b7629ddf16f17bbcfab6b2"),),
    ),
    "coco-val": Source(
        "COCO 2017 validation images, which COCO-LN500 is of",
        "images under their own Flickr licences, annotations CC BY 4.0",
        archives=(Archive(f"{COCO}val2017.zip", "442b8da7639aecaf257c1dceb8ba8c80"),),
    ),
    "docci": Source(
        "DOCCI's images",
        "CC BY 4.0",
        archives=(Archive("https://storage.googleapis.com/docci/data/docci_images.tar.gz", None),),
    ),
    "densefusion": Source(
        "DenseFusion-1M, captions and images of the gallery",
        "CC BY 4.0; images under their owners' rights",
        hub=("BAAI/DenseFusion-1M", ("DenseFusion-1M/*", "images/*")),
    ),
    "oxford-pet": Source(
        "Oxford-IIIT Pet, for the motivation study",
        "CC BY-SA 4.0",
        archives=(
            Archive(f"{PETS}images.tar.gz", "5c4f3ee8e5d25df40f4fd59a7f44e54c"),
            Archive(f"{PETS}annotations.tar.gz", "95a8c909bbe2e81eed6a22bccdf3f68f"),
        ),
    ),
}


def describe(name: str) -> str:
    """Licence, origin and size of a source, asked of its server.

    Raises:
        CimError: for an unknown name, or where the server cannot be reached.
    """
    source = _source(name)
    if source.hub is not None:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError

        repository, patterns = source.hub
        try:
            files = HfApi().dataset_info(repository, files_metadata=True).siblings
        except (HfHubHTTPError, OSError) as error:
            raise CimError(f"{name}: the hub cannot be reached ({' '.join(str(error).split())[:150]})") from None
        size = sum(f.size or 0 for f in files if any(Path(f.rfilename).match(pattern) for pattern in patterns))
        origin = f"hub data set {repository}"
    else:
        size, origin = sum(_size(archive.url) for archive in source.archives), source.archives[0].url
    return f"{name}: {source.what}\n  licence: {source.licence}\n  from: {origin}\n  size: {size / 1e9:.2f} GB"


def download(name: str, folder: Path) -> None:
    """Fetch and unpack a source into a folder; what is there already is not fetched again.

    Raises:
        CimError: where it cannot be fetched, is not what its publisher made, or the disk is full.
    """
    source, folder = _source(name), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if source.hub is not None:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        repository, patterns = source.hub
        try:
            snapshot_download(repository, repo_type="dataset", allow_patterns=list(patterns), local_dir=folder)
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            raise CimError(f"{name}: {' '.join(str(error).split())[:200]}; the same command goes on") from None
        return
    for archive in source.archives:
        done = folder / f".{archive.name}.done"
        if done.is_file():
            print(f"{archive.name}: is there already")
            continue
        path = fetch(archive.url, folder / archive.name, archive.md5)
        unpack(path, folder)
        path.unlink()
        done.touch()


def fetch(url: str, path: Path, md5: str | None, timeout: float = 60) -> Path:
    """Fetch a file to `path`, going on with what an earlier try left in `path`.part.

    Raises:
        CimError: where the server does not give it, it has another checksum, or the disk is full.
    """
    if path.is_file():
        return path
    part = path.with_name(f"{path.name}.part")
    have = part.stat().st_size if part.is_file() else 0
    try:
        headers = {"Range": f"bytes={have}-"} if have else {}
        with requests.get(url, headers=headers, stream=True, timeout=timeout) as answer:
            if answer.status_code != 416:  # 416: the part is the whole
                answer.raise_for_status()
                if have and answer.status_code != 206:  # the server knows no ranges
                    have = 0
                total = have + int(answer.headers.get("Content-Length", 0))
                bar = tqdm(total=total or None, initial=have, unit="B", unit_scale=True, desc=path.name, mininterval=2)
                with part.open("ab" if have else "wb") as out, bar:
                    for block in answer.iter_content(BLOCK):
                        out.write(block)
                        bar.update(len(block))
                if total and part.stat().st_size < total:
                    raise CimError(
                        f"{url}: was cut off at {part.stat().st_size:,} of {total:,} bytes; run the same again"
                    )
    except requests.RequestException as error:
        raise CimError(f"{url}: {' '.join(str(error).split())[:150]}; run the same again, it goes on") from None
    except OSError as error:
        raise CimError(f"{part}: cannot be written ({error.strerror}); make room and run the same again") from None
    if md5 is not None and (found := _md5(part)) != md5:
        part.unlink()
        raise CimError(f"{url}: its MD5 is {found}, not the published {md5}; removed, run the same again")
    os.replace(part, path)
    return path


def unpack(path: Path, folder: Path) -> None:
    """Unpack a .zip, .tar or .tar.gz; nothing is written outside the folder.

    Raises:
        CimError: where it is not such a file.
    """
    try:
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                archive.extractall(folder)  # zipfile itself strips what leads outside
        else:
            with tarfile.open(path) as archive:
                archive.extractall(folder, filter="data")
    except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        raise CimError(f"{path}: cannot be unpacked ({error}); delete it and run the same again") from None


def _source(name: str) -> Source:
    if name not in SOURCES:
        raise CimError(f"data set '{name}' is not known; there are {', '.join(SOURCES)}")
    return SOURCES[name]


def _size(url: str) -> int:
    try:
        answer = requests.head(url, allow_redirects=True, timeout=30)
        answer.raise_for_status()
    except requests.RequestException as error:
        raise CimError(f"{url}: {' '.join(str(error).split())[:150]}") from None
    return int(answer.headers.get("Content-Length", 0))


def _md5(path: Path) -> str:
    with path.open("rb") as content:
        return hashlib.file_digest(content, "md5").hexdigest()
