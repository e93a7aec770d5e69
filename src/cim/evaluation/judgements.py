"""Human judgements of captions in their published layouts, and how well scores agree with them.

flickr8k-expert   Hodosh et al. 2013. ExpertAnnotations.txt, Flickr8k.token.txt: three grades of 1 to 4 a caption.
composite         Aditya et al. 2015. 8k_, 30k_ and coco_correctness.csv: grades of 1 to 5.
pascal50s         Vedantam et al. 2015. pair_pascal.mat, consensus_pascal.mat: which of two captions is better.

Images are found by file name anywhere in the folder. As is customary, Kendall's tau-c is taken over single grades, and
captions that were written for the same image are left out of Flickr8k-Expert.
"""

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd
from tqdm import tqdm

from cim.errors import CimError
from cim.evaluation.statistics import Estimate, kendall, ratio, resample_weights
from cim.images import ImageFolder
from cim.scorer import Scorer

CATEGORIES = {1: "HC", 2: "HI", 3: "HM", 4: "MM"}  # human correct, human incorrect, human-machine, machine-machine
VOTES = 48  # each pair of Pascal-50S is compared with 48 references
COMPOSITE = {"8k": 3, "30k": 4, "coco": 4}  # part to candidate captions per image


@dataclass(frozen=True)
class Judgements:
    """Captions of images and their human judgements.

    Attributes:
        rows: columns image (path), caption and grade; or image, caption, pair, side (0, 1), preferred side, category.
        summary: how much was read and left out.
    """

    rows: pd.DataFrame
    summary: str


def load_judgements(benchmark: str, folder: Path) -> Judgements:
    """Read one of BENCHMARKS.

    Raises:
        CimError: for an unknown name, a missing file or image, or another layout.
    """
    if benchmark not in BENCHMARKS:
        raise CimError(f"unknown benchmark '{benchmark}'; use one of {', '.join(BENCHMARKS)}")
    return BENCHMARKS[benchmark](folder)


def flickr8k_expert(folder: Path) -> Judgements:
    """One row for each of the three grades of each caption."""
    captions = dict(_fields(folder / "Flickr8k.token.txt", "image#number", "caption"))
    rows, own, path = [], 0, folder / "ExpertAnnotations.txt"
    for number, (image, key, *grades) in enumerate(_fields(path, "image", "caption id", "grade", "grade", "grade"), 1):
        try:
            graded = [(image, captions[key].strip(), int(grade)) for grade in grades]
        except (KeyError, ValueError) as error:
            raise CimError(f"{path}:{number}: unknown caption id or invalid grade ({error})") from None
        if key.partition("#")[0] == image:
            own += 1
        else:
            rows += graded
    return _graded(rows, folder, f"{own} captions of the same image left out")


def composite(folder: Path) -> Judgements:
    """One row per grade, of those of the three parts that exist."""
    paths = {part: path for part in COMPOSITE if (path := folder / f"{part}_correctness.csv").is_file()}
    rows = []
    for part, path in paths.items():
        n = COMPOSITE[part]
        with path.open(newline="", encoding="utf-8", errors="replace") as lines:
            for number, row in enumerate(csv.reader(lines, delimiter=";"), 1):
                start = next((i for i, cell in enumerate(row) if cell.strip().startswith("http")), None)
                if start is None:
                    continue  # the header, and the empty end of the sheet
                image, cells = PurePosixPath(row[start].strip()).name, row[start + 1 :]
                try:
                    rows += [(image, cells[i], float(cells[n + i])) for i in range(n)]
                except (ValueError, IndexError):
                    raise CimError(f"{path}:{number}: should hold {n} captions and as many grades") from None
    if not rows:
        raise CimError(f"{folder}: no grades in 8k_correctness.csv, 30k_correctness.csv or coco_correctness.csv")
    return _graded(rows, folder, f"parts {', '.join(paths)}")


def pascal50s(folder: Path) -> Judgements:
    """Two rows per pair; `preferred` is the side with most votes, and a pair without a majority is left out."""
    from scipy.io import loadmat

    paths = [_require(folder / name) for name in ("pair_pascal.mat", "consensus_pascal.mat")]
    try:
        pairs, triplets = loadmat(paths[0]), loadmat(paths[1])["triplets"].ravel()
        rows, undecided = [], 0
        for i, (pair, category) in enumerate(zip(pairs["new_input"].ravel(), pairs["category"].ravel(), strict=True)):
            image, *sides = [str(_unwrapped(value)).strip() for value in _unwrapped(pair)]
            votes = [0, 0]
            for triplet in triplets[i * VOTES : (i + 1) * VOTES]:
                _, first, second, winner = [_unwrapped(value) for value in _unwrapped(triplet)]
                votes[sides.index(str(first if int(winner) == 1 else second).strip())] += 1
            if votes[0] == votes[1]:
                undecided += 1
                continue
            rows += [(i, s, image, sides[s], int(votes[1] > votes[0]), CATEGORIES[int(category)]) for s in (0, 1)]
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise CimError(f"{folder}: the .mat files are not in Pascal-50S's layout ({error})") from None
    frame = pd.DataFrame(rows, columns=["pair", "side", "image", "caption", "preferred", "category"])
    frame = _with_paths(frame, folder)
    summary = f"{len(frame) // 2} pairs of {frame['image'].nunique()} images, {undecided} undecided left out"
    return Judgements(frame, summary)


