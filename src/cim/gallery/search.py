"""Nearest captions: an exact search by matrix product, and FAISS indexes whose candidates are ranked exactly.

Whatever the kind, the vectors themselves lie in one float16 array on disk, memory-mapped and shared by all
processes, and the ranks come from cosines with them in float32. The kinds differ in how they
find the candidates:

    exact        all of them: one blocked matrix product for the whole batch of queries
    ivf          FAISS IVF with 8-bit codes: only the lists nearest to a query
    hnsw         FAISS HNSW with 8-bit codes: a walk along a graph; slow to build, fast for single queries
    compressed   FAISS IVF with 4-bit codes: half the memory, more candidates to rank
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import faiss
import numpy as np
import torch
from torch.nn.functional import normalize
from tqdm.auto import tqdm

from cim.errors import CimError
from cim.processes import computes_in_bfloat16

KINDS = ("exact", "ivf", "hnsw", "compressed")
# Below this many rows a batch is searched exactly in a moment, and nothing else is worth its build.
SMALL = 200_000
BLOCK = 65_536  # rows read, written or added at once
SCAN = 4096  # rows multiplied at once on a CPU, so that they and their scores stay in its caches
GROUP = 16  # rows of which the coarse pass keeps only the best score
# Candidates that are ranked exactly, at least: the coarser the codes, the more.
CANDIDATES = {"ivf": 32, "hnsw": 64, "compressed": 256}
SPARE_GROUPS = 12  # how many more groups than asked are ranked exactly, for what the coarse pass rounds


class Search(Protocol):
    """What a gallery searches with."""

    kind: str

    def search(self, queries: np.ndarray, k: int) -> np.ndarray:
        """(n, k) rows, best first, for (n, d) float32 queries."""
        ...


def blocks(n: int, size: int = BLOCK) -> Iterator[slice]:
    """Slices that cover range(n)."""
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


def as_tensor(vectors: np.ndarray) -> torch.Tensor:
    """The array as a tensor on the same memory; a read-only one is mapped anew, for torch wants to be able to write."""
    if not vectors.flags.writeable and isinstance(vectors, np.memmap):
        vectors = np.memmap(vectors.filename, vectors.dtype, "c", vectors.offset, vectors.shape)
    return torch.from_numpy(vectors)


class ExactSearch:
    """Inner product with every vector.

    A small gallery is held in float32 and multiplied once. A large one is read block by block in two
    passes: scores in the fastest type that the hardware has, of which the best of every sixteen rows is
    kept; then float32 scores of the rows in the best groups. The coarse scores are taken relative to the best
    found so far, where a short float is finest: what the first pass drops by mistake is within 0.001 of cosine
    of what is found instead, and only where hundreds of captions lie that close (benchmarks/ measure it).

    Args:
        vectors: (N, d) float16, normally memory-mapped; moved to the device where that is a GPU.
    """

    kind = "exact"

    def __init__(self, vectors: np.ndarray, device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        self._vectors = as_tensor(vectors).to(self.device)
        self._small = normalize(self._vectors.float(), dim=1) if len(vectors) <= BLOCK else None
        if self.device.type == "cuda":
            self._coarse = torch.float16
        else:
            self._coarse = torch.bfloat16 if computes_in_bfloat16(self.device) else torch.float32

    @torch.inference_mode()
    def search(self, queries: np.ndarray, k: int) -> np.ndarray:
        q = torch.from_numpy(np.ascontiguousarray(queries, np.float32)).to(self.device)
        if self._small is not None:
            return (q @ self._small.T).topk(k, dim=1).indices.cpu().numpy()
        return rank_exactly(q, self._coarse_candidates(q, k + SPARE_GROUPS), self._vectors, k).cpu().numpy()

    def _coarse_candidates(self, q: torch.Tensor, groups: int) -> torch.Tensor:
        """(n, c) rows of the groups that hold the highest coarse scores, and those of the last, broken group."""
        n_rows = len(self._vectors)
        whole = n_rows - n_rows % GROUP
        sample = self._vectors[:: max(1, n_rows // 4096)].float()
        best = (q @ sample.T).amax(1)
        transposed = q.to(self._coarse).T.contiguous()
        maxima = []
        for part in blocks(whole, SCAN if self.device.type == "cpu" else 4 * BLOCK):
            offset = best.to(self._coarse)
            # addmm adds the offset to the product's own float32 and rounds once, afterwards.
            scores = torch.addmm(-offset, self._vectors[part].to(self._coarse), transposed)
            top = scores.view(-1, GROUP, len(q)).amax(1).float() + offset.float()
            best = torch.maximum(best, top.amax(0))
            maxima.append(top)
        chosen = torch.cat(maxima).T.topk(min(groups, whole // GROUP), dim=1).indices
        rows = (chosen[:, :, None] * GROUP + torch.arange(GROUP, device=self.device)).flatten(1)
        return torch.cat([rows, torch.arange(whole, n_rows, device=self.device).expand(len(q), -1)], dim=1)


class FaissSearch:
    """Candidates from a FAISS index, ranked by the vectors themselves.

    Args:
        vectors: (N, d) float16, normally memory-mapped.
        effort: how much is looked at: lists probed (ivf, compressed) or nodes kept (hnsw).
        candidates: how many of what is found are ranked exactly.
    """

    def __init__(self, kind: str, index: faiss.Index, vectors: np.ndarray, effort: int, candidates: int = 32):
        self.kind, self.index = kind, index
        self._vectors = vectors
        self.effort, self.candidates = effort, candidates

    @torch.inference_mode()
    def search(self, queries: np.ndarray, k: int) -> np.ndarray:
        queries = np.ascontiguousarray(queries, np.float32)
        candidates = min(max(self.candidates, k), self.index.ntotal)
        if self.kind == "hnsw":
            self.index.hnsw.efSearch = max(self.effort, candidates)
        else:
            faiss.extract_index_ivf(self.index).nprobe = self.effort
        _, found = self.index.search(queries, candidates)
        if (lacking := (found[:, :k] < 0).any(1)).any():
            print(f"{self.kind} index: {lacking.sum()} queries found fewer than {k}; searched exactly", flush=True)
            found[lacking] = -1
            found[lacking, :k] = ExactSearch(self._vectors).search(queries[lacking], k)
        distinct, place = np.unique(found, return_inverse=True)
        vectors = torch.from_numpy(gather(self._vectors, distinct.clip(min=0)))
        rows = torch.from_numpy(np.where(found < 0, -1, place.reshape(found.shape)))
        return distinct[rank_exactly(torch.from_numpy(queries), rows, vectors, k).numpy()]


def gather(vectors: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """vectors[rows]; of a memory-mapped array read with plain reads, each row once.

    A page fault maps what lies around the row as well, so that rows here and there soon hold the whole
    file in memory.
    """
    if not isinstance(vectors, np.memmap) or rows.size > len(vectors) // 4:
        return vectors[rows]
    distinct, place = np.unique(rows, return_inverse=True)
    out = np.empty((len(distinct), vectors.shape[1]), vectors.dtype)
    with open(vectors.filename, "rb", buffering=0) as file:
        for i, row in enumerate(distinct.tolist()):
            os.preadv(file.fileno(), [out[i]], vectors.offset + row * vectors.strides[0])
    return out[place.reshape(rows.shape)]


def rank_exactly(q: torch.Tensor, rows: torch.Tensor, vectors: torch.Tensor, k: int) -> torch.Tensor:
    """The k best of each query's candidates by cosine in float32, best first.

    Args:
        q: (n, d) float32.
        rows: (n, c) candidates, each once; -1 for none.
        vectors: (N, d).

    Returns:
        (n, k) rows.
    """
    out = []
    at_once = max(1, 2**22 // (rows.shape[1] * q.shape[1]))  # 16 MB of float32
    for part in blocks(len(q), at_once):
        gathered = vectors[rows[part].clamp(min=0)].float()
        # float16 leaves lengths that differ by 1e-4, enough to swap captions that say nearly the same.
        scores = torch.bmm(gathered, q[part, :, None])[:, :, 0] / torch.linalg.vector_norm(gathered, dim=2)
        scores = scores.masked_fill(rows[part] < 0, -torch.inf)
        out.append(rows[part].gather(1, scores.topk(k, dim=1).indices))
    return torch.cat(out) if out else rows[:, :k]


def choose_kind(rows: int, dim: int, memory: int | None = None) -> tuple[str, str]:
    """The kind of index for a gallery of this size, and why.

    Args:
        memory: bytes of this machine's memory; None asks the machine.
    """
    memory = memory or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    size = rows * dim * 2
    if rows <= SMALL:
        return "exact", f"{rows:,} rows are searched whole in a moment"
    if size <= memory / 4:
        return "ivf", f"{rows:,} rows are many to search whole, and their {size / 2**30:.1f} GiB fit into memory"
    return "compressed", f"{rows:,} rows take {size / 2**30:.1f} GiB, more than a quarter of this machine's memory"


def build_index(vectors: np.ndarray, kind: str, path: Path) -> None:
    """Train a FAISS index on a sample of the vectors, add all of them block by block, write it aside and rename it.

    Args:
        vectors: (N, d) float16, memory-mapped or not.
        kind: one of KINDS but exact, which needs no index.
    """
    n, dim = vectors.shape
    lists = 2 ** max(2, round(math.log2(4 * math.sqrt(n))))
    factory = {"ivf": f"IVF{lists},SQ8", "hnsw": "HNSW32,SQ8", "compressed": f"IVF{lists},SQ4"}[kind]
    index = faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    wanted = min(n, 65_536 if kind == "hnsw" else 40 * lists)
    sample = np.sort(np.random.default_rng(0).choice(n, wanted, replace=False))
    print(f"{kind} index ({factory}): training on {wanted:,} of {n:,} vectors", flush=True)
    index.train(vectors[sample].astype(np.float32))
    add_to_index(index, vectors, 0)
    aside = Path(path).with_suffix(".partial")
    faiss.write_index(index, str(aside))
    os.replace(aside, path)


def add_to_index(index: faiss.Index, vectors: np.ndarray, start: int) -> None:
    """Add the vectors from row `start` on, with progress."""
    for part in tqdm(list(blocks(len(vectors) - start)), desc="indexing", mininterval=2):
        index.add(vectors[start + part.start : start + part.stop].astype(np.float32))


def calibrate(search: FaissSearch, vectors: np.ndarray, target: float, k: int = 3, queries: int = 256) -> float:
    """Set the least effort, then the fewest candidates, in powers of two, that find the target share of the nearest k.

    Half of the queries lie close to a row, as a caption of an image like one in the gallery does; the exact
    neighbours of these differ by little and want many candidates. The other half lie between two rows,
    near none in particular, and want effort.

    Returns:
        The share found, in the half where it is lower.
    """
    rng = np.random.default_rng(0)
    a, b = (vectors[np.sort(rng.integers(0, len(vectors), queries))].astype(np.float32) for _ in range(2))
    q = a + np.where(np.arange(queries) % 2, 0.1, 0.3)[:, None].astype(np.float32) * b[rng.permutation(queries)]
    q /= np.linalg.norm(q, axis=1, keepdims=True)
    exact = ExactSearch(vectors).search(q, k)

    def recall() -> float:
        found = search.search(q, k)
        return min(recall_at_k(found[half::2], exact[half::2]) for half in (0, 1))

    most = min(1024, len(vectors))
    search.effort, search.candidates = 4, most
    while (reached := recall()) < target and search.effort < len(vectors):
        search.effort *= 2
    # Where the target is out of reach, what comes as close serves.
    wanted = min(target, reached)
    search.candidates = min(CANDIDATES[search.kind], most)
    while (reached := recall()) < wanted and search.candidates < most:
        search.candidates *= 2
    return reached


def recall_at_k(found: np.ndarray, exact: np.ndarray) -> float:
    """Mean share of the exact (n, k) rows that are among the (n, k) found ones."""
    return float((found[:, :, None] == exact[:, None, :]).any(1).mean())


def open_search(
    kind: str, vectors: np.ndarray, path: Path, effort: int, candidates: int, device: torch.device | str = "cpu"
) -> ExactSearch | FaissSearch:
    """The search of a gallery on disk.

    A GPU whose memory has room for the vectors searches them all: there that takes less time than any index.

    Raises:
        CimError: where the index file cannot be read or is not an index of these vectors.
    """
    device = torch.device(device)
    fits = device.type == "cuda" and vectors.nbytes < torch.cuda.mem_get_info(device)[0] / 4
    if kind == "exact" or fits:
        return ExactSearch(vectors, device if fits else "cpu")
    try:
        index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[-160:]
        raise CimError(
            f"{path}: not a readable FAISS index ({reason}); make it again with 'cim gallery index'"
        ) from None
    if (index.ntotal, index.d) != vectors.shape:
        raise CimError(
            f"{path}: holds {index.ntotal} vectors of {index.d} dimensions, the gallery {vectors.shape[0]} of "
            f"{vectors.shape[1]}; make it again with 'cim gallery index'"
        )
    if device.type == "cuda" and hasattr(faiss, "StandardGpuResources") and kind != "hnsw":
        index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), device.index or 0, index)
    return FaissSearch(kind, index, vectors, effort, candidates)
