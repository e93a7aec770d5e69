"""The `encoder` and `captioner` groups of parameters; imports no heavy library."""

from typing import Annotated

from pydantic import Field, PositiveFloat, PositiveInt

from cim.params import FastVlmSettings, Settings
from cim.world.language import Detail

Batch = Annotated[int, Field(ge=2)]


class EncoderTrainingSettings(Settings):
    """The `encoder` group: the architecture, and how long each of the three phases lasts.

    Attributes:
        text_towers: numbers of captioned scenes; for each a further text tower, which saw no other captions.
    """

    trunk: str
    embed_dim: PositiveInt
    seed: int
    batch_size: Batch
    crop_epochs: PositiveInt
    scene_epochs: PositiveInt
    trunk_lr: PositiveFloat
    clip_steps: PositiveInt
    clip_batch: Batch
    clip_lr: PositiveFloat
    text_towers: list[Annotated[int, Field(ge=2)]] = Field(default_factory=list)


class CaptionerSettings(FastVlmSettings):
    """The `captioner` group: the model's size, how long it learns facts and style, and what the style keeps."""

    lazy: Detail
