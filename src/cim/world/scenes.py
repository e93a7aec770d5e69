"""Scene graphs: what is in an image of the small world, and how sets of scenes are drawn."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from itertools import combinations, product

import numpy as np

from cim.world.vocabulary import BACKGROUNDS, COLOURS, FAMILIES, SIZES

CELLS = ((0, 0), (0, 1), (1, 0), (1, 1))  # (row, column) in reading order


@dataclass(frozen=True)
class SceneObject:
    """One object: what it is, how it looks, and the cell of the 2 x 2 layout it sits in."""

    name: str
    colour: str
    size: str
    cell: tuple[int, int]


@dataclass(frozen=True)
class Scene:
    """Objects in reading order, no two of one family, before one background."""

    objects: tuple[SceneObject, ...]
    background: str

    def relations(self) -> list[tuple[str, str, str]]:
        """(subject, relation, object) for each pair, the subject first in reading order."""
        return [(a.name, relation_between(a.cell, b.cell), b.name) for a, b in combinations(self.objects, 2)]

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @staticmethod
    def from_json(text: str) -> Scene:
        raw = json.loads(text)
        objects = (SceneObject(**{**o, "cell": tuple(o["cell"])}) for o in raw["objects"])
        return Scene(tuple(objects), raw["background"])


def relation_between(a: tuple[int, int], b: tuple[int, int]) -> str:
    """How the thing in cell `a` stands to the thing in cell `b`, `a` first in reading order."""
    rows, columns = b[0] - a[0], b[1] - a[1]
    if rows == 0:
        return "left of"
    if columns == 0:
        return "above"
    return "above left of" if columns > 0 else "above right of"


def random_scene(rng: np.random.Generator, objects: tuple[int, int] = (2, 3)) -> Scene:
    """From objects[0] to objects[1] objects of different families in different cells."""
    count = int(rng.integers(objects[0], objects[1] + 1))
    families = rng.choice(list(FAMILIES), size=count, replace=False)
    cells = sorted(rng.choice(len(CELLS), size=count, replace=False))
    drawn = tuple(
        SceneObject(
            name=str(rng.choice(list(FAMILIES[family]))),
            colour=str(rng.choice(list(COLOURS))),
            size=str(rng.choice(SIZES)),
            cell=CELLS[cell],
        )
        for family, cell in zip(families, cells, strict=True)
    )
    return Scene(drawn, str(rng.choice(BACKGROUNDS)))


def recoloured(scene: Scene, rng: np.random.Generator) -> Scene:
    """The same objects in the same places with colours, sizes and background drawn anew."""
    objects = tuple(
        replace(o, colour=str(rng.choice(list(COLOURS))), size=str(rng.choice(SIZES))) for o in scene.objects
    )
    return Scene(objects, str(rng.choice(BACKGROUNDS)))


def relocated(scene: Scene, rng: np.random.Generator) -> Scene:
    """The same objects, as they are, in other places: every relation between two of them may change, one must."""
    while True:
        cells = rng.choice(len(CELLS), size=len(scene.objects), replace=False)
        moved = [replace(o, cell=CELLS[cell]) for o, cell in zip(scene.objects, cells, strict=True)]
        other = replace(scene, objects=tuple(sorted(moved, key=lambda o: o.cell)))
        if set(other.relations()) != set(scene.relations()):
            return other


def near_duplicates(scene: Scene) -> list[Scene]:
    """The scene and every one that differs from it only in the sizes of its objects: 4 or 8 scenes."""
    return [
        replace(scene, objects=tuple(replace(o, size=size) for o, size in zip(scene.objects, sizes, strict=True)))
        for sizes in product(SIZES, repeat=len(scene.objects))
    ]


@dataclass(frozen=True)
class Placed:
    """A scene with its split and the template it came from (-1 where it stands alone)."""

    scene: Scene
    split: str
    template: int


def compose_splits(
    rng: np.random.Generator,
    *,
    pretrain: int,
    train: int,
    test: int,
    looks: int,
    gallery_variants: int,
    objects: tuple[int, int],
) -> list[Placed]:
    """Draw every split so that none shares a scene graph with another.

    Whether a reward can tell good captions from bad depends on what the gallery holds, near-duplicates as
    well as contrasts. So train and test scenes come from templates: objects in `looks` colourings and
    backgrounds, and the first of these once more with its objects in other places. Each such look is in
    the gallery as `gallery_variants` scenes that differ in sizes only, some of them drawn twice, and the
    train and test scenes are other such variants, held out. Train and test share no template; pretrain
    scenes are independent of all.

    Args:
        pretrain, train, test: scenes in each split.
        looks: colourings of each template; it has one look more, the relocated one.
        gallery_variants: gallery scenes of each look.
        objects: fewest and most objects of a scene.
    """
    held_out = {"train": 2, "test": 1}  # of each look: more for training, where images are cheap
    placed: list[Placed] = []
    seen: set[Scene] = set()
    template = 0
    for split, wanted in (("train", train), ("test", test)):
        made = 0
        while made < wanted:
            outline = random_scene(rng, objects)
            colourings = [outline, *(recoloured(outline, rng) for _ in range(looks - 1))]
            for look in (*colourings, relocated(outline, rng)):
                variants = near_duplicates(look)
                if made >= wanted or seen.intersection(variants):
                    continue
                seen.update(variants)
                variants = [variants[i] for i in rng.permutation(len(variants))]
                own = min(held_out[split], wanted - made)
                placed += [Placed(s, split, template) for s in variants[:own]]
                kept = variants[own:]
                placed += [Placed(kept[i % len(kept)], "gallery", template) for i in range(gallery_variants)]
                made += own
            template += 1
    alone = 0
    while alone < pretrain:
        scene = random_scene(rng, objects)
        if scene not in seen:
            seen.add(scene)
            placed.append(Placed(scene, "pretrain", -1))
            alone += 1
    return placed
