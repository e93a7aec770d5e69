"""Several captions of one image: how much of what they say one of them says, and how often they contradict."""

import operator
from collections.abc import Callable, Mapping, Sequence
from itertools import chain, combinations

import numpy as np
import pandas as pd

from cim.evaluation.capture.graphs import SceneGraph
from cim.evaluation.statistics import Bootstrap, ratio, with_interval

# Attributes of one kind exclude each other, unless they mean the same: words between two commas.
KINDS = {
    "colour": "black, white, gray grey silver, red, orange, yellow golden gold blond blonde, brown tan beige, green, "
    "blue, purple violet, pink",
    "size": "small little tiny, large big huge giant",
    "number": "2 two, 3 three, 4 four, 5 five, 6 six, 7 seven, 8 eight, 9 nine, 10 ten, 11 eleven, 12 twelve",
}
MEANING = {
    word: (kind, alike) for kind, meanings in KINDS.items() for alike in meanings.split(", ") for word in alike.split()
}


def said_by_one(
    graphs: Sequence[Sequence[SceneGraph]], alike: Callable[[str, str], bool] = operator.eq
) -> pd.DataFrame:
    """How much of what all captions of an image say one of them says, and how often they contradict each other.

    The facts of a graph are its objects, (object, attribute) pairs and relations. Two captions *compare* where both
    give the same object an attribute of the same kind (colour, size, number), and *contradict* where they then share
    none: "a red car" contradicts "a blue car" and not "a red and blue car". Where an image has several objects of a
    name, captions may mean different ones, so this is the most that they can contradict.

    Args:
        graphs: of each image those of its captions.
        alike: whether two names mean one object; the first of them is then its name.

    Returns:
        One row an image: `object_share` and `fact_share` (mean over captions of the share of the union; 0 where the
        union is empty), `any_object` and `any_fact` (1, or 0 where it is), and the numbers `compared` and
        `contradicted`, over all pairs of captions, objects and kinds.
    """
    return pd.DataFrame([_said_by_one(own, alike) for own in graphs])


def _said_by_one(graphs: Sequence[SceneGraph], alike: Callable[[str, str], bool]) -> dict[str, float]:
    names: dict[str, str] = {}
    for name in chain.from_iterable(graph.objects for graph in graphs):
        if name not in names:
            names[name] = next((kept for kept in names.values() if alike(name, kept)), name)
    objects = [{names[name] for name in graph.objects} for graph in graphs]
    attributes = [{(names.get(name, name), word) for name, word in graph.pairs} for graph in graphs]
    relations = [{(names.get(a, a), by, names.get(b, b)) for a, by, b in graph.relations} for graph in graphs]
    facts = [set().union(*parts) for parts in zip(objects, attributes, relations, strict=True)]
    row: dict[str, float] = {}
    for name, stated in (("object", objects), ("fact", facts)):
        union = set().union(*stated)
        row |= {f"{name}_share": np.mean([len(own) for own in stated]) / max(1, len(union)), f"any_{name}": bool(union)}
    meant = []  # of a caption: (object, kind) -> meanings
    for pairs in attributes:
        meant.append(own := {})
        for name, (kind, meaning) in ((name, MEANING[word]) for name, word in pairs if word in MEANING):
            own.setdefault((name, kind), set()).add(meaning)
    disjoint = [a[key].isdisjoint(b[key]) for a, b in combinations(meant, 2) for key in a.keys() & b.keys()]
    return {**row, "compared": len(disjoint), "contradicted": sum(disjoint)}


def one_annotator(said: pd.DataFrame, seed: int, resamples: int) -> dict[str, dict]:
    """Means over images of said_by_one's shares of `objects` and `facts`, and of all comparisons the share of
    `contradictions`, as cells with 95 % intervals over images; NaN where there is nothing to divide by."""

    def metrics(sums: np.ndarray) -> dict[str, np.ndarray]:
        totals = dict(zip(said.columns, sums.T, strict=True))
        return {
            "objects": ratio(totals["object_share"], totals["any_object"]),
            "facts": ratio(totals["fact_share"], totals["any_fact"]),
            "contradictions": ratio(totals["contradicted"], totals["compared"]),
        }

    bootstrap = Bootstrap(len(said), {"": 1}, resamples, np.random.default_rng(seed))
    found = bootstrap.estimates("", said.to_numpy(float)[None], metrics)
    return {name: estimate.cell() for name, estimate in found.items()}


def one_annotator_text(one: Mapping[str, Mapping[str, Mapping]]) -> str:
    """One sentence on the cells of `one_annotator`, by the annotators' name."""

    def each(what: str) -> str:
        return ", ".join(f"{with_interval(cells[what])} % ({name})" for name, cells in one.items())

    return (
        f"Of all facts that the captions of an image state, one caption states {each('facts')}. Where two captions "
        f"give an object a colour, size or number, they contradict each other in {each('contradictions')}."
    )
