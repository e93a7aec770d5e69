"""English for scenes: captions of any detail, captions with errors, and yes/no questions."""

from dataclasses import replace

import numpy as np
from numpy.random import Generator

from cim.params import Settings, Share
from cim.world.scenes import Scene
from cim.world.vocabulary import BACKGROUNDS, COLOURS, FAMILIES, FAMILY_OF, INVERSE, SIZES, generalisations

# Wordings of each fact, the common one first; the reader (cim.world.reader) knows exactly these.
SIZE_WORDS = {"small": ("small", "little"), "large": ("large", "big")}
RELATION_PHRASES = {
    "left of": ("left of", "to the left of"), "right of": ("right of", "to the right of"),
    "above": ("above", "over"), "below": ("below", "under"),
    "above left of": ("above and left of", "above and to the left of"),
    "above right of": ("above and right of", "above and to the right of"),
    "below left of": ("below and left of", "below and to the left of"),
    "below right of": ("below and right of", "below and to the right of"),
}  # fmt: skip
BACKGROUND_PHRASES = {
    "meadow": ("a meadow", "green grass"), "beach": ("a beach", "a sandy shore"),
    "night": ("a night sky", "the dark night"), "snow": ("snow", "a snowy field"),
}  # fmt: skip
# What each of these wordings, and each colour, states.
FACT_OF = {
    phrase: fact
    for table in (SIZE_WORDS, RELATION_PHRASES, BACKGROUND_PHRASES, {colour: [colour] for colour in COLOURS})
    for fact, phrases in table.items()
    for phrase in phrases
}
QUESTION_KINDS = ("name", "colour", "size", "relation", "background")


class Detail(Settings):
    """The probability that a caption keeps each kind of fact; 1 everywhere is the full caption.

    An object is called by its name with probability `name`, else by its family ("bird") with probability `family`,
    else by its kind ("animal").
    """

    object: Share = 1.0
    name: Share = 1.0
    family: Share = 1.0
    colour: Share = 1.0
    size: Share = 1.0
    relation: Share = 1.0
    background: Share = 1.0


FULL = Detail()


def describe(scene: Scene, rng: Generator, detail: Detail = FULL) -> str:
    """A caption of the scene in sentences; `rng` chooses what is left out and how the rest is worded."""

    def keep(chance: float) -> bool:
        return rng.random() < chance

    def pick(wordings: tuple[str, ...]) -> str:
        return wordings[0] if keep(0.8) else wordings[int(rng.integers(1, len(wordings)))]

    kept = [o for o in scene.objects if keep(detail.object)] or [scene.objects[int(rng.integers(len(scene.objects)))]]
    nouns, phrases = {}, {}
    for o in kept:
        name, family, kind = generalisations(o.name)
        nouns[name] = name if keep(detail.name) else family if keep(detail.family) else kind
    for o in kept:
        size = [pick(SIZE_WORDS[o.size])] if keep(detail.size) else []
        colour = [o.colour] if keep(detail.colour) else []
        phrases[o.name] = with_article(" ".join([*size, *colour, nouns[o.name]]))
    relations = [(a, r, b) for a, r, b in scene.relations() if a in nouns and b in nouns and keep(detail.relation)]

    def mention(name: str) -> str:
        return phrases.pop(name, f"the {nouns[name]}")  # in full the first time only

    sentences = []
    for a, relation, b in relations:
        if keep(0.15):
            a, relation, b = b, INVERSE[relation], a
        sentences.append(f"{mention(a)} is {pick(RELATION_PHRASES[relation])} {mention(b)}.")
    if phrases:
        sentences.append(f"there is {' and '.join(phrases.values())}.")
    if keep(detail.background):
        sentences.append(f"the background is {pick(BACKGROUND_PHRASES[scene.background])}.")
    return " ".join(sentences)


def with_article(phrase: str) -> str:
    """The phrase with "a" or "an" before it."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def corrupt(scene: Scene, rng: Generator, errors: int) -> Scene:
    """The scene with `errors` of its facts false: another name of the family, another colour, size or background, or
    two objects in swapped places, which falsifies their relation; all of its facts where they are fewer.
    """
    facts = [(kind, i) for i in range(len(scene.objects)) for kind in ("name", "colour", "size")]
    facts += [("background", 0), ("places", 0)]
    for k in rng.permutation(len(facts))[:errors]:
        scene = _falsify(scene, *facts[k], rng)
    return scene


def with_slips(scene: Scene, rng: Generator, rate: float) -> Scene:
    """The scene as a careless annotator sees it: each fact is false with probability `rate`."""
    return corrupt(scene, rng, int(rng.binomial(3 * len(scene.objects) + 2, rate)))


def _falsify(scene: Scene, kind: str, i: int, rng: Generator) -> Scene:
    if kind == "background":
        return replace(scene, background=another(kind, scene.background, rng))
    objects = list(scene.objects)
    if kind == "places":
        a, b = sorted(rng.choice(len(objects), size=2, replace=False))
        # Reading order is kept by swapping what lies in the cells, not the cells.
        objects[a], objects[b] = replace(objects[b], cell=objects[a].cell), replace(objects[a], cell=objects[b].cell)
    else:
        objects[i] = replace(objects[i], **{kind: another(kind, getattr(objects[i], kind), rng)})
    return replace(scene, objects=tuple(objects))


def another(kind: str, value: str, rng: Generator) -> str:
    """A false value for a fact of this kind (name, colour, size, background): a name is replaced within its family."""
    values = {"colour": COLOURS, "size": SIZES, "background": BACKGROUNDS}
    options = FAMILIES[FAMILY_OF[value]] if kind == "name" else values[kind]
    return str(rng.choice([option for option in options if option != value]))


def ask(scenes: list[Scene], rng: Generator) -> list[list[dict[str, str]]]:
    """One yes/no question of each kind for each scene: {"kind", "question", "answer"}.

    Over all scenes half of the answers of each kind are "yes" (one more if the number is odd). A false alternative is
    of the same sort as the truth: another bird, another colour, the inverse relation.
    """
    truths = {kind: rng.permutation(np.arange(len(scenes)) % 2 == 0) for kind in QUESTION_KINDS}

    def one(i: int, kind: str) -> dict[str, str]:
        true = truths[kind][i]
        return {"kind": kind, "question": _question(scenes[i], kind, true, rng), "answer": "yes" if true else "no"}

    return [[one(i, kind) for kind in QUESTION_KINDS] for i in range(len(scenes))]


def _question(scene: Scene, kind: str, true: bool, rng: Generator) -> str:
    o = scene.objects[int(rng.integers(len(scene.objects)))]
    if kind == "relation":
        relations = scene.relations()
        a, relation, b = relations[int(rng.integers(len(relations)))]
        return f"is the {a} {RELATION_PHRASES[relation if true else INVERSE[relation]][0]} the {b}?"
    value = scene.background if kind == "background" else getattr(o, kind)
    value = value if true else another(kind, value, rng)
    if kind == "background":
        return f"is the background {BACKGROUND_PHRASES[value][0]}?"
    return f"is the {FAMILY_OF[o.name]} {with_article(value)}?" if kind == "name" else f"is the {o.name} {value}?"
