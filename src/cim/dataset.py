"""Stage `dataset`: any source of images and captions becomes one manifest."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from cim.layouts import flickr8k, oxford_pet, sc_captioner
from cim.manifest import COLUMNS, EXTENDED, write_manifest
from cim.settings import require
from cim.world.graphs import extended_lists
from cim.world.language import describe
from cim.world.questions import ask
from cim.world.render import Painter, png_bytes
from cim.world.scenes import compose_splits


@dataclass(frozen=True)
class DatasetSettings:
    """The `dataset` group.

    Attributes:
        folder: the raw data: sprites for the world, a data set's own layout else.
        images: where a published data set's images are, if not in `folder`.
        train, test: how many images; for published data the first or a random choice of so many, 0 for all.
    """

    source: str
    folder: str
    seed: int = 0
    pretrain: int = 0
    train: int = 0
    test: int = 0
    min_objects: int = 3
    max_objects: int = 3
    looks: int = 2
    gallery_variants: int = 4
    images: str | None = None

    def __post_init__(self):
        require(self.source in SOURCES, f"source '{self.source}' is not known; there are {', '.join(SOURCES)}")
        require(min(self.pretrain, self.train, self.test) >= 0, "pretrain, train and test cannot be negative")
        require(
            2 <= self.min_objects <= self.max_objects <= 4,
            "objects must be 2 to 4, min_objects no more than max_objects",
        )
        require(self.looks >= 1, "looks must be at least 1")
        require(self.gallery_variants >= 1, "gallery_variants must be at least 1")


def make_dataset(settings: DatasetSettings, out: Path) -> Path:
    """Write the manifest, and the images where they are drawn here, to `out`; return the manifest's path."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    SOURCES[settings.source](settings, out)
    return out / "manifest.parquet"


def world(settings: DatasetSettings, out: Path) -> None:
    """Scenes of the small world, drawn, captioned in full and, in the test split, asked about."""
    rng = np.random.default_rng(settings.seed)
    placed = compose_splits(
        rng,
        pretrain=settings.pretrain,
        train=settings.train,
        test=settings.test,
        looks=settings.looks,
        gallery_variants=settings.gallery_variants,
        objects=(settings.min_objects, settings.max_objects),
    )
    asked = [p.scene for p in placed if p.split == "test"]
    questions = iter(ask(asked, rng))
    painter = Painter(Path(settings.folder) / "objects")
    (out / "images").mkdir()
    rows = []
    for i, p in enumerate(tqdm(placed, desc="drawing scenes", mininterval=2)):
        name = f"images/{p.split}-{i:06d}.png"
        (out / name).write_bytes(png_bytes(painter.paint(p.scene, rng)))
        rows.append(
            (
                f"{p.split}-{i:06d}",
                name,
                describe(p.scene, rng),
                p.split,
                "openmoji-world",
                p.template,
                p.scene.to_json(),
                json.dumps(next(questions)) if p.split == "test" else None,
                *(json.dumps(known) if p.split == "test" else None for known in extended_lists(p.scene)),
            )
        )
    write_manifest(pd.DataFrame(rows, columns=[*COLUMNS, *EXTENDED]), out / "manifest.parquet")


SOURCES = {"world": world, "flickr8k": flickr8k, "sc_captioner": sc_captioner, "oxford_pet": oxford_pet}
