"""Nearest captions: exactly by matrix products, or by a FAISS index whose candidates are ranked exactly.

The vectors lie in one float16 array on disk, memory-mapped and shared by all processes. Whatever the kind of index,
ranks come from float32 cosines with them. Kinds are `exact` and the strings that `faiss.index_factory` takes.
"""

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import faiss
import numpy as np
import torch
from tqdm import tqdm

from cim.errors import CimError
from cim.files import explained, replacing
from cim.processes import computes_in_bfloat16

OTHER_KIND = "use exact, auto or another string for faiss.index_factory"
SMALL = 200_000  # rows up to which exact search is fast
BLOCK = 65_536  # rows read, written or added at once
SCAN = 4096  # rows multiplied at once on a CPU, so that they and their scores stay in its caches
GROUP = 16  # rows of which the coarse pass keeps only the best score
SPARE_GROUPS = 12  # further groups that are ranked exactly, since the coarse pass rounds
FINE_CODES = ("Flat", "SQ8", "SQbf16", "SQfp16")  # at least a byte per dimension: fewer candidates need ranking


def blocks(n: int, size: int = BLOCK, start: int = 0) -> Iterator[slice]:
    """Slices that cover range(start, n)."""
    return (slice(i, min(i + size, n)) for i in range(start, n, size))


