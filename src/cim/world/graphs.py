"""Scene graphs of the small world's captions, and answers from them, both exact and deterministic."""

from collections.abc import Mapping, Sequence

from cim.world.reader import answer, read_caption
from cim.world.scenes import Scene
from cim.world.vocabulary import generalisations

BACKGROUND = "background"  # the object whose attribute is the scene's background


class WorldReader:
    """Answers the small world's questions from captions by its grammar, without a model."""

    name = "world"

    def answer(self, pairs: Sequence[tuple[str, str]]) -> list[str]:
        return [answer(question, read_caption(caption)) for caption, question in pairs]


def scene_graph(caption: str) -> dict:
    """What a caption states, each thing once: {"objects", "attributes", "relations"}, relations in reading order."""
    read = read_caption(caption)
    nouns = [o.noun for o in read.objects]
    attributes: dict[str, dict[str, None]] = {}
    for noun, words in [*((o.noun, o.colours + o.sizes) for o in read.objects), (BACKGROUND, read.backgrounds)]:
        if words:
            attributes.setdefault(noun, {}).update(dict.fromkeys(words))
    return {
        "objects": dict.fromkeys([*nouns, BACKGROUND] if read.backgrounds else nouns),
        "attributes": attributes,
        "relations": dict.fromkeys((nouns[a], relation, nouns[b]) for a, relation, b in read.relations),
    }


def extended_lists(scene: Scene) -> tuple[list[str], Mapping[str, list[str]]]:
    """All true objects of a scene, by every noun, and the attributes of each noun."""
    attributes: dict[str, list[str]] = {BACKGROUND: [scene.background]}
    for o in scene.objects:
        for noun in generalisations(o.name):
            known = attributes.setdefault(noun, [])
            known += [word for word in (o.colour, o.size) if word not in known]
    return list(attributes), attributes
