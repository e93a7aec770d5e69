"""Tiny models of the published classes with random weights: real processors, real chat formats, no hub.

Each is written to a folder as the hub would hold it. They share one byte-level tokenizer, so that any text goes in and out.
"""

from __future__ import annotations

from pathlib import Path

import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

WIDTH, HEADS = 32, 2
CHATML = """{%% for message in messages %%}<|im_start|>{{ message['role'] }}
{%% if message['content'] is string %%}{{ message['content'] }}{%% else %%}{%% for part in message['content'] %%}\
{%% if part['type'] == 'image' %%}%s{%% else %%}{{ part['text'] }}{%% endif %%}{%% endfor %%}{%% endif %%}<|im_end|>
{%% endfor %%}{%% if add_generation_prompt %%}<|im_start|>assistant
{%% endif %%}"""
LLAVA = """{% for message in messages %}{{ 'USER: ' if message['role'] == 'user' else ' ASSISTANT: ' }}\
{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}\
{% if part['type'] == 'image' %}<image>
{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{% if message['role'] == 'assistant' %}</s>{% endif %}\
{% endfor %}{% if add_generation_prompt %} ASSISTANT:{% endif %}"""
SMOL = """<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}:{% if message['content'] is string %}\
 {{ message['content'] }}{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% else %}\
{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<end_of_utterance>
{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"""