BENCHMARKS = {"flickr8k-expert": flickr8k_expert, "composite": composite, "pascal50s": pascal50s}


def _unwrapped(value):
    """The value inside MATLAB's nested cells; a struct as its fields."""
    while isinstance(value, np.ndarray):
        value = value.ravel()[0]
    return value


def _require(path: Path) -> Path:
    if not path.is_file():
        raise CimError(f"{path}: not found; set --data to the folder of the benchmark's files and images")
    return path


def _fields(path: Path, *columns: str) -> Iterator[list[str]]:
    """The tab-separated columns of each line that is not empty."""
    lines = _require(path).read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(filter(str.strip, lines), 1):
        fields = line.split("\t", len(columns) - 1)
        if len(fields) < len(columns):
            raise CimError(f"{path}:{number}: should be {', '.join(columns)}, separated by tabs")
        yield fields


def _graded(rows: Sequence[tuple[str, str, float]], folder: Path, note: str) -> Judgements:
    frame = _with_paths(pd.DataFrame(rows, columns=["image", "caption", "grade"]), folder)
    return Judgements(frame, f"{len(frame)} grades of {frame['image'].nunique()} images, {note}")


def _with_paths(frame: pd.DataFrame, folder: Path) -> pd.DataFrame:
    """The rows that have a caption, with paths in place of image names."""
    frame = frame[frame["caption"].str.strip() != ""].reset_index(drop=True)
    names = frame["image"].unique().tolist()
    paths = map(str, ImageFolder(folder).paths(names))
    return frame.assign(image=frame["image"].map(dict(zip(names, paths, strict=True))))


def agreement_with_people(judgements: Judgements, scorer: Scorer, seed: int = 0, resamples: int = 1000) -> dict:
    """Agreement of GRC, QIR, CIM and caption length: Kendall's tau with grades, accuracy by category for pairs.

    Intervals are bootstrap intervals over images.
    """
    rows = judgements.rows
    distinct = rows[["image", "caption"]].drop_duplicates().reset_index(drop=True)
    scores = _scores(distinct, scorer)
    table = rows.merge(distinct.join(scores), on=["image", "caption"], how="left", validate="many_to_one")
    rng = np.random.default_rng(seed)
    out = {"rows": len(rows), "summary": judgements.summary, "resamples": resamples, "seed": seed, "scores": {}}
    for name in scores:
        if "pair" in rows:
            out["scores"][name] = _preferences(table, name, rng, resamples)
        else:
            columns = table[name].to_numpy(float), table["grade"].to_numpy(float), table["image"].to_numpy()
            out["scores"][name] = {f"tau-{v}": kendall(*columns, rng, resamples, v) for v in "cb"}
    return out


def _scores(distinct: pd.DataFrame, scorer: Scorer, batch: int = 1024) -> pd.DataFrame:
    """Columns grc, qir, cim and words of distinct (image, caption) pairs."""
    parts = [distinct.iloc[start : start + batch] for start in range(0, len(distinct), batch)]
    progress = tqdm(parts, desc="scoring", mininterval=2)
    scores = pd.concat([scorer.score(p["image"].tolist(), p["caption"].tolist()) for p in progress], ignore_index=True)
    return scores.assign(words=[len(caption.split()) for caption in distinct["caption"]])


def _preferences(table: pd.DataFrame, name: str, rng: np.random.Generator, resamples: int) -> dict:
    """Share of pairs whose preferred side scores higher, by category and their mean; an equal score is half right."""
    pairs = table.pivot(index="pair", columns="side", values=name)
    first = table[table["side"] == 0].set_index("pair")
    right = (np.sign(pairs[1] - pairs[0]) * np.where(first["preferred"] == 1, 1, -1) + 1).to_numpy() / 2
    _, codes = np.unique(first["image"], return_inverse=True)
    weights = resample_weights(codes.max() + 1, resamples, rng)[:, codes]
    found = {}
    for category in CATEGORIES.values():
        if (mask := (first["category"] == category).to_numpy()).any():
            samples = ratio(weights[:, mask] @ right[mask], weights[:, mask].sum(1))
            found[category] = Estimate(right[mask].mean(), samples)
    values, samples = zip(*found.values(), strict=True)
    found["mean"] = Estimate(np.mean(values), np.mean(samples, axis=0))
    return {category: estimate.cell() for category, estimate in found.items()}
