"""A deterministic reader of the small world's English: captions to graphs, questions to answers.

It reads whatever a model writes: words it does not know are passed over, and nothing is guessed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from cim.world.language import BACKGROUND_PHRASES, RELATION_PHRASES, SIZE_WORDS
from cim.world.vocabulary import COLOURS, FAMILY_OF, INVERSE, KIND_OF_FAMILY, generalisations

_NOUNS = (*FAMILY_OF, *KIND_OF_FAMILY, *dict.fromkeys(KIND_OF_FAMILY.values()))
_SIZE_OF = {word: size for size, words in SIZE_WORDS.items() for word in words}
_RELATION_OF = {phrase: relation for relation, phrases in RELATION_PHRASES.items() for phrase in phrases}
_BACKGROUND_OF = {phrase: name for name, phrases in BACKGROUND_PHRASES.items() for phrase in phrases}


def _alternatives(phrases) -> str:
    # Longest first, so that "above and left of" is not read as "above".
    return "|".join(re.escape(p) for p in sorted(phrases, key=len, reverse=True))


_MENTION = re.compile(rf"\b((?:\w+ )*?)({_alternatives(_NOUNS)})\b")
_RELATION = re.compile(rf"\b({_alternatives(_RELATION_OF)})\b")
_BACKGROUND = re.compile(rf"\bbackground is ({_alternatives(_BACKGROUND_OF)})\b")
_CANONICAL = ("left of", "above", "above left of", "above right of")


@dataclass
class ReadObject:
    """An object as a caption speaks of it."""

    noun: str
    colours: list[str] = field(default_factory=list)
    sizes: list[str] = field(default_factory=list)


@dataclass
class CaptionGraph:
    """What a caption states. Relations are (subject index, relation, object index), never inverse ones."""

    objects: list[ReadObject] = field(default_factory=list)
    relations: list[tuple[int, str, int]] = field(default_factory=list)
    backgrounds: list[str] = field(default_factory=list)


def read_caption(caption: str) -> CaptionGraph:
    """Everything the caption states, repeated statements once."""
    graph = CaptionGraph()
    for sentence in re.split(r"[.!?\n]", caption.lower()):
        sentence = " ".join(re.findall(r"[a-z]+", sentence))
        for phrase in _BACKGROUND.findall(sentence):
            _add_once(graph.backgrounds, _BACKGROUND_OF[phrase])
        previous, gap_start = None, 0
        for match in _MENTION.finditer(sentence):
            index = _resolve(graph, match.group(1).split(), match.group(2))
            relation = _RELATION.findall(sentence[gap_start : match.end(1)])
            if previous is not None and relation and index != previous:
                _add_once(graph.relations, canonical(previous, _RELATION_OF[relation[-1]], index))
            previous, gap_start = index, match.end()
    return graph


def canonical(a, relation: str, b) -> tuple:
    """The triple with `relation` turned so that its subject comes first in reading order."""
    return (a, relation, b) if relation in _CANONICAL else (b, INVERSE[relation], a)


def _add_once(items: list, item) -> None:
    if item not in items:
        items.append(item)


def _resolve(graph: CaptionGraph, before: list[str], noun: str) -> int:
    """The index of the object that a mention is of; "the owl" is the last owl spoken of, "an owl" a new one."""
    start = max((i for i, word in enumerate(before) if word in ("a", "an", "the")), default=-1)
    determiner, adjectives = (before[start] if start >= 0 else "a"), before[start + 1 :]
    index = None
    if determiner == "the":
        index = find(graph, noun)
    if index is None:
        graph.objects.append(ReadObject(noun))
        index = len(graph.objects) - 1
    for word in adjectives:
        if word in COLOURS:
            _add_once(graph.objects[index].colours, word)
        elif word in _SIZE_OF:
            _add_once(graph.objects[index].sizes, _SIZE_OF[word])
    return index


def find(graph: CaptionGraph, noun: str) -> int | None:
    """The last object that `noun` may name: one called so, or called by something finer."""
    for index in reversed(range(len(graph.objects))):
        if noun in generalisations(graph.objects[index].noun):
            return index
    return None


_REFERENT = rf"the ({_alternatives(_NOUNS)})"
_QUESTIONS = {
    "name": re.compile(rf"is {_REFERENT} an? ({_alternatives(FAMILY_OF)})\?"),
    "colour": re.compile(rf"is {_REFERENT} ({_alternatives(COLOURS)})\?"),
    "size": re.compile(rf"is {_REFERENT} ({_alternatives(_SIZE_OF)})\?"),
    "relation": re.compile(rf"is {_REFERENT} ({_alternatives(_RELATION_OF)}) {_REFERENT}\?"),
    "background": re.compile(rf"is the background ({_alternatives(_BACKGROUND_OF)})\?"),
}


def answer(question: str, caption: CaptionGraph) -> str:
    """Yes, No, or n/a where the caption does not tell.

    Raises:
        ValueError: for a question that is not of the small world's five forms.
    """
    for kind, pattern in _QUESTIONS.items():
        if match := pattern.fullmatch(question.lower()):
            return {True: "yes", False: "no", None: "n/a"}[_VERDICTS[kind](caption, *match.groups())]
    raise ValueError(f"not a question that the reader knows: {question!r}")


def _referent(caption: CaptionGraph, noun: str) -> int | None:
    """The object a question means: one the noun may name, else the only one called by something coarser."""
    index = find(caption, noun)
    if index is not None:
        return index
    coarser = [i for i, o in enumerate(caption.objects) if o.noun in generalisations(noun)]
    return coarser[0] if len(coarser) == 1 else None


def _is_named(caption: CaptionGraph, noun: str, name: str) -> bool | None:
    index = find(caption, noun)
    if index is None or caption.objects[index].noun not in FAMILY_OF:
        return None
    return caption.objects[index].noun == name


def _has(values: list[str], value: str) -> bool | None:
    return value in values if len(values) == 1 else None  # two colours for one object tell nothing


def _has_colour(caption: CaptionGraph, noun: str, colour: str) -> bool | None:
    index = _referent(caption, noun)
    return None if index is None else _has(caption.objects[index].colours, colour)


def _has_size(caption: CaptionGraph, noun: str, word: str) -> bool | None:
    index = _referent(caption, noun)
    return None if index is None else _has(caption.objects[index].sizes, _SIZE_OF[word])


def _stands(caption: CaptionGraph, a: str, phrase: str, b: str) -> bool | None:
    first, second = _referent(caption, a), _referent(caption, b)
    stated = {t[1] if t[0] == first else INVERSE[t[1]] for t in caption.relations if {t[0], t[2]} == {first, second}}
    if first is None or second is None or len(stated) != 1:
        return None
    return stated == {_RELATION_OF[phrase]}


def _lies_before(caption: CaptionGraph, phrase: str) -> bool | None:
    return _has(caption.backgrounds, _BACKGROUND_OF[phrase])


_VERDICTS = {
    "name": _is_named,
    "colour": _has_colour,
    "size": _has_size,
    "relation": _stands,
    "background": _lies_before,
}
