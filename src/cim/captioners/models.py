"""Any image-text-to-text model of transformers: its settings, loading it, and prompting it.

Nothing depends on a model's name: its processor, its chat template and these settings describe it.
"""

from pathlib import Path

import torch
from PIL import Image
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from cim.captioners.loading import loading
from cim.captioners.settings import ModelSettings
from cim.errors import CimError
from cim.images import open_image
from cim.processes import default_device

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Matches the parameters of a vision tower, by the names that transformers' models give it.
VISION = r"(.*\.)?(vision_tower|visual|vision_model)\..*"


def load_model(settings: ModelSettings, device: torch.device | None = None):
    """Model and processor, ready for generation; a folder with a LoRA adapter gets its base merged in.

    Raises:
        CimError: where it cannot be loaded, with the reason; so do load_processor and skeleton.
    """
    name = settings.name
    options = {"dtype": DTYPES[settings.dtype], "attn_implementation": settings.attention} | settings.source
    with loading(f"model '{name}'"):
        if (Path(name) / "adapter_config.json").is_file():
            from peft import PeftConfig, PeftModel

            config = PeftConfig.from_pretrained(name)
            options["revision"] = config.revision or "main"
            model = _load_weights(config.base_model_name_or_path, **options)
            model = PeftModel.from_pretrained(model, name).merge_and_unload()
        else:
            model = _load_weights(name, **options)
    hold_batch_norm(model)
    return model.to(device or default_device()).eval(), load_processor(settings)


def _load_weights(name: str, **options) -> nn.Module:
    model, found = AutoModelForImageTextToText.from_pretrained(name, output_loading_info=True, **options)
    if found["missing_keys"]:  # transformers only logs that these have random weights
        raise ValueError(f"its weights lack {min(found['missing_keys'])} and {len(found['missing_keys']) - 1} more")
    return model


def load_processor(settings: ModelSettings):
    """The processor, with the settings' options; its tokenizer pads on the left, as generation needs."""
    with loading(f"model '{settings.name}'"):
        processor = AutoProcessor.from_pretrained(settings.name, **settings.source, **settings.processor)
        if not getattr(processor, "chat_template", None):
            raise ValueError("its processor has no chat template")
    processor.tokenizer.padding_side = "left"
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    return processor


def skeleton(settings: ModelSettings) -> nn.Module:
    """The model without memory for its weights, from its configuration alone, for counting."""
    with loading(f"model '{settings.name}'"), torch.device("meta"):
        config = AutoConfig.from_pretrained(settings.name, **settings.source)
        return AutoModelForImageTextToText.from_config(config, trust_remote_code=settings.trust_remote_code)


def hold_batch_norm(model: nn.Module) -> None:
    """Keep every BatchNorm in evaluation mode, also after `model.train()`.

    Else a vision tower would use and overwrite batch statistics, which ruins it within a few steps at an almost
    unchanged reward.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
            module.train = lambda mode=True, module=module: module


def chat(prompt: str) -> list[dict]:
    """The conversation that asks for a caption of one image."""
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]


def fit(image: Image.Image, max_pixels: int | None) -> Image.Image:
    """The image, scaled down to at most max_pixels; its shape is kept.

    >>> fit(Image.new("RGB", (400, 100)), 10_000).size
    (200, 50)
    """
    if max_pixels is None or image.width * image.height <= max_pixels:
        return image
    scale = (max_pixels / (image.width * image.height)) ** 0.5
    return image.resize((max(1, int(image.width * scale)), max(1, int(image.height * scale))), Image.Resampling.BICUBIC)


def prompt_inputs(processor, images: list[Image.Image], settings: ModelSettings):
    """The model's inputs to caption these images: the same prompt for each, padded on the left."""
    text = processor.apply_chat_template(chat(settings.prompt), add_generation_prompt=True, tokenize=False)
    fitted = [[fit(image, settings.max_pixels)] for image in images]
    return processor(images=fitted, text=[text] * len(images), padding=True, return_tensors="pt")


def longest_prompt(processor, paths: list[Path], settings: ModelSettings) -> int:
    """Tokens of the longest prompt with one of these images; CimError where it is longer than max_prompt."""
    inputs = prompt_inputs(processor, [open_image(path) for path in paths], settings)
    longest = int(inputs["attention_mask"].sum(1).max())
    if settings.max_prompt is not None and longest > settings.max_prompt:
        raise CimError(
            f"a prompt with its image takes {longest} tokens, more than model.max_prompt={settings.max_prompt}; "
            "lower model.max_pixels or raise model.max_prompt"
        )
    return longest
