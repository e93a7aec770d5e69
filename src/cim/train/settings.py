"""The `train`, `sft` and `compute` groups, and their arithmetic: from images and captions to TRL's terms."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from cim.errors import CimError
from cim.params import Settings, Share, require


class TrainSettings(Settings):
    """GRPO's optimisation, and what SFT shares with it. Batches count images; each image gets `group_size` captions.

    Attributes:
        validation: images at the end of the split that are held out; the checkpoint of the best reward on them is
            kept. With 0 nothing is chosen: the last step is kept.
        steps, epochs: optimiser updates, or passes over the images; exactly one of both.
        images_per_step: images of one optimiser update (verl's ppo_mini_batch_size).
        updates_per_rollout: updates on one rollout's captions; images_per_step times it is verl's train_batch_size.
        kl: weight of the KL term, in its low-variance estimator (TRL's own).
        optimizer: transformers' name for it, such as adamw_torch or paged_adamw_8bit.
        save_every: updates between two checkpoints, and between two validations.
        lora_rank: 0 trains all weights.
        merge: with LoRA, also write the merged weights.
    """

    split: str
    images_per_step: PositiveInt
    group_size: Annotated[int, Field(ge=2)]
    lr: PositiveFloat
    kl: NonNegativeFloat
    temperature: PositiveFloat
    max_completion: PositiveInt
    save_every: PositiveInt
    steps: PositiveInt | None = None
    epochs: PositiveFloat | None = None
    validation: NonNegativeInt = 0
    updates_per_rollout: PositiveInt = 1
    warmup_steps: NonNegativeInt = 5
    freeze_vision: bool = True
    lora_rank: NonNegativeInt = 0
    lora_targets: str = "all-linear"
    merge: bool = False
    bf16: bool = False
    optimizer: str = "adamw_torch"

    @model_validator(mode="after")
    def _check(self) -> TrainSettings:
        require((self.steps is None) != (self.epochs is None), "give either steps or epochs")
        return self


# What SFT reads of the `train` group; its stage in dvc.yaml depends on these alone.
SHARED = (
    "split", "validation", "save_every", "freeze_vision", "lora_rank", "lora_targets", "merge", "bf16", "optimizer",
)  # fmt: skip


class SftSettings(Settings):
    """Supervised steps, and how the annotators write where captions are made here (cim.data.annotators)."""

    batch_size: PositiveInt
    lr: PositiveFloat
    steps: PositiveInt | None = None
    epochs: PositiveFloat | None = None
    annotators: dict[str, float] = {}
    slip_rate: Share = 0.0

    @model_validator(mode="after")
    def _check(self) -> SftSettings:
        require((self.steps is None) != (self.epochs is None), "give either steps or epochs")
        return self


class ComputeSettings(Settings):
    """Where and how training is computed: it changes speed and memory, not what is learnt, so nothing retrains for it.

    Attributes:
        accelerate: a configuration file of accelerate; None for all devices of this machine.
        per_device, sft_per_device: captions in one forward and backward pass of a device; None for all of an update.
        vllm: where captions are sampled: off (transformers), colocate (the same GPUs) or server.
        log_to: transformers' integrations, such as tensorboard, dvclive, wandb, trackio.
        warn_distinct: warn of a collapse where a smaller share of a step's captions is distinct.
    """

    accelerate: str | None = None
    per_device: PositiveInt | None = None
    sft_per_device: PositiveInt | None = None
    gradient_checkpointing: bool = False
    vllm: Literal["off", "colocate", "server"] = "off"
    vllm_memory: Share = 0.3
    vllm_url: str | None = None
    log_to: list[str] = []
    warn_distinct: Share = 0.2

    @model_validator(mode="after")
    def _check(self) -> ComputeSettings:
        require(self.vllm != "server" or bool(self.vllm_url), "vllm=server needs vllm_url")
        return self


@dataclass(frozen=True)
class Batches:
    """The batches of a GRPO run in TRL's terms.

    Attributes:
        per_device: captions in one pass of a device (per_device_train_batch_size).
        accumulation: passes of every device before an update (gradient_accumulation_steps).
        per_rollout: passes of every device that one rollout feeds (steps_per_generation).
        captions: sampled in one rollout (generation_batch_size).
        updates: optimiser updates in all (max_steps).
        rollouts: in all.
    """

    per_device: int
    accumulation: int
    per_rollout: int
    captions: int
    updates: int
    rollouts: int

    def lines(self, s: TrainSettings, images: int, processes: int) -> list[str]:
        """The arithmetic in words."""
        whole = s.images_per_step * s.updates_per_rollout
        passes = "steps" if s.steps else f"{s.epochs:g} epochs of {images:,} images"
        return [
            f"a rollout: {whole} images x {s.group_size} captions = {self.captions} captions",
            f"an update: {s.images_per_step} images x {s.group_size} = {s.images_per_step * s.group_size} captions = "
            f"{processes} processes x {self.per_device} at once x {self.accumulation} accumulated",
            f"{s.updates_per_rollout} updates a rollout, {self.rollouts} rollouts, {self.updates} updates ({passes})",
        ]


def batches(s: TrainSettings, per_device: int | None, images: int, processes: int) -> Batches:
    """How a GRPO run is divided.

    Raises:
        CimError: where the counts do not divide, or there are too few images.
    """
    whole = s.images_per_step * s.updates_per_rollout
    if images < whole:
        raise CimError(
            f"parameters: a rollout takes {whole} images (train.images_per_step x train.updates_per_rollout), "
            f"but there are {images} to train on; lower them"
        )
    update = s.images_per_step * s.group_size
    accumulation, per_device = divided(update, per_device, processes, "compute.per_device")
    updates = s.steps or max(1, math.ceil(s.epochs * (images // whole))) * s.updates_per_rollout
    return Batches(
        per_device=per_device,
        accumulation=accumulation,
        per_rollout=accumulation * s.updates_per_rollout,
        captions=whole * s.group_size,
        updates=updates,
        rollouts=math.ceil(updates / s.updates_per_rollout),
    )


def sft_updates(s: SftSettings, images: int) -> int:
    """Optimiser updates of an SFT run."""
    return s.steps or math.ceil(s.epochs * images / s.batch_size)


def divided(update: int, per_device: int | None, processes: int, parameter: str) -> tuple[int, int]:
    """Passes to accumulate, and captions in one pass of a device, for an update of so many captions.

    Raises:
        CimError: where they do not divide.
    """
    per_device = per_device or max(1, update // processes)
    if update % (per_device * processes):
        raise CimError(
            f"parameters: the {update} captions of an update cannot be shared by {processes} processes x {per_device} "
            f"at once ({parameter}); change one of them"
        )
    return update // (per_device * processes), per_device
