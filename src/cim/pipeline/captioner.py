"""Stage `captioner`: the base model that CIM improves."""

import pandas as pd

from cim.data.manifest import read_manifest
from cim.params import group
from cim.pipeline.not_trained import note_instead
from cim.pipeline.paths import ARTIFACTS, MANIFEST, RESULTS
from cim.world.captioner import CaptionerSettings, train_captioner


def run(params: dict) -> None:
    """Train it, or note which model the profile uses instead."""
    if params.get("captioner") is None:
        note_instead("captioner", "loss.csv", {"model": params["model"]["name"]})
        return
    settings = group(CaptionerSettings, params["captioner"], "captioner")
    pretrain = read_manifest(MANIFEST).split("pretrain")
    curve = train_captioner(
        pretrain.image_paths, pretrain.frame["scene"], ARTIFACTS / "encoder", settings, ARTIFACTS / "captioner"
    )
    path = RESULTS / "captioner" / "loss.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(curve).to_csv(path, index=False, float_format="%.5f")
