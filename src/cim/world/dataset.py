"""The small world's images: scenes drawn, captioned in full and, in the test split, asked about."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from cim.world.graphs import extended_lists
from cim.world.language import describe
from cim.world.questions import ask
from cim.world.render import Painter, png_bytes
from cim.world.scenes import compose_splits


def draw_dataset(sprites: Path, out: Path, seed: int, **splits) -> pd.DataFrame:
    """Draw every scene to OUT/images.

    Args:
        sprites: the folder of the objects' drawings.
        splits: as cim.world.scenes.compose_splits takes them.

    Returns:
        A manifest's columns, with scene, questions, extra_objects and extra_attributes as JSON.
    """
    rng = np.random.default_rng(seed)
    placed = compose_splits(rng, **splits)
    questions = iter(ask([p.scene for p in placed if p.split == "test"], rng))
    painter = Painter(sprites)
    (out / "images").mkdir()
    rows = []
    for i, p in enumerate(tqdm(placed, desc="drawing scenes", mininterval=2)):
        name = f"images/{p.split}-{i:06d}.png"
        (out / name).write_bytes(png_bytes(painter.paint(p.scene, rng)))
        row = {
            "image_id": f"{p.split}-{i:06d}",
            "image": name,
            "caption": describe(p.scene, rng),
            "split": p.split,
            "source": "openmoji-world",
            "template": p.template,
            "scene": p.scene.to_json(),
            "questions": None,
            "extra_objects": None,
            "extra_attributes": None,
        }
        if p.split == "test":
            row["questions"] = json.dumps(next(questions))
            row["extra_objects"], row["extra_attributes"] = map(json.dumps, extended_lists(p.scene))
        rows.append(row)
    return pd.DataFrame(rows)
