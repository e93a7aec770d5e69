"""Opening images as browsers show them, wherever they are stored, and finding them by name."""

import hashlib
import io
import lzma
import os
import re
import tarfile
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from functools import cache, lru_cache
from glob import glob
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from cim.errors import CimError
from cim.files import explained

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
# What reading a damaged or encrypted archive, a missing member, or an impossible path raises.
DAMAGED = (
    OSError, EOFError, KeyError, ValueError, RuntimeError, AttributeError, tarfile.TarError, zipfile.BadZipFile,
    zlib.error, lzma.LZMAError,
)  # fmt: skip


def open_image(source: Path | str | bytes, name: str = "") -> Image.Image:
    """The image as RGB, as a browser shows it: rotated as its EXIF data says, 16 bits as 8, transparency on white.

    Args:
        source: the content of an image file, or its place: see `read_stored`.
        name: what errors call it, where it is given as content.

    Raises:
        CimError: if the image is missing or cannot be decoded.
    """
    content = read_stored(source)
    try:
        with Image.open(io.BytesIO(content)) as image:
            return _as_shown(image)
    # What Pillow's readers of damaged files raise: NotImplementedError of DDS is a RuntimeError, as AVIF's.
    except (OSError, ValueError, SyntaxError, RuntimeError, TypeError, Image.DecompressionBombError) as error:
        reason = "no known image format" if isinstance(error, UnidentifiedImageError) else error
        where = name if isinstance(source, bytes) else source
        raise CimError(f"{where}: unreadable image ({reason}); replace or remove it") from None


def _as_shown(image: Image.Image) -> Image.Image:
    with suppress(Exception):  # invalid EXIF data, which are written anew after the pixels are rotated
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I"):  # 16 bits, which `convert` clips to 255
        image = image.convert("I").point(lambda value: value / 256).convert("L")
        image.info.pop("transparency", None)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def read_stored(image: Path | str | bytes) -> bytes:
    """The content of an image by its place: a file, or FILE!MEMBER within a zip or tar file; content is returned as is.

    Raises:
        CimError: where it cannot be read, or is within a Parquet file, which gives no access to single images.
    """
    if isinstance(image, bytes):
        return image
    # A folder's name may have a "!" too.
    archive, kind, member = re.match(r"(?s)(?:(.+?(\.zip|\.tar|\.parquet))!(.+))?", str(image)).groups()
    try:
        match kind:
            case ".zip":
                return _open_zip(archive, os.getpid()).read(member)
            case ".tar":
                with tarfile.open(archive) as tar:
                    return tar.extractfile(member).read()
            case ".parquet":
                raise CimError(f"{image}: images within Parquet files cannot be opened one by one")
        return Path(image).read_bytes()
    except FileNotFoundError:
        raise CimError(f"{image}: image not found; restore the file or correct the path") from None
    except DAMAGED as error:
        raise CimError(f"{image}: cannot be read ({error}); fetch the file again") from None


def content_digest(content: bytes) -> str:
    """Short SHA-256 of an image file's content, as in a manifest's column `digest`."""
    return hashlib.sha256(content).hexdigest()[:16]


def locate(root: Path, image: str) -> str:
    """The place of an image: ROOT/IMAGE, or where ROOT holds FILE.zip with the member IMAGE, FILE.zip!MEMBER.

    A zip file's name may be the first folder of IMAGE, as in DenseFusion-1M: 000072/1.png in 000072.zip.

    Raises:
        CimError: where several zip files hold it, or one cannot be read.
    """
    path = os.path.join(root, image)
    if not (members := _zip_members(root)) or os.path.isfile(path):
        return path
    if (place := members.get(image, path)) is None:
        raise CimError(f"{path}: several zip files of that folder hold it; remove one")
    return place


@cache
def _zip_members(root: Path) -> dict[str, str | None]:
    """The place of each member of the zip files in a folder, with and without the zip file's name; None for several."""
    found: dict[str, str | None] = {}
    for path in sorted(root.glob("*.zip")):
        with explained(f"{path}: not a readable zip file", "fetch it again", *DAMAGED):
            members = _open_zip(str(path), os.getpid()).namelist()
        for member in members:
            for name in (member, f"{path.stem}/{member}"):
                found[name] = None if name in found else f"{path}!{member}"
    return found


@lru_cache(maxsize=256)
def _open_zip(path: str, _process: int) -> zipfile.ZipFile:
    """An open zip file; each process has its own, since forked ones would share the position in the file."""
    return zipfile.ZipFile(path)


class ImageFolder:
    """The image files in a folder and its subfolders, hidden ones left out, by name or stem."""

    def __init__(self, folder: Path | str):
        self.folder = Path(folder).expanduser().resolve()
        if not self.folder.is_dir():
            raise CimError(f"{self.folder}: not a folder; set it to the one that holds the images")
        self._paths: dict[str, list[Path]] = defaultdict(list)
        for path in (self.folder / name for name in sorted(glob("**", root_dir=self.folder, recursive=True))):
            if path.suffix.lower() in SUFFIXES and path.is_file():
                self._paths[path.name].append(path)
                self._paths[path.stem].append(path)

    def paths(self, images: Sequence[str]) -> list[Path]:
        """The files of these names.

        Raises:
            CimError: naming the first of those that are missing, or both files if two have a name.
        """
        found = [self._paths.get(Path(image).name) or self._paths.get(Path(image).stem) or [None] for image in images]
        for image, (path, *others) in zip(images, found, strict=True):
            if others:
                raise CimError(f"image '{image}' may be {path} or {others[0]}; set the image folder to one of theirs")
        if missing := [image for image, (path,) in zip(images, found, strict=True) if path is None]:
            count = f"{len(missing)} of {len(images)} images are missing"
            raise CimError(f"{self.folder}: {count}, '{missing[0]}' among them; set the image folder to the right one")
        return [path for (path,) in found]
