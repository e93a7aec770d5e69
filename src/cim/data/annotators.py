"""Captions as annotators would write them, for supervised fine-tuning."""

from __future__ import annotations

import numpy as np

from cim.data.manifest import Manifest
from cim.params import group


def written_captions(manifest: Manifest, chances: dict[str, float], slip_rate: float, seed: int) -> list[str]:
    """The manifest's captions, or, where the scenes are known, ones with omissions and slips.

    Args:
        chances: the chance that annotators mention each kind of fact, as cim.world.language.Detail names them.
        slip_rate: the chance that they state a fact wrongly.

    Raises:
        CimError: for an unknown kind of fact or a chance outside [0, 1].
    """
    if not manifest.scenes_known:
        return manifest.captions
    from cim.world.language import Detail, describe, with_slips
    from cim.world.scenes import Scene

    rng = np.random.default_rng(seed)
    detail = group(Detail, chances, "sft.annotators")
    scenes = (Scene.from_json(s) for s in manifest.frame["scene"])
    return [describe(with_slips(scene, rng, slip_rate), rng, detail) for scene in scenes]
