"""What a caption says, as a scene graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cim.errors import CimError


@dataclass(frozen=True)
class SceneGraph:
    """Objects, attributes by object, and relations, in the order in which they are matched."""

    objects: tuple[str, ...] = ()
    attributes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    relations: tuple[tuple[str, str, str], ...] = ()

    @staticmethod
    def of(value: Mapping, where: str = "graph") -> SceneGraph:
        """From JSON: {"objects": [...], "attributes": {object: [...]}, "relations": [[subject, relation, object]]}.

        Raises:
            CimError: where it has another shape.
        """
        try:
            graph = SceneGraph(
                tuple(value["objects"]),
                {name: tuple(words) for name, words in value["attributes"].items()},
                tuple((s, r, o) for s, r, o in value["relations"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CimError(f"{where}: not a scene graph ({error})") from None
        if not all(isinstance(phrase, str) for phrase in graph.phrases()):
            raise CimError(f"{where}: a scene graph holds text only")
        return graph

    @property
    def attribute_words(self) -> tuple[str, ...]:
        """The attributes of all objects, one after the other."""
        return tuple(word for words in self.attributes.values() for word in words)

    def phrases(self) -> set[str]:
        """Every text in it, relations also as one phrase each."""
        parts = {*self.objects, *self.attributes, *self.attribute_words}
        return parts | {part for relation in self.relations for part in (*relation, " ".join(relation))}
