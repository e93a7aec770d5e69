"""SC-Captioner's data: RefinedCaps to train on, COCO-LN500 and DOCCI500 to test on."""

import json
from pathlib import Path

import numpy as np
import pandas as pd

from cim.data import manifest
from cim.data.labels import load_labels, sentences_of
from cim.errors import CimError
from cim.files import read_json, valid_text
from cim.images import ImageFolder

BENCHMARKS = ("cocoln500", "docci500")
TRAIN_FILE = "train_coco6k_sft.json"


def read(folder: Path, images: str | None, train: int, test: int, seed: int) -> tuple[pd.DataFrame, Path]:
    """RefinedCaps as split train, each benchmark as a split of its name; images are found by name, default in FOLDER.

    FOLDER holds train_coco6k_sft.json, test_cocoln500.json and test_docci500.json (LLaMA-Factory's layout) and, for a
    full evaluation, folders cocoln500 and docci500 with their labels. A benchmark without its test file and labels is
    left out. Test rows get their reference's `sentences`, for the correlation study.

    Args:
        train: a random choice of so many training images; 0 for all.
        test: the first so many of each benchmark; 0 for all.

    Raises:
        CimError: if a file has another layout, or an image is missing or ambiguous.
    """
    photos = ImageFolder(images or folder)
    captions = llama_factory(manifest.find_file(folder, TRAIN_FILE))
    if train:
        chosen = np.sort(np.random.default_rng(seed).permutation(len(captions))[:train])
        captions = [captions[i] for i in chosen]
    paths = photos.paths([image for image, _ in captions])
    rows = [manifest.row(p, caption, "train", "RefinedCaps") for p, (_, caption) in zip(paths, captions, strict=True)]
    for name in BENCHMARKS:
        rows += _benchmark(folder, name, photos, test)
    return manifest.joined(rows)


def _benchmark(folder: Path, name: str, photos: ImageFolder, test: int) -> list[dict]:
    file, labels = next(folder.rglob(f"test_{name}.json"), None), folder / name / "references.json"
    known = load_labels(labels.parent, name) if labels.is_file() else None
    if not known and not file:
        print(f"dataset: neither test_{name}.json nor {name}/references.json in {folder}; {name} left out")
        return []
    captions = (list(known.references.items()) if known else llama_factory(file))[: test or None]
    rows = []
    for path, (image, caption) in zip(photos.paths([image for image, _ in captions]), captions, strict=True):
        sentences = sentences_of(caption)
        more = {"sentences": sentences if len(sentences) > 1 else []}
        if known:
            asked = known.questions.get(image, {})
            more["questions"] = [{"question": question, "answer": answer} for question, answer in asked.items()]
            extended = {"extra_objects": known.extra_objects, "extra_attributes": known.extra_attributes}
            more |= {column: of[image] for column, of in extended.items() if image in of}
        rows.append(manifest.row(path, caption, name, name, **{k: json.dumps(value) for k, value in more.items()}))
    return rows


def llama_factory(path: Path) -> list[tuple[str, str]]:
    """(image, caption) pairs of LLaMA-Factory's JSON.

    An entry is {"conversations": [{"value": prompt}, {"value": caption}], "images": [path]}; a CimError names the
    first one in another layout.
    """
    entries, pairs = read_json(path), []
    for number, entry in enumerate(entries if isinstance(entries, list) else [entries]):
        match entry:
            case {"conversations": [_, {"value": str(caption)}, *_], "images": [str(image)]}:
                pairs.append((valid_text(image), valid_text(caption.strip())))
            case _:
                raise CimError(
                    f"{path}: entry {number} should hold a prompt and a caption as conversations, and one image"
                )
    if not pairs:
        raise CimError(f"{path}: holds no captions")
    return pairs
