"""Training the captioner for photographs on human captions: stage `captioner` of profiles with photos.

    facts   one to three captions of an image joined, so that the model knows more than a caption says
    style   each image's shortest caption, so that it says less than it knows, as real captioners do

A reward can only bring out what the model knows.
"""

import math
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import Trainer, TrainingArguments, set_seed

from cim import code, fastvlm
from cim.captioners.models import VISION
from cim.captioners.photos import build_captioner
from cim.captioners.settings import PhotoCaptionerSettings
from cim.encoders import weights_digest
from cim.files import short_digest
from cim.images import content_digest, open_image
from cim.processes import bfloat16_if_fast, computes_in_bfloat16, default_device
from cim.train import checkpoints

PROJECTOR = "multi_modal_projector"


def train_captioner(
    images: Sequence[Path], captions: Sequence[Sequence[str]], settings: PhotoCaptionerSettings, work: Path, out: Path
) -> list[dict]:
    """Train on images and the captions of each; save model and processor to `out`; return the loss curve.

    Checkpoints lie in a subfolder of `work` that is named by all inputs; the same call resumes from the last one.
    """
    device = default_device()
    set_seed(settings.seed)
    captions = [[sentence(caption) for caption in of_image] for of_image in captions]
    model, processor = build_captioner(settings, [caption for of_image in captions for caption in of_image])
    model.requires_grad_(True).to(device)
    tower = model.model.vision_tower.requires_grad_(False).eval()
    features = vision_features(tower, processor, images, device)
    fastvlm.whiten_projector(model, features)
    files = [content_digest(path.read_bytes()) for path in images]
    made_of = [code.digest("cim.train.captioner"), weights_digest(model), settings.model_dump(), files, captions]
    folder = work / short_digest(made_of)
    trained = model
    if settings.lora_rank:  # on all linear layers of the language model; the projector is trained as it is
        lora = LoraConfig(
            r=settings.lora_rank, lora_alpha=2 * settings.lora_rank, target_modules="all-linear",
            exclude_modules=rf"{VISION}|.*{PROJECTOR}.*", modules_to_save=[PROJECTOR],
        )  # fmt: skip
        trained = get_peft_model(model, lora)
    prompt = fastvlm.prompt_tokens(processor, settings.prompt, features)

    def collate(examples: list[tuple[int, str]]) -> dict:
        rows, texts = zip(*examples, strict=True)
        batch = fastvlm.caption_batch(processor.tokenizer, prompt, list(texts))
        # Logits of the prompt are not computed: a large vocabulary makes them a good part of the work.
        answer = batch["labels"].shape[1] - len(prompt)
        labels = batch["labels"][:, -answer:]
        return batch | {"labels": labels, "logits_to_keep": answer + 1, "pixel_values": features[list(rows)]}

    trainer = Trainer(
        trained,
        TrainingArguments(
            str(folder), max_steps=settings.fact_steps + settings.style_steps, seed=settings.seed, logging_steps=10,
            per_device_train_batch_size=settings.batch_size, save_steps=settings.save_every, report_to="none",
            train_sampling_strategy="sequential", remove_unused_columns=False, bf16=computes_in_bfloat16(device),
            use_cpu=device.type == "cpu", dataloader_pin_memory=False,
        ),
        data_collator=collate,
        train_dataset=examples(captions, settings),
        optimizers=optimizer_and_schedule(trained, settings),
        compute_loss_func=partial(caption_loss, smoothing=settings.label_smoothing),
        callbacks=[checkpoints.MarkComplete()],
    )  # fmt: skip
    with fastvlm.features_as_pixels(tower):
        trainer.train(resume_from_checkpoint=checkpoints.last_checkpoint(folder))
    model = trained.merge_and_unload() if settings.lora_rank else trained
    model.requires_grad_(True).eval().save_pretrained(out)
    processor.save_pretrained(out)
    shutil.rmtree(folder)
    return [
        {"phase": "facts" if row["step"] <= settings.fact_steps else "style", "step": row["step"], "loss": row["loss"]}
        for row in trainer.state.log_history
        if "loss" in row
    ]


def sentence(caption: str) -> str:
    """The caption with one full stop at its end, as published captions often have it after a space.

    >>> sentence("A dog runs . ")
    'A dog runs.'
    """
    return f"{caption.rstrip(' .')}."


def examples(captions: list[list[str]], settings: PhotoCaptionerSettings) -> list[tuple[int, str]]:
    """Position of an image and a text for it, in the order of training; each phase goes through the images in turn."""
    rng = np.random.default_rng(settings.seed)

    def rows(steps: int) -> np.ndarray:
        count = steps * settings.batch_size
        passes = [rng.permutation(len(captions)) for _ in range(math.ceil(count / len(captions)))]
        return np.concatenate(passes)[:count].tolist()

    facts = [(i, " ".join(rng.permutation(captions[i])[: rng.integers(1, 4)])) for i in rows(settings.fact_steps)]
    return facts + [(i, min(captions[i], key=len)) for i in rows(settings.style_steps)]


@torch.no_grad()
def vision_features(tower, processor, images: Sequence[Path], device: torch.device, batch: int = 64) -> torch.Tensor:
    """The frozen tower's features of image files, (n, c, h, w) in bfloat16 or float32, as training computes."""
    parts = []
    for start in tqdm(range(0, len(images), batch), desc="vision features", mininterval=2):
        opened = [open_image(path) for path in images[start : start + batch]]
        pixels = processor.image_processor(opened, return_tensors="pt")["pixel_values"]
        # Channels last is the fast layout for convolutions.
        pixels = pixels.to(device).contiguous(memory_format=torch.channels_last)
        with bfloat16_if_fast(device):
            parts.append(tower(pixels).last_hidden_state)
    return torch.cat(parts)


def optimizer_and_schedule(model: torch.nn.Module, settings: PhotoCaptionerSettings):
    """AdamW; the learning rate rises in the first 5 % of a phase and decays as a cosine."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in trained if (PROJECTOR in name) == projector], "lr": lr}
        for projector, lr in ((False, settings.lr), (True, settings.projector_lr))
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.01)

    def factor(step: int) -> float:
        style = step >= settings.fact_steps
        steps = settings.style_steps if style else settings.fact_steps
        done = (step - settings.fact_steps * style + 1) / steps
        return (settings.style_lr if style else 1.0) * min(done / 0.05, (1 + math.cos(math.pi * done)) / 2)

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def caption_loss(outputs, labels: torch.Tensor, num_items_in_batch=None, smoothing: float = 0.0) -> torch.Tensor:
    """Mean cross-entropy of labels (n, t), -100 to ignore; logits (n, t + 1, vocabulary) each predict the next."""
    logits = outputs.logits[:, :-1].flatten(0, 1).float()
    return cross_entropy(logits, labels.flatten(), label_smoothing=smoothing)
