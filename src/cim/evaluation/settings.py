"""The parameters of the stages that evaluate, and of `cim judge`; imports no heavy library."""

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from cim.params import Names, Settings, Share, require
from cim.rewards import RewardSettings


class BootstrapSettings(Settings):
    """The bootstrap of `cim judge`, and of the groups below that build on it."""

    seed: NonNegativeInt
    resamples: PositiveInt


class StudySettings(BootstrapSettings):
    """That of a study, with enough resamples for its tables."""

    resamples: int = Field(ge=100)


class CorrelationSettings(BootstrapSettings):
    """The `correlation` group."""

    split: str
    images: int = Field(ge=3)
    reward: RewardSettings
    fractions: list[Annotated[float, Field(gt=0, le=1)]] = Field(min_length=1)
    ks: list[PositiveInt] = Field(min_length=1)
    model_captions: bool = False


class SamplesSettings(StudySettings):
    """The `samples` group.

    Attributes:
        split, images: the first images of this split; 0 for all.
        count: captions sampled for each, by every model.
        models: runs of the pipeline, and `base-0`, the model before training.
        rewards: further settings of the reward to compare, by name.
        best_of: numbers of captions to choose from; at most `count`.
    """

    split: str
    images: NonNegativeInt
    count: int = Field(ge=2)
    max_new_tokens: PositiveInt
    models: Names
    rewards: dict[str, RewardSettings] = Field(default_factory=dict)
    best_of: list[PositiveInt] = Field(min_length=1)
    temperature: PositiveFloat

    @model_validator(mode="after")
    def _check(self) -> Self:
        require(max(self.best_of) <= self.count, "best_of cannot be more than count")
        require(self.images != 1, "images should be 0 (all), or 2 at least")
        return self


class AblationSettings(StudySettings):
    """The `ablation` group; `of` is the split whose captions are compared, or none."""

    of: list[str] = Field(max_length=1)


class LabelSettings(AblationSettings):
    """The `labels` group.

    Attributes:
        split, held_out: the training images, and how many of them no run trains on.
        levels: names of annotators (`sft.annotators`), from the least thorough on.
        annotators: captions of an image, of which the study computes how much one says.
    """

    split: str
    held_out: NonNegativeInt
    levels: dict[str, dict[str, Share]] = Field(min_length=1)
    annotators: int = Field(ge=2)


class EvaluateSettings(StudySettings):
    """The `evaluate` group.

    Attributes:
        encoder: the sentence encoder of CAPTURE's soft matching.
        identification: the one that searches the human captions with a caption; None where there are not several.
    """

    splits: Names
    parser: Literal["world", "pattern", "factual"]
    encoder: str
    reader: str | None = None
    wordnet: bool = True
    identification: str | None = None


class Setting(RewardSettings):
    """One setting of the reward in the `judgements` study; k beyond the gallery's size means all of it.

    Attributes:
        text: the text rows of a gallery image: its first caption, the mean of all, or each.
        rows: the first so many images of the gallery; None for all.
    """

    text: Literal["first", "mean", "each"] = "first"
    rows: PositiveInt | None = None


class JudgementSettings(BootstrapSettings):
    """The `judgements` group.

    Attributes:
        of: the data sets whose judgements are studied: flickr8k, or none; in `folder`, in their published layout.
        splits: whose images are the gallery, in random order.
        seed: of that order, of the halves of the judged images and of the bootstrap.
        settings: settings of the reward by name.
        ks, decays, temperatures, whitens: the grid that a setting is chosen from; K beyond the gallery: all of it.
        sizes: numbers of gallery images.
        texts, images: other encoders to compare.
    """

    of: list[Literal["flickr8k"]] = Field(max_length=1)
    folder: str
    splits: Names
    settings: dict[str, Setting] = Field(min_length=1)
    ks: list[PositiveInt] = Field(min_length=1)
    decays: list[Annotated[float, Field(gt=0, le=1)]] = Field(min_length=1)
    temperatures: list[PositiveFloat] = Field(min_length=1)
    whitens: list[Share] = Field(min_length=1)
    sizes: list[PositiveInt] = Field(min_length=1)
    texts: list[str] = Field(default_factory=list)
    images: list[str] = Field(default_factory=list)
