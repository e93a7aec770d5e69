"""Captions of known quality for scenes: of rising detail, and of rising accuracy."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from cim.world.language import FULL, Detail, corrupt, describe
from cim.world.scenes import Scene
from cim.world.scoring import graph_f1, score_captions

# From "there is an animal" to the full caption: what each grade keeps, each in addition to the one before.
FINENESS = {
    "kinds": Detail(name=0, family=0, colour=0, size=0, relation=0, background=0),
    "families": Detail(name=0, colour=0, size=0, relation=0, background=0),
    "names": Detail(colour=0, size=0, relation=0, background=0),
    "+ colours": Detail(size=0, relation=0, background=0),
    "+ sizes, background": Detail(relation=0),
    "+ relations": FULL,
}
MOST_ERRORS = 4


def graded_captions(image_ids: Sequence[str], scenes: Sequence[str], rng: np.random.Generator) -> pd.DataFrame:
    """Captions of every grade for each scene, given as JSON.

    Returns:
        Columns image_id, ladder ("fineness" or "accuracy"), level (higher is better), label, caption and quality,
        the F1 of the facts that the caption states.
    """
    rows = []
    for image_id, text in zip(image_ids, scenes, strict=True):
        scene = Scene.from_json(text)
        for level, (label, detail) in enumerate(FINENESS.items()):
            rows.append((image_id, "fineness", level, label, describe(scene, rng, detail), text))
        for errors in range(MOST_ERRORS + 1):
            caption = describe(corrupt(scene, rng, errors), rng)
            rows.append((image_id, "accuracy", MOST_ERRORS - errors, f"{errors} errors", caption, text))
    table = pd.DataFrame(rows, columns=["image_id", "ladder", "level", "label", "caption", "scene"])
    return table.assign(quality=quality(table["caption"].tolist(), table.pop("scene")))


def quality(captions: list[str], scenes: Sequence[str]) -> np.ndarray:
    """(n,) F1 of all facts of each caption, given its scene graph as JSON."""
    return graph_f1(score_captions(captions, [Scene.from_json(s) for s in scenes], [[]] * len(captions)))
