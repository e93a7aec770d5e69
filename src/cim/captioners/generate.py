"""Captions by any image-text-to-text model, greedy or sampled."""

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from cim.captioners.models import prompt_inputs
from cim.captioners.settings import ModelSettings
from cim.data.manifest import Manifest
from cim.images import open_image


@torch.inference_mode()
def caption_images(
    model, processor, manifest: Manifest, settings: ModelSettings, max_new_tokens: int, batch: int = 64, progress=True
) -> list[str]:
    """Greedy captions of all images of a manifest."""
    options = {"max_new_tokens": max_new_tokens, "do_sample": False}
    parts = _generated(model, processor, manifest, settings, batch, progress, options)
    return [caption for *_, captions in parts for caption in captions]


@torch.inference_mode()
def sample_captions(
    model, processor, manifest: Manifest, settings: ModelSettings, count: int, max_new_tokens: int,
    temperature: float = 1.0, seed: int = 0, batch: int = 16, progress=True,
) -> pd.DataFrame:  # fmt: skip
    """Sample `count` captions of each image of a manifest, reproducibly for the same batch size.

    Returns:
        Columns image_id, caption and likelihood, the mean log-probability of the caption's tokens at temperature 1.
    """
    device, rows = model.device, []
    ends = torch.tensor([processor.tokenizer.pad_token_id, *np.ravel(model.generation_config.eos_token_id)])
    options = {
        "max_new_tokens": max_new_tokens, "do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0,
        "num_return_sequences": count,
    }  # fmt: skip
    chosen, last = [], []  # log-probabilities of the tokens drawn in each step, and of all tokens in the last one

    def record(module, args, inputs, outputs):
        # The logits of all steps would take tens of gigabytes with a large vocabulary. A processor of logits would see
        # them after the model's own, such as a penalty for repetition.
        if last:
            chosen.append(last.pop().gather(-1, inputs["input_ids"][:, -1:]))
        last.append(outputs.logits[:, -1].float().log_softmax(-1))

    fork = torch.random.fork_rng([device] if device.type == "cuda" else [])
    with fork, model.register_forward_hook(record, with_kwargs=True):
        torch.manual_seed(seed)
        for part, answers, captions in _generated(model, processor, manifest, settings, batch, progress, options):
            likelihoods = torch.cat([*chosen, last.pop().gather(-1, answers[:, -1:])], 1)
            chosen.clear()
            # The end token counts, the padding after it does not.
            counted = (~torch.isin(answers, ends.to(device))).cumprod(1)
            counted = torch.cat([counted.new_ones(len(counted), 1), counted[:, :-1]], 1)
            likelihood = (likelihoods.nan_to_num(neginf=0.0) * counted).sum(1) / counted.sum(1)
            rows += zip(part.frame["image_id"].repeat(count), captions, likelihood.tolist(), strict=True)
    return pd.DataFrame(rows, columns=["image_id", "caption", "likelihood"])


def _generated(model, processor, manifest: Manifest, settings: ModelSettings, batch: int, progress: bool, options):
    """For each batch of images: their rows, and the answers' tokens (n, t) and text."""
    for start in tqdm(range(0, len(manifest), batch), desc="captioning", disable=not progress, mininterval=2):
        part = manifest.take(range(start, min(start + batch, len(manifest))))
        images = [open_image(path) for path in part.image_paths]
        inputs = prompt_inputs(processor, images, settings).to(model.device, dtype=model.dtype)
        tokens = model.generate(**inputs, **options, return_dict_in_generate=True).sequences
        answers = tokens[:, inputs["input_ids"].shape[1] :]
        yield part, answers, [c.strip() for c in processor.batch_decode(answers, skip_special_tokens=True)]
