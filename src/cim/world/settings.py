"""The `encoder` and `captioner` groups of parameters; imports no heavy library."""

from typing import Annotated, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from cim.params import Settings, require
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


class CaptionerSettings(Settings):
    """The `captioner` group: the model's size, how long it learns facts and style, and what the style keeps."""

    prompt: str
    hidden_size: PositiveInt
    layers: PositiveInt
    heads: PositiveInt
    seed: int
    batch_size: PositiveInt
    fact_steps: PositiveInt
    style_steps: PositiveInt
    lr: PositiveFloat
    style_lr: PositiveFloat
    lazy: Detail

    @model_validator(mode="after")
    def _check(self) -> Self:
        require(self.hidden_size % self.heads == 0, "hidden_size must be a multiple of heads")
        return self
