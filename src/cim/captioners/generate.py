"""Greedy captions by any image-text-to-text model, and how diverse captions are."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from cim.captioners.models import ModelSettings, prompt_inputs
from cim.data.manifest import Manifest
from cim.images import open_image


@torch.inference_mode()
def caption_images(
    model, processor, manifest: Manifest, settings: ModelSettings, max_new_tokens: int, batch: int = 64, progress=True
) -> list[str]:
    """Greedy captions of all images of a manifest."""
    captions: list[str] = []
    for start in tqdm(range(0, len(manifest), batch), desc="captioning", disable=not progress, mininterval=2):
        images = [open_image(path) for path in manifest.image_paths[start : start + batch]]
        inputs = prompt_inputs(processor, images, settings).to(model.device, dtype=model.dtype)
        out = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        answers = out[:, inputs["input_ids"].shape[1] :]
        captions += [c.strip() for c in processor.batch_decode(answers, skip_special_tokens=True)]
    return captions


def diversity(captions: Sequence[str]) -> dict[str, float]:
    """Statistics that reveal a collapse: share of distinct captions, share of the most common one, mean words."""
    counts = pd.Series(list(captions)).value_counts()
    return {
        "distinct": len(counts) / len(captions),
        "most_common": float(counts.iloc[0]) / len(captions),
        "words": float(np.mean([len(c.split()) for c in captions])),
    }
