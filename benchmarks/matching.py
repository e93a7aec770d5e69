"""CAPTURE's and SC-Captioner's matching compared with the public code, on the same parse graphs, encoder and machine.

    pip install --no-deps capture-metric FactualSceneGraph tabulate
    python benchmarks/matching.py --vectors capture_vectors.json

The file holds samples with "candidate_graph" and "reference_graph" as SceneGraph.of reads them, "extra_objects" and
"extra_attributes". Each is scored once: a repeated one would cost us no further embedding. The public package
(CAPTURE) needs its encoder set by hand, and NLTK's downloads and its unused parser disabled. SC-Captioner's scores are
in no package: the peer computes them as published, on that package's matching, embedding the phrases of each
pair of objects when it comes to them.

With --labels FOLDER (SC-Captioner's layout) also the time of a whole evaluation: its references, each given to
another image, parsed by pattern, scored in both modes, with 10,000 resamples.
"""

import json
import sys
import types
from pathlib import Path

import numpy as np
import pandas as pd
from common import TEXT, arguments, report, seconds

from cim.data.labels import load_labels
from cim.encoders import load_text_encoder
from cim.evaluation.capture.evaluate import evaluate
from cim.evaluation.capture.graphs import SceneGraph
from cim.evaluation.capture.matching import Sample, Similarity, score
from cim.evaluation.capture.parsers import PatternParser
from cim.evaluation.capture.synonyms import WordNet, load_wordnet

KINDS, WHAT = ("object", "attribute", "relation"), ("precision", "recall", "f1")
FIELDS = ["capture", *(f"{kind}_{what}" for kind in KINDS for what in WHAT)]
FIELDS += ["sc_object_precision", "sc_object_recall", "sc_attribute_precision", "sc_attribute_recall"]


def public(wordnet: WordNet, model):
    """The public matching with this encoder and WordNet, its downloads and its parser left out."""
    parser = types.ModuleType("factual_scene_graph.parser.scene_graph_parser")
    parser.SceneGraphParser = None
    sys.modules[parser.__name__] = parser
    import nltk

    nltk.download = lambda *_, **__: True
    from capture_metric import capture

    capture.wordnet = wordnet._reader
    scorer = capture.CAPTURE.__new__(capture.CAPTURE)
    scorer.alpha, scorer.beta, scorer.gamma, scorer.eps = 0.5, 0.5, 0.2, 1e-6
    scorer.synonym_matching = scorer.soft_matching = True
    scorer.stop_words_list, scorer.text_encoder = set(), model

    def attributes(asked: dict, given: dict) -> float:
        names, others = list(asked), list(given)
        left, right = capture.encode_phrases(model, others, names, batch_size=4)
        alike = left.dot(right.T)
        weight = found = 0.0
        for i, name in enumerate(names):
            nearest = int(alike[:, i].argmax())
            said, true = capture.encode_phrases(model, list(given[others[nearest]]), list(asked[name]), batch_size=4)
            weight += alike[nearest, i] * len(true)
            found += alike[nearest, i] * said.dot(true.T).max(0).sum()
        return found / (weight + scorer.eps)

    def score(sample: Sample) -> list[float]:
        graphs = [(list(g.objects), g.attributes, list(g.relations)) for g in (sample.reference, sample.candidate)]
        values = list(scorer.compute_f_score(*graphs))
        said, true = graphs[1][0], graphs[0][0]
        known = list(dict.fromkeys([*true, *sample.extra_objects]))
        values.append(scorer.compute_match(said, known)[1] / (len(said) + scorer.eps))
        values.append(scorer.compute_match(said, true)[2] / (len(true) + scorer.eps))
        candidate, reference = sample.candidate.attributes, sample.reference.attributes
        if candidate and reference:
            values += [attributes(candidate, sample.extra_attributes), attributes(reference, candidate)]
        else:
            values += [float("nan")] * 2
        return [float(value) for value in values]

    return score


def score_all(samples: list[Sample], encode, wordnet: WordNet) -> list[dict[str, float]]:
    similarity = Similarity.of_samples(samples, encode, wordnet)
    return [score(sample, similarity, "paper") for sample in samples]


def whole_evaluation(folder: Path) -> dict[str, float]:
    """Seconds that the parts of `cim evaluate` take on a benchmark's own references, shifted by one image."""
    labels = load_labels(folder)
    ids = list(labels.references)
    captions = {"shifted": {0: dict(zip(ids, [labels.references[i] for i in [*ids[1:], ids[0]]], strict=True))}}
    encoder, wordnet = load_text_encoder(TEXT), load_wordnet()
    encoder.encode(["warm"])
    parser = PatternParser(wordnet)
    parse = seconds(lambda: parser.parse([*labels.references.values()]))
    whole = seconds(lambda: evaluate(captions, labels, PatternParser(wordnet), encoder.encode, wordnet))
    return {"captions": len(ids), "whole_s": whole, "of_it_parsing_about_s": 2 * parse}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--vectors", type=Path, required=True)
    parser.add_argument("--labels", type=Path, help="a benchmark's folder, to time a whole evaluation")
    options = parser.parse_args()
    samples = [
        Sample(
            SceneGraph.of(v["candidate_graph"]), SceneGraph.of(v["reference_graph"]), tuple(v["extra_objects"]),
            v["extra_attributes"],
        )
        for v in json.loads(options.vectors.read_text())
    ]  # fmt: skip
    count = len(samples)
    encoder = load_text_encoder(TEXT)
    every: set[str] = set()
    for sample in samples:
        every |= sample.candidate.phrases() | sample.reference.phrases()
        every.update(sample.extra_objects, sample.extra_attributes, *sample.extra_attributes.values())
    phrases = sorted(every)
    encoder.encode(phrases[:32])
    embed = seconds(lambda: encoder.encode(phrases))
    wordnet = load_wordnet()
    out: list[dict] = []
    ours = seconds(lambda: out.extend(score_all(samples, encoder.encode, wordnet)))
    peer_score = public(load_wordnet(), encoder._model)
    theirs: list[list[float]] = []
    peer = seconds(lambda: theirs.extend(map(peer_score, samples)))
    mine = np.array([[row[field] for field in FIELDS] for row in out])
    row = {
        "phrases": len(phrases),
        "embed_each_once_s": embed,
        "ours_s": ours,
        "ours_over_embedding": ours / embed,
        "peer_s_a_sample": peer / count,
        "times_the_peer": peer / ours,
        "largest_difference": float(np.nanmax(np.abs(mine - np.array(theirs)))),
    }
    result: dict = {"samples": {count: row}}
    if options.labels:
        result["evaluation"] = whole_evaluation(options.labels)
        print("a whole evaluation:", result["evaluation"])
    report("matching", result, pd.DataFrame({count: row}))


if __name__ == "__main__":
    main()
