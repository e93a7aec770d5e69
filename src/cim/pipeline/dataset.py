"""Stage `dataset`: one manifest of images and captions."""

from cim.data.dataset import DatasetSettings, make_dataset
from cim.params import group
from cim.pipeline.paths import ARTIFACTS


def run(params: dict) -> None:
    """Write artifacts/dataset."""
    make_dataset(group(DatasetSettings, params.get("dataset"), "dataset"), ARTIFACTS / "dataset")
