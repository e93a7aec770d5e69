"""From captions to scene graphs: FactualSceneGraph's model as in the paper, or a pattern that needs no model.

Both lemmatise with WordNet, as the public code does, so that "birds" and "bird" are one object.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Protocol

from tqdm import tqdm

from cim import code
from cim.captioners.loading import loading
from cim.data.labels import sentences_of
from cim.encoders import weights_digest
from cim.errors import CimError
from cim.evaluation.capture.graphs import SceneGraph
from cim.evaluation.capture.synonyms import WordNet
from cim.files import read_json, short_digest, write_json

FACTUAL = "lizhuang144/flan-t5-base-VG-factual-sg"
CACHE = Path(".cache/parses")

# What a sentence states: (entity, attributes) pairs, and (subject, relation, object) triples.
Facts = tuple[list[tuple[str, set[str]]], list[tuple[str, str, str]]]


class Parser(Protocol):
    """Turns captions into graphs; `name` appears in the metrics."""

    name: str

    def parse(self, captions: Sequence[str]) -> list[SceneGraph]: ...


class FactualParser:
    """The paper's parser: FACTUAL's T5 from the hub (Li et al. 2023), one sentence at a time, batched by length.

    Loaded by transformers itself, since its authors' package does not run with transformers 5. `version` changes with
    everything that may change a parse: code, WordNet, the checkpoint's revision on the hub and its weights.

    Raises:
        CimError: where the model cannot be loaded.
    """

    def __init__(self, wordnet: WordNet, checkpoint: str = FACTUAL, device: str = "cpu", batch: int = 64):
        from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

        with loading(f"parser factual: '{checkpoint}'"):
            self._tokenizer = AutoTokenizer.from_pretrained(checkpoint)
            self._model = AutoModelForSeq2SeqLM.from_pretrained(checkpoint).to(device).eval()
        self.name, self._wordnet, self._batch = f"factual:{checkpoint}", wordnet, batch
        revision = getattr(self._model.config, "_commit_hash", None)
        self.version = f"{self.name} {revision} {weights_digest(self._model)} {wordnet.source} {code.digest(__name__)}"

    def parse(self, captions: Sequence[str]) -> list[SceneGraph]:
        parts = [sentences_of(caption) for caption in captions]
        distinct = sorted({sentence for part in parts for sentence in part}, key=lambda text: (len(text), text))
        parsed: dict[str, Facts] = {}
        for start in tqdm(range(0, len(distinct), self._batch), desc="parsing", mininterval=2):
            batch = distinct[start : start + self._batch]
            parsed |= zip(batch, map(read_facts, self._generate(batch)), strict=True)
        return [merge([parsed[sentence] for sentence in part], self._wordnet) for part in parts]

    def _generate(self, sentences: Sequence[str]) -> list[str]:
        prompts = [f"Generate Scene Graph: {sentence}" for sentence in sentences]
        inputs = self._tokenizer(prompts, max_length=64, truncation=True, padding=True, return_tensors="pt")
        inputs = {name: inputs[name].to(self._model.device) for name in ("input_ids", "attention_mask")}
        out = self._model.generate(**inputs, num_beams=5, max_length=128, early_stopping=True)
        return self._tokenizer.batch_decode(out, skip_special_tokens=True)


def read_facts(text: str) -> Facts:
    """The entities and relations of FACTUAL's notation.

    Facts are "( subject , relation , object )", attributes "( subject , is , attribute )"; a number is no attribute,
    and a single fact may name an object only. A fact that was cut short is dropped.

    >>> read_facts("( dog , is , black ) , ( dog , on , grass )")
    ([('dog', {'black'}), ('grass', set())], [('dog', 'on', 'grass')])
    """
    facts = [" ".join(fact.strip(" ()").split()) for fact in re.split(r"\)\s*,", text)]
    if not text.strip().endswith(")"):
        facts = facts[:-1] or [facts[0].partition(",")[0].strip()]
    facts = sorted({fact for fact in facts if fact})
    entities: dict[str, set[str]] = {}
    relations = []
    for fact in facts:
        match [part.strip() for part in fact.split(",")]:
            case [subject, "is", attribute]:
                entities.setdefault(subject, set()).update(() if attribute.isdigit() else {attribute})
            case [subject, relation, other]:
                entities.setdefault(subject, set())
                entities.setdefault(other, set())
                relations.append((subject, relation, other))
            case [name, *_] if len(facts) == 1:
                entities[name] = set()
    return list(entities.items()), relations


def merge(sentences: Iterable[Facts], wordnet: WordNet) -> SceneGraph:
    """One graph of the facts of a caption's sentences, lemmatised, each fact once."""
    objects: dict[str, None] = {}
    attributes: dict[str, dict[str, None]] = {}
    relations: dict[tuple[str, str, str], None] = {}
    for entities, triples in sentences:
        for name, words in entities:
            objects[head := wordnet.lemma(name, "n")] = None
            if kept := [wordnet.lemma(word, "a") for word in sorted(words) if " of" not in word]:
                attributes.setdefault(head, {}).update(dict.fromkeys(kept))
        relations |= {(wordnet.lemma(s, "n"), relation, wordnet.lemma(o, "n")): None for s, relation, o in triples}
    return SceneGraph.of({"objects": objects, "attributes": attributes, "relations": relations})


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Closed classes of words; STOP words are never part of a graph.
PREPOSITIONS = _words("""in on at with of by near behind beside besides between under underneath over above below
    beneath across along around against among inside outside into onto through toward towards from to before after
    beyond upon within alongside next front top left right bottom side for like off up down as""")
