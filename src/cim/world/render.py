"""Drawing scenes from the rendered OpenMoji art."""

from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from cim.files import explained
from cim.world.scenes import Scene
from cim.world.vocabulary import COLOURS

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
