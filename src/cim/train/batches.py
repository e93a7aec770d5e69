"""From images and captions to the batches of transformers' and TRL's trainers."""

import math
from dataclasses import dataclass

from cim.errors import CimError
from cim.train.settings import SftSettings, TrainSettings


@dataclass(frozen=True)
class Batches:
    """How a run is divided among processes, passes and updates.

    Attributes:
        per_device: captions in one pass of a device (per_device_train_batch_size).
        accumulation: passes of every device before an update (gradient_accumulation_steps).
        updates: optimizer updates in all (max_steps).
        summary: the same in words, one line for a rollout and one for an update.
    """

    per_device: int
    accumulation: int
    updates: int
    summary: list[str]


def grpo_batches(s: TrainSettings, per_device: int | None, images: int, processes: int) -> Batches:
    """The batches of a GRPO run; CimError where the counts do not divide or there are too few images."""
    rollout = s.images_per_step * s.updates_per_rollout
    if images < rollout:
        raise CimError(
            f"parameters: a rollout takes {rollout} images (train.images_per_step x train.updates_per_rollout), "
            f"but there are {images} to train on; lower them"
        )
    if s.save_every % s.updates_per_rollout:
        raise CimError(
            f"parameters: train.save_every={s.save_every} should be a multiple of train.updates_per_rollout="
            f"{s.updates_per_rollout}: captions of a rollout are not in a checkpoint"
        )
    updates = s.steps or max(1, math.ceil(s.epochs * (images // rollout))) * s.updates_per_rollout
    summary = (
        f"a rollout: {rollout} images x {s.group_size} captions = {rollout * s.group_size} captions for "
        f"{s.updates_per_rollout} updates; {math.ceil(updates / s.updates_per_rollout)} rollouts in all"
    )
    return _divide(s.images_per_step * s.group_size, updates, per_device, processes, "compute.per_device", summary)


def sft_batches(s: SftSettings, per_device: int | None, images: int, processes: int) -> Batches:
    """The batches of an SFT run; CimError where the counts do not divide."""
    # As Trainer counts: the last update of an epoch takes what is left of it.
    updates = s.steps or math.ceil(s.epochs * math.ceil(images / s.batch_size))
    return _divide(s.batch_size, updates, per_device, processes, "compute.sft_per_device")


def _divide(
    captions: int, updates: int, per_device: int | None, processes: int, parameter: str, *summary: str
) -> Batches:
    per_device = per_device or max(1, captions // processes)
    accumulation, rest = divmod(captions, per_device * processes)
    if rest:
        raise CimError(
            f"parameters: the {captions} captions of an update cannot be shared by {processes} processes x "
            f"{per_device} at once ({parameter}); change one of them"
        )
    update = (
        f"an update: {captions} captions = {processes} processes x {per_device} at once x {accumulation} accumulated; "
        f"{updates} updates in all"
    )
    return Batches(per_device, accumulation, updates, [*summary, update])
