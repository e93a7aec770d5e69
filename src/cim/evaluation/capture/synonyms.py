"""Synonyms from WordNet, wherever the user has it."""

from __future__ import annotations

import io
import os
import re
import warnings
from collections.abc import Callable
from functools import cache, cached_property
from pathlib import Path

import nltk
from nltk.corpus.reader.wordnet import WordNetCorpusReader

from cim.errors import CimError

FOLDERS = (Path("/usr/share/wordnet"), Path(".wordnet/usr/share/wordnet"))

# File numbers of WordNet 3.0 (lexnames(5WN)), which Debian documents but does not ship: name, part of speech.
_NOUNS = (
    "Tops act animal artifact attribute body cognition communication event feeling food group location motive object "
    "person phenomenon plant possession process quantity relation shape state substance time"
)
_VERBS = (
    "body change cognition communication competition consumption contact creation emotion motion perception "
    "possession social stative weather"
)
LEXNAMES = (
    [("adj.all", 3), ("adj.pert", 3), ("adv.all", 4)]
    + [(f"noun.{name}", 1) for name in _NOUNS.split()]
    + [(f"verb.{name}", 2) for name in _VERBS.split()]
    + [("adj.ppl", 3)]
)


class _FolderReader(WordNetCorpusReader):
    """NLTK's reader on plain WordNet database files."""

    def open(self, file):
        if file == "lexnames":
            return io.StringIO("".join(f"{i:02d}\t{name}\t{pos}\n" for i, (name, pos) in enumerate(LEXNAMES)))
        return super().open(file)

    def map_wn(self, version="wordnet"):
        return None  # a map to other languages' WordNets, which would want NLTK's own data


class WordNet:
    """Synonyms of words and phrases.

    Attributes:
        source: which WordNet it is, to be told beside the results.
    """

    def __init__(self, reader: WordNetCorpusReader, source: str):
        self._reader, self.source = reader, source
        self.synonyms: Callable[[str], frozenset[str]] = cache(self._synonyms)

    def _synonyms(self, phrase: str) -> frozenset[str]:
        """All lemmas of all senses of a phrase, itself among them where WordNet has it; empty where it does not."""
        senses = self._reader.synsets("_".join(phrase.split()))
        return frozenset(lemma for sense in senses for lemma in sense.lemma_names())

    def lemma(self, word: str, part: str) -> str:
        """The base form of a word as a noun (n), adjective (a) or verb (v); the shortest where there are several."""
        return min(self._reader._morphy(word, part) or [word], key=len)

    def use(self, word: str) -> dict[str, int]:
        """How common a word is in WordNet's tagged texts as noun (n), adjective (a) or verb (v), where it can be."""
        out = {}
        for part in "nav":
            bases = {base for base in (word, self.lemma(word, part)) if self._reader.synsets(base, pos=part)}
            if bases:
                # A sense counts a little even where the texts do not have it.
                senses = sum(len(self._reader.synsets(base, pos=part)) for base in bases)
                out[part] = senses + 10 * sum(self._counts.get((base, part), 0) for base in bases)
        return out

    @cached_property
    def _counts(self) -> dict[tuple[str, str], int]:
        """Times that each lemma was tagged as each part of speech, from cntlist.rev."""
        counts: dict[tuple[str, str], int] = {}
        with self._reader.open("cntlist.rev") as lines:
            for line in lines:
                key, _, count = line.split()
                lemma, _, rest = key.partition("%")
                part = {"1": "n", "2": "v", "3": "a", "5": "a"}.get(rest[0])
                if part:
                    counts[lemma, part] = counts.get((lemma, part), 0) + int(count)
        return counts

    def alike(self, a: str, b: str) -> bool:
        """Whether two phrases share a lemma of any of their senses."""
        return not self.synonyms(a).isdisjoint(self.synonyms(b))


def load_wordnet() -> WordNet:
    """WordNet from $CIM_WORDNET, NLTK's data, or Debian's files (packages wordnet-base and wordnet-sense-index).

    Raises:
        CimError: where there is none; nothing is downloaded.
    """
    asked = os.environ.get("CIM_WORDNET")
    if not asked and (nltk_data := _nltk_data()) is not None:
        return nltk_data
    for folder in [Path(asked)] if asked else FOLDERS:
        if (folder / "data.noun").is_file() and (folder / "index.sense").is_file():
            root = str(folder.resolve())
            nltk.data.path.append(root)  # NLTK opens nothing outside its data paths
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of other languages, which are not wanted
                reader = _FolderReader(root, omw_reader=None)
            return WordNet(reader, f"WordNet {_version(folder / 'data.noun')} in {folder}")
    raise CimError(
        f"no WordNet in {asked or 'the NLTK data or ' + ' or '.join(map(str, FOLDERS))}: run 'make wordnet', or "
        "python -m nltk.downloader wordnet, or set CIM_WORDNET to a folder with data.noun and index.sense"
    )


def _nltk_data() -> WordNet | None:
    from nltk import data
    from nltk.corpus import wordnet

    try:
        data.find("corpora/wordnet.zip")
    except LookupError:
        try:
            data.find("corpora/wordnet")
        except LookupError:
            return None
    wordnet.ensure_loaded()
    return WordNet(wordnet, f"WordNet {wordnet.get_version()} in NLTK's data")


def _version(path: Path) -> str:
    head = path.read_bytes()[:2000].decode("ascii", "replace")
    found = re.search(r"WordNet (\d+\.\d+)", head)
    return found.group(1) if found else "of unknown version"
