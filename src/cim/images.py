"""Opening images, wherever they are stored, and finding them by name."""

import io
import os
import tarfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from cim.errors import CimError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def open_image(source: Path | str | BinaryIO, name: str = "") -> Image.Image:
    """The image as RGB, fully decoded.

    Args:
        name: the name of an open file in errors.

    Raises:
        CimError: if the file is missing or cannot be decoded.
    """
    try:
        with Image.open(source) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise CimError(f"{name or source}: image not found; restore the file or correct the manifest") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise CimError(f"{name or source}: unreadable image ({error}); replace or remove it") from None


def open_stored(image: str) -> Image.Image:
    """Open an image by its path in a gallery: a file, or FILE!MEMBER within a tar file.

    Raises:
        CimError: where it cannot be read, or is within a Parquet file, which gives no access to single images.
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


class ImageFolder:
    """The image files in a folder and its subfolders, hidden ones left out, by name or stem."""

    def __init__(self, folder: Path | str):
        self.folder = Path(folder).expanduser().resolve()
        if not self.folder.is_dir():
            raise CimError(f"{self.folder}: not a folder; set it to the one that holds the images")
        self._paths: dict[str, list[Path]] = defaultdict(list)
        for root, folders, names in os.walk(self.folder, followlinks=True):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for path in (Path(root, name) for name in sorted(names) if not name.startswith(".")):
                if path.suffix.lower() in SUFFIXES:
                    self._paths[path.name].append(path)
                    self._paths[path.stem].append(path)

    def find(self, image: str) -> Path | None:
        """The file of this name, or None; a CimError that names both if two files have it."""
        name = Path(image).name
        found = self._paths.get(name) or self._paths.get(Path(name).stem) or [None]
        if len(found) > 1:
            raise CimError(f"image '{image}' may be {found[0]} or {found[1]}; set the image folder to one of theirs")
        return found[0]

    def paths(self, images: Sequence[str]) -> list[Path]:
        """The files of these names; a CimError that names the first if any is missing."""
        found = [self.find(image) for image in images]
        if missing := [image for image, path in zip(images, found, strict=True) if path is None]:
            count = f"{len(missing)} of {len(images)} images are missing"
            raise CimError(f"{self.folder}: {count}, '{missing[0]}' among them; set the image folder to the right one")
        return found
