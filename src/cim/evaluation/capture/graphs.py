"""A caption's scene graph."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self


@dataclass(frozen=True)
class SceneGraph:
    """Objects, attributes by object, and (subject, relation, object) triples, in the order of matching."""

    objects: tuple[str, ...] = ()
    attributes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    relations: tuple[tuple[str, str, str], ...] = ()

    @staticmethod
    def of(value: Mapping) -> Self:
        """From JSON: {"objects": [...], "attributes": {object: [...]}, "relations": [[subject, relation, object]]}."""
        attributes = {name: tuple(words) for name, words in value["attributes"].items()}
        return SceneGraph(tuple(value["objects"]), attributes, tuple(map(tuple, value["relations"])))

    @property
    def pairs(self) -> set[tuple[str, str]]:
        """Its (object, attribute) pairs."""
        return {(name, word) for name, words in self.attributes.items() for word in words}

    @property
    def attribute_words(self) -> tuple[str, ...]:
        """The attributes of all objects, one after the other."""
        return tuple(word for words in self.attributes.values() for word in words)

    def phrases(self) -> set[str]:
        """Every text of the graph; a relation also as one phrase."""
        words = {*self.objects, *self.attributes, *self.attribute_words}
        return words.union(*self.relations, map(" ".join, self.relations))
