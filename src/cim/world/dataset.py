"""The small world's images: scenes drawn, captioned in full and, in the test split, asked about."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from cim.world.graphs import extended_lists
from cim.world.language import ask, describe
from cim.world.render import paint
from cim.world.scenes import compose_splits


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
