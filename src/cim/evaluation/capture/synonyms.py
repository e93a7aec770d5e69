"""Synonyms, base forms and frequencies of words from WordNet, in NLTK's data or in a folder."""

import io
import os
import warnings
from collections import Counter
from contextlib import suppress
from functools import cache, cached_property
from pathlib import Path

import nltk
from nltk.corpus import wordnet
from nltk.corpus.reader.wordnet import WordNetCorpusReader

from cim.errors import CimError

PARTS = {"1": "n", "2": "v", "3": "a", "4": "r", "5": "a"}  # of speech, by WordNet's numbers
MADE = ".wordnet/usr/share/wordnet"  # by `make wordnet`, in the repository: runs/NAME is two levels below it
FOLDERS = (Path("/usr/share/wordnet"), Path(MADE), Path("../..", MADE))


class _FolderReader(WordNetCorpusReader):
    """NLTK's reader on plain WordNet database files."""

    def open(self, file):
        # Debian does not ship the names of WordNet's 45 lexicographer files, which NLTK wants but nothing here reads.
        return io.StringIO("".join(f"{i} - -\n" for i in range(45))) if file == "lexnames" else super().open(file)

    def map_wn(self, version="wordnet"):
        return None  # a map to WordNets of other languages, which needs NLTK's own data


class WordNet:
    """Synonyms, base forms and frequencies.

    Attributes:
        source: which WordNet it is, for the metrics.
    """

    def __init__(self, reader: WordNetCorpusReader, source: str):
        self._reader, self.source = reader, source
        self.synonyms, self.lemma = cache(self.synonyms), cache(self.lemma)

    def synonyms(self, phrase: str) -> frozenset[str]:
        """All lemmas of all senses of a phrase, including itself; empty where WordNet does not have it."""
        senses = self._reader.synsets("_".join(phrase.split()))
        return frozenset(lemma for sense in senses for lemma in sense.lemma_names())

    def alike(self, a: str, b: str) -> bool:
        """Whether two phrases share a lemma of any of their senses."""
        return not self.synonyms(a).isdisjoint(self.synonyms(b))

    def lemma(self, word: str, part: str) -> str:
        """The base form of a word as a noun (n), adjective (a) or verb (v); the shortest where there are several."""
        return min(self._reader._morphy(word, part) or [word], key=len)

    def use(self, word: str) -> dict[str, int]:
        """How common a word is in WordNet's tagged texts, for those of noun (n), adjective (a), verb (v) it can be."""
        out = {}
        for part in "nav":
            bases = {word, self.lemma(word, part)}
            if senses := sum(len(self._reader.synsets(base, part)) for base in bases):
                # A sense counts a little even where the texts do not have it.
                out[part] = senses + 10 * sum(self._counts[base, part] for base in bases)
        return out

    @cached_property
    def _counts(self) -> Counter[tuple[str, str]]:
        """How often each lemma is tagged as each part of speech, from lines "lemma%5:... sense count"."""
        counts: Counter[tuple[str, str]] = Counter()
        with self._reader.open("cntlist.rev") as lines:
            for key, _, count in map(str.split, lines):
                lemma, _, sense = key.partition("%")
                counts[lemma, PARTS[sense[0]]] += int(count)
        return counts


def load_wordnet() -> WordNet:
    """WordNet from $CIM_WORDNET, NLTK's data, or Debian's files (packages wordnet-base and wordnet-sense-index).

    Raises:
        CimError: where there is none; nothing is downloaded.
    """
    asked = os.environ.get("CIM_WORDNET")
    if not asked:
        with suppress(LookupError):
            return WordNet(wordnet, f"WordNet {wordnet.get_version()} in NLTK's data")
    for folder in [Path(asked)] if asked else FOLDERS:
        if (folder / "data.noun").is_file() and (folder / "index.sense").is_file():
            root = str(folder.resolve())
            nltk.data.path.append(root)  # NLTK opens nothing outside its data paths
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about other languages, which are not needed
                reader = _FolderReader(root, omw_reader=None)
            return WordNet(reader, f"WordNet {reader.get_version()} in {folder}")
    raise CimError(
        f"no WordNet in {asked or 'the NLTK data or ' + ' or '.join(map(str, FOLDERS[:2]))}: run 'make wordnet', or "
        "python -m nltk.downloader wordnet, or set CIM_WORDNET to a folder with data.noun and index.sense"
    )
