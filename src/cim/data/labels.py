"""Labels of benchmarks, and user captions of their images: invalid entries are reported, the rest is scored."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import TypeAdapter, ValidationError

from cim.data.flickr8k import human_captions
from cim.data.manifest import Manifest
from cim.errors import CimError
from cim.files import explained, read_text, valid_text

LONGEST = 20_000  # characters of a caption that are read; the longest reference has about 800

Questions = dict[str, str]
Objects = tuple[str, ...]
Attributes = dict[str, Objects]


@dataclass(frozen=True)
class Labels:
    """Labels of a benchmark, by image.

    Attributes:
        questions: question to answer, as in the file (Yes, No, and a few others).
        extra_objects: further objects of the image; empty where the benchmark has no such list.
        extra_attributes: all true attributes of each object, likewise.
    """

    name: str
    references: Mapping[str, str]
    questions: Mapping[str, Questions]
    extra_objects: Mapping[str, Objects] = field(default_factory=dict)
    extra_attributes: Mapping[str, Attributes] = field(default_factory=dict)


class Problem(NamedTuple):
    """An invalid entry of a captions file, and how it is scored."""

    image: str
    what: str


def labels_of(manifest: Manifest, name: str) -> Labels:
    """The labels in a manifest: its captions, in lines of one text where an image has several (CAPTURE's public code
    averages scores over references instead), questions and extended lists."""
    frame = manifest.frame.set_index("image_id")
    references = map("\n".join, human_captions(frame))

    def column(key: str, values: type) -> dict[str, Any]:
        read, cells = TypeAdapter(values).validate_json, frame[key].items() if key in frame else ()
        return {image: read(text) for image, text in cells if isinstance(text, str)}

    asked = column("questions", list[dict[str, str]])
    questions = {image: {row["question"]: row["answer"] for row in rows} for image, rows in asked.items()}
    objects, attributes = column("extra_objects", Objects), column("extra_attributes", Attributes)
    return Labels(name, dict(zip(frame.index, references, strict=True)), questions, objects, attributes)


def load_labels(folder: Path, name: str = "") -> Labels:
    """Labels in SC-Captioner's layout: references.json and, where they exist, questions.json, extra_objects.jsonl and
    extra_attributes.json.

    Raises:
        CimError: where references.json is missing, a file has another layout, or questions name another image.
    """
    folder = Path(folder)

    def read(file: str, values: type, layout: str, required: bool = False) -> dict[str, Any]:
        path, found = folder / file, {}
        if required or path.is_file():
            text = read_text(path)
            for number, part in enumerate(text.split("\n") if path.suffix == ".jsonl" else [text], 1):
                try:
                    found |= TypeAdapter(dict[str, values]).validate_json(part.strip() or "{}")
                except ValidationError as error:
                    where = f"{path}:{number}" if path.suffix == ".jsonl" else path
                    raise CimError(f"{where}: should be {layout} ({error.errors()[0]['msg']})") from None
        return found

    references = read("references.json", str, "{image: caption}", required=True)
    questions = read("questions.json", Questions, "{image: {question: answer}}")
    if not references:
        raise CimError(f"{folder / 'references.json'}: holds no captions")
    if unknown := questions.keys() - references.keys():
        raise CimError(f"{folder / 'questions.json'}: image '{min(unknown)}' is not in references.json")
    objects = read("extra_objects.jsonl", Objects, "{image: [object, ...]}")
    attributes = read("extra_attributes.json", Attributes, "{image: {object: [attribute, ...]}}")
    return Labels(name or folder.name, references, questions, objects, attributes)


def read_captions(path: Path, known: Mapping[str, object]) -> tuple[dict[str, str], list[Problem]]:
    """The captions of all known images from JSON of {image: caption}, and its invalid entries.

    An image is found by its id, with or without a file's folder and suffix. The last caption of an image counts. Images
    without a caption get an empty one; unknown images are left out.

    Raises:
        CimError: where the file cannot be read, or has no caption of a known image.
    """
    with explained(f"{path}: not JSON", "write {image: caption}", ValueError, RecursionError):
        pairs = json.loads(read_text(path), object_pairs_hook=tuple)  # a dict would hide repeated keys
    if not isinstance(pairs, tuple):
        raise CimError(f"{path}: should be {{image: caption}}, not a {type(pairs).__name__}")
    captions: dict[str, str] = {}
    problems = []
    for name, value in pairs:
        name = valid_text(name)
        image = next((form for form in (name, Path(name).name, Path(name).stem) if form in known), None)
        if image is None:
            problems.append(Problem(name, "no such image in the benchmark; left out"))
            continue
        if image in captions:
            problems.append(Problem(image, "occurs more than once; the last one counts"))
        if not isinstance(value, str):
            problems.append(Problem(image, "caption is not text; scored as empty"))
            value = ""
        elif not value.strip():
            problems.append(Problem(image, "caption is empty"))
        elif len(value) > LONGEST:
            problems.append(Problem(image, f"caption has {len(value):,} characters; only {LONGEST:,} are read"))
        if value != (value := valid_text(value)):
            problems.append(Problem(image, "caption holds invalid characters, such as half an emoji; read as U+FFFD"))
        captions[image] = value[:LONGEST]
    if not captions:
        raise CimError(f"{path}: no caption of an image of the benchmark; its ids look like '{next(iter(known))}'")
    missing = [image for image in known if image not in captions]
    problems += [Problem(image, "no caption; scored as empty") for image in missing]
    return captions | dict.fromkeys(missing, ""), problems


def sentences_of(caption: str) -> list[str]:
    """The sentences of a caption, split after . ! ? and at line ends."""
    return [part.strip() for part in re.split(r"(?<=[.!?])\s+|\n+", caption) if part.strip()]
