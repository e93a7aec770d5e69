"""Supervised fine-tuning of the base model on captions of the images that the reinforcement learning sees."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset, Features, Image, List, Value

from cim.generation import chat
from cim.manifest import Manifest
from cim.processes import processes
from cim.settings import group, require
from cim.train.common import Job


@dataclass(frozen=True)
class SftSettings:
    """The `sft` group: supervised steps, and how the annotators of method sft write."""

    steps: int
    batch_size: int
    lr: float
    annotators: dict[str, float]
    slip_rate: float

    def __post_init__(self):
        require(min(self.steps, self.batch_size) >= 1, "steps and batch_size must be positive")
        require(0 <= self.slip_rate <= 1, "slip_rate must lie in [0, 1]")


def sft_dataset(manifest: Manifest, captions: list[str], prompt: str) -> Dataset:
    """Columns prompt, completion, images."""
    rows = {
        "prompt": [chat(prompt)] * len(manifest),
        "completion": [[{"role": "assistant", "content": [{"type": "text", "text": c}]}] for c in captions],
        "images": [[str(path)] for path in manifest.image_paths],
    }
    message = List({"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})})
    return Dataset.from_dict(
        rows, features=Features({"prompt": message, "completion": message, "images": List(Image())})
    )


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


def train(run: str, params: dict, artifacts: Path) -> None:
    """Fine-tune the base model; write the model and log.json to artifacts/train/RUN."""
    from trl import SFTConfig, SFTTrainer

    sft = group(SftSettings, params.get("sft"), "sft")
    job = Job.start(run, params, artifacts)
    resume = job.resume_from({name: params[name] for name in ("train", "sft")})
    config = SFTConfig(
        max_steps=sft.steps,
        per_device_train_batch_size=max(1, sft.batch_size // processes().num_processes),
        learning_rate=sft.lr,
        lr_scheduler_type="cosine",
        warmup_steps=min(5, sft.steps),
        max_length=None,
        **job.trainer_arguments(),
    )
    captions = sft_captions(job.method, job.images, sft, job.seed)
    trainer = SFTTrainer(
        args=config, train_dataset=sft_dataset(job.images, captions, job.settings.prompt), **job.trainer_parts()
    )
    job.finish(trainer, resume)
