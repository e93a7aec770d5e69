"""Published data sets, whose licence and size are printed before anything is downloaded.

Downloads show progress, resume if interrupted, and are checked against their publisher's MD5 if one is known. They are
collected in a hidden subfolder and moved to their place at the end, never over a file that exists.
"""

import hashlib
import shutil
import tarfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import requests
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.utils import filter_repo_objects
from tqdm import tqdm

from cim.errors import CimError
from cim.files import explained

# After errors of requests, the hub and the disk, which are all OSErrors.
RESUME = "rerun the same command to resume"
BLOCK = 1 << 16  # bytes that an interruption loses at most
COCO = "http://images.cocodataset.org/zips/"
FLICKR8K = "https://github.com/jbrownlee/Datasets/releases/download/Flickr8k/"
PETS = "https://www.robots.ox.ac.uk/~vgg/data/pets/data/"


@dataclass(frozen=True)
class Archive:
    """A .zip, .tar or .tar.gz; md5 is None if its publisher states none."""

    origin: str
    md5: str | None = None

    def size(self) -> int:
        with requests.head(self.origin, allow_redirects=True, timeout=30) as answer:
            answer.raise_for_status()
            return int(answer.headers.get("Content-Length", 0))

    def fetch(self, folder: Path) -> Path:
        path, files = folder / Path(self.origin).name, folder / "files"
        download_file(self.origin, path)
        with path.open("rb") as content:
            if self.md5 and (found := hashlib.file_digest(content, "md5").hexdigest()) != self.md5:
                path.unlink()
                raise CimError(f"{self.origin}: its MD5 is {found}, not the published {self.md5}; removed, try again")
        shutil.rmtree(files, ignore_errors=True)
        damaged = (shutil.ReadError, zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error)
        with explained(f"{path}: cannot be unpacked", "delete it and rerun the same command", *damaged):
            # Neither form writes outside the folder; zip takes no filter.
            shutil.unpack_archive(path, files, **({} if path.suffix == ".zip" else {"filter": "data"}))
        return files


@dataclass(frozen=True)
class HubFiles:
    """Files of a data set of the Hugging Face hub, by patterns."""

    origin: str
    patterns: list[str]

    def size(self) -> int:
        files = HfApi().dataset_info(self.origin, files_metadata=True).siblings
        wanted = filter_repo_objects(files, allow_patterns=self.patterns, key=lambda file: file.rfilename)
        return sum(file.size or 0 for file in wanted)

    def fetch(self, folder: Path) -> Path:
        snapshot_download(self.origin, repo_type="dataset", allow_patterns=self.patterns, local_dir=folder / "files")
        return folder / "files"


class Source(NamedTuple):
    """A data set. A part's `size` is in bytes; its `fetch` downloads into a folder of its own and returns its files."""

    content: str
    licence: str
    parts: list[Archive | HubFiles]


COCO_LICENCE = "images under their own Flickr licences, annotations CC BY 4.0"
SOURCES = {
    "sc-captioner": Source("RefinedCaps, COCO-LN500 and DOCCI500: captions and test sets, no images",
                           "Apache-2.0; captions of Localized Narratives and DOCCI CC BY 4.0",
                           [HubFiles("zl2048/SC-Captioner-data", ["llamafactory_json/*"])]),
    "coco-train": Source("COCO 2017 training images, used by RefinedCaps", COCO_LICENCE,
                         [Archive(f"{COCO}train2017.zip", "cced6f7f71b7629ddf16f17bbcfab6b2")]),
    "coco-val": Source("COCO 2017 validation images, used by COCO-LN500", COCO_LICENCE,
                       [Archive(f"{COCO}val2017.zip", "442b8da7639aecaf257c1dceb8ba8c80")]),
    "docci": Source("DOCCI's images", "CC BY 4.0",
                    [Archive("https://storage.googleapis.com/docci/data/docci_images.tar.gz")]),
    "densefusion": Source("DenseFusion-1M, captions and images of the gallery",
                          "CC BY 4.0; images under their owners' rights",
                          [HubFiles("BAAI/DenseFusion-1M", ["DenseFusion-1M/*", "images/*"])]),
    "flickr8k": Source("Flickr8k: photos, captions, splits and human judgements",
                       "research use only; the photos belong to their authors",
                       [Archive(f"{FLICKR8K}Flickr8k_Dataset.zip"), Archive(f"{FLICKR8K}Flickr8k_text.zip")]),
    "oxford-pet": Source("Oxford-IIIT Pet, for the motivation study", "CC BY-SA 4.0",
                         [Archive(f"{PETS}images.tar.gz", "5c4f3ee8e5d25df40f4fd59a7f44e54c"),
                          Archive(f"{PETS}annotations.tar.gz", "95a8c909bbe2e81eed6a22bccdf3f68f")]),
}  # fmt: skip


def describe(name: str) -> str:
    """Licence, origin and size of a data set; a CimError for an unknown name, or if the server cannot be reached."""
    if name not in SOURCES:
        raise CimError(f"data set '{name}' is unknown; choose from {', '.join(SOURCES)}")
    content, licence, parts = SOURCES[name]
    with explained(f"{name}: its size cannot be read", RESUME, OSError):
        size = sum(part.size() for part in parts)
    return f"{name}: {content}\n  licence: {licence}\n  from: {parts[0].origin}\n  size: {size / 1e9:.2f} GB"


def download(name: str, folder: Path) -> Path:
    """Download and unpack one of SOURCES into a folder, and return it; finished parts are not downloaded again.

    Raises:
        CimError: if it cannot be downloaded, its MD5 is not the published one, or one of its files exists already.
    """
    for part in SOURCES[name].parts:
        own = folder / f".{Path(part.origin).name}"
        done = own.with_name(f"{own.name}.done")
        if done.is_file():
            print(f"{part.origin}: already downloaded")
            continue
        with explained(f"{part.origin}: cannot be downloaded", RESUME, OSError):
            own.mkdir(parents=True, exist_ok=True)
            # What is hidden is the hub's own record of the download; macOS adds __MACOSX to the archives that it makes.
            hidden = (".", "__MACOSX")
            entries = sorted(entry for entry in part.fetch(own).iterdir() if not entry.name.startswith(hidden))
            for entry in entries:
                if (folder / entry.name).exists():
                    raise CimError(f"{folder / entry.name}: exists already; move it away, or choose another --to")
            for entry in entries:
                entry.rename(folder / entry.name)
            done.touch()
            shutil.rmtree(own)
    return folder


def download_file(url: str, path: Path) -> None:
    """Download to `path`, continuing a partial file; an OSError if the server, the connection or the disk fails."""
    have = path.stat().st_size if path.is_file() else 0
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with requests.get(url, headers=headers, stream=True, timeout=60) as answer:
        if answer.status_code == 416:  # no bytes are left
            return
        answer.raise_for_status()
        have = have if answer.status_code == 206 else 0  # 200: the server ignores ranges
        total = have + int(answer.headers.get("Content-Length", 0))
        bar = tqdm(total=total or None, initial=have, unit="B", unit_scale=True, desc=path.name, mininterval=2)
        with path.open("ab" if have else "wb") as out, bar:
            for block in answer.iter_content(BLOCK):
                out.write(block)
                bar.update(len(block))
