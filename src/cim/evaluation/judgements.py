"""People's judgements of captions, in the layouts that they are published in, and how scores follow them.

flickr8k-expert   Hodosh et al. 2013. ExpertAnnotations.txt, Flickr8k.token.txt: three grades of 1 to 4 a caption.
composite         Aditya et al. 2015. 8k_, 30k_ and coco_correctness.csv: grades of 1 to 5.
pascal50s         Vedantam et al. 2015. pair_pascal.mat, consensus_pascal.mat: which of two captions is better.

Images are found by file name anywhere in the folder. As is customary, Kendall's tau-c is taken over single grades, and
captions that were written for the very image are left out of Flickr8k-Expert.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from cim.errors import CimError
from cim.evaluation.statistics import interval, kendall, resample_weights
from cim.images import ImageFolder
from cim.scorer import Scorer

CATEGORIES = {1: "HC", 2: "HI", 3: "HM", 4: "MM"}  # human correct, human incorrect, human-machine, machine-machine
VOTES = 48  # a pair of Pascal-50S is judged against each of 48 references


@dataclass(frozen=True)
class Judgements:
    """Captions of images as people judged them.

    Attributes:
        rows: columns image (path), caption, and grade (one row a grade), or pair, side (0 or 1), preferred
            (the side that won) and category.
        told: what was read and left out, for the user.
    """

    rows: pd.DataFrame
    told: str

    @property
    def paired(self) -> bool:
        return "pair" in self.rows


def load_judgements(benchmark: str, folder: Path) -> Judgements:
    """Read one of BENCHMARKS.

    Raises:
        CimError: for an unknown name, a missing file or image, or another layout.
    """
    if benchmark not in BENCHMARKS:
        raise CimError(f"benchmark '{benchmark}' is not known; there are {', '.join(BENCHMARKS)}")
    folder = Path(folder)
    if not folder.is_dir():
        raise CimError(f"{folder}: not a folder; --data is where the benchmark's files and images are")
    return BENCHMARKS[benchmark](folder)


def flickr8k_expert(folder: Path) -> Judgements:
    """One row for each of the three grades of each caption."""
    captions: dict[str, str] = {}
    for line in _lines(folder / "Flickr8k.token.txt"):
        name, tab, caption = line.partition("\t")
        if not tab:
            raise CimError(f"{folder / 'Flickr8k.token.txt'}: should be lines of 'image#number<tab>caption'")
        captions[name] = caption.strip()
    rows, own = [], 0
    path = folder / "ExpertAnnotations.txt"
    for number, line in enumerate(_lines(path), 1):
        try:
            image, caption, *grades = line.split("\t")
            grades = [int(grade) for grade in grades]
            text = captions[caption]
        except (ValueError, KeyError):
            raise CimError(f"{path}:{number}: should be image, caption id and three grades, tab-separated") from None
        if caption.partition("#")[0] == image:
            own += 1
            continue
        rows += [(image, text, grade) for grade in grades]
    frame = _with_images(pd.DataFrame(rows, columns=["image", "caption", "grade"]), folder)
    told = f"{len(frame)} grades of {frame['image'].nunique()} images, {own} captions of the very image left out"
    return Judgements(frame, told)


def composite(folder: Path) -> Judgements:
    """One row a grade, of all three parts that are there."""
    rows, parts = [], []
    for part, candidates in (("8k", 3), ("30k", 4), ("coco", 4)):
        path = folder / f"{part}_correctness.csv"
        if not path.is_file():
            continue
        parts.append(part)
        with path.open(newline="", encoding="utf-8", errors="replace") as lines:
            for number, row in enumerate(csv.reader(lines, delimiter=";"), 1):
                start = next((i for i, cell in enumerate(row) if cell.strip().startswith("http")), None)
                if start is None:
                    continue  # the header, and what the sheets end with
                cells = row[start + 1 : start + 1 + 2 * candidates]
                try:
                    grades = [float(grade) for grade in cells[candidates:]]
                except ValueError:
                    grades = []
                if len(grades) != candidates:
                    raise CimError(f"{path}:{number}: wants {candidates} captions and as many grades")
                image = PurePosixPath(row[start].strip()).name
                rows += [(image, text, grade) for text, grade in zip(cells, grades, strict=False)]
    if not rows:
        raise CimError(f"{folder}: no grades in 8k_correctness.csv, 30k_correctness.csv or coco_correctness.csv")
    frame = _with_images(pd.DataFrame(rows, columns=["image", "caption", "grade"]), folder)
    return Judgements(frame, f"{len(frame)} grades of {frame['image'].nunique()} images, parts {', '.join(parts)}")


def pascal50s(folder: Path) -> Judgements:
    """Two rows a pair; the side that more judgements preferred has won, without a majority it is left out."""
    from scipy.io import loadmat

    for name in ("pair_pascal.mat", "consensus_pascal.mat"):
        if not (folder / name).is_file():
            raise CimError(f"{folder / name}: not found; --data should hold Pascal-50S's own files")
    try:
        pairs = loadmat(folder / "pair_pascal.mat")
        triplets = loadmat(folder / "consensus_pascal.mat")["triplets"].ravel()
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
    frame = _with_images(frame, folder)
    return Judgements(
        frame, f"{len(frame) // 2} pairs of {frame['image'].nunique()} images, {undecided} undecided left out"
    )


def _unwrapped(value):
    """What MATLAB's nested cells hold; a struct comes out as its fields."""
    while isinstance(value, np.ndarray):
        value = value.ravel()[0]
    return value


