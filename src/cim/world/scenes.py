"""Scene graphs: what is in an image of the small world, and how sets of scenes are drawn."""

import json
from dataclasses import asdict, dataclass, replace
from itertools import combinations, product
from typing import Self

from numpy.random import Generator
from pydantic import TypeAdapter

from cim.world.vocabulary import BACKGROUNDS, COLOURS, FAMILIES, SIZES

CELLS = ((0, 0), (0, 1), (1, 0), (1, 1))  # (row, column) in reading order
# (rows, columns) from the subject's cell to the object's -> relation
RELATION_OF_STEP = {(0, 1): "left of", (1, 0): "above", (1, 1): "above left of", (1, -1): "above right of"}


@dataclass(frozen=True)
class SceneObject:
    """One object: its name, its look, and its cell of the 2 x 2 layout."""

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
        return [
            (a.name, RELATION_OF_STEP[b.cell[0] - a.cell[0], b.cell[1] - a.cell[1]], b.name)
            for a, b in combinations(self.objects, 2)
        ]

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @staticmethod
    def from_json(text: str) -> Self:
        return _SCENE.validate_json(text)


_SCENE = TypeAdapter(Scene)


def _look(rng: Generator) -> dict[str, str]:
    return {"colour": str(rng.choice(list(COLOURS))), "size": str(rng.choice(SIZES))}


def random_scene(rng: Generator, objects: tuple[int, int] = (2, 3)) -> Scene:
    """From objects[0] to objects[1] objects of different families in different cells."""
    count = int(rng.integers(objects[0], objects[1] + 1))
    families = rng.choice(list(FAMILIES), size=count, replace=False)
    cells = sorted(rng.choice(len(CELLS), size=count, replace=False))
    drawn = tuple(
        SceneObject(name=str(rng.choice(list(FAMILIES[family]))), **_look(rng), cell=CELLS[cell])
        for family, cell in zip(families, cells, strict=True)
    )
    return Scene(drawn, str(rng.choice(BACKGROUNDS)))


def recoloured(scene: Scene, rng: Generator) -> Scene:
    """The same objects in the same places with new random colours, sizes and background."""
    return Scene(tuple(replace(o, **_look(rng)) for o in scene.objects), str(rng.choice(BACKGROUNDS)))


def relocated(scene: Scene, rng: Generator) -> Scene:
    """The same objects with the same looks in other cells, so that at least one relation changes."""
    while True:
        cells = rng.choice(len(CELLS), size=len(scene.objects), replace=False)
        moved = [replace(o, cell=CELLS[cell]) for o, cell in zip(scene.objects, cells, strict=True)]
        other = replace(scene, objects=tuple(sorted(moved, key=lambda o: o.cell)))
        if set(other.relations()) != set(scene.relations()):
            return other


def near_duplicates(scene: Scene) -> list[Scene]:
    """The scene in every combination of its objects' sizes, its own included."""
    sized = [[replace(o, size=size) for size in SIZES] for o in scene.objects]
    return [replace(scene, objects=objects) for objects in product(*sized)]


def compose_splits(
    rng: Generator, *, pretrain: int, train: int, test: int, looks: int, gallery_variants: int, objects: tuple[int, int]
) -> list[tuple[Scene, str, int]]:
    """Draw every split so that none shares a scene graph with another: (scene, split, template, or -1 for none).

    A reward can only separate good captions from bad if the gallery has near-duplicates as well as contrasts. So train
    and test scenes come from templates: objects in `looks` colourings and backgrounds, plus the first of these with its
    objects in other places. The gallery has `gallery_variants` scenes of each look that differ in sizes only, some
    drawn twice; train and test scenes are held-out variants of a look. Train and test share no template; pretrain
    scenes are independent. `pretrain`, `train` and `test` count scenes; `objects` are the fewest and most in a scene.
    """
    placed: list[tuple[Scene, str, int]] = []
    seen: set[Scene] = set()
    template = 0
    # Held-out variants of each look: more for training, where images are cheap.
    for split, wanted, held_out in (("train", train, 2), ("test", test, 1)):
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
                own = min(held_out, wanted - made)
                kept = variants[own:]
                placed += [(s, split, template) for s in variants[:own]]
                placed += [(kept[i % len(kept)], "gallery", template) for i in range(gallery_variants)]
                made += own
            template += 1
    alone: dict[Scene, None] = {}
    while len(alone) < pretrain:
        if (scene := random_scene(rng, objects)) not in seen:
            alone[scene] = None
    return placed + [(scene, "pretrain", -1) for scene in alone]
