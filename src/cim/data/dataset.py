"""Stage `dataset`: any source of images and captions becomes one manifest."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Self

import pandas as pd
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from cim.data import flickr8k, oxford_pet, sc_captioner
from cim.data.manifest import write_manifest
from cim.images import content_digest, read_stored
from cim.params import Settings, require

Objects = Annotated[int, Field(ge=2, le=4)]


class DatasetSettings(Settings):
    """The `dataset` group.

    Attributes:
        source: one of SOURCES.
        folder: the raw inputs of the world, else the data set in its published layout.
        images: the folder of the images; None for the one that the layout names.
        pretrain, train, test: how many images; of published data the first, or a random choice of so many, 0 for all.
    """

    source: str
    folder: str
    images: str | None = None
    seed: int = 0
    pretrain: NonNegativeInt = 0
    train: NonNegativeInt = 0
    test: NonNegativeInt = 0
    min_objects: Objects = 3
    max_objects: Objects = 3
    looks: PositiveInt = 2
    gallery_variants: PositiveInt = 4

    @model_validator(mode="after")
    def _check(self) -> Self:
        require(self.source in SOURCES, f"source '{self.source}' is unknown; choose one of {', '.join(SOURCES)}")
        require(self.min_objects <= self.max_objects, "min_objects cannot be more than max_objects")
        return self


def make_dataset(settings: DatasetSettings, out: Path) -> Path:
    """Write the manifest, and for the world its images, to `out`; return the manifest's path.

    A data set that was there is replaced once the new one is complete. An image that cannot be read is a CimError.
    """
    aside = out.with_name(f"{out.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    frame, root = SOURCES[settings.source](settings, Path(settings.folder).expanduser().resolve(), aside)
    counts = ", ".join(f"{count:,} images in split {split}" for split, count in frame["split"].value_counts().items())
    print(f"dataset: {counts}", flush=True)
    with ThreadPoolExecutor(4) as pool:  # a digest of each file, so that a changed image changes the manifest
        digests = pool.map(lambda image: content_digest(read_stored(root / image)), frame["image"])
        frame = frame.assign(digest=list(digests))
    write_manifest(frame, aside / "manifest.parquet", root if root != aside else None)
    shutil.rmtree(out, ignore_errors=True)
    aside.rename(out)
    return out / "manifest.parquet"


def _world(s: DatasetSettings, folder: Path, out: Path) -> tuple[pd.DataFrame, Path]:
    from cim.world.dataset import draw_dataset

    splits = s.model_dump(include={"pretrain", "train", "test", "looks", "gallery_variants"})
    objects = (s.min_objects, s.max_objects)
    return draw_dataset(folder / "objects", out, s.seed, objects=objects, **splits), out


# Each takes the settings, the absolute path of their folder, and the folder to draw to; it returns the manifest's rows
# and the folder of their images.
SOURCES = {
    "world": _world,
    "flickr8k": lambda s, folder, _: flickr8k.read(folder, s.images, s.pretrain, s.train, s.test),
    "sc_captioner": lambda s, folder, _: sc_captioner.read(folder, s.images, s.train, s.test, s.seed),
    "oxford_pet": lambda s, folder, _: oxford_pet.read(folder, s.images, s.seed),
}
