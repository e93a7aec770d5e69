"""Captions by any image-text-to-text model, and what loading one safely takes."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

from cim.encoders import default_device
from cim.errors import CimError
from cim.manifest import Manifest, open_image


def load_captioner(name: str | Path, device: torch.device | None = None, dtype: torch.dtype = torch.float32):
    """Model and processor of a local folder or a hub name; a folder with a LoRA adapter gets its base merged in.

    Raises:
        CimError: where it is not there and cannot be fetched.
    """
    try:
        if (Path(name) / "adapter_config.json").is_file():
            from peft import PeftConfig, PeftModel

            base = PeftConfig.from_pretrained(name).base_model_name_or_path
            model = AutoModelForImageTextToText.from_pretrained(base, dtype=dtype)
            model = PeftModel.from_pretrained(model, name).merge_and_unload()
        else:
            model = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype)
        processor = AutoProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CimError(
            f"captioner '{name}' could not be loaded: {reason}; make it with its stage or fetch it"
        ) from None
    hold_batch_norm(model)
    processor.tokenizer.padding_side = "left"
    return model.to(device or default_device()).eval(), processor


def hold_batch_norm(model: nn.Module) -> int:
    """Keep every BatchNorm in evaluation mode for good; returns how many there are.

    A trainer's `model.train()` would else make a vision tower use and overwrite batch statistics, which
    ruins it within a few steps at an almost unchanged reward.
    """
    held = 0
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
            module.train = lambda mode=True, module=module: module
            held += 1
    return held


def chat(prompt: str) -> list[dict]:
    """The conversation that asks for a caption of one image."""
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]


@torch.inference_mode()
def caption_images(
    model, processor, manifest: Manifest, prompt: str, max_new_tokens: int, batch_size: int = 64, progress: bool = True
) -> list[str]:
    """Greedy captions of all images of a manifest."""
    text = processor.apply_chat_template(chat(prompt), add_generation_prompt=True, tokenize=False)
    captions: list[str] = []
    for start in tqdm(range(0, len(manifest), batch_size), desc="captioning", disable=not progress, mininterval=2):
        images = [open_image(path) for path in manifest.image_paths[start : start + batch_size]]
        inputs = processor(images=images, text=[text] * len(images), padding=True, return_tensors="pt").to(model.device)
        out = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        answers = out[:, inputs["input_ids"].shape[1] :]
        captions += [c.strip() for c in processor.batch_decode(answers, skip_special_tokens=True)]
    return captions
