"""A deterministic reader of the small world's English: captions to scene graphs, questions to answers.

It reads whatever a model writes: unknown words are skipped, and nothing is guessed.
"""

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from cim.world.language import BACKGROUND_PHRASES, FACT_OF, RELATION_PHRASES, SIZE_WORDS
from cim.world.vocabulary import BACKGROUND, COLOURS, FAMILY_OF, FORWARD, INVERSE, KIND_OF_FAMILY, generalisations


def _any(*tables: Iterable[str]) -> str:
    # Longest first, so that "above and left of" is not read as "above".
    return f"({'|'.join(sorted({phrase for table in tables for phrase in table}, key=len, reverse=True))})"


_NOUN = _any(FAMILY_OF, KIND_OF_FAMILY, KIND_OF_FAMILY.values())
_RELATION, _BACKGROUND = _any(*RELATION_PHRASES.values()), _any(*BACKGROUND_PHRASES.values())
_QUESTIONS = {
    "name": rf"is the {_NOUN} an? {_any(FAMILY_OF)}\?",
    "colours": rf"is the {_NOUN} {_any(COLOURS)}\?",
    "sizes": rf"is the {_NOUN} {_any(*SIZE_WORDS.values())}\?",
    "relation": rf"is the {_NOUN} {_RELATION} the {_NOUN}\?",
    "background": rf"is the background {_BACKGROUND}\?",
}


@dataclass
class ReadObject:
    """An object of a caption. Dictionaries here stand for ordered sets: their keys count."""

    noun: str
    colours: dict[str, None] = field(default_factory=dict)
    sizes: dict[str, None] = field(default_factory=dict)


@dataclass
class CaptionGraph:
    """What a caption states. Relations are (subject index, relation, object index), relations of FORWARD only."""

    objects: list[ReadObject] = field(default_factory=list)
    relations: dict[tuple[int, str, int], None] = field(default_factory=dict)
    backgrounds: dict[str, None] = field(default_factory=dict)


def read_caption(caption: str) -> CaptionGraph:
    """Everything the caption states, repeated statements once."""
    graph = CaptionGraph()
    for sentence in re.split(r"[.!?\n]", caption.lower()):
        sentence = " ".join(re.findall(r"[a-z]+", sentence))
        for phrase in re.findall(rf"\bbackground is {_BACKGROUND}\b", sentence):
            graph.backgrounds[FACT_OF[phrase]] = None
        previous, gap_start = None, 0
        for match in re.finditer(rf"\b((?:\w+ )*?){_NOUN}\b", sentence):
            index = _resolve(graph, match[1].split(), match[2])
            phrases = re.findall(rf"\b{_RELATION}\b", sentence[gap_start : match.end(1)])
            if previous is not None and phrases and index != previous:
                relation = FACT_OF[phrases[-1]]
                backward = (index, INVERSE[relation], previous)
                graph.relations[(previous, relation, index) if relation in FORWARD else backward] = None
            previous, gap_start = index, match.end()
    return graph


def _resolve(graph: CaptionGraph, before: list[str], noun: str) -> int:
    """The index of the object that a noun after these words names: "the owl" is the last owl, "an owl" a new one."""
    start = max((i for i, word in enumerate(before) if word in ("a", "an", "the")), default=-1)
    index = _find(graph, noun) if start >= 0 and before[start] == "the" else None
    if index is None:
        index = len(graph.objects)
        graph.objects.append(ReadObject(noun))
    for word in before[start + 1 :]:
        if word in COLOURS:
            graph.objects[index].colours[word] = None
        elif FACT_OF.get(word) in SIZE_WORDS:
            graph.objects[index].sizes[FACT_OF[word]] = None
    return index


def _find(graph: CaptionGraph, noun: str) -> int | None:
    """The last object that `noun` may name: one called so, or by a finer noun."""
    return max((i for i, o in enumerate(graph.objects) if noun in generalisations(o.noun)), default=None)


def answer(question: str, caption: CaptionGraph) -> str:
    """yes, no, or n/a if the caption states nothing on the matter, or contradicts itself.

    Of several objects that a noun may name the last one counts.

    Raises:
        ValueError: for a question that is not of the small world's five forms.
    """
    for kind, pattern in _QUESTIONS.items():
        if match := re.fullmatch(pattern, question.lower()):
            stated, asked = _statements(caption, kind, *match.groups())
            return "n/a" if len(stated) != 1 else "yes" if asked in stated else "no"
    raise ValueError(f"not a question that the reader knows: {question!r}")


def _statements(caption: CaptionGraph, kind: str, *words: str) -> tuple[Collection[str], str]:
    """What the caption states on the subject of a question, and what the question asks for."""
    if kind == "background":
        return caption.backgrounds, FACT_OF[words[0]]
    if kind == "relation":
        a, b = _referent(caption, words[0]), _referent(caption, words[2])
        return {r if x == a else INVERSE[r] for x, r, y in caption.relations if {x, y} == {a, b}}, FACT_OF[words[1]]
    noun, value = words
    if kind == "name":
        return {o.noun for o in caption.objects if noun in generalisations(o.noun)} & FAMILY_OF.keys(), value
    index = _referent(caption, noun)
    return [] if index is None else getattr(caption.objects[index], kind), FACT_OF[value]


def _referent(caption: CaptionGraph, noun: str) -> int | None:
    """The index of the object a question means: one the noun may name, else the only one with a coarser noun."""
    if (index := _find(caption, noun)) is not None:
        return index
    coarser = [i for i, o in enumerate(caption.objects) if o.noun in generalisations(noun)]
    return coarser[0] if len(coarser) == 1 else None


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
    for noun, words in [*((o.noun, o.colours | o.sizes) for o in read.objects), (BACKGROUND, read.backgrounds)]:
        if words:
            attributes.setdefault(noun, {}).update(words)
    return {
        "objects": dict.fromkeys([*nouns, BACKGROUND] if read.backgrounds else nouns),
        "attributes": attributes,
        "relations": dict.fromkeys((nouns[a], relation, nouns[b]) for a, relation, b in read.relations),
    }
