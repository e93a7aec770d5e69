"""CAPTURE's matching beside the public one on the same parse graphs, encoder and machine.

    pip install --no-deps capture-metric FactualSceneGraph tabulate
    python benchmarks/matching.py --vectors capture_vectors.json

The file holds samples with "candidate_graph" and "reference_graph" as cim.capture.graphs.SceneGraph.of reads them; they
are repeated, with other partners, until there are --samples of them. The public package wants its encoder set by hand,
NLTK's downloads avoided and its parser, which is not used, left out.
"""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import numpy as np
import pandas as pd
from common import TEXT, arguments, report, seconds

from cim.capture.graphs import SceneGraph
from cim.capture.matching import Sample, score_all
from cim.capture.synonyms import WordNet, load_wordnet
from cim.encoders import load_text_encoder

FIELDS = [
    "capture",
    *(f"{kind}_{what}" for kind in ("object", "attribute", "relation") for what in ("precision", "recall", "f1")),
]


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

    def score(sample: Sample) -> list[float]:
        graphs = [(list(g.objects), g.attributes, list(g.relations)) for g in (sample.reference, sample.candidate)]
        return [float(value) for value in scorer.compute_f_score(*graphs)]

    return score


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--vectors", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument(
        "--peer-samples", type=int, default=120, help="scored by the peer, which takes as long for each"
    )
    options = parser.parse_args()
    vectors = json.loads(options.vectors.read_text())
    candidates = [SceneGraph.of(v["candidate_graph"]) for v in vectors]
    references = [SceneGraph.of(v["reference_graph"]) for v in vectors]
    n = len(vectors)
    rows = {}
    for count in (n, options.samples):
        # Round after round, every candidate meets the next reference.
        samples = [Sample(candidates[i % n], references[(i + i // n) % n]) for i in range(count)]
        encoder = load_text_encoder(TEXT)
        phrases = sorted(set().union(*(sample.phrases() for sample in samples)))
        encoder.encode(phrases[:32])
        embed = seconds(lambda: encoder.encode(phrases))  # noqa: B023
        wordnet = load_wordnet()
        out: list[dict] = []
        ours = seconds(lambda: out.extend(score_all(samples, encoder.encode, wordnet, "paper")))  # noqa: B023
        peer_score = public(load_wordnet(), encoder._model)
        asked = samples[: min(count, options.peer_samples)]
        theirs: list[list[float]] = []
        peer = seconds(lambda: theirs.extend(map(peer_score, asked))) / len(asked)  # noqa: B023
        mine = np.array([[row[field] for field in FIELDS] for row in out[: len(asked)]])
        rows[count] = {
            "phrases": len(phrases),
            "embed_each_once_s": embed,
            "ours_s": ours,
            "ours_over_embedding": ours / embed,
            "peer_s_a_sample": peer,
            "times_the_peer": peer * count / ours,
            "largest_difference": float(np.abs(mine - np.array(theirs)).max()),
        }
    report("matching", {"peer_samples": options.peer_samples, "samples": rows}, pd.DataFrame(rows))


if __name__ == "__main__":
    main()
