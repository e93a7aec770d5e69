"""From captions to scene graphs: FactualSceneGraph's model as in the paper, or a pattern that needs no model.

Both lemmatise with WordNet, as the public code does, so that "birds" and "bird" are one object.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Protocol

from tqdm.auto import tqdm

from cim.data.labels import sentences_of
from cim.errors import CimError
from cim.evaluation.capture.graphs import SceneGraph
from cim.evaluation.capture.synonyms import WordNet

FACTUAL = "lizhuang144/flan-t5-base-VG-factual-sg"


class Parser(Protocol):
    """Turns captions into graphs; `name` says how, and changes when the graphs would."""

    name: str

    def parse(self, captions: Sequence[str]) -> list[SceneGraph]: ...


class FactualParser:
    """The paper's parser: FACTUAL's T5 from the hub (Li et al. 2023), a sentence at a time, all of a run in batches.

    Loaded by transformers itself, since its authors' package does not run with transformers 5. Sentences of like
    length share a batch, and what is parsed does not depend on what else is in it.

    Raises:
        CimError: where the model cannot be had.
    """

    def __init__(self, wordnet: WordNet, checkpoint: str = FACTUAL, device: str = "cpu", batch: int = 64):
        from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

        from cim.captioners.models import why_not_loaded

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(checkpoint)
            self._model = AutoModelForSeq2SeqLM.from_pretrained(checkpoint).to(device).eval()
        except (OSError, ValueError) as error:
            raise CimError(f"parser factual: '{checkpoint}' could not be loaded: {why_not_loaded(error)}") from None
        self.name, self._wordnet, self._batch = f"factual:{checkpoint}", wordnet, batch

    def parse(self, captions: Sequence[str]) -> list[SceneGraph]:
        parts = [sentences_of(caption) for caption in captions]
        distinct = sorted({sentence for part in parts for sentence in part}, key=lambda text: (len(text), text))
        parsed: dict[str, dict] = {}
        for start in tqdm(range(0, len(distinct), self._batch), desc="parsing", mininterval=2):
            batch = distinct[start : start + self._batch]
            parsed |= zip(batch, map(read_facts, self._generate(batch)), strict=True)
        return [merge([parsed[sentence] for sentence in part], self._wordnet) for part in parts]

    def _generate(self, sentences: Sequence[str]) -> list[str]:
        import torch

        asked = [f"Generate Scene Graph: {sentence}" for sentence in sentences]
        inputs = self._tokenizer(asked, max_length=64, truncation=True, padding=True, return_tensors="pt")
        with torch.inference_mode():
            out = self._model.generate(
                input_ids=inputs["input_ids"].to(self._model.device),
                attention_mask=inputs["attention_mask"].to(self._model.device),
                num_beams=5,
                max_length=128,
                early_stopping=True,
            )
        return self._tokenizer.batch_decode(out, skip_special_tokens=True)


def read_facts(text: str) -> dict:
    """The entities and relations of FACTUAL's notation.

    Facts are "( subject , relation , object )", attributes "( subject , is , attribute )"; a number is no
    attribute, and one fact alone may name an object only. What was cut short is dropped.

    >>> read_facts("( dog , is , black ) , ( dog , on , grass )")["relations"]
    [{'subject': 0, 'relation': 'on', 'object': 1}]
    """
    whole = text.strip().endswith(")")
    facts = [" ".join(fact.strip(" ()").split()) for fact in re.split(r"\)\s*,", text)]
    if not whole:
        facts = facts[:-1] if len(facts) > 1 else [facts[0].partition(",")[0].strip()]
    facts = sorted({fact for fact in facts if fact})
    entities: dict[str, set[str]] = {}
    relations = []
    for fact in facts:
        parts = [part.strip() for part in fact.split(",")]
        if len(parts) == 3:
            subject, relation, other = parts
            attributes = entities.setdefault(subject, set())
            if relation != "is":
                entities.setdefault(other, set())
                relations.append((subject, relation, other))
            elif not other.isdigit():
                attributes.add(other)
        elif len(facts) == 1:
            entities.setdefault(parts[0], set())
    at = {name: i for i, name in enumerate(entities)}
    return {
        "entities": [{"head": name, "attributes": words} for name, words in entities.items()],
        "relations": [{"subject": at[s], "relation": r, "object": at[o]} for s, r, o in relations],
    }


def merge(sentences: Sequence[dict], wordnet: WordNet) -> SceneGraph:
    """One graph of the graphs of a caption's sentences, in FactualSceneGraph's form, each thing once."""
    objects: dict[str, None] = {}
    attributes: dict[str, dict[str, None]] = {}
    relations: dict[tuple[str, str, str], None] = {}
    for graph in sentences:
        heads = [wordnet.lemma(entity["head"], "n") for entity in graph["entities"]]
        for head, entity in zip(heads, graph["entities"], strict=True):
            objects[head] = None
            for attribute in sorted(entity["attributes"]):
                if " of" not in attribute:
                    attributes.setdefault(head, {})[wordnet.lemma(attribute, "a")] = None
        for r in graph["relations"]:
            relations[heads[r["subject"]], r["relation"], heads[r["object"]]] = None
    return SceneGraph(tuple(objects), {name: tuple(words) for name, words in attributes.items()}, tuple(relations))


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


PREPOSITIONS = _words(
    """in on at with of by near behind beside besides between under underneath over above below beneath across along
    around against among inside outside into onto through toward towards from to before after beyond upon within
    alongside next front top left right bottom side for like off up down as"""
)
STOP = _words(
    """a an the this that these those there here it its they them their he his him she her we our us you your i my
    is are was were be been being has have had do does did can could will would may might must shall should not
    no and or but so if then than also very too just only some any each every another other others such which
    who whom whose what when where while because both either neither all most many much more several few lot
    image picture photo photograph view scene background foreground one ones thing something someone anything
    front side top bottom left right middle center centre see look appear seem visible present"""
)
NUMBERS = _words("two three four five six seven eight nine ten eleven twelve multiple")
DETERMINERS = _words("a an the this that these those his her its their my our your some each every another")


class PatternParser:
    """Noun phrases and what stands between them, by WordNet's parts of speech: no model, the same graph every time.

    An adjective, number or participle before a noun is its attribute, as is one after "is". Verbs and prepositions
    between two noun phrases of a clause are a relation. It knows nothing of the clauses' structure beyond that.
    """

    name = "pattern:1"

    def __init__(self, wordnet: WordNet):
        self._wordnet = wordnet
        self._kind = cache(self._kind_of)

    def parse(self, captions: Sequence[str]) -> list[SceneGraph]:
        return [merge([self._sentence(s) for s in sentences_of(caption)], self._wordnet) for caption in captions]

    def _kind_of(self, word: str) -> str:
        """n, a, v or "" for a word, by how often WordNet's texts use it so; words it does not know are names."""
        if word in NUMBERS or word.isdigit():
            return "a"
        counts = self._wordnet.use(word)
        if not any(counts.values()):
            return "n" if counts or word.isalpha() else ""
        return max("nav", key=lambda kind: counts.get(kind, 0))

    def _sentence(self, sentence: str) -> dict:
        entities: list[dict] = []
        relations: list[dict] = []
        for clause in re.split(r"[,;:()]|\bwhile\b|\bbut\b", sentence.lower()):
            self._clause(re.findall(r"[a-z0-9]+(?:[-'][a-z0-9]+)*", clause), entities, relations)
        return {"entities": entities, "relations": relations}

    def _clause(self, words: list[str], entities: list[dict], relations: list[dict]) -> None:
        subject, between, pending = None, [], []
        copula = False
        for i, word in enumerate(words):
            after = words[i + 1] if i + 1 < len(words) else ""
            if word in ("is", "are", "was", "were"):
                copula = True
            if word in PREPOSITIONS:
                between.append(word)
                pending = []
                continue
            if word in STOP:
                if word == "and":
                    between.append(word)
                continue
            kind = self._kind(word)
            verbal = word.endswith(("ing", "ed")) and self._wordnet.lemma(word, "v") != word
            before = words[i - 1] if i else ""
            if verbal and before not in DETERMINERS:
                kind = "v"
            elif kind == "v" and (before in DETERMINERS | PREPOSITIONS or (pending and pending[-1][0] == before)):
                # After "the", "white" or "with" comes a noun where the word can be one.
                kind = "n" if "n" in self._wordnet.use(word) else "v"
            if kind == "n" and after and after not in STOP | PREPOSITIONS and self._kind(after) == "n":
                # A noun before a noun belongs to its name: "tennis racket".
                pending.append((word, "n"))
            elif kind == "n":
                compound = [w for w, k in pending if k == "n"]
                head = " ".join([*compound, word])
                entities.append({"head": head, "attributes": {w for w, k in pending if k == "a"}})
                here = len(entities) - 1
                said = [w for w in between if w != "and"]
                if subject is not None and said and "and" not in between:
                    relations.append({"subject": subject, "relation": " ".join(said), "object": here})
                subject, between, pending, copula = here, [], [], False
            elif kind == "a":
                if copula and subject is not None and (not after or after in STOP | PREPOSITIONS):
                    entities[subject]["attributes"].add(word)
                else:
                    pending.append((word, "a"))
            elif kind == "v":
                between.append(word)
                pending = []


