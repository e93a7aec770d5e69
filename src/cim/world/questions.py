"""Yes/no questions about a scene, with as many answers Yes as No."""

from __future__ import annotations

import numpy as np

from cim.world.language import BACKGROUND_PHRASES, RELATION_PHRASES, another
from cim.world.scenes import Scene
from cim.world.vocabulary import BACKGROUNDS, COLOURS, FAMILIES, FAMILY_OF, INVERSE, SIZES

KINDS = ("name", "colour", "size", "relation", "background")


def ask(scenes: list[Scene], rng: np.random.Generator) -> list[list[dict[str, str]]]:
    """One question of each kind for each scene: {"kind", "question", "answer"}.

    Over all scenes half of the answers of each kind are "yes" (one more where the number is odd).
    A false alternative is always of the same sort as the truth: another bird, another colour, the
    inverse relation.
    """
    truths = {kind: rng.permutation(np.arange(len(scenes)) % 2 == 0) for kind in KINDS}

    def one(i: int, kind: str) -> dict[str, str]:
        truth = bool(truths[kind][i])
        return {"kind": kind, "question": _question(scenes[i], kind, truth, rng), "answer": "yes" if truth else "no"}

    return [[one(i, kind) for kind in KINDS] for i in range(len(scenes))]


def _question(scene: Scene, kind: str, truth: bool, rng: np.random.Generator) -> str:
    o = scene.objects[int(rng.integers(len(scene.objects)))]
    if kind == "name":
        family = FAMILY_OF[o.name]
        name = o.name if truth else another(tuple(FAMILIES[family]), o.name, rng)
        return f"is the {family} {'an' if name[0] in 'aeiou' else 'a'} {name}?"
    if kind == "colour":
        return f"is the {o.name} {o.colour if truth else another(tuple(COLOURS), o.colour, rng)}?"
    if kind == "size":
        return f"is the {o.name} {o.size if truth else another(SIZES, o.size, rng)}?"
    if kind == "background":
        name = scene.background if truth else another(BACKGROUNDS, scene.background, rng)
        return f"is the background {BACKGROUND_PHRASES[name][0]}?"
    relations = scene.relations()
    a, relation, b = relations[int(rng.integers(len(relations)))]
    return f"is the {a} {RELATION_PHRASES[relation if truth else INVERSE[relation]][0]} the {b}?"
