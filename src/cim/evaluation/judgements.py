"""Human judgements of captions in their published layouts, and how well scores agree with them.

flickr8k-expert   Hodosh et al. 2013. ExpertAnnotations.txt: three grades of 1 to 4 a caption.
flickr8k-cf       The same. CrowdFlowerAnnotations.txt: the share of people who say that a caption describes the image.
composite         Aditya et al. 2015. 8k_, 30k_ and coco_correctness.csv: grades of 1 to 5.
pascal50s         Vedantam et al. 2015. pair_pascal.mat, consensus_pascal.mat: which of two captions is better.

Images are found by file name anywhere in the folder. As is customary, captions that were written for the same image are
left out of Flickr8k's, and agreement is Kendall's tau-c over single grades, for flickr8k-cf tau-b.
"""

import csv
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import pandas as pd
from tqdm import tqdm

from cim.data.flickr8k import read_captions
from cim.errors import CimError
from cim.evaluation.statistics import Estimate, kendall, ratio, resample_weights
from cim.images import ImageFolder
from cim.scorer import Scorer

CATEGORIES = {1: "HC", 2: "HI", 3: "HM", 4: "MM"}  # human correct, human incorrect, human-machine, machine-machine
VOTES = 48  # each pair of Pascal-50S is compared with 48 references
DAMAGED = 0.05  # share of a file's lines that may be damaged
COMPOSITE = {"8k": 3, "30k": 4, "coco": 4}  # part to candidate captions per image


class Judgements(NamedTuple):
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
    path, numbers = folder / "ExpertAnnotations.txt", ["first", "second", "third"]
    table = _judged(path, numbers)
    table, note = _of_other_images(path, table, table[numbers].isin([1, 2, 3, 4]).all(axis=1))
    return _graded(table.melt(["image", "caption"], numbers, value_name="grade"), note, folder)


def flickr8k_cf(folder: Path) -> Judgements:
    """One row for each caption; its grade is the share of three or more people who say that it describes the image."""
    path = folder / "CrowdFlowerAnnotations.txt"
    table = _judged(path, ["grade", "yes", "no"])
    counted = table["yes"] / (table["yes"] + table["no"])
    return _graded(*_of_other_images(path, table, (table["grade"] - counted).abs() < 0.01), folder)


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
    return _graded(pd.DataFrame(rows, columns=["image", "caption", "grade"]), f"parts {', '.join(paths)}", folder)


def pascal50s(folder: Path) -> Judgements:
    """Two rows per pair; `preferred` is the side with most votes, and a pair without a majority is left out."""
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    paths = [_require(folder / name) for name in ("pair_pascal.mat", "consensus_pascal.mat")]
    try:
        pairs, triplets = (loadmat(path, simplify_cells=True) for path in paths)
        rows, undecided = [], 0
        for i, (pair, category) in enumerate(zip(pairs["new_input"], pairs["category"], strict=True)):
            image, *sides = map(str.strip, pair.values())
            votes = [0, 0]
            for triplet in triplets["triplets"][i * VOTES : (i + 1) * VOTES]:
                _, first, second, winner = triplet.values()
                votes[sides.index((first if winner == 1 else second).strip())] += 1
            if votes[0] == votes[1]:
                undecided += 1
                continue
            rows += [(i, s, image, sides[s], int(votes[1] > votes[0]), CATEGORIES[int(category)]) for s in (0, 1)]
        if not rows:
            raise ValueError("no pair with a majority")
    except (LookupError, ValueError, TypeError, AttributeError, MatReadError) as error:
        raise CimError(f"{folder}: the .mat files are not in Pascal-50S's layout ({error})") from None
    frame = pd.DataFrame(rows, columns=["pair", "side", "image", "caption", "preferred", "category"])
    frame = _with_paths(frame, folder)
    summary = f"{len(frame) // 2} pairs of {frame['image'].nunique()} images, {undecided} undecided left out"
    return Judgements(frame, summary)


READERS = (flickr8k_expert, flickr8k_cf, composite, pascal50s)
BENCHMARKS = {read.__name__.replace("_", "-"): read for read in READERS}


def _require(path: Path) -> Path:
    if not path.is_file():
        raise CimError(f"{path}: not found; set --data to the folder of the benchmark's files and images")
    return path


def _judged(path: Path, numbers: list[str]) -> pd.DataFrame:
    """Columns image, id and numbers of each line that is not empty; NaN where a number is missing or invalid."""
    lines = pd.Series(_require(path).read_text(encoding="utf-8", errors="replace").split("\n"))
    columns = ["image", "id", *numbers]
    cells = lines[lines.str.strip() != ""].str.split("\t", n=len(columns) - 1, expand=True)
    table = cells.reindex(columns=range(len(columns))).astype(str).set_axis(columns, axis=1)
    table[numbers] = table[numbers].apply(pd.to_numeric, errors="coerce").astype(float)
    return table


def _of_other_images(path: Path, table: pd.DataFrame, valid: pd.Series) -> tuple[pd.DataFrame, str]:
    """Lines whose caption, a new column, was written for another image, and what was left out.

    Raises:
        CimError: where none is left, or more than DAMAGED are not valid or of unknown images or captions.
    """
    captions = read_captions(path.parent)
    table = table.assign(caption=table["id"].map(captions.set_index("id")["caption"]))
    valid = valid & table["caption"].notna() & table["image"].isin(captions["image"])
    own = valid & (table["id"].str.extract(r"(.+)#", expand=False) == table["image"])
    kept, bad = table[valid & ~own], table.index[~valid] + 1
    if kept.empty or len(bad) > DAMAGED * len(table):
        what = "too few columns, unknown images or caption ids, invalid judgements"
        lines = f"; line {', '.join(map(str, bad[:3]))}" if len(bad) else ""
        raise CimError(
            f"{path}: {len(bad)} of {len(table)} lines are damaged ({what}{lines}), {len(kept)} can be used; restore it"
        )
    return kept, f"{own.sum()} captions of the same image and {len(bad)} damaged lines left out"


def _graded(rows: pd.DataFrame, note: str, folder: Path) -> Judgements:
    frame = _with_paths(rows[["image", "caption", "grade"]], folder)
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


def _scores(distinct: pd.DataFrame, scorer: Scorer, batch: int = 256) -> pd.DataFrame:
    """Columns grc, qir, cim and words of distinct (image, caption) pairs; a caption never retrieves its own image."""
    paths = distinct["image"].unique().tolist()
    stems = [Path(path).stem for path in paths]  # image ids in galleries of published data sets
    ids = dict(zip(paths, np.where(scorer.gallery.rows_of(stems) >= 0, stems, paths), strict=True))
    for start in tqdm(range(0, len(paths), batch), desc="embedding images", mininterval=2):
        scorer.add_images({ids[path]: path for path in paths[start : start + batch]})
    found = int((scorer.gallery_rows(list(ids.values())) >= 0).sum())
    print(f"{found} of {len(paths)} source images are in the gallery", flush=True)
    scores = scorer.retrieval_scores(distinct["caption"].tolist(), distinct["image"].map(ids).tolist())
    return scores.assign(words=distinct["caption"].str.split().str.len())


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
