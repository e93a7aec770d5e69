"""Published data sets in their own layouts, each made one manifest of: images stay where they are."""

from __future__ import annotations

import csv
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from cim.capture.labels import load_labels
from cim.capture.parsers import sentences_of
from cim.errors import CimError
from cim.manifest import COLUMNS, EXTENDED, write_manifest
from cim.sources import IMAGE_SUFFIXES

if TYPE_CHECKING:
    from cim.dataset import DatasetSettings

BENCHMARKS = ("cocoln500", "docci500")
TRAIN_FILE = "train_coco6k_sft.json"


def flickr8k(settings: DatasetSettings, out: Path) -> None:
    """Flickr8k's own layout: Images/ and captions.txt with the header "image,caption".

    The first caption of each photo is its gallery caption; the others are kept as a JSON list in an
    extra column, `queries`, for the correlation study.
    """
    folder = Path(settings.folder).expanduser().resolve()
    listing = folder / "captions.txt"
    if not listing.is_file():
        raise CimError(f"{listing}: not found; DATA should be a folder in Flickr8k's layout (Images/, captions.txt)")
    captions: dict[str, list[str]] = {}
    with listing.open(newline="", encoding="utf-8") as lines:
        reader = csv.reader(lines)
        if next(reader, None) != ["image", "caption"]:
            raise CimError(f"{listing}: the first line should be 'image,caption'")
        for number, row in enumerate(reader, start=2):
            if not row:
                continue
            if len(row) < 2 or not row[0].strip():
                raise CimError(f"{listing}: line {number} should be 'image,caption'")
            if caption := ",".join(row[1:]).strip():
                captions.setdefault(row[0].strip(), []).append(caption)
    there = {image: texts for image, texts in captions.items() if (folder / "Images" / image).is_file()}
    if not there:
        raise CimError(f"{folder / 'Images'}: none of the {len(captions)} photos that {listing.name} names is there")
    if len(there) < len(captions):
        print(
            f"dataset: {len(captions) - len(there)} of {len(captions)} photos are not in {folder / 'Images'}; left out"
        )
    rows = [
        (Path(image).stem, f"Images/{image}", texts[0], "gallery", "flickr8k", -1, None, None, json.dumps(texts[1:]))
        for image, texts in there.items()
    ]
    write_manifest(pd.DataFrame(rows, columns=[*COLUMNS, "queries"]), out / "manifest.parquet", image_root=folder)


def sc_captioner(settings: DatasetSettings, out: Path) -> None:
    """SC-Captioner's data: RefinedCaps as split train, COCO-LN500 and DOCCI500 as splits of their names.

    FOLDER holds train_coco6k_sft.json, test_cocoln500.json and test_docci500.json (LLaMA-Factory's layout) and, where
    the benchmarks are to be judged in full, folders cocoln500 and docci500 with their labels. A benchmark without its
    test file and labels is passed over. Images are found by name anywhere in `settings.images`, or in FOLDER.
    Test rows get their reference's sentences as `queries`, for the correlation study.
    """
    folder = Path(settings.folder).expanduser().resolve()
    there = images_by_name(settings.images or folder)
    train = llama_factory(_somewhere(folder, TRAIN_FILE))
    if settings.train:
        chosen = np.sort(np.random.default_rng(settings.seed).permutation(len(train))[: settings.train])
        train = [train[i] for i in chosen]
    rows = [_row(_found(there, image, TRAIN_FILE), caption, "train", "RefinedCaps") for image, caption in train]
    for name in BENCHMARKS:
        test, labels = folder.rglob(f"test_{name}.json"), folder / name / "references.json"
        known = load_labels(labels.parent, name) if labels.is_file() else None
        pairs = list(known.references.items()) if known else []
        if known is None and (path := next(test, None)) is not None:
            pairs = llama_factory(path)
        if settings.test:
            pairs = pairs[: settings.test]
        for image, caption in pairs:
            path = _found(there, image, name)
            sentences = sentences_of(caption)
            row = _row(path, caption, name, name) | {"queries": json.dumps(sentences) if len(sentences) > 1 else "[]"}
            if known:
                asked = known.questions.get(image, {})
                row["questions"] = json.dumps([{"question": q, "answer": answer} for q, answer in asked.items()])
                if image in known.extra_objects:
                    row["extra_objects"] = json.dumps(known.extra_objects[image])
                if image in known.extra_attributes:
                    row["extra_attributes"] = json.dumps(known.extra_attributes[image])
            rows.append(row)
        if not pairs:
            print(f"dataset: neither test_{name}.json nor {name}/references.json in {folder}; {name} left out")
    _write(rows, out)