NUMBERS = _words("two three four five six seven eight nine ten eleven twelve multiple")
DETERMINERS = _words("a an the this that these those his her its their my our your some each every another")
STOP = DETERMINERS | _words("""there here it they them he him she we us you i is are was were be been being has have had
    do does did can could will would may might must shall should not no and or but so if then than also very too just
    only any other others such which who whom whose what when where while because both either neither all most many much
    more several few lot image picture photo photograph view scene background foreground one ones thing something
    someone anything middle center centre see look appear seem visible present""")
CLOSED = PREPOSITIONS | STOP


class PatternParser:
    """Noun phrases and the words between them, by WordNet's parts of speech: deterministic, without a model.

    An adjective, number or participle before a noun is its attribute, as is one after "is". Verbs and prepositions
    between two noun phrases of a clause are a relation. The structure of clauses beyond that is ignored.
    """

    name = "pattern"

    def __init__(self, wordnet: WordNet):
        self._wordnet = wordnet
        self._kind = cache(self._kind_of)

    def parse(self, captions: Sequence[str]) -> list[SceneGraph]:
        return [merge(map(self._facts, sentences_of(caption)), self._wordnet) for caption in captions]

    def _kind_of(self, word: str) -> str:
        """n, a, v or "" for a word, by its most common use in WordNet's texts; unknown words are names."""
        if word in NUMBERS or word.isdigit():
            return "a"
        counts = self._wordnet.use(word)
        return max(counts, key=counts.get, default="n" if word.isalpha() else "")

    def _facts(self, sentence: str) -> Facts:
        facts: Facts = [], []
        for clause in re.split(r"[,;:()]|\bwhile\b|\bbut\b", sentence.lower()):
            self._add_clause(re.findall(r"[a-z0-9]+(?:[-'][a-z0-9]+)*", clause), *facts)
        return facts

    def _add_clause(self, words: list[str], entities: list, relations: list) -> None:
        subject, between, pending, copula = "", [], [], False  # pending: (word, kind) before the noun they belong to
        for before, word, after in zip(["", *words], words, [*words[1:], ""], strict=False):
            copula = copula or word in ("is", "are", "was", "were")
            if word in PREPOSITIONS:
                between, pending = [*between, word], []
            elif word == "and":
                between.append(word)
            if word in CLOSED:
                continue
            kind, last = self._kind(word), not after or after in CLOSED
            if word.endswith(("ing", "ed")) and self._wordnet.lemma(word, "v") != word and before not in DETERMINERS:
                kind = "v"
            elif kind == "v" and (before in DETERMINERS | PREPOSITIONS or (pending and pending[-1][0] == before)):
                # After "the", "white" or "with" comes a noun where the word can be one.
                kind = "n" if "n" in self._wordnet.use(word) else "v"
            if kind == "n" and not last and self._kind(after) == "n":
                pending.append((word, "n"))  # a noun before a noun belongs to its name: "tennis racket"
            elif kind == "n":
                name = " ".join([*(w for w, k in pending if k == "n"), word])
                entities.append((name, {w for w, k in pending if k == "a"}))
                if subject and between and "and" not in between:
                    relations.append((subject, " ".join(between), name))
                subject, between, pending, copula = name, [], [], False
            elif kind == "a" and copula and subject and last:
                entities[-1][1].add(word)
            elif kind == "a":
                pending.append((word, "a"))
            elif kind == "v":
                between, pending = [*between, word], []


class WorldParser:
    """The small world's own grammar: exact and deterministic."""

    name = "world"

    def parse(self, captions: Sequence[str]) -> list[SceneGraph]:
        from cim.world.reader import scene_graph

        return [SceneGraph.of(scene_graph(caption)) for caption in captions]


class CachedParser:
    """A parser whose graphs are kept by caption, in one file for each version of it; only new captions are parsed."""

    def __init__(self, parser: Parser, version: str, folder: Path):
        self.name, self._parser = parser.name, parser
        self._path = folder / f"{short_digest(version)}.json"
        self._known = read_json(self._path) if self._path.is_file() else {}

    def parse(self, captions: Sequence[str]) -> list[SceneGraph]:
        new = [caption for caption in dict.fromkeys(captions) if caption not in self._known]
        for start in range(0, len(new), 256):  # in pieces, so that an interruption loses little
            piece = new[start : start + 256]
            self._known |= zip(piece, map(asdict, self._parser.parse(piece)), strict=True)
            write_json(self._path, self._known, indent=None)
        return [SceneGraph.of(self._known[caption]) for caption in captions]


def load_parser(name: str, wordnet: WordNet | None, device: str = "cpu", cache: Path = CACHE) -> Parser:
    """The parser pattern, factual or world; parses by the factual model are kept in folder `cache`.

    Raises:
        CimError: for another name, or where its model or WordNet is missing.
    """
    if name == "world":
        return WorldParser()
    if name not in ("pattern", "factual"):
        raise CimError(f"unknown parser '{name}'; use pattern, factual or world")
    if wordnet is None:
        raise CimError(f"parser {name} needs WordNet, even without synonyms; run 'make wordnet' or set wordnet: true")
    if name == "pattern":
        return PatternParser(wordnet)
    parser = FactualParser(wordnet, FACTUAL, device)
    return CachedParser(parser, parser.version, cache)
