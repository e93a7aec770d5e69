"""Captions as annotators would write them, for supervised fine-tuning."""

import numpy as np

from cim.data.manifest import Manifest
from cim.params import group


def written_captions(manifest: Manifest, chances: dict[str, float], slip_rate: float, seed: int) -> list[str]:
    """The manifest's captions or, if the scenes are known, ones with omissions and errors.

    Args:
        chances: the probability that annotators mention each kind of fact, as in cim.world.language.Detail.
        slip_rate: the probability that they state a fact wrongly.
    """
    if not manifest.scenes_known:
        return manifest.captions
    from cim.world.language import Detail, describe, with_slips
    from cim.world.scenes import Scene

    rng = np.random.default_rng(seed)
    detail = group(Detail, chances, "sft.annotators")
    scenes = map(Scene.from_json, manifest.frame["scene"])
    return [describe(with_slips(scene, rng, slip_rate), rng, detail) for scene in scenes]
