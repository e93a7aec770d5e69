"""Encoding captions: SentenceTransformer's defaults compared with other batch sizes and bfloat16, in one run.

    python benchmarks/encoding.py --captions captions.json

Reported: the largest distance between embeddings. benchmarks/reward.py measures what it changes in the rewards.
"""

import numpy as np
import pandas as pd
import torch
from common import TEXT, arguments, grouped_captions, median_seconds, report, seed_captions

from cim.encoders import load_text_encoder


def main() -> None:
    options = arguments(__doc__).parse_args()
    captions, _ = grouped_captions(seed_captions(options.captions), options.count)
    model = load_text_encoder(TEXT)._model
    reference = model.encode(captions, normalize_embeddings=True)
    default = median_seconds(lambda: model.encode(captions, normalize_embeddings=True), options.repeats)
    rows = {"SentenceTransformer's defaults": {"seconds": default, "times_default": 1.0, "largest_distance": 0.0}}
    for precision in ("float32", "bfloat16"):
        for batch in (16, 32, 64, 128, 256):
            encoder = load_text_encoder(TEXT, batch, precision=precision)
            taken = median_seconds(lambda encoder=encoder: encoder.encode(captions), options.repeats)
            distance = np.linalg.norm(encoder.encode(captions) - reference, axis=1).max()
            rows[f"{precision}, batches of {batch}"] = {
                "seconds": taken,
                "times_default": default / taken,
                "largest_distance": float(distance),
            }
    words = float(np.mean([len(c.split()) for c in captions]))
    name = "encoding" + ("-gpu" if torch.cuda.is_available() else "")
    report(name, {"captions": len(captions), "words": words, "ways": rows}, pd.DataFrame(rows).T)


if __name__ == "__main__":
    main()
