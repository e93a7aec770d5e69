"""The small world's images: scenes drawn from OpenMoji's art, captioned in full and, in the test split, asked about."""

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw, ImageOps
from tqdm import tqdm

from cim.files import explained
from cim.world.language import ask, describe
from cim.world.scenes import Scene, compose_splits
from cim.world.vocabulary import BACKGROUND, COLOURS, generalisations

SCENE_PIXELS = 112
CELL_PIXELS = SCENE_PIXELS // 2
OBJECT_PIXELS = {"small": 32, "large": 52}
# background -> (sky, ground, specks)
BACKDROPS = {
    "meadow": ("#cfe8ff", "#a9d88e", "#f4f7c1"),
    "beach": ("#a8def0", "#f0dfae", "#d9c27f"),
    "night": ("#3d4470", "#565c86", "#e8e6a8"),
    "snow": ("#dfe3e8", "#ffffff", "#c3ccd6"),
}


def draw_dataset(drawings: Path, out: Path, seed: int, **splits) -> pd.DataFrame:
    """Draw the scenes of compose_splits(**splits) to OUT/images, from the folder of the objects' drawings.

    Returns:
        A manifest's columns, with scene, questions, extra_objects and extra_attributes as JSON.
    """
    rng = np.random.default_rng(seed)
    placed = compose_splits(rng, **splits)
    questions = iter(ask([scene for scene, split, _ in placed if split == "test"], rng))
    (out / "images").mkdir()
    rows = []
    for i, (scene, split, template) in enumerate(tqdm(placed, desc="drawing scenes", mininterval=2)):
        image_id = f"{split}-{i:06d}"
        image = f"images/{image_id}.png"
        paint(drawings, scene, rng).save(out / image, compress_level=1)  # fast, since the files are many and small
        known = map(json.dumps, (next(questions), *extended_lists(scene))) if split == "test" else [None] * 3
        row = (image_id, image, describe(scene, rng), split, "openmoji-world", template, scene.to_json(), *known)
        rows.append(row)
    given = ("image_id", "image", "caption", "split", "source", "template", "scene")
    return pd.DataFrame(rows, columns=[*given, "questions", "extra_objects", "extra_attributes"])


def extended_lists(scene: Scene) -> tuple[list[str], Mapping[str, list[str]]]:
    """All true objects of a scene, by every noun, and the attributes of each noun."""
    attributes: dict[str, list[str]] = {BACKGROUND: [scene.background]}
    for o in scene.objects:
        for noun in generalisations(o.name):
            known = attributes.setdefault(noun, [])
            known += [word for word in (o.colour, o.size) if word not in known]
    return list(attributes), attributes


def paint(drawings: Path, scene: Scene, rng: np.random.Generator) -> Image.Image:
    """Draw the scene, 112 x 112 RGB; `rng` jitters the tilt of each object and its place in its cell."""
    canvas = _backdrop(scene.background, rng)
    for o in scene.objects:
        sprite = _sprite(drawings, o.name, o.colour, o.size)
        sprite = sprite.rotate(float(rng.uniform(-8, 8)), Image.Resampling.BILINEAR)
        row, column = o.cell
        x, y = (k * CELL_PIXELS + int(rng.integers(0, CELL_PIXELS - sprite.width + 1)) for k in (column, row))
        canvas.paste(sprite, (x, y), sprite)
    return canvas


@cache
def _sprite(drawings: Path, name: str, colour: str, size: str) -> Image.Image:
    """A drawing, tinted and scaled."""
    path = drawings / f"{name}.png"
    with explained(f"{path}: cannot be read", "run 'cim data' to draw it again", OSError):
        art = Image.open(path).convert("RGBA")
    shadow, mid, highlight = COLOURS[colour]
    tinted = ImageOps.colorize(ImageOps.autocontrast(art.convert("L")), shadow, highlight, mid).convert("RGBA")
    tinted.putalpha(art.getchannel("A"))
    return tinted.resize((OBJECT_PIXELS[size],) * 2, Image.Resampling.LANCZOS)


def _backdrop(name: str, rng: np.random.Generator) -> Image.Image:
    """A sky over ground, the horizon and a few specks placed by `rng`."""
    sky, ground, speck = BACKDROPS[name]
    canvas = Image.new("RGB", (SCENE_PIXELS, SCENE_PIXELS), sky)
    draw = ImageDraw.Draw(canvas)
    draw.rectangle((0, int(rng.integers(45, 68)), SCENE_PIXELS, SCENE_PIXELS), fill=ground)
    for x, y in rng.integers(0, SCENE_PIXELS - 2, size=(14, 2)).tolist():
        draw.rectangle((x, y, x + 1, y + 1), fill=speck)
    return canvas
