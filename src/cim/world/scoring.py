"""Caption quality against the ground truth: precision, recall and F1 of stated facts, and questions answered."""

from __future__ import annotations

import numpy as np
import pandas as pd

from cim.world.reader import CaptionGraph, answer, read_caption
from cim.world.scenes import Scene
from cim.world.vocabulary import FAMILY_OF, generalisations

FACTS = ("object", "attribute", "relation", "background")
COUNTS = ("stated", "correct", "recalled", "true")


def align(graph: CaptionGraph, scene: Scene) -> list[int | None]:
    """For each caption object the scene object it is of, one to one, finest nouns first; None where none is.

    Among scene objects that a coarse noun fits, the one whose colour and size agree best is taken.
    """
    aligned: list[int | None] = [None] * len(graph.objects)
    free = set(range(len(scene.objects)))
    for grade in range(3):  # name, family, kind
        for i, read in enumerate(graph.objects):
            if aligned[i] is not None:
                continue
            fitting = [j for j in sorted(free) if generalisations(scene.objects[j].name)[grade] == read.noun]
            if fitting:
                aligned[i] = max(
                    fitting,
                    key=lambda j: (scene.objects[j].colour in read.colours) + (scene.objects[j].size in read.sizes),
                )
                free.remove(aligned[i])
    return aligned


def count_facts(caption: str, scene: Scene) -> dict[str, int]:
    """How many facts of each sort a caption states, states correctly and recalls, and how many are true.

    Keys are "<fact>_<count>" for FACTS x COUNTS. An object counts as correct under any true noun ("a
    bird" for an owl), as recalled only under its name. A second mention of one object as a new one is
    a false statement.
    """
    graph = read_caption(caption)
    aligned = align(graph, scene)
    truth = {i: scene.objects[j] for i, j in enumerate(aligned) if j is not None}
    relations = set(scene.relations())
    stated = {
        "object": len(graph.objects),
        "attribute": sum(len(o.colours) + len(o.sizes) for o in graph.objects),
        "relation": len(graph.relations),
        "background": len(graph.backgrounds),
    }
    correct = {
        "object": len(truth),
        "attribute": sum(
            (o.colour in graph.objects[i].colours) + (o.size in graph.objects[i].sizes) for i, o in truth.items()
        ),
        "relation": sum(
            a in truth and b in truth and (truth[a].name, relation, truth[b].name) in relations
            for a, relation, b in graph.relations
        ),
        "background": int(scene.background in graph.backgrounds),
    }
    named = sum(graph.objects[i].noun in FAMILY_OF for i in truth)
    true = {
        "object": len(scene.objects),
        "attribute": 2 * len(scene.objects),
        "relation": len(relations),
        "background": 1,
    }
    return {
        f"{fact}_{count}": value[fact]
        for count, value in zip(COUNTS, (stated, correct, {**correct, "object": named}, true), strict=True)
        for fact in FACTS
    }


def score_captions(captions: list[str], scenes: list[Scene], questions: list[list[dict]]) -> pd.DataFrame:
    """One row a caption: the counts of `count_facts`, words, and per kind of question the verdicts.

    Columns "qa_<kind>_<answer>" hold 1 where the right answer is <answer> (yes, no) and the caption
    gives it, 0 where it gives another or does not tell, and NaN where that answer is not the right one.
    """
    rows = []
    for caption, scene, asked in zip(captions, scenes, questions, strict=True):
        row: dict[str, float] = dict(count_facts(caption, scene))
        row["words"] = len(caption.split())
        graph = read_caption(caption)
        for q in asked:
            row[f"qa_{q['kind']}_{q['answer']}"] = float(answer(q["question"], graph) == q["answer"])
            row[f"told_{q['kind']}"] = float(answer(q["question"], graph) != "n/a")
        rows.append(row)
    return pd.DataFrame(rows)


def graph_f1(scores: pd.DataFrame) -> np.ndarray:
    """F1 over all facts of each caption, (n,); 0 where nothing true is stated."""
    stated, correct, recalled, true = (scores[[f"{fact}_{c}" for fact in FACTS]].sum(axis=1) for c in COUNTS)
    precision = np.divide(correct, stated, out=np.zeros(len(scores)), where=stated > 0)
    recall = recalled / true
    total = precision + recall
    return np.divide(2 * precision * recall, total, out=np.zeros(len(scores)), where=total > 0)
