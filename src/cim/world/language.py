"""English for scenes: writing captions of any fineness, and captions with errors."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from cim.params import Settings, Share
from cim.world.scenes import Scene, SceneObject
from cim.world.vocabulary import BACKGROUNDS, COLOURS, FAMILIES, FAMILY_OF, INVERSE, KIND_OF, SIZES

# Several wordings for one fact; the reader (cim.world.reader) knows exactly these.
SIZE_WORDS = {"small": ("small", "little"), "large": ("large", "big")}
RELATION_PHRASES = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
    "above left of": ("above and left of", "above and to the left of"),
    "above right of": ("above and right of", "above and to the right of"),
    "below left of": ("below and left of", "below and to the left of"),
    "below right of": ("below and right of", "below and to the right of"),
}
BACKGROUND_PHRASES = {
    "meadow": ("a meadow", "green grass"),
    "beach": ("a beach", "a sandy shore"),
    "night": ("a night sky", "the dark night"),
    "snow": ("snow", "a snowy field"),
}


class Detail(Settings):
    """The chance that a caption keeps each kind of fact; 1 everywhere is the full caption.

    An object that is kept is called by its name with chance `name`, else by its family with chance
    `family` ("bird"), else by its kind ("animal").
    """

    object: Share = 1.0
    name: Share = 1.0
    family: Share = 1.0
    colour: Share = 1.0
    size: Share = 1.0
    relation: Share = 1.0
    background: Share = 1.0


FULL = Detail()


def describe(scene: Scene, rng: np.random.Generator, detail: Detail = FULL) -> str:
    """A caption of the scene in sentences; `rng` chooses what is left out and how the rest is worded."""

    def keep(chance: float) -> bool:
        return rng.random() < chance

    kept = [o for o in scene.objects if keep(detail.object)] or [scene.objects[int(rng.integers(len(scene.objects)))]]
    nouns = {o.name: _noun(o, keep, detail) for o in kept}
    phrases = {o.name: _noun_phrase(o, nouns[o.name], keep, detail, rng) for o in kept}
    relations = [(a, r, b) for a, r, b in scene.relations() if a in nouns and b in nouns and keep(detail.relation)]
    introduced: set[str] = set()

    def mention(name: str) -> str:
        if name in introduced:
            return f"the {nouns[name]}"
        introduced.add(name)
        return phrases[name]

    sentences = []
    for a, relation, b in relations:
        if keep(0.15):
            a, relation, b = b, INVERSE[relation], a
        sentences.append(f"{mention(a)} is {_pick(RELATION_PHRASES[relation], rng)} {mention(b)}.")
    alone = [mention(o.name) for o in kept if o.name not in introduced]
    if alone:
        sentences.append(f"there is {' and '.join(alone)}.")
    if keep(detail.background):
        sentences.append(f"the background is {_pick(BACKGROUND_PHRASES[scene.background], rng)}.")
    return " ".join(sentences)


def _pick(options: tuple[str, ...], rng: np.random.Generator) -> str:
    # The first wording is the common one, as in any language.
    return options[0] if rng.random() < 0.8 else options[int(rng.integers(1, len(options)))]


def _noun(o: SceneObject, keep, detail: Detail) -> str:
    if keep(detail.name):
        return o.name
    return FAMILY_OF[o.name] if keep(detail.family) else KIND_OF[o.name]


def _noun_phrase(o: SceneObject, noun: str, keep, detail: Detail, rng: np.random.Generator) -> str:
    words = [_pick(SIZE_WORDS[o.size], rng)] if keep(detail.size) else []
    words += [o.colour] if keep(detail.colour) else []
    words.append(noun)
    return f"{'an' if words[0][0] in 'aeiou' else 'a'} {' '.join(words)}"


def corrupt(scene: Scene, rng: np.random.Generator, errors: int) -> Scene:
    """The scene with `errors` of its facts replaced by false ones, so that its caption states them.

    A name becomes another of its family, a colour or size another, the background another; two
    objects swap places, which falsifies their relation.

    Raises:
        ValueError: where the scene has fewer facts than `errors`.
    """
    facts = [(kind, i) for i in range(len(scene.objects)) for kind in ("name", "colour", "size")]
    facts += [("background", 0), ("places", 0)]
    if errors > len(facts):
        raise ValueError(f"the scene has {len(facts)} facts, fewer than {errors} errors")
    for k in rng.permutation(len(facts))[:errors]:
        scene = _falsify(scene, *facts[k], rng)
    return scene


def with_slips(scene: Scene, rng: np.random.Generator, rate: float) -> Scene:
    """The scene as a careless annotator sees it: each fact is false with chance `rate`."""
    facts = 3 * len(scene.objects) + 2
    return corrupt(scene, rng, int(rng.binomial(facts, rate)))


def _falsify(scene: Scene, kind: str, i: int, rng: np.random.Generator) -> Scene:
    if kind == "background":
        return replace(scene, background=another(BACKGROUNDS, scene.background, rng))
    objects = list(scene.objects)
    if kind == "places":
        a, b = sorted(rng.choice(len(objects), size=2, replace=False))
        # Reading order is kept by swapping what lies in the cells, not the cells.
        objects[a], objects[b] = replace(objects[b], cell=objects[a].cell), replace(objects[a], cell=objects[b].cell)
    else:
        now = getattr(objects[i], kind)
        options = {
            "name": tuple(FAMILIES[FAMILY_OF[objects[i].name]]),
            "colour": tuple(COLOURS),
            "size": SIZES,
        }
        objects[i] = replace(objects[i], **{kind: another(options[kind], now, rng)})
    return replace(scene, objects=tuple(objects))


def another(options: tuple[str, ...], now: str, rng: np.random.Generator) -> str:
    """One of the options that is not `now`."""
    return str(rng.choice([o for o in options if o != now]))
