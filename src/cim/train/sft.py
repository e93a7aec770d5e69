"""Supervised fine-tuning of the base model on captions of the images that the reinforcement learning sees."""

from __future__ import annotations

import hashlib
from pathlib import Path

from datasets import Dataset, Features, Image, List, Value

from cim.captioners.models import chat
from cim.data.annotators import written_captions
from cim.data.manifest import Manifest
from cim.params import group
from cim.processes import processes
from cim.train import checkpoints
from cim.train.job import Job, with_fitted_images
from cim.train.settings import SHARED, SftSettings, divided, sft_updates


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


def train(run: str, params: dict, artifacts: Path) -> None:
    """Fine-tune the base model; write the model and log.json to artifacts/train/RUN.

    Weights that were made from the same inputs are kept.
    """
    from trl import SFTConfig, SFTTrainer

    sft = group(SftSettings, params.get("sft"), "sft")
    job = Job.start(run, params, artifacts)

    def captions(images: Manifest) -> list[str]:
        if job.method == "sft_perfect":
            return images.captions
        return written_captions(images, sft.annotators, sft.slip_rate, job.seed)

    labels = captions(job.images)
    made_from = job.made_from(
        "cim.train.sft", SHARED, sft=sft.model_dump(), labels=hashlib.sha256(repr(labels).encode()).hexdigest()[:16]
    )
    digest = checkpoints.inputs_digest(made_from)
    if checkpoints.is_trained(job.out, digest):
        print(f"kept: {job.out} was trained from the same inputs ({digest})", flush=True)
        return
    resume = checkpoints.last_checkpoint(job.checkpoints / digest)
    accumulation, per_device = divided(
        sft.batch_size, job.compute.sft_per_device, processes().num_processes, "compute.sft_per_device"
    )
    updates = sft_updates(sft, len(job.images))
    config = SFTConfig(
        max_steps=updates,
        per_device_train_batch_size=per_device,
        per_device_eval_batch_size=per_device,
        gradient_accumulation_steps=accumulation,
        learning_rate=sft.lr,
        lr_scheduler_type="cosine",
        warmup_steps=min(5, updates),
        max_length=None,
        **job.trainer_arguments("eval_loss", job.checkpoints / digest),
    )

    def data(images: Manifest, said: list[str]) -> Dataset:
        return sft_dataset(images, said, job.model_settings.prompt, job.model_settings.max_pixels)

    held_out = data(job.validation, captions(job.validation)) if len(job.validation) else None
    trainer = SFTTrainer(
        args=config, train_dataset=data(job.images, labels), eval_dataset=held_out, **job.trainer_parts()
    )
    job.finish(trainer, resume, made_from)
