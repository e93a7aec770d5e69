"""Stage `captioner`: a small image-text-to-text model of the small world, the base that CIM improves.

A FastVLM (LLaVA-like: timm trunk, projector, Qwen2 text model) with a real processor and chat template, saved and
loaded like any hub model. It first learns to state every fact, then a lazy style that leaves facts out at random:
real captioners too know more than they say, and a reward can only bring out what is known.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Self

import numpy as np
import open_clip
import torch
from pydantic import PositiveFloat, PositiveInt, model_validator
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    CLIPImageProcessor,
    FastVlmConfig,
    FastVlmForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from cim.errors import CimError
from cim.params import Settings, require
from cim.processes import bfloat16_if_fast, default_device
from cim.world.encoder import load_pixels, minimize, normalise
from cim.world.language import BACKGROUND_PHRASES, FULL, RELATION_PHRASES, SIZE_WORDS, Detail, describe
from cim.world.scenes import Scene
from cim.world.vocabulary import COLOURS, FAMILY_OF, KIND_OF_FAMILY

# The trunk's stride, 32 in timm's small test models, on images of 112 pixels.
TOKENS_PER_SIDE = 4
PAD, END, IMAGE, USER, ASSISTANT, UNKNOWN = "<pad>", "<end>", "<image>", "<user>", "<assistant>", "<unk>"

CHAT_TEMPLATE = """{% for message in messages %}\
{{ '<' + message['role'] + '>' }}\
{% if message['content'] is string %}{{ message['content'] }}{% else %}\
{% for part in message['content'] %}\
{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}\
{% endfor %}\
{% endif %}{% if message['role'] == 'assistant' %}<end>{% endif %}\
{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"""


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


def build_processor(image_size: int, prompt: str) -> LlavaProcessor:
    """Image processor and word-level tokenizer for every word that the small world's English can use."""
    phrases = [prompt, ". , ? a an the is there and background"]
    phrases += [*COLOURS, *FAMILY_OF, *KIND_OF_FAMILY, *KIND_OF_FAMILY.values()]
    for table in (SIZE_WORDS, RELATION_PHRASES, BACKGROUND_PHRASES):
        phrases += [phrase for wordings in table.values() for phrase in wordings]
    splitter = pre_tokenizers.Whitespace()
    words = dict.fromkeys(word for phrase in phrases for word, _ in splitter.pre_tokenize_str(phrase.lower()))
    special = [PAD, END, IMAGE, USER, ASSISTANT, UNKNOWN]
    tokenizer = Tokenizer(WordLevel({w: i for i, w in enumerate([*special, *words])}, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = splitter
    # Words joined by spaces, but none before punctuation.
    spaces = decoders.Replace(Regex("^"), " "), decoders.Fuse(), decoders.Replace(Regex(" (?=[.,?])"), "")
    tokenizer.decoder = decoders.Sequence([*spaces, decoders.Strip(" ", 1, 0)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, unk_token=UNKNOWN, padding_side="left",
        additional_special_tokens=[IMAGE, USER, ASSISTANT], clean_up_tokenization_spaces=False,
    )  # fmt: skip
    images = CLIPImageProcessor(
        size={"shortest_edge": image_size}, crop_size={"height": image_size, "width": image_size},
        image_mean=[0.5] * 3, image_std=[0.5] * 3,
    )  # fmt: skip
    return LlavaProcessor(
        image_processor=images, tokenizer=fast, patch_size=image_size // TOKENS_PER_SIDE, image_token=IMAGE,
        vision_feature_select_strategy="full", num_additional_image_tokens=0, chat_template=CHAT_TEMPLATE,
    )  # fmt: skip


def build_model(tokenizer, encoder: Path, settings: CaptionerSettings) -> FastVlmForConditionalGeneration:
    """A FastVLM whose vision tower is the image encoder's trunk; its text model is untrained."""
    if not (encoder / "open_clip_config.json").is_file():
        raise CimError(f"{encoder}: holds no image encoder; run stage 'encoder' to train it")
    trunk = open_clip.create_model_from_pretrained(f"local-dir:{encoder}")[0].visual.trunk
    name = open_clip.get_model_config(f"local-dir:{encoder}")["vision_cfg"]["timm_model_name"]
    vision = {
        "model_type": "timm_wrapper", "architecture": name, "do_pooling": False, "hidden_size": trunk.num_features,
        "model_args": {"global_pool": ""},
    }  # fmt: skip
    text = {
        "model_type": "qwen2", "hidden_size": settings.hidden_size, "intermediate_size": 4 * settings.hidden_size,
        "num_hidden_layers": settings.layers, "num_attention_heads": settings.heads,
        "num_key_value_heads": settings.heads, "vocab_size": len(tokenizer), "max_position_embeddings": 512,
        "pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None,
        "tie_word_embeddings": True,
    }  # fmt: skip
    shared = {"image_token_index": tokenizer.convert_tokens_to_ids(IMAGE), "tie_word_embeddings": True}
    model = FastVlmForConditionalGeneration(FastVlmConfig(vision_config=vision, text_config=text, **shared))
    model.model.vision_tower.timm_model.load_state_dict(trunk.state_dict(), strict=False)
    model.generation_config.update(pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)
    return model


def train_captioner(
    images: Sequence[Path], scenes: Sequence[str], encoder: Path, settings: CaptionerSettings, out: Path
) -> list[dict]:
    """Train on image files of one size and their scene graphs as JSON; save model and processor; return the loss curve.

    The trunk of the OpenCLIP folder `encoder` becomes the vision tower. It is frozen: its features are computed once.
    """
    torch.manual_seed(settings.seed)
    rng = np.random.default_rng(settings.seed)
    device = default_device()
    pixels = load_pixels(images)
    scenes = [Scene.from_json(scene) for scene in scenes]
    processor = build_processor(pixels.shape[-1], settings.prompt)
    model = build_model(processor.tokenizer, encoder, settings).to(device)
    tower = model.model.vision_tower
    tower.requires_grad_(False).eval()
    with torch.inference_mode(), bfloat16_if_fast(device):
        maps = [tower(normalise(chunk, device)).last_hidden_state.float() for chunk in pixels.split(256)]
    features = torch.cat(maps).clone()
    if (side := features.shape[-1]) != TOKENS_PER_SIDE:
        raise CimError(
            f"{encoder}: its trunk has {side} features per side, not {TOKENS_PER_SIDE}; use one of stride 32"
        )
    _whiten_projector(model.model.multi_modal_projector.linear_1, features)
    prompt_ids = _prompt_ids(processor, settings.prompt)
    tower.forward = lambda pixel_values, **_: BaseModelOutputWithPooling(last_hidden_state=pixel_values)
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]

    def loss_of(batch: tuple[np.ndarray, float]) -> torch.Tensor:
        rows, full_share = batch
        captions = [describe(scenes[i], rng, FULL if rng.random() < full_share else settings.lazy) for i in rows]
        inputs = _batch(processor.tokenizer, prompt_ids, captions)
        return model(pixel_values=features[rows], **{k: v.to(device) for k, v in inputs.items()}).loss

    curve = []
    # Some lazy captions among the facts, so that the style phase has no sentence form that was never seen.
    for phase, steps, lr, full_share in (
        ("facts", settings.fact_steps, settings.lr, 0.6),
        ("style", settings.style_steps, settings.style_lr, 0.0),
    ):
        optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
        batches = ((rng.integers(0, len(scenes), settings.batch_size), full_share) for _ in range(steps))
        losses = minimize(optimizer, loss_of, batches, steps, 0.1, f"captioner: {phase}", max_norm=1.0)
        curve += [{"phase": phase, "step": step, "loss": losses[step]} for step in range(0, steps, 10)]
    del tower.forward
    model.requires_grad_(True).eval()
    model.save_pretrained(out)
    processor.save_pretrained(out)
    return curve


def _whiten_projector(linear: nn.Linear, features: torch.Tensor) -> None:
    """Fold (x - mean) / std of each feature channel into the projector's start; it shortens the plateau by half."""
    mean, std = features.mean((0, 2, 3)), features.std((0, 2, 3)) + 1e-6
    with torch.no_grad():
        nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        linear.weight /= std
        linear.bias -= linear.weight @ mean


def _prompt_ids(processor: LlavaProcessor, prompt: str) -> list[int]:
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    side = processor.image_processor.crop_size["height"]
    return processor(images=[torch.zeros(3, side, side, dtype=torch.uint8)], text=[text])["input_ids"][0]


def _batch(tokenizer, prompt_ids: list[int], captions: list[str]) -> dict[str, torch.Tensor]:
    """Prompt and caption as one right-padded sequence; only the caption and its end are labels."""
    answers = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(captions, add_special_tokens=False)["input_ids"]]

    def padded(rows: Iterable[list[int]], value: int) -> torch.Tensor:
        return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)

    return {
        "input_ids": padded(([*prompt_ids, *answer] for answer in answers), tokenizer.pad_token_id),
        "labels": padded(([-100] * len(prompt_ids) + answer for answer in answers), -100),
        "attention_mask": padded(([1] * (len(prompt_ids) + len(answer)) for answer in answers), 0),
    }
