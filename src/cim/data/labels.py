"""Benchmarks' labels and anybody's captions, read with care: what is wrong is reported, the rest is scored."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cim.data.manifest import Manifest
from cim.errors import CimError

LONGEST = 20_000  # characters of a caption that are read; a reference has some 800 at most


@dataclass(frozen=True)
class Labels:
    """A benchmark's labels, by image.

    Attributes:
        questions: question to answer, as the file has it (Yes, No, and a handful of others).
        extra_objects: what else is in the image; empty where the benchmark has no such list.
        extra_attributes: everything true of each object, likewise.
    """

    name: str
    references: Mapping[str, str]
    questions: Mapping[str, Mapping[str, str]]
    extra_objects: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    extra_attributes: Mapping[str, Mapping[str, tuple[str, ...]]] = field(default_factory=dict)


def labels_of(manifest: Manifest, name: str) -> Labels:
    """The labels that a manifest's rows carry: captions as references, and what else its columns know."""
    frame = manifest.frame
    ids = frame["image_id"].tolist()

    def column(key: str) -> dict[str, Any]:
        if key not in frame:
            return {}
        return {i: json.loads(text) for i, text in zip(ids, frame[key], strict=True) if isinstance(text, str)}

    asked = {i: {q["question"]: q["answer"] for q in questions} for i, questions in column("questions").items()}
    objects = {i: tuple(words) for i, words in column("extra_objects").items()}
    attributes = {i: {o: tuple(w) for o, w in of.items()} for i, of in column("extra_attributes").items()}
    return Labels(name, dict(zip(ids, manifest.captions, strict=True)), asked, objects, attributes)


@dataclass(frozen=True)
class Problem:
    """One thing in a captions file that could not be taken as it is, and what was done about it."""

    image: str
    what: str


def load_labels(folder: Path, name: str = "") -> Labels:
    """Labels in SC-Captioner's layout: references.json, questions.json, and where there are any extra_objects.jsonl and
    extra_attributes.json.

    Raises:
        CimError: where a file is missing or has another layout.
    """
    folder = Path(folder)
    references = _read_json(folder / "references.json")
    if not all(isinstance(text, str) for text in references.values()):
        raise CimError(f"{folder / 'references.json'}: should be {{image: caption}}")
    questions = _read_json(folder / "questions.json") if (folder / "questions.json").is_file() else {}
    objects: dict[str, tuple[str, ...]] = {}
    if (path := folder / "extra_objects.jsonl").is_file():
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                objects |= {image: tuple(words) for image, words in json.loads(line).items()}
            except (ValueError, AttributeError, TypeError) as error:
                raise CimError(f"{path}:{number}: should be {{image: [objects]}} ({error})") from None
    attributes = {}
    if (path := folder / "extra_attributes.json").is_file():
        attributes = {
            image: {name: tuple(words) for name, words in of.items()} for image, of in _read_json(path).items()
        }
    return Labels(name or folder.name, references, questions, objects, attributes)


def read_captions(path: Path, known: Mapping[str, object]) -> tuple[dict[str, str], list[Problem]]:
    """A JSON of {image: caption}, and everything in it that is not as it should be.

    An image is known by its id, with or without a file's folder and suffix. Of repeated images the last one counts.
    Images without a caption get an empty one, as silence is what they got; unknown images are left out.

    Raises:
        CimError: where the file cannot be read at all, or holds a caption of no known image.
    """
    pairs: list[tuple[str, object]] = []

    def keep_pairs(found: list[tuple[str, object]]) -> dict:
        # Called from the inside out: what it saw last are the pairs of the whole, repeated keys among them.
        pairs[:] = found
        return dict(found)

    content = _text(path)
    try:
        top = json.loads(content, object_pairs_hook=keep_pairs)
    except ValueError as error:
        raise CimError(f"{path}: not JSON ({error})") from None
    except RecursionError:
        raise CimError(f"{path}: nested too deeply; should be {{image: caption}}") from None
    if not isinstance(top, dict):
        raise CimError(f"{path}: should be {{image: caption}}, not a {type(top).__name__}")
    captions: dict[str, str] = {}
    problems = []
    for name, value in pairs:
        image = name if name in known else Path(name).stem
        if image not in known:
            problems.append(Problem(name, "no such image in the benchmark; left out"))
            continue
        if image in captions:
            problems.append(Problem(image, "occurs more than once; the last one counts"))
        if not isinstance(value, str):
            problems.append(Problem(image, f"caption is a {type(value).__name__}, not text; scored as empty"))
            value = ""
        elif not value.strip():
            problems.append(Problem(image, "caption is empty"))
        elif len(value) > LONGEST:
            problems.append(Problem(image, f"caption has {len(value):,} characters; only {LONGEST:,} are read"))
            value = value[:LONGEST]
        captions[image] = value
    if not captions:
        raise CimError(f"{path}: no caption of an image of the benchmark; ids are such as '{next(iter(known))}'")
    for image in known:
        if image not in captions:
            problems.append(Problem(image, "no caption; scored as empty"))
            captions[image] = ""
    return captions, problems


def _text(path: Path) -> str:
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise CimError(f"{path}: cannot be read ({error.strerror})") from None
    for start, encoding in ((b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"), (b"", "utf-8-sig")):
        if content.startswith(start):
            try:
                return content.decode(encoding)
            except UnicodeDecodeError as error:
                raise CimError(
                    f"{path}: not {encoding} ({error.reason} at byte {error.start}); save it as UTF-8"
                ) from None
    raise AssertionError("every content starts with nothing")


def _read_json(path: Path) -> dict:
    try:
        value = json.loads(_text(path))
    except ValueError as error:
        raise CimError(f"{path}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise CimError(f"{path}: should be a JSON object by image")
    return value


def sentences_of(caption: str) -> list[str]:
    """The sentences of a caption, split after . ! ? and at line ends."""
    return [part.strip() for part in re.split(r"(?<=[.!?])\s+|\n+", caption) if part.strip()]
