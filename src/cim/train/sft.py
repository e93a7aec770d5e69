"""Supervised fine-tuning of the base model on captions of the images that the reinforcement learning sees."""

from functools import partial
from pathlib import Path
from typing import Any

from cim import code
from cim.captioners.models import chat
from cim.data.annotators import written_captions
from cim.data.manifest import Manifest
from cim.files import short_digest
from cim.processes import processes
from cim.train.batches import sft_batches
from cim.train.job import Job
from cim.train.settings import SHARED


def train(run: str, params: dict, artifacts: Path) -> None:
    """Fine-tune the base model; write the model and log.json to artifacts/train/RUN.

    Weights that were made from the same inputs are kept.
    """
    job = Job(run, params, artifacts).load()
    job.train(
        lambda folder: make_trainer(job, folder),
        train=job.settings.model_dump(include=set(SHARED)),
        code=code.digest("cim.train.sft"),
        sft=job.sft.model_dump(),
        labels=short_digest([labels(job, part) for part in (job.images, job.validation)]),
    )


def labels(job: Job, images: Manifest) -> list[str]:
    """The captions that the method trains on."""
    if job.objective == "sft_perfect":
        return images.captions
    return written_captions(images, job.sft.annotators, job.sft.slip_rate, job.seed)


def make_trainer(job: Job, folder: Path) -> Any:
    """TRL's trainer for the job; checkpoints go to `folder`."""
    from trl import SFTConfig, SFTTrainer

    batches = sft_batches(job.sft, job.compute.sft_per_device, len(job.images), processes().num_processes)
    config = partial(
        SFTConfig, per_device_eval_batch_size=batches.per_device, max_length=None,
        learning_rate=job.sft.lr, lr_scheduler_type="cosine", warmup_steps=min(5, batches.updates),
    )  # fmt: skip

    def columns(images: Manifest) -> dict[str, list]:
        captions = labels(job, images)
        answers = [[{"role": "assistant", "content": [{"type": "text", "text": caption}]}] for caption in captions]
        return {"prompt": [chat(job.model_settings.prompt)] * len(images), "completion": answers}

    trainer = job.trainer(SFTTrainer, folder, batches, columns, "eval_loss", config)
    # Every token of an update counts the same, however the update is divided: TRL computes the loss, not these models,
    # most of which declare that theirs does not know the number of tokens.
    trainer.model_accepts_loss_kwargs = True
    return trainer
