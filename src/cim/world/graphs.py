"""Scene graphs of the small world's captions, and answers from them, both exact and deterministic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cim.world.reader import answer, read_caption
from cim.world.scenes import Scene
from cim.world.vocabulary import generalisations

BACKGROUND = "background"  # the object whose attributes are what lies behind the others


class WorldReader:
    """Answers the small world's questions from captions by its grammar, without a model."""

    name = "world"

    def answer(self, pairs: Sequence[tuple[str, str]]) -> list[str]:
        return [answer(question, read_caption(caption)) for caption, question in pairs]


def scene_graph(caption: str) -> dict:
    """What a caption states, each thing once: {"objects", "attributes", "relations"}, relations in reading order."""
    read = read_caption(caption)
    attributes: dict[str, dict[str, None]] = {}
    for o in read.objects:
        if words := [*o.colours, *o.sizes]:
            attributes.setdefault(o.noun, {}).update(dict.fromkeys(words))
    if read.backgrounds:
        attributes[BACKGROUND] = dict.fromkeys(read.backgrounds)
    objects = dict.fromkeys([*(o.noun for o in read.objects), *([BACKGROUND] if read.backgrounds else [])])
    relations = dict.fromkeys((read.objects[a].noun, r, read.objects[b].noun) for a, r, b in read.relations)
    return {"objects": objects, "attributes": attributes, "relations": relations}


def extended_lists(scene: Scene) -> tuple[list[str], Mapping[str, list[str]]]:
    """Everything that may be said of a scene: coarser names of its objects, and their attributes by every name."""
    attributes: dict[str, list[str]] = {BACKGROUND: [scene.background]}
    for o in scene.objects:
        for noun in generalisations(o.name):
            known = attributes.setdefault(noun, [])
            known += [word for word in (o.colour, o.size) if word not in known]
    return list(attributes), attributes
