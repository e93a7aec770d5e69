"""The `train` group, and its arithmetic: from images and captions to TRL's terms."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from cim.errors import CimError
from cim.settings import require

VLLM = ("off", "colocate", "server")


@dataclass(frozen=True)
class TrainSettings:
    """GRPO's optimisation, and what SFT shares with it. Batches count images; each gets `group_size` captions.

    Attributes:
        validation: images at the end of the split that are held out; the checkpoint of the best reward on them is
            kept. With 0 nothing is chosen: the last step is kept.
        steps, epochs: optimiser updates, or passes over the images; exactly one of both is given.
        images_per_step: images of one optimiser update (verl's ppo_mini_batch_size).
        updates_per_rollout: updates on one rollout's captions; images_per_step times it is verl's train_batch_size.
        per_device: captions in one forward and backward pass of a device; None for all of them.
        kl: weight of the KL term, in its low-variance estimator (TRL's own).
        optimizer: transformers' name for it, such as adamw_torch or paged_adamw_8bit.
        vllm: where captions are sampled: off (transformers), colocate (the same GPUs) or server.
        log_to: transformers' integrations, such as tensorboard, dvclive, wandb, trackio.
        merge: with LoRA, also write the merged weights.
        accelerate: a configuration file of accelerate; None for all devices of this machine.
        check_memory: refuse a run that the plan thinks too large for its devices.
    """

    split: str
    images_per_step: int
    group_size: int
    lr: float
    kl: float
    temperature: float
    max_completion: int
    save_every: int
    steps: int | None = None
    epochs: float | None = None
    validation: int = 0
    updates_per_rollout: int = 1
    per_device: int | None = None
    warmup_steps: int = 5
    freeze_vision: bool = True
    lora_rank: int = 0
    lora_targets: str = "all-linear"
    merge: bool = False
    bf16: bool = False
    gradient_checkpointing: bool = False
    optimizer: str = "adamw_torch"
    vllm: str = "off"
    vllm_memory: float = 0.3
    vllm_url: str | None = None
    log_to: list[str] = field(default_factory=list)
    accelerate: str | None = None
    check_memory: bool = True
    warn_distinct: float = 0.2

    def __post_init__(self):
        require(self.group_size >= 2, "group_size must be at least 2: an advantage compares captions of one image")
        counts = (self.images_per_step, self.updates_per_rollout, self.max_completion, self.save_every)
        require(min(*counts, self.per_device or 1) >= 1, "counts must be positive")
        require((self.steps is None) != (self.epochs is None), "give either steps or epochs")
        require((self.steps or 1) >= 1 and (self.epochs or 1) > 0, "steps and epochs must be positive")
        require(
            self.lr > 0 and self.temperature > 0 and self.kl >= 0,
            "lr and temperature must be positive, kl not negative",
        )
        require(min(self.lora_rank, self.validation, self.warmup_steps) >= 0, "no count can be negative")
        require(self.vllm in VLLM, f"vllm '{self.vllm}' is not known; there are {', '.join(VLLM)}")
        require(self.vllm != "server" or bool(self.vllm_url), "vllm=server needs vllm_url")


@dataclass(frozen=True)
class Batches:
    """One run's batches in TRL's terms.

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

    def lines(self, settings: TrainSettings, images: int, processes: int) -> list[str]:
        """The arithmetic, for a person."""
        s = settings
        whole = s.images_per_step * s.updates_per_rollout
        passes = "steps" if s.steps else f"{s.epochs:g} epochs of {images:,} images"
        return [
            f"a rollout: {whole} images x {s.group_size} captions = {self.captions} captions",
            f"an update: {s.images_per_step} images x {s.group_size} = {s.images_per_step * s.group_size} captions = "
            f"{processes} processes x {self.per_device} at once x {self.accumulation} accumulated",
            f"{s.updates_per_rollout} updates a rollout, {self.rollouts} rollouts, {self.updates} updates ({passes})",
        ]


def batches(settings: TrainSettings, images: int, processes: int) -> Batches:
    """How a run of these settings is cut.

    Raises:
        CimError: where the counts do not divide, or there are too few images.
    """
    s = settings
    whole = s.images_per_step * s.updates_per_rollout
    if images < whole:
        raise CimError(
            f"parameters: a rollout takes {whole} images (train.images_per_step x train.updates_per_rollout), "
            f"but there are {images} to train on; lower them"
        )
    update = s.images_per_step * s.group_size
    per_device = s.per_device or max(1, update // processes)
    if update % (per_device * processes):
        raise CimError(
            f"parameters: {update} captions an update (train.images_per_step x train.group_size) cannot be shared by "
            f"{processes} processes x {per_device} captions at once (train.per_device); change one of them"
        )
    accumulation = update // (per_device * processes)
    rollouts_an_epoch = images // whole
    if s.steps is not None:
        updates = s.steps
    else:
        updates = max(1, math.ceil(s.epochs * rollouts_an_epoch)) * s.updates_per_rollout
    return Batches(
        per_device=per_device,
        accumulation=accumulation,
        per_rollout=accumulation * s.updates_per_rollout,
        captions=whole * s.group_size,
        updates=updates,
        rollouts=math.ceil(updates / s.updates_per_rollout),
    )