class WorldParser:
    """The small world's own: exact and deterministic."""

    name = "world"

    def parse(self, captions: Sequence[str]) -> list[SceneGraph]:
        from cim.world.graphs import scene_graph

        return [SceneGraph.of(scene_graph(caption)) for caption in captions]


def load_parser(name: str, wordnet: WordNet | None, device: str = "cpu") -> Parser:
    """pattern, factual or world.

    Raises:
        CimError: for another name, or where its parts are missing.
    """
    if name == "world":
        return WorldParser()
    if name not in ("pattern", "factual"):
        raise CimError(f"parser '{name}' is not known; there are pattern, factual and world")
    if wordnet is None:
        raise CimError(f"parser {name}: it needs WordNet, also where synonyms are not wanted; run 'make wordnet'")
    return FactualParser(wordnet, device=device) if name == "factual" else PatternParser(wordnet)


class CachedParser:
    """A parser that keeps its graphs by caption, in one file a parser; only new captions are parsed."""

    def __init__(self, parser: Parser, folder: Path):
        self.name, self._parser = parser.name, parser
        self._path = Path(folder) / f"{hashlib.sha256(parser.name.encode()).hexdigest()[:16]}.jsonl"

    def parse(self, captions: Sequence[str]) -> list[SceneGraph]:
        known = self._known
        new = [c for c in dict.fromkeys(captions) if self._key(c) not in known]
        # In pieces, so that a kill loses little.
        for start in range(0, len(new), 256):
            piece = new[start : start + 256]
            graphs = self._parser.parse(piece)
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as lines:
                for caption, graph in zip(piece, graphs, strict=True):
                    known[self._key(caption)] = graph
                    value = {"objects": graph.objects, "attributes": graph.attributes, "relations": graph.relations}
                    lines.write(json.dumps({"key": self._key(caption), "graph": value}) + "\n")
        return [known[self._key(caption)] for caption in captions]

    @staticmethod
    def _key(caption: str) -> str:
        return hashlib.sha256(caption.encode("utf-8", "surrogatepass")).hexdigest()

    @cached_property
    def _known(self) -> dict[str, SceneGraph]:
        known = {}
        if self._path.is_file():
            for line in self._path.read_text(encoding="utf-8").splitlines():
                try:
                    row = json.loads(line)
                    known[row["key"]] = SceneGraph.of(row["graph"])
                except (ValueError, KeyError):
                    continue  # a line that a kill cut short
        return known
