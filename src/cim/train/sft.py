"""Supervised fine-tuning of the base model on captions of the images that the reinforcement learning sees."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from datasets import Dataset, Features, Image, List, Value

from cim.errors import CimError
from cim.manifest import Manifest
from cim.models import chat
from cim.processes import processes
from cim.settings import group, require
from cim.train.common import Job, with_fitted_images


@dataclass(frozen=True)
class SftSettings:
    """The `sft` group: supervised steps, and how the annotators of method sft write."""

    batch_size: int
    lr: float
    steps: int | None = None
    epochs: float | None = None
    per_device: int | None = None
    annotators: dict[str, float] = field(default_factory=dict)
    slip_rate: float = 0.0

    def __post_init__(self):
        require((self.steps is None) != (self.epochs is None), "give either steps or epochs")
        require(min(self.steps or 1, self.batch_size, self.per_device or 1) >= 1, "counts must be positive")
        require((self.epochs or 1) > 0, "epochs must be positive")
        require(0 <= self.slip_rate <= 1, "slip_rate must lie in [0, 1]")


def sft_dataset(manifest: Manifest, captions: list[str], prompt: str, max_pixels: int | None = None) -> Dataset:
    """Columns prompt, completion, images."""
    rows = {
        "prompt": [chat(prompt)] * len(manifest),
        "completion": [[{"role": "assistant", "content": [{"type": "text", "text": c}]}] for c in captions],
        "images": [[str(path)] for path in manifest.image_paths],
    }
    message = List({"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})})
    features = Features({"prompt": message, "completion": message, "images": List(Image())})
    return with_fitted_images(Dataset.from_dict(rows, features=features), "images", max_pixels)


def sft_captions(method: str, manifest: Manifest, settings: SftSettings, seed: int) -> list[str]:
    """What the annotators wrote: the manifest's captions, or for the small world ones with omissions and slips."""
    if method == "sft_perfect" or "scene" not in manifest.frame or manifest.frame["scene"].isna().any():
        return manifest.captions
    from cim.captioner import detail_of
    from cim.world.language import describe, with_slips
    from cim.world.scenes import Scene

    rng = np.random.default_rng(seed)
    detail = detail_of(settings.annotators, "annotators")
    scenes = (Scene.from_json(s) for s in manifest.frame["scene"])
    return [describe(with_slips(scene, rng, settings.slip_rate), rng, detail) for scene in scenes]


def updates(settings: SftSettings, images: int) -> int:
    """Optimiser updates in all."""
    return settings.steps or math.ceil(settings.epochs * images / settings.batch_size)


def divided(settings: SftSettings, processes: int) -> tuple[int, int]:
    """Passes that are accumulated, and captions in one pass of a device.

    Raises:
        CimError: where the batch cannot be shared so.
    """
    per_device = settings.per_device or max(1, settings.batch_size // processes)
    if settings.batch_size % (per_device * processes):
        raise CimError(
            f"parameters: sft.batch_size={settings.batch_size} cannot be shared by {processes} processes x "
            f"{per_device} "
            "captions at once (sft.per_device); change one of them"
        )
    return settings.batch_size // (per_device * processes), per_device


def train(run: str, params: dict, artifacts: Path) -> None:
    """Fine-tune the base model; write the model and log.json to artifacts/train/RUN."""
    from trl import SFTConfig, SFTTrainer

    sft = group(SftSettings, params.get("sft"), "sft")
    job = Job.start(run, params, artifacts)
    resume = job.resume_from({name: params[name] for name in ("train", "sft")})
    accumulation, per_device = divided(sft, processes().num_processes)
    config = SFTConfig(
        max_steps=updates(sft, len(job.images)),
        per_device_train_batch_size=per_device,
        per_device_eval_batch_size=per_device,
        gradient_accumulation_steps=accumulation,
        learning_rate=sft.lr,
        lr_scheduler_type="cosine",
        warmup_steps=min(5, updates(sft, len(job.images))),
        max_length=None,
        **job.trainer_arguments("eval_loss"),
    )

    def data(images: Manifest) -> Dataset:
        captions = sft_captions(job.method, images, sft, job.seed)
        return sft_dataset(images, captions, job.model_settings.prompt, job.model_settings.max_pixels)

    held_out = data(job.validation) if len(job.validation) else None
    trainer = SFTTrainer(args=config, train_dataset=data(job.images), eval_dataset=held_out, **job.trainer_parts())
    job.finish(trainer, resume, params)
