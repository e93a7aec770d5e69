"""Opening images, and finding them by name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError

from cim.errors import CimError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def open_image(source: Path | str | BinaryIO, name: str = "") -> Image.Image:
    """The image as RGB, fully decoded.

    Args:
        source: a path or an open file.
        name: what to call it in an error, where it is not a path.

    Raises:
        CimError: naming the file, where it is missing or cannot be decoded.
    """
    name = name or source
    try:
        with Image.open(source) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise CimError(f"{name}: image not found; restore the file or correct the manifest") from None
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise CimError(f"{name}: unreadable image ({error}); replace it or remove it from the data set") from None


class ImageFolder:
    """The image files in a folder and its subfolders, found by name, with or without suffix.

    Raises:
        CimError: where the folder is missing.
    """

    def __init__(self, folder: Path | str):
        self.folder = Path(folder).expanduser().resolve()
        if not self.folder.is_dir():
            raise CimError(f"{self.folder}: not a folder; name the one that holds the images")
        self._by_name: dict[str, list[Path]] = {}
        self._by_stem: dict[str, list[Path]] = {}
        for root, folders, names in os.walk(self.folder, followlinks=True):
            folders.sort()
            for name in sorted(names):
                if name.lower().endswith(SUFFIXES) and not name.startswith("."):
                    path = Path(root, name)
                    self._by_name.setdefault(path.name, []).append(path)
                    self._by_stem.setdefault(path.stem, []).append(path)

    def find(self, image: str) -> Path | None:
        """The file of this name; None where there is none.

        Raises:
            CimError: naming both files, where two have this name.
        """
        name = Path(image).name
        found = self._by_name.get(name) or self._by_stem.get(name) or self._by_stem.get(Path(name).stem) or []
        if len(found) > 1:
            raise CimError(
                f"image '{image}' may be {found[0]} or {found[1]}; name a folder that holds only one of them"
            )
        return found[0] if found else None
