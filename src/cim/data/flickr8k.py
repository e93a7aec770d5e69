"""Flickr8k (Hodosh et al. 2013) in its published layout, or one like it.

Images/ or Flicker8k_Dataset/      photos
Flickr8k.token.txt                 lines "IMAGE#i<tab>caption"; or captions.txt, "image,caption" with that header
Flickr_8k.trainImages.txt          names of images, likewise devImages and testImages; all three or none
"""

import csv
import json
from collections.abc import Collection
from pathlib import Path

import pandas as pd

from cim.data import manifest
from cim.errors import CimError
from cim.images import SUFFIXES

LONGEST = 100_000  # characters of a line that are read; csv refuses 131,072
PHOTOS = ("Images", "Flicker8k_Dataset")
LISTINGS = {"Flickr8k.token.txt": {"delimiter": "\t", "quoting": csv.QUOTE_NONE}, "captions.txt": {"delimiter": ","}}


def read(
    folder: Path, images: str | None, pretrain: int = 0, train: int = 0, test: int = 0
) -> tuple[pd.DataFrame, Path]:
    """The photos of `images`, or of FOLDER, with all their captions: the first as `caption`, the others as `queries`.

    The first half of the training images, in the order of their file, which is random, is split pretrain, the second
    train; dev and test are as published, images of no file are split other. Without split files all are split gallery.
    Captions without a photo and photos without a caption are counted and left out.

    Args:
        pretrain, train, test: the first so many images of these splits, `test` for dev too; 0 for all.

    Raises:
        CimError: if there are no captions of photos that are there, or the split files are incomplete or inconsistent.
    """
    default = next((path for name in PHOTOS if (path := folder / name).is_dir()), folder / PHOTOS[0])
    photos = Path(images).expanduser().resolve() if images else default
    captions = read_captions(folder).groupby("image", sort=False)["caption"].agg(list).to_dict()
    splits = _splits(folder, captions, {"pretrain": pretrain, "train": train, "dev": test, "test": test})
    found = [image for image in captions if (photos / image).is_file()]
    if not found:
        raise CimError(f"{photos}: none of the {len(captions)} photos with captions is there; set dataset.images")
    if missing := len(captions) - len(found):
        print(f"dataset: {missing} of {len(captions)} photos are not in {photos}; left out")
    there = {path.name for path in photos.glob("[!.]*") if path.suffix.lower() in SUFFIXES}
    if bare := sorted(there - captions.keys()):
        print(f"dataset: {len(bare)} photos in {photos} have no caption, '{bare[0]}' among them; left out")
    kept = [(image, *captions[image]) for image in found if image in splits]
    return manifest.joined(
        manifest.row(photos / image, first, splits[image], "flickr8k", queries=json.dumps(rest))
        for image, first, *rest in kept
    )


def human_captions(frame: pd.DataFrame) -> list[list[str]]:
    """All captions of each image of a manifest's frame; one where it has no `queries`, which `read` writes."""
    rest = frame["queries"] if "queries" in frame else ["[]"] * len(frame)
    return [[first, *json.loads(others)] for first, others in zip(frame["caption"], rest, strict=True)]


def read_captions(folder: Path) -> pd.DataFrame:
    """Columns image, id ("IMAGE#i", the i-th caption of the image from 0) and caption; damaged lines are left out.

    Raises:
        CimError: if there is no file of captions, or it has another layout or no captions.
    """
    path = next((path for name in LISTINGS if (path := folder / name).is_file()), None)
    if path is None:
        raise CimError(f"{folder}: holds neither {' nor '.join(LISTINGS)}; it should be in Flickr8k's layout")
    lines = path.read_text(encoding="utf-8-sig", errors="replace").split("\n")
    # Line by line, so that a stray quotation mark damages one caption only.
    rows = [next(csv.reader([line[:LONGEST]], **LISTINGS[path.name])) for line in lines if line.strip()]
    cells = [(row[0].strip(), LISTINGS[path.name]["delimiter"].join(row[1:]).strip()) for row in rows]
    if path.name == "captions.txt":
        if cells[:1] != [("image", "caption")]:
            raise CimError(f"{path}: the first line should be 'image,caption'")
        frame = pd.DataFrame(cells[1:], columns=["image", "caption"], dtype=str)
        frame["id"] = frame["image"] + "#" + frame.groupby("image").cumcount().astype(str)
    else:
        frame = pd.DataFrame(cells, columns=["id", "caption"], dtype=str)
        frame["image"] = frame["id"].str.extract(r"(.+)#\d+$", expand=False).fillna("")
    damaged = (frame == "").any(axis=1) | frame["caption"].str.contains("\ufffd") | frame["id"].duplicated()
    if damaged.all():
        raise CimError(f"{path}: holds no captions")
    if damaged.any():
        which = "without image or caption, not UTF-8, or repeated"
        print(f"{path}: {damaged.sum()} of {len(frame)} lines are damaged ({which}); left out")
    return frame.loc[~damaged, ["image", "id", "caption"]].reset_index(drop=True)


def _splits(folder: Path, captioned: Collection[str], limits: dict[str, int]) -> dict[str, str]:
    """The split of each image; images beyond their split's limit are left out."""
    paths = {name: folder / f"Flickr_8k.{name}Images.txt" for name in ("train", "dev", "test")}
    if not any(path.is_file() for path in paths.values()):
        return dict.fromkeys(captioned, "gallery")
    listed: dict[str, Path] = {}
    names: dict[str, list[str]] = {}
    for name, path in paths.items():
        if not path.is_file():
            raise CimError(f"{path}: not found; restore it, or remove the other split files")
        lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
        names[name] = list(dict.fromkeys(filter(None, map(str.strip, lines))))
        if unknown := [image for image in names[name] if image not in captioned]:
            count = f"{len(unknown)} of {len(names[name])} images have no caption"
            raise CimError(f"{path}: {count}, '{unknown[0]}' among them; correct their names or remove them")
        if twice := [image for image in names[name] if image in listed]:
            raise CimError(f"{path}: '{twice[0]}' is in {listed[twice[0]].name} too; remove it from one of them")
        listed |= dict.fromkeys(names[name], path)
    half = len(names["train"]) // 2
    names["pretrain"], names["train"] = names["train"][:half], names["train"][half:]
    splits = {image: "other" for image in captioned if image not in listed}
    for split, limit in limits.items():
        splits |= dict.fromkeys(names[split][: limit or None], split)
    return splits
