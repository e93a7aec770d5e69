"""Caption quality against the ground truth: precision, recall and F1 of stated facts, and questions answered.

And captions of known quality for scenes: of rising detail, and of rising accuracy.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from cim.world.language import FULL, Detail, corrupt, describe
from cim.world.reader import CaptionGraph, answer, read_caption, scene_graph
from cim.world.scenes import Scene, SceneObject
from cim.world.vocabulary import BACKGROUND, FAMILY_OF, generalisations

FACTS = ("object", "attribute", "relation", "background")
COUNTS = ("stated", "correct", "recalled", "true")
# From "there is an animal" to the full caption: what each grade keeps, each in addition to the one before.
FINENESS = {
    "kinds": Detail(name=0, family=0, colour=0, size=0, relation=0, background=0),
    "families": Detail(name=0, colour=0, size=0, relation=0, background=0),
    "names": Detail(colour=0, size=0, relation=0, background=0),
    "+ colours": Detail(size=0, relation=0, background=0),
    "+ sizes, background": Detail(relation=0),
    "+ relations": FULL,
}
MOST_ERRORS = 4


def stated_facts(caption: str) -> list[tuple[str, ...]]:
    """The facts that a caption states, each once: objects, their colours and sizes, relations by nouns, backgrounds."""
    graph = scene_graph(caption)
    looks = [(noun, word) for noun, words in graph["attributes"].items() for word in words]
    return [*((noun,) for noun in graph["objects"] if noun != BACKGROUND), *looks, *graph["relations"]]


def align(graph: CaptionGraph, scene: Scene) -> dict[int, SceneObject]:
    """The scene object of each caption object that has one, by index: one to one, finest nouns first.

    If a coarse noun fits several scene objects, the one whose colour and size agree best is taken.
    """
    aligned: dict[int, SceneObject] = {}
    for grade in range(3):  # name, family, kind
        for i, read in enumerate(graph.objects):
            free = [o for o in scene.objects if o not in aligned.values()]
            fitting = [o for o in free if generalisations(o.name)[grade] == read.noun]
            if i not in aligned and fitting:
                aligned[i] = max(fitting, key=lambda o: (o.colour in read.colours) + (o.size in read.sizes))
    return aligned


def count_facts(graph: CaptionGraph, scene: Scene) -> dict[str, int]:
    """How many facts of each kind a caption states, states correctly and recalls, and how many are true.

    Keys are "<fact>_<count>" for FACTS x COUNTS. An object counts as correct under any true noun ("a bird" for an
    owl), as recalled only under its name. A second mention of one object as a new one is a false statement.
    """
    truth = align(graph, scene)
    relations = set(scene.relations())
    named = sum(graph.objects[i].noun in FAMILY_OF for i in truth)
    looks = sum((o.colour in graph.objects[i].colours) + (o.size in graph.objects[i].sizes) for i, o in truth.items())
    stated = [(truth[a].name, relation, truth[b].name) for a, relation, b in graph.relations if {a, b} <= truth.keys()]
    related = sum(triple in relations for triple in stated)
    behind = int(scene.background in graph.backgrounds)
    counts = {  # in the order of COUNTS
        "object": (len(graph.objects), len(truth), named, len(scene.objects)),
        "attribute": (sum(len(o.colours | o.sizes) for o in graph.objects), looks, looks, 2 * len(scene.objects)),
        "relation": (len(graph.relations), related, related, len(relations)),
        "background": (len(graph.backgrounds), behind, behind, 1),
    }
    return {f"{fact}_{c}": n for fact, row in counts.items() for c, n in zip(COUNTS, row, strict=True)}


def score_captions(captions: list[str], scenes: list[Scene], questions: list[list[dict]]) -> pd.DataFrame:
    """One row a caption: the counts of `count_facts`, words, and the verdicts for each kind of question.

    Columns "qa_<kind>_<answer>" hold 1 if the right answer is <answer> (yes, no) and the caption gives it, 0 if it
    gives another or none, and NaN if that answer is not the right one. Columns "told_<kind>" hold 1 if it gives any.
    """
    rows = []
    for caption, scene, asked in zip(captions, scenes, questions, strict=True):
        graph = read_caption(caption)
        row: dict[str, float] = {**count_facts(graph, scene), "words": len(caption.split())}
        for q in asked:
            given = answer(q["question"], graph)
            row[f"qa_{q['kind']}_{q['answer']}"] = float(given == q["answer"])
            row[f"told_{q['kind']}"] = float(given != "n/a")
        rows.append(row)
    return pd.DataFrame(rows)


def graph_f1(scores: pd.DataFrame) -> np.ndarray:
    """F1 over all facts of each caption, (n,); 0 if nothing true is stated."""
    stated, correct, recalled, true = (scores[[f"{f}_{c}" for f in FACTS]].to_numpy().sum(axis=1) for c in COUNTS)
    precision, recall = correct / np.maximum(stated, 1), recalled / true
    return 2 * precision * recall / np.where(correct > 0, precision + recall, 1)


def graded_captions(image_ids: Sequence[str], scenes: Sequence[str], rng: np.random.Generator) -> pd.DataFrame:
    """Captions of every grade for each scene, given as JSON.

    Returns:
        Columns image_id, ladder ("fineness" or "accuracy"), level (higher is better), label, caption and quality,
        the F1 of the facts that the caption states.
    """
    rows = []
    for image_id, text in zip(image_ids, scenes, strict=True):
        scene = Scene.from_json(text)
        for level, (label, detail) in enumerate(FINENESS.items()):
            rows.append((image_id, "fineness", level, label, describe(scene, rng, detail), text))
        for errors in range(MOST_ERRORS + 1):
            caption = describe(corrupt(scene, rng, errors), rng)
            rows.append((image_id, "accuracy", MOST_ERRORS - errors, f"{errors} errors", caption, text))
    table = pd.DataFrame(rows, columns=["image_id", "ladder", "level", "label", "caption", "scene"])
    return table.assign(quality=quality(table["caption"].tolist(), table.pop("scene")))


def quality(captions: list[str], scenes: Sequence[str]) -> np.ndarray:
    """(n,) F1 of all facts of each caption, given its scene graph as JSON."""
    return graph_f1(score_captions(captions, [Scene.from_json(s) for s in scenes], [[]] * len(captions)))
