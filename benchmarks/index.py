"""Kinds of index against gallery size: time to build and to search, memory, and what they do to the reward.

    python benchmarks/index.py --sizes 10000 100000 1000000

Caption vectors are synthetic, between those of real captions (common.synthetic_texts). Every kind searches for
the same captions, in one batch; recall and rewards are compared with the exact search. Draws
results/benchmarks/index.png, with the slope of each kind on a log-log scale.
"""

import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from common import (
    GALLERIES,
    GROUP,
    KINDS,
    RESULTS,
    TEXT,
    arguments,
    changes,
    factory,
    grouped_captions,
    images_of,
    median_seconds,
    recall_at_k,
    report,
    seed_captions,
    synthetic_texts,
)

from cim import rewards
from cim.encoders import load_text_encoder
from cim.gallery.search import ExactSearch, build_index, open_search
from cim.report import figures

K = 3


def vectors_of(rows: int, seeds: np.ndarray) -> np.ndarray:
    """Caption vectors for so many rows, made once."""
    path = GALLERIES / f"gallery-{rows}" / "texts.npy"
    if not path.is_file():
        path = GALLERIES / f"texts-{rows}.npy"
    if not path.is_file():
        GALLERIES.mkdir(parents=True, exist_ok=True)
        synthetic_texts(seeds, rows, path)
    return np.load(path, mmap_mode="c")


def reward_of(found: np.ndarray, texts: np.ndarray, source: np.ndarray) -> np.ndarray:
    """GRC + QIR of what was found."""
    # Without noise, image vectors can be made from those of the captions when they are needed.
    retrieved = images_of(texts[found.ravel()], noise=0.0).reshape(*found.shape, -1)
    weights = rewards.rank_weights(K)
    return rewards.gallery_representation_consistency(retrieved) + rewards.query_gallery_image_relevance(
        source, retrieved, weights
    )


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 30_000, 100_000, 300_000, 1_000_000])
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--recall", type=float, default=0.99)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    encoder = load_text_encoder(TEXT)
    seed_texts = seed_captions(options.captions)
    seeds = encoder.encode(seed_texts)
    captions, image = grouped_captions(seed_texts, options.count)
    queries = encoder.encode(captions)
    source = images_of(seeds, noise=0.0)[image]

    rows = []
    for size in options.sizes:
        texts = vectors_of(size, seeds)
        start = time.perf_counter()
        exact = ExactSearch(texts, device)
        made = time.perf_counter() - start
        truth = exact.search(queries, K)
        expected = reward_of(truth, texts, source)
        for kind in options.kinds:
            start = time.perf_counter()
            path = GALLERIES / f"index-{size}.faiss"
            if kind == "exact":
                search, built, effort, candidates = exact, made, 0, 0
            else:
                tuned = build_index(texts, factory(kind, size), options.recall, path)
                effort, candidates = tuned["effort"], tuned["candidates"]
                search = open_search({"kind": factory(kind, size), "file": path.name, **tuned}, texts, GALLERIES)
                built = time.perf_counter() - start
            found = search.search(queries, K)
            row = {
                "rows": size,
                "kind": kind,
                "build": built,
                "search": median_seconds(lambda search=search: search.search(queries, K), options.repeats),
                "effort": effort,
                "candidates": candidates,
                "recall": recall_at_k(found, truth),
                "index_gib": path.stat().st_size / 2**30 if kind != "exact" else 0.0,
                "vectors_gib": texts.nbytes / 2**30,
                **changes(reward_of(found, texts, source), expected),
            }
            rows.append(row)
            print(f"{size:>10,} {kind:<11} {row['search'] * 1e3 / len(queries):8.4f} ms a caption", flush=True)
            path.unlink(missing_ok=True)
    frame = pd.DataFrame(rows)
    slopes = draw(frame, len(queries))
    shown = frame.assign(search=1e3 * frame["search"] / len(queries))
    shown = shown.rename(
        columns={
            "build": "build s", "search": "search ms a caption", "recall": "recall@3", "index_gib": "index GiB",
            "reward_mean_change": "mean change", "rank_correlation_in_groups": "rank correlation in fives",
        }
    )  # fmt: skip
    columns = ["build s", "search ms a caption", "effort", "candidates", "recall@3", "index GiB", "mean change"]
    table = shown.set_index(["rows", "kind"])[[*columns, "rank correlation in fives"]]
    result = {"captions": len(captions), "group": GROUP, "k": K, "slopes": slopes, "measured": rows}
    report("index" + ("-gpu" if device == "cuda" else ""), result, table)
    print("slopes of log search time against log rows:", {k: round(v, 2) for k, v in slopes.items()})


def draw(frame: pd.DataFrame, queries: int, path: Path = RESULTS / "index.png") -> dict[str, float]:
    """Search time against rows, both logarithmic; returns the slope of each kind."""
    figures.style()
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    slopes = {}
    for kind, part in frame.groupby("kind", sort=False):
        if len(part) > 1:
            slopes[kind] = float(np.polyfit(np.log(part["rows"]), np.log(part["search"]), 1)[0])
        label = f"{kind}, slope {slopes[kind]:.2f}" if kind in slopes else kind
        left.plot(part["rows"], 1e3 * part["search"] / queries, "o-", label=label)
        right.plot(part["rows"], part["recall"], "o-", label=kind)
    left.set(xscale="log", yscale="log", xlabel="gallery rows", ylabel="ms a caption", title="search")
    right.set(xscale="log", xlabel="gallery rows", ylabel="recall@3", title="found of the exact nearest three")
    left.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figures.save(figure, path)
    return slopes


if __name__ == "__main__":
    main()
