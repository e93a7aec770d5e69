"""Stage `encoder`: the small world's own OpenCLIP image encoder."""

from cim.data.manifest import read_manifest
from cim.files import write_metrics
from cim.params import group
from cim.pipeline.not_trained import note_instead
from cim.pipeline.paths import ARTIFACTS, MANIFEST, RESULTS
from cim.world.encoder import EncoderTrainingSettings, train_encoder


def run(params: dict) -> None:
    """Train it, or note which encoder the profile uses instead."""
    if params.get("encoder") is None:
        note_instead("encoder", "metrics.json", {"image": params["encoders"]["image"]})
        return
    settings = group(EncoderTrainingSettings, params["encoder"], "encoder")
    pretrain = read_manifest(MANIFEST).split("pretrain")
    metrics = train_encoder(
        pretrain.image_paths, pretrain.frame["scene"], pretrain.captions, settings, ARTIFACTS / "encoder"
    )
    write_metrics(RESULTS / "encoder" / "metrics.json", metrics)
    print(metrics)
