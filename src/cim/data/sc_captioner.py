"""SC-Captioner's data: RefinedCaps to train on, COCO-LN500 and DOCCI500 to test on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd

from cim.data import layout
from cim.data.labels import load_labels, sentences_of
from cim.errors import CimError
from cim.images import ImageFolder

BENCHMARKS = ("cocoln500", "docci500")
TRAIN_FILE = "train_coco6k_sft.json"


def read(folder: Path, images: str | None, train: int, test: int, seed: int) -> tuple[pd.DataFrame, Path]:
    """RefinedCaps as split train, each benchmark as a split of its name.

    FOLDER holds train_coco6k_sft.json, test_cocoln500.json and test_docci500.json (LLaMA-Factory's layout) and, where
    the benchmarks are to be evaluated in full, folders cocoln500 and docci500 with their labels. A benchmark without
    its test file and labels is left out. Test rows get their reference's sentences as `queries`, for the correlation
    study.

    Args:
        images: where the images are, found by name; None for FOLDER.
        train: a random choice of so many training images; 0 for all.
        test: the first so many of each benchmark; 0 for all.

    Raises:
        CimError: where a file has another layout, or an image is missing.
    """
    folder = folder.expanduser().resolve()
    there = ImageFolder(images or folder)
    pairs = llama_factory(layout.find_file(folder, TRAIN_FILE))
    if train:
        chosen = np.sort(np.random.default_rng(seed).permutation(len(pairs))[:train])
        pairs = [pairs[i] for i in chosen]
    rows = [
        layout.row(layout.find_image(there, image, TRAIN_FILE), caption, "train", "RefinedCaps")
        for image, caption in pairs
    ]
    for name in BENCHMARKS:
        benchmark = _benchmark(folder, name, there, test)
        if not benchmark:
            print(f"dataset: neither test_{name}.json nor {name}/references.json in {folder}; {name} left out")
        rows += benchmark
    return layout.joined(rows)


def _benchmark(folder: Path, name: str, there: ImageFolder, test: int) -> list[dict]:
    file, labels = next(folder.rglob(f"test_{name}.json"), None), folder / name / "references.json"
    known = load_labels(labels.parent, name) if labels.is_file() else None
    pairs = list(known.references.items()) if known else llama_factory(file) if file else []
    rows = []
    for image, caption in pairs[: test or None]:
        sentences = sentences_of(caption)
        row = layout.row(layout.find_image(there, image, name), caption, name, name)
        row["queries"] = json.dumps(sentences if len(sentences) > 1 else [])
        if known:
            asked = known.questions.get(image, {})
            row["questions"] = json.dumps([{"question": q, "answer": answer} for q, answer in asked.items()])
            if image in known.extra_objects:
                row["extra_objects"] = json.dumps(known.extra_objects[image])
            if image in known.extra_attributes:
                row["extra_attributes"] = json.dumps(known.extra_attributes[image])
        rows.append(row)
    return rows


def llama_factory(path: Path) -> list[tuple[str, str]]:
    """(image, caption) pairs of LLaMA-Factory's JSON.

    An entry is {"conversations": [{"value": prompt}, {"value": caption}], "images": [path]}.

    Raises:
        CimError: naming the entry that has another layout.
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
