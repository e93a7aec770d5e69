"""Stage `captioner`: the base model that CIM improves."""

import pandas as pd

from cim.captioners.settings import PhotoCaptionerSettings
from cim.data.flickr8k import human_captions
from cim.data.manifest import read_manifest
from cim.params import group
from cim.pipeline.not_trained import note_instead
from cim.pipeline.paths import ARTIFACTS, MANIFEST, RESULTS
from cim.train import captioner as photos
from cim.world import captioner as world
from cim.world.settings import CaptionerSettings


def run(params: dict) -> None:
    """Train it, or note which model the profile uses instead."""
    values, out = params.get("captioner"), ARTIFACTS / "captioner"
    if values is None:
        note_instead("captioner", "loss.csv", {"model": params["model"]["name"]})
        return
    pretrain = read_manifest(MANIFEST).split("pretrain")
    images, frame = pretrain.image_paths, pretrain.frame
    if "vision_tower" in values:
        settings = group(PhotoCaptionerSettings, values, "captioner")
        work = ARTIFACTS / "checkpoints" / "captioner"
        curve = photos.train_captioner(images, human_captions(frame), settings, work, out)
    else:
        settings = group(CaptionerSettings, values, "captioner")
        curve = world.train_captioner(images, frame["scene"], ARTIFACTS / "encoder", settings, out)
    path = RESULTS / "captioner" / "loss.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(curve).to_csv(path, index=False, float_format="%.5f")