BENCHMARKS = {"flickr8k-expert": flickr8k_expert, "composite": composite, "pascal50s": pascal50s}


def find_images(folder: Path, names: Iterable[str]) -> dict[str, Path]:
    """The file of each image, by name with or without suffix, anywhere in the folder.

    Raises:
        CimError: naming the first that is not there, and how many.
    """
    there = ImageFolder(folder)
    wanted = list(dict.fromkeys(names))
    found = {name: there.find(name) for name in wanted}
    if missing := [name for name, path in found.items() if path is None]:
        raise CimError(f"{folder}: {len(missing)} of {len(wanted)} images are not there, '{missing[0]}' among them")
    return found


def agreement_with_people(judgements: Judgements, scorer: Scorer, seed: int = 0, resamples: int = 1000) -> dict:
    """How GRC, QIR, CIM and mere length follow people: Kendall's tau for grades, accuracy by category for pairs.

    Intervals are bootstrap intervals over images.
    """
    rows = judgements.rows
    said = rows[["image", "caption"]].drop_duplicates().reset_index(drop=True)
    scores = _scores(said, scorer)
    table = rows.merge(said.join(scores), on=["image", "caption"], how="left", validate="many_to_one")
    rng = np.random.default_rng(seed)
    out = {"rows": len(rows), "told": judgements.told, "resamples": resamples, "seed": seed, "scores": {}}
    for name in scores:
        if judgements.paired:
            out["scores"][name] = _preferences(table, name, rng, resamples)
        else:
            out["scores"][name] = {
                f"tau-{variant}": kendall(
                    table[name].to_numpy(float),
                    table["grade"].to_numpy(float),
                    table["image"].to_numpy(),
                    rng,
                    resamples,
                    variant,
                )
                for variant in "cb"
            }
    return out


def _scores(said: pd.DataFrame, scorer: Scorer, at_once: int = 1024) -> pd.DataFrame:
    """Columns grc, qir, cim and words of distinct (image, caption) pairs."""
    parts = []
    for start in tqdm(range(0, len(said), at_once), desc="scoring", mininterval=2):
        part = said.iloc[start : start + at_once]
        parts.append(scorer.score(part["image"].tolist(), part["caption"].tolist()))
    scores = pd.concat(parts, ignore_index=True)
    return scores.assign(words=[len(caption.split()) for caption in said["caption"]])


def _preferences(table: pd.DataFrame, name: str, rng: np.random.Generator, resamples: int) -> dict:
    """Share of pairs whose preferred side scores higher, by category and their mean; an equal score is half right."""
    pairs = table.pivot(index="pair", columns="side", values=name)
    first = table[table["side"] == 0].set_index("pair")
    ahead = np.sign(pairs[1] - pairs[0]) * np.where(first["preferred"] == 1, 1, -1)
    right = (ahead + 1) / 2
    _, codes = np.unique(first["image"], return_inverse=True)
    weights = resample_weights(codes.max() + 1, resamples, rng)[:, codes]
    categories = {c: (first["category"] == c).to_numpy() for c in CATEGORIES.values() if (first["category"] == c).any()}
    values, samples = {}, {}
    for category, mask in categories.items():
        values[category] = float(right[mask].mean())
        with np.errstate(invalid="ignore"):
            samples[category] = weights[:, mask] @ right[mask].to_numpy() / weights[:, mask].sum(1)
    values["mean"], samples["mean"] = float(np.mean(list(values.values()))), np.mean(list(samples.values()), axis=0)
    return {c: {"value": values[c], "interval": interval(samples[c])} for c in values}


def _with_images(frame: pd.DataFrame, folder: Path) -> pd.DataFrame:
    """With paths for image names; rows without a caption are nothing to judge."""
    frame = frame[frame["caption"].str.strip() != ""].reset_index(drop=True)
    paths = find_images(folder, frame["image"])
    return frame.assign(image=[str(paths[name]) for name in frame["image"]])


def _lines(path: Path) -> Sequence[str]:
    if not path.is_file():
        raise CimError(f"{path}: not found; --data should hold the benchmark's own files")
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