class ExactSearch:
    """Inner product with all (N, d) float16 vectors, normally memory-mapped; moved to the device where that is a GPU.

    Up to BLOCK rows are held in float32 and multiplied once. More are read in two passes: coarse scores in the fastest
    type of the hardware, of which the best of each GROUP rows is kept; then float32 scores of the rows in the best
    groups. Coarse scores are relative to the best found so far, where a short float is finest: a row dropped by mistake
    is within 0.001 of cosine of the one found instead, and only where hundreds lie that close (benchmarks/index.py).
    """

    def __init__(self, vectors: np.ndarray, device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        self._vectors = torch.from_numpy(vectors).to(self.device)
        self._small = torch.nn.functional.normalize(self._vectors.float(), dim=1) if len(vectors) <= BLOCK else None
        short = torch.bfloat16 if computes_in_bfloat16(self.device) else torch.float32
        self._coarse = torch.float16 if self.device.type == "cuda" else short

    @torch.inference_mode()
    def search(self, queries: np.ndarray, k: int) -> np.ndarray:
        """(n, k) rows, best first, for (n, d) queries."""
        q = torch.from_numpy(np.ascontiguousarray(queries, np.float32)).to(self.device)
        if self._small is not None:
            return (q @ self._small.T).topk(k, dim=1).indices.cpu().numpy()
        return rank_exactly(q, self._coarse_candidates(q, k + SPARE_GROUPS), self._vectors, k).cpu().numpy()

    def _coarse_candidates(self, q: torch.Tensor, groups: int) -> torch.Tensor:
        """(n, c) rows of the groups with the highest coarse scores, and those of the last, incomplete group."""
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
    """Candidates from a FAISS index, ranked by the (N, d) float16 vectors themselves.

    Args:
        effort: the index's nprobe or efSearch; ignored by an index that has neither.
        candidates: how many candidates are ranked exactly.
    """

    def __init__(self, kind: str, index: faiss.Index, vectors: np.ndarray, effort: int = 1, candidates: int = 32):
        self.kind, self.index, self.effort, self.candidates = kind, index, effort, candidates
        self.vectors = vectors
        # The GPU build's class sets parameters of indexes on both kinds of device.
        self._space = getattr(faiss, "GpuParameterSpace", faiss.ParameterSpace)()
        self.parameter = None
        for name in ("nprobe", "efSearch"):
            with suppress(RuntimeError):  # an index without it
                self._space.set_index_parameter(index, name, 1)
                self.parameter = name
                break

    @torch.inference_mode()
    def search(self, queries: np.ndarray, k: int) -> np.ndarray:
        """(n, k) rows, best first, for (n, d) queries."""
        queries = np.ascontiguousarray(queries, np.float32)
        if self.parameter:
            self._space.set_index_parameter(self.index, self.parameter, self.effort)
        _, found = self.index.search(queries, min(max(self.candidates, k), self.index.ntotal))
        if (lacking := (found[:, :k] < 0).any(1)).any():
            print(f"{self.kind} index: {lacking.sum()} queries found fewer than {k}; searched exactly", flush=True)
            found[lacking] = -1
            found[lacking, :k] = ExactSearch(self.vectors).search(queries[lacking], k)
        distinct, place = np.unique(found, return_inverse=True)
        vectors = torch.from_numpy(gather(self.vectors, distinct.clip(min=0)))
        rows = torch.from_numpy(np.where(found < 0, -1, place.reshape(found.shape)))
        return distinct[rank_exactly(torch.from_numpy(queries), rows, vectors, k).numpy()]


def gather(vectors: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """vectors[rows], of a memory-mapped array by plain reads: page faults would load what surrounds each row."""
    if not isinstance(vectors, np.memmap) or rows.size > len(vectors) // 4:
        return vectors[rows]
    distinct, place = np.unique(rows, return_inverse=True)
    out = np.empty((len(distinct), vectors.shape[1]), vectors.dtype)
    with open(vectors.filename, "rb", buffering=0) as file:
        for i, row in enumerate(distinct.tolist()):
            os.preadv(file.fileno(), [out[i]], vectors.offset + row * vectors.strides[0])
    return out[place.reshape(rows.shape)]


def unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors as float32 of unit length, which rounding to float16 changed too."""
    vectors = vectors.astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def cosines(q: np.ndarray, vectors: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """(n, k) cosines of (n, d) queries with (n, k) rows of the (N, d) vectors."""
    return np.einsum("nd,nkd->nk", q, unit(gather(vectors, rows)))


def rank_exactly(q: torch.Tensor, rows: torch.Tensor, vectors: torch.Tensor, k: int) -> torch.Tensor:
    """The k best of each query's candidates by cosine in float32, best first.

    Args:
        q: (n, d) float32.
        rows: (n, c) distinct rows of the (N, d) vectors; -1 for none.

    Returns:
        (n, k) rows.
    """
    out = []
    at_once = max(1, 2**22 // (rows.shape[1] * q.shape[1]))  # 16 MB of float32
    for part in blocks(len(q), at_once):
        gathered = vectors[rows[part].clamp(min=0)].float()
        # Lengths in float16 differ by 1e-4, enough to swap nearly identical captions.
        scores = torch.bmm(gathered, q[part, :, None])[:, :, 0] / torch.linalg.vector_norm(gathered, dim=2)
        scores = scores.masked_fill(rows[part] < 0, -torch.inf)
        out.append(rows[part].gather(1, scores.topk(k, dim=1).indices))
    return torch.cat(out) if out else rows[:, :k]


def choose_kind(rows: int, dim: int, memory: int | None = None) -> tuple[str, str]:
    """The kind of index for a gallery of this size on a machine with so many bytes of memory, and the reason."""
    if rows <= SMALL:
        return "exact", f"{rows:,} rows are few enough to search exactly"
    lists = 2 ** round(np.log2(16 * rows) / 2)  # about 4 * sqrt(rows)
    memory = memory or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    size = rows * dim * 2
    fits = size <= memory / 4
    reason = f"{rows:,} rows of {size / 2**30:.1f} GiB {'fit into' if fits else 'exceed'} a quarter of memory"
    return f"IVF{lists},SQ{8 if fits else 4}", reason


def new_index(kind: str, dim: int) -> faiss.Index:
    """An empty index for inner products.

    Raises:
        CimError: where FAISS refuses `kind`.
    """
    with explained(f"parameter index: FAISS refuses '{kind}' for {dim} dimensions", OTHER_KIND, RuntimeError):
        # FAISS crashes or hangs on a count of zero, as in IVF0.
        if re.search(r"[A-Z]0(\D|$)", kind):
            raise RuntimeError("a count is 0")
        return faiss.index_factory(dim, kind, faiss.METRIC_INNER_PRODUCT)


def build_index(vectors: np.ndarray, kind: str, recall: float, path: Path, former: Path | None = None) -> dict:
    """Write a FAISS index of (N, d) vectors, tuned to find `recall` of the exact nearest three.

    Args:
        former: an index of this kind that holds the first vectors and gets the rest; None to train a new one.

    Returns:
        The effort and candidates for FaissSearch, and the measured recall.

    Raises:
        CimError: where FAISS refuses `kind` or cannot build it from so few vectors.
    """
    n = len(vectors)
    index = new_index(kind, vectors.shape[1]) if former is None else faiss.read_index(str(former))
    with explained(f"parameter index: FAISS cannot build '{kind}' from {n:,} rows", OTHER_KIND, RuntimeError):
        if not index.ntotal:
            ivf = faiss.try_extract_index_ivf(index)
            size = min(n, max(65_536, 40 * ivf.nlist if ivf else 0))
            sample = np.sort(np.random.default_rng(0).choice(n, size, replace=False))
            print(f"index: training on {size:,} of {n:,} vectors", flush=True)
            index.train(vectors[sample].astype(np.float32))
        for part in tqdm(list(blocks(n, start=index.ntotal)), desc="indexing", mininterval=2):
            index.add(vectors[part].astype(np.float32))
    with replacing(path) as partial, explained(f"{path}: cannot be written", "free some space", RuntimeError):
        faiss.write_index(index, str(partial))
    search = FaissSearch(kind, index, vectors)
    tuned = {"recall": round(_calibrate(search, recall), 4), "effort": search.effort, "candidates": search.candidates}
    print("index:", ", ".join(f"{name} {value}" for name, value in tuned.items()), flush=True)
    return tuned


def index_at(path: Path, vectors: np.ndarray, kind: str, recall: float, base: tuple[Path, dict] | None = None) -> dict:
    """Build an index of any kind at `path`; returns gallery.json's entry for it.

    Args:
        base: folder and index of a gallery of the first vectors; an index of the same kind is enlarged.
    """
    kind, reason = choose_kind(*vectors.shape) if kind == "auto" else (kind, "requested")
    print(f"index: {kind} ({reason})", flush=True)
    if kind == "exact":
        return {"kind": kind, "reason": reason, "effort": 0, "candidates": 0, "recall": 1.0}
    trained_on, source = len(vectors), None
    folder, former = base or (None, {"kind": "exact"})
    # An index trained on a small part of what it holds finds less: past twice its size it is trained again.
    if former["kind"] == kind and len(vectors) <= 2 * former["trained_on"]:
        trained_on, source = former["trained_on"], folder / former["file"]
    tuned = build_index(vectors, kind, recall, path, source)
    return {"kind": kind, "reason": reason, **tuned, "file": path.name, "trained_on": trained_on}


def _calibrate(search: FaissSearch, target: float, queries: int = 256) -> float:
    """Set the least effort, then the fewest candidates, in powers of two, that find the target share of the nearest 3.

    Half of the queries lie close to a row, like a caption of an image similar to one in the gallery; their exact
    neighbours differ little and need many candidates. The other half lie between two rows and need effort.

    Returns:
        The share found, in the half where it is lower.
    """
    vectors, n = search.vectors, len(search.vectors)
    rng = np.random.default_rng(0)
    a, b = (vectors[np.sort(rng.integers(0, n, queries))].astype(np.float32) for _ in range(2))
    q = a + np.where(np.arange(queries) % 2, 0.1, 0.3)[:, None].astype(np.float32) * b[rng.permutation(queries)]
    q /= np.linalg.norm(q, axis=1, keepdims=True)
    k = min(3, n)
    # Of captions that say the same, any counts.
    least = cosines(q, vectors, ExactSearch(vectors).search(q, k))[:, -1:] - 1e-6

    def recall() -> float:
        near = cosines(q, vectors, search.search(q, k)) >= least
        return float(min(near[half::2].mean() for half in (0, 1)))

    most = min(1024, n)
    search.effort, search.candidates = 4, most
    while (reached := recall()) < target and search.parameter and search.effort < n:
        search.effort *= 2
    # If the target is out of reach, use the fewest candidates that come as close.
    wanted = min(target, reached)
    search.candidates = min(32 if any(code in search.kind for code in FINE_CODES) else 256, most)
    while (reached := recall()) < wanted and search.candidates < most:
        search.candidates *= 2
    return reached


def open_search(
    info: dict, vectors: np.ndarray, folder: Path, device: torch.device | str = "cpu"
) -> ExactSearch | FaissSearch:
    """The search of a gallery on disk.

    On a GPU whose memory has room for the vectors the search is exact, which is faster there than any index.

    Args:
        info: the index in gallery.json: its kind, and unless that is exact its file, effort and candidates.

    Raises:
        CimError: where the index file cannot be read or is not an index of these vectors.
    """
    device = torch.device(device)
    fits = device.type == "cuda" and vectors.nbytes < torch.cuda.mem_get_info(device)[0] / 4
    if info["kind"] == "exact" or fits:
        return ExactSearch(vectors, device if fits else "cpu")
    path, fix = folder / info.get("file", ""), "rebuild it with 'cim gallery index'"
    with explained(f"{path}: unreadable FAISS index", fix, RuntimeError):
        index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC)
    if (found := (index.ntotal, index.d)) != vectors.shape:
        raise CimError(f"{path}: index of {found} vectors and dimensions, the gallery has {vectors.shape}; {fix}")
    if device.type == "cuda" and hasattr(faiss, "StandardGpuResources"):
        with suppress(RuntimeError):  # some kinds of index work on CPUs only
            index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), device.index or 0, index)
    return FaissSearch(info["kind"], index, vectors, info["effort"], info["candidates"])