def tokenizer(end: str, *special: str, template: str = "", **named: str) -> tf.PreTrainedTokenizerFast:
    """Single bytes and these special tokens; `named` are tokens that processors ask for by attribute."""
    letters = [end, *special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(BPE({letter: i for i, letter in enumerate(letters)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([end, *special])
    options = {"extra_special_tokens": named} if named else {}
    fast = tf.PreTrainedTokenizerFast(tokenizer_object=core, eos_token=end, pad_token=end, **options)
    fast.chat_template = template
    return fast


def text_shape(words: tf.PreTrainedTokenizerFast) -> dict:
    return {
        "vocab_size": len(words),
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "max_position_embeddings": 2048,
        "bos_token_id": None,
        "eos_token_id": words.eos_token_id,
        "pad_token_id": words.pad_token_id,
    }


def llava() -> tuple:
    """LLaVA-1.5."""
    words = tokenizer("</s>", "<image>", template=LLAVA)
    images = tf.CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    processor = tf.LlavaProcessor(
        images, words, patch_size=14, vision_feature_select_strategy="default", chat_template=LLAVA,
        num_additional_image_tokens=1,
    )  # fmt: skip
    vision = tf.CLIPVisionConfig(
        hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=2, num_attention_heads=HEADS, image_size=56,
        patch_size=14, projection_dim=WIDTH,
    )  # fmt: skip
    config = tf.LlavaConfig(
        vision_config=vision,
        text_config=tf.LlamaConfig(**text_shape(words)),
        image_token_id=words.convert_tokens_to_ids("<image>"),
    )
    return tf.LlavaForConditionalGeneration(config), processor


def _qwen_words() -> tf.PreTrainedTokenizerFast:
    template = CHATML % "<|vision_start|><|image_pad|><|vision_end|>"
    special = ("<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    return tokenizer("<|im_end|>", *special, template=template)


def _qwen_ids(words) -> dict:
    tokens = {
        "image": "<|image_pad|>",
        "video": "<|video_pad|>",
        "vision_start": "<|vision_start|>",
        "vision_end": "<|vision_end|>",
    }
    return {f"{name}_token_id": words.convert_tokens_to_ids(token) for name, token in tokens.items()}


def _qwen_text(words) -> dict:
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10_000.0}
    return {**text_shape(words), "rope_parameters": rope}


def qwen2_vl() -> tuple:
    """Qwen2-VL."""
    words = _qwen_words()
    images = tf.Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=112 * 112)
    processor = tf.Qwen2VLProcessor(images, words, tf.Qwen2VLVideoProcessor(), chat_template=words.chat_template)
    vision = {"depth": 2, "embed_dim": WIDTH, "hidden_size": WIDTH, "num_heads": HEADS, "mlp_ratio": 2}
    config = tf.Qwen2VLConfig(text_config=_qwen_text(words), vision_config=vision, **_qwen_ids(words))
    return tf.Qwen2VLForConditionalGeneration(config), processor


def qwen2_5_vl() -> tuple:
    """Qwen2.5-VL."""
    words = _qwen_words()
    images = tf.Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=112 * 112)
    processor = tf.Qwen2_5_VLProcessor(images, words, tf.Qwen2VLVideoProcessor(), chat_template=words.chat_template)
    vision = {
        "depth": 2, "hidden_size": WIDTH, "intermediate_size": WIDTH, "out_hidden_size": WIDTH, "num_heads": HEADS,
        "window_size": 56, "fullatt_block_indexes": [1],
    }  # fmt: skip
    config = tf.Qwen2_5_VLConfig(text_config=_qwen_text(words), vision_config=vision, **_qwen_ids(words))
    return tf.Qwen2_5_VLForConditionalGeneration(config), processor


def qwen3_vl() -> tuple:
    """Qwen3-VL."""
    words = _qwen_words()
    images = tf.Qwen2VLImageProcessor(min_pixels=32 * 32, max_pixels=128 * 128, patch_size=16)
    processor = tf.Qwen3VLProcessor(images, words, tf.Qwen3VLVideoProcessor(), chat_template=words.chat_template)
    vision = {
        "depth": 2, "hidden_size": WIDTH, "intermediate_size": WIDTH, "out_hidden_size": WIDTH, "num_heads": HEADS,
        "num_position_embeddings": 64, "deepstack_visual_indexes": [0],
    }  # fmt: skip
    text = {**_qwen_text(words), "head_dim": WIDTH // HEADS}
    config = tf.Qwen3VLConfig(text_config=text, vision_config=vision, **_qwen_ids(words))
    return tf.Qwen3VLForConditionalGeneration(config), processor


def internvl() -> tuple:
    """InternVL 2.5 and 3, in transformers' layout; images become up to three tiles and a thumbnail."""
    template = CHATML % "<IMG_CONTEXT>\n"
    words = tokenizer(
        "<|im_end|>", "<|im_start|>", "<IMG_CONTEXT>", "<img>", "</img>", "<video>", template=template,
        context_image_token="<IMG_CONTEXT>", start_image_token="<img>", end_image_token="</img>", video_token="<video>",
    )  # fmt: skip
    from transformers.models.got_ocr2 import GotOcr2ImageProcessor

    images = GotOcr2ImageProcessor(size={"height": 56, "width": 56}, crop_to_patches=True, min_patches=1, max_patches=3)
    processor = tf.InternVLProcessor(
        images, words, tf.InternVLVideoProcessor(), image_seq_length=4, chat_template=template
    )
    vision = tf.InternVLVisionConfig(
        hidden_size=WIDTH, intermediate_size=WIDTH, num_hidden_layers=2, num_attention_heads=HEADS, image_size=[56, 56],
        patch_size=[14, 14],
    )  # fmt: skip
    config = tf.InternVLConfig(
        vision_config=vision,
        text_config=tf.Qwen2Config(**text_shape(words)),
        image_token_id=words.convert_tokens_to_ids("<IMG_CONTEXT>"),
    )
    return tf.InternVLForConditionalGeneration(config), processor


def smolvlm() -> tuple:
    """SmolVLM2; images become tiles and a thumbnail."""
    words = tokenizer(
        "<end_of_utterance>", "<|im_start|>", "<image>", "<fake_token_around_image>", "<global-img>", "<video>",
        *(f"<row_{r}_col_{c}>" for r in range(1, 4) for c in range(1, 4)), template=SMOL,
    )  # fmt: skip
    images = tf.SmolVLMImageProcessor(size={"longest_edge": 112}, max_image_size={"longest_edge": 56})
    processor = tf.SmolVLMProcessor(images, words, tf.SmolVLMVideoProcessor(), image_seq_len=4, chat_template=SMOL)
    vision = {
        "hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": HEADS,
        "image_size": 56, "patch_size": 14,
    }  # fmt: skip
    text = tf.LlamaConfig(**text_shape(words))
    config = tf.SmolVLMConfig(
        text_config=text, vision_config=vision, scale_factor=2, image_token_id=words.convert_tokens_to_ids("<image>"),
        pad_token_id=words.pad_token_id,
    )  # fmt: skip
    return tf.SmolVLMForConditionalGeneration(config), processor


def mllama() -> tuple:
    """Llama 3.2 Vision: images per sample, read through cross-attention. Not one of STANDINS: TRL's GRPO cannot train it."""
    template = CHATML % "<|image|>"
    words = tokenizer("<|im_end|>", "<|im_start|>", "<|image|>", "<|python_tag|>", template=template)
    words.bos_token = "<|im_start|>"
    images = tf.MllamaImageProcessor(size={"height": 56, "width": 56}, max_image_tiles=4)
    vision = {
        "hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": 2, "num_global_layers": 1,
        "attention_heads": HEADS, "vision_output_dim": 2 * WIDTH, "image_size": 56, "intermediate_layers_indices": [0],
    }  # fmt: skip
    text = {**text_shape(words), "cross_attention_layers": [1], "bos_token_id": words.bos_token_id}
    config = tf.MllamaConfig(
        vision_config=vision, text_config=text, image_token_id=words.convert_tokens_to_ids("<|image|>")
    )
    return tf.MllamaForConditionalGeneration(config), tf.MllamaProcessor(images, words, chat_template=template)


STANDINS = {make.__name__: make for make in (llava, qwen2_vl, qwen2_5_vl, qwen3_vl, internvl, smolvlm)}


def write(name: str, folder: Path) -> Path:
    """Write the model of one of the functions above to a folder."""
    torch.manual_seed(0)
    model, processor = globals()[name]()
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
