"""Stage `captioner`: a small image-text-to-text model of the small world, the base that CIM improves.

It is a FastVLM (LLaVA-like: timm trunk, projector, Qwen2 text model) with a real processor and chat
template, saved and loaded like any hub model. It first learns to state every fact, then a lazy style
that leaves facts out at random: real captioners too know more than they say, and a reward can only
bring out what is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import open_clip
import torch
from open_clip_train.scheduler import cosine_lr
from pydantic import PositiveFloat, PositiveInt, model_validator
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from torch import nn
from tqdm.auto import tqdm
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
from cim.world.encoder import load_pixels, normalise
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
    def _check(self) -> CaptionerSettings:
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
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(Regex("^"), " "),
            decoders.Fuse(),
            decoders.Replace(Regex(" (?=[.,?])"), ""),
            decoders.Strip(" ", 1, 0),
        ]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        additional_special_tokens=[IMAGE, USER, ASSISTANT],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    images = CLIPImageProcessor(
        size={"shortest_edge": image_size},
        crop_size={"height": image_size, "width": image_size},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=fast,
        patch_size=image_size // TOKENS_PER_SIDE,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        image_token=IMAGE,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(
    processor: LlavaProcessor, encoder: Path, settings: CaptionerSettings
) -> FastVlmForConditionalGeneration:
    """A FastVLM whose vision tower is the image encoder's trunk; its text model is untrained."""
    if not (encoder / "open_clip_config.json").is_file():
        raise CimError(f"{encoder}: no image encoder there; make it with the 'encoder' stage")
    clip, _ = open_clip.create_model_from_pretrained(f"local-dir:{encoder}")
    architecture = open_clip.get_model_config(f"local-dir:{encoder}")["vision_cfg"]["timm_model_name"]
    tokenizer = processor.tokenizer
    config = FastVlmConfig(
        vision_config={
            "model_type": "timm_wrapper",
            "architecture": architecture,
            "do_pooling": False,
            "hidden_size": clip.visual.trunk.num_features,
            "model_args": {"global_pool": ""},
        },
        text_config={
            "model_type": "qwen2",
            "hidden_size": settings.hidden_size,
            "intermediate_size": 4 * settings.hidden_size,
            "num_hidden_layers": settings.layers,
            "num_attention_heads": settings.heads,
            "num_key_value_heads": settings.heads,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 512,
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "bos_token_id": None,
            "tie_word_embeddings": True,
        },
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        tie_word_embeddings=True,
    )
    model = FastVlmForConditionalGeneration(config)
    model.model.vision_tower.timm_model.load_state_dict(clip.visual.trunk.state_dict(), strict=False)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model


class _CachedTower(nn.Module):
    """Stands in for a frozen vision tower: the pixels it is given are feature maps already."""

    def forward(self, pixel_values: torch.Tensor, **_) -> BaseModelOutputWithPooling:
        return BaseModelOutputWithPooling(last_hidden_state=pixel_values)


def train_captioner(
    images: Sequence[Path], scenes: Sequence[str], encoder: Path, settings: CaptionerSettings, out: Path
) -> list[dict]:
    """Train on images of known scenes; save model and processor; return the loss curve.

    The vision tower stays frozen, so its features are computed once.

    Args:
        images: files of one size.
        scenes: the scene graph of each image, as JSON.
        encoder: the OpenCLIP folder whose trunk becomes the vision tower.
    """
    torch.manual_seed(settings.seed)
    rng = np.random.default_rng(settings.seed)
    device = default_device()
    pixels = load_pixels(images)
    scenes = [Scene.from_json(scene) for scene in scenes]
    processor = build_processor(pixels.shape[-1], settings.prompt)
    model = build_model(processor, encoder, settings).to(device)
    tower = model.model.vision_tower
    tower.requires_grad_(False).eval()
    with torch.inference_mode(), bfloat16_if_fast(device):
        maps = [tower(normalise(chunk, device)).last_hidden_state.float() for chunk in pixels.split(256)]
    features = torch.cat(maps).clone()
    if features.shape[-1] != TOKENS_PER_SIDE:
        raise CimError(
            f"{encoder}: its trunk gives {features.shape[-1]} features a side, the captioner reads {TOKENS_PER_SIDE}; "
            "set encoder.trunk to one of stride 32"
        )
    _whiten_projector(model.model.multi_modal_projector.linear_1, features)
    prompt_ids = _prompt_ids(processor, settings.prompt)

    model.model.vision_tower = _CachedTower()
    curve = []
    # Some lazy captions among the facts, so that the style asks for no sentence that was never seen.
    for phase, steps, lr, full_share in (
        ("facts", settings.fact_steps, settings.lr, 0.6),
        ("style", settings.style_steps, settings.style_lr, 0.0),
    ):
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
        schedule = cosine_lr(optimizer, lr, steps // 10, steps)
        model.train()
        for step in tqdm(range(steps), desc=f"captioner: {phase}", mininterval=2):
            schedule(step)
            rows = rng.integers(0, len(scenes), settings.batch_size)
            captions = [describe(scenes[i], rng, FULL if rng.random() < full_share else settings.lazy) for i in rows]
            batch = {k: v.to(device) for k, v in _batch(processor.tokenizer, prompt_ids, captions).items()}
            loss = model(pixel_values=features[rows], **batch).loss
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            if step % 10 == 0:
                curve.append({"phase": phase, "step": step, "loss": loss.item()})
    model.model.vision_tower = tower
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
    blank = torch.zeros(3, side, side, dtype=torch.uint8)
    return processor(images=[blank], text=[text])["input_ids"][0]


def _batch(tokenizer, prompt_ids: list[int], captions: list[str]) -> dict[str, torch.Tensor]:
    """Prompt and caption as one right-padded sequence; only the caption and its end are labels."""
    answers = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(captions, add_special_tokens=False)["input_ids"]]
    longest = max(map(len, answers))
    start = len(prompt_ids)
    ids = torch.full((len(captions), start + longest), tokenizer.pad_token_id)
    ids[:, :start] = torch.tensor(prompt_ids)
    labels = torch.full_like(ids, -100)
    for row, answer in enumerate(answers):
        ids[row, start : start + len(answer)] = labels[row, start : start + len(answer)] = torch.tensor(answer)
    mask = (labels != -100).long()
    mask[:, :start] = 1
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}