def llama_factory(path: Path) -> list[tuple[str, str]]:
    """(image, caption) of LLaMA-Factory's JSON: [{"conversations": [{"value": prompt}, {"value": caption}], "images":
    [path]}, ...].

    Raises:
        CimError: naming the entry that is otherwise.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CimError(f"{path}: not JSON ({error})") from None
    pairs = []
    for number, entry in enumerate(entries if isinstance(entries, list) else [entries]):
        try:
            caption, (image,) = entry["conversations"][1]["value"], entry["images"]
        except (KeyError, IndexError, TypeError, ValueError):
            caption = image = None
        if not isinstance(caption, str) or not isinstance(image, str):
            raise CimError(f"{path}: entry {number} should hold a prompt and a caption as conversations, and one image")
        pairs.append((image, caption.strip()))
    if not pairs:
        raise CimError(f"{path}: holds no captions")
    return pairs


def oxford_pet(settings: DatasetSettings, out: Path) -> None:
    """The Oxford-IIIT Pet data set: images/, annotations/list.txt. Splits gallery and test alternate within a breed.

    Captions name the breed. `ladders` grades captions of an image from "an animal" to the breed (fineness), and from
    the other species over another breed to the right one (accuracy): the paper's motivation study.
    """
    folder = Path(settings.folder).expanduser().resolve()
    listing = _somewhere(folder, "list.txt")
    there = images_by_name(settings.images or folder)
    pets = []
    for line in listing.read_text(encoding="utf-8").splitlines():
        if line.startswith("#") or not line.strip():
            continue
        try:
            image, _, species, _ = line.split()
            breed = re.sub(r"_\d+$", "", image).replace("_", " ")
            pets.append((image, breed, {"1": "cat", "2": "dog"}[species]))
        except (ValueError, KeyError):
            raise CimError(f"{listing}: should be lines of 'image class species breed', not {line!r}") from None
    breeds = {s: sorted({b for _, b, of in pets if of == s}) for s in ("cat", "dog")}
    rng = np.random.default_rng(settings.seed)
    rows, seen = [], dict[str, int]()
    for image, breed, species in pets:
        seen[breed] = seen.get(breed, -1) + 1
        others = [b for b in breeds[species] if b != breed] or [breed]
        wrong, foreign = others[int(rng.integers(len(others)))], {"cat": "dog", "dog": "cat"}[species]
        named, mistaken = (f"a photo of {_with_article(b)} {species}." for b in (breed, wrong))
        ladders = {
            "fineness": ["a photo of an animal.", f"a photo of a {species}.", named],
            "accuracy": [f"a photo of a {foreign}.", mistaken, named],
        }
        split = "test" if seen[breed] % 2 else "gallery"
        row = _row(_found(there, image, listing.name), ladders["fineness"][-1], split, "Oxford-IIIT Pet")
        rows.append(row | {"ladders": json.dumps(ladders)})
    _write(rows, out)


def _with_article(noun: str) -> str:
    return f"{'an' if noun[0].lower() in 'aeiou' else 'a'} {noun}"


def images_by_name(folder: Path | str) -> dict[str, Path]:
    """Every image file in a folder, by name with and without suffix.

    Raises:
        CimError: where the folder is not there.
    """
    folder = Path(folder).expanduser().resolve()
    if not folder.is_dir():
        raise CimError(f"{folder}: not a folder; name the one that holds the images")
    there: dict[str, Path] = {}
    for root, _, names in os.walk(folder, followlinks=True):
        for name in sorted(names):
            if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith("."):
                path = Path(root, name)
                there.setdefault(path.name, path)
                there.setdefault(path.stem, path)
    return there


def _found(there: dict[str, Path], image: str, where: str) -> Path:
    path = there.get(Path(image).name) or there.get(Path(image).stem)
    if path is None:
        raise CimError(f"{where}: image '{image}' is not there; name the folder that holds it with dataset.images")
    return path


def _somewhere(folder: Path, name: str) -> Path:
    found = sorted(folder.rglob(name)) if folder.is_dir() else []
    if not found:
        raise CimError(f"{folder / name}: not found; 'cim download' fetches it, or name the folder with dataset.folder")
    return found[0]


def _row(path: Path, caption: str, split: str, source: str) -> dict:
    return {"image_id": path.stem, "image": path, "caption": caption, "split": split, "source": source, "template": -1}


def _write(rows: list[dict], out: Path) -> None:
    """Write the manifest; an image of two splits keeps the later one, so that no test image is trained on."""
    frame = pd.DataFrame(rows).reindex(columns=[*COLUMNS, *EXTENDED, "queries", "ladders"])
    frame = frame[[c for c in frame if c in COLUMNS or frame[c].notna().any()]]
    if (twice := frame["image_id"].duplicated(keep="last")).any():
        print(f"dataset: {int(twice.sum())} images of more than one split or entry; the last one counts")
        frame = frame[~twice]
    root = Path(os.path.commonpath([path.parent for path in frame["image"]]))
    frame["image"] = [path.relative_to(root).as_posix() for path in frame["image"]]
    write_manifest(frame.reset_index(drop=True), out / "manifest.parquet", image_root=root)
    counts = frame["split"].value_counts()
    print("dataset: " + ", ".join(f"{count:,} images in split {split}" for split, count in counts.items()))
