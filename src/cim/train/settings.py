"""The `train`, `sft` and `compute` groups of parameters."""

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from cim.params import Settings, Share, require


class Length(Settings):
    """How long a run is: `steps` optimizer updates, or `epochs` passes over the images; exactly one of both."""

    steps: PositiveInt | None = None
    epochs: PositiveFloat | None = None

    @model_validator(mode="after")
    def _check_length(self) -> Self:
        require((self.steps is None) != (self.epochs is None), "give either steps or epochs")
        return self


class SharedSettings(Settings):
    """What both methods read of the `train` group.

    Attributes:
        validation: images at the end of the split that are held out; the checkpoint with the best reward (SFT: loss)
            on them is kept. 0 keeps the last step.
        save_every: updates between two checkpoints, and between two validations.
        lora_rank: 0 trains all weights.
        merge: with LoRA, also write the merged weights; set later, it merges the kept adapter.
        optimizer: transformers' name for it, such as adamw_torch or paged_adamw_8bit.
    """

    split: str
    save_every: PositiveInt
    validation: NonNegativeInt = 0
    freeze_vision: bool = True
    lora_rank: NonNegativeInt = 0
    lora_targets: str = "all-linear"
    merge: bool = False
    bf16: bool = False
    optimizer: str = "adamw_torch"


SHARED = tuple(SharedSettings.model_fields)  # stage sft in dvc.yaml depends on these of the `train` group


class TrainSettings(Length, SharedSettings):
    """The `train` group. Batches count images; each image gets `group_size` captions.

    Attributes:
        images_per_step: images of one optimizer update (verl's ppo_mini_batch_size).
        updates_per_rollout: updates on one rollout's captions; images_per_step times it is verl's train_batch_size.
        kl: weight of the KL term, in its low-variance estimator (TRL's own).
        schedule: of the learning rate after warm-up, by transformers' name.
        scale_rewards: advantages divided by the standard deviation of the group, of the batch, or not at all (none).
        truncated: a caption cut off at max_completion: keep its reward, mask it from the loss, or give it the lowest.
        repetition: subtracted from the reward, in standard deviations of the batch's rewards, times the share of a
            caption's word pairs that occurred before in it.
    """

    images_per_step: PositiveInt
    group_size: Annotated[int, Field(ge=2)]
    lr: PositiveFloat
    kl: NonNegativeFloat
    temperature: PositiveFloat
    max_completion: PositiveInt
    updates_per_rollout: PositiveInt = 1
    warmup_steps: NonNegativeInt = 5
    schedule: Literal["constant_with_warmup", "linear", "cosine"] = "constant_with_warmup"
    scale_rewards: Literal["group", "batch", "none"] = "group"
    truncated: Literal["keep", "mask", "lowest"] = "keep"
    repetition: NonNegativeFloat = 0.0


class SftSettings(Length):
    """The `sft` group: supervised steps, and how cim.data.annotators writes captions where scenes are known.

    Attributes:
        images: so many images of the split, drawn by the run's seed, are labelled; None for all that are not held out.
            If it is no multiple of batch_size, the last update of each epoch has fewer captions.
    """

    images: PositiveInt | None = None
    batch_size: PositiveInt
    lr: PositiveFloat
    annotators: dict[str, float] = Field(default_factory=dict)
    slip_rate: Share = 0.0


class ComputeSettings(Settings):
    """The `compute` group. It changes speed and memory, not what is learned: nothing retrains for it.

    Attributes:
        accelerate: a configuration file of accelerate; None for all devices of this machine.
        per_device, sft_per_device: captions in one forward and backward pass of a device; None for all of an update.
        vllm: where captions are sampled: off (transformers), colocate (the same GPUs) or server.
        vllm_memory: share of a GPU's memory for vLLM with colocate.
        cache_vision: a frozen vision tower that takes nothing but pixels computes each image once
            (cim.captioners.vision_cache).
        log_to: transformers' integrations, such as tensorboard, dvclive, wandb, trackio.
        warn_distinct: warn of a collapse where a smaller share of a step's captions is distinct.
    """

    accelerate: str | None = None
    per_device: PositiveInt | None = None
    sft_per_device: PositiveInt | None = None
    gradient_checkpointing: bool = False
    cache_vision: bool = False
    vllm: Literal["off", "colocate", "server"] = "off"
    vllm_memory: Annotated[float, Field(gt=0, le=1)] = 0.3
    vllm_url: Annotated[str, Field(pattern=r"^https?://[^\s/]+")] | None = None
    log_to: list[str] = Field(default_factory=list)
    warn_distinct: Share = 0.2

    @model_validator(mode="after")
    def _check_server(self) -> Self:
        require(self.vllm != "server" or self.vllm_url is not None, "vllm=server needs vllm_url")
        return self
