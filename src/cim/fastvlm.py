"""Small FastVLM models (LLaVA-like: timm trunk, projector, text model): assembling them, and their training batches."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
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

STRIDE = 32  # of timm's usual convolutional trunks: pixels on each side of an image token
PAD, END, IMAGE, USER, ASSISTANT, UNKNOWN = "<pad>", "<end>", "<image>", "<user>", "<assistant>", "<unk>"


def chat_template(role: str, user_end: str, assistant_end: str) -> str:
    """A chat template for messages of text or of images and text; `role` opens a message, % standing for its role."""
    before, after = role.split("%")
    return (
        "{% for message in messages %}{{ '" + before + "' + message['role'] + '" + after + "' }}"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}" + IMAGE + "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
        "{{ '" + assistant_end + "' if message['role'] == 'assistant' else '" + user_end + "' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '" + before + "assistant" + after + "' }}{% endif %}"
    )


WORDS_CHAT = chat_template("<%>", "", END)  # for word_tokenizer
CHATML = chat_template("<|im_start|>%\\n", "<|im_end|>\\n", "<|im_end|>\\n")


def split_words(text: str) -> list[str]:
    """Lower-case words and punctuation marks, as the tokenizer of `word_tokenizer` sees them."""
    return [word for word, _ in pre_tokenizers.Whitespace().pre_tokenize_str(text.lower())]


def word_tokenizer(words: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer with one token for each of these words, and for what `WORDS_CHAT` needs."""
    vocabulary = dict.fromkeys([PAD, END, IMAGE, USER, ASSISTANT, UNKNOWN, *words])
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    # Words joined by spaces, but none before punctuation.
    spaces = decoders.Replace(Regex("^"), " "), decoders.Fuse(), decoders.Replace(Regex(" (?=[.,?])"), "")
    tokenizer.decoder = decoders.Sequence([*spaces, decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, unk_token=UNKNOWN, padding_side="left",
        additional_special_tokens=[IMAGE, USER, ASSISTANT], clean_up_tokenization_spaces=False,
    )  # fmt: skip


def build_processor(
    tokenizer, template: str, image_size: int, mean: Sequence[float], std: Sequence[float]
) -> LlavaProcessor:
    """Scales and crops images to image_size x image_size, as (x / 255 - mean) / std, with a token for each feature."""
    side = math.ceil(image_size / STRIDE)
    images = CLIPImageProcessor(
        size={"shortest_edge": image_size}, crop_size={"height": image_size, "width": image_size},
        image_mean=list(mean), image_std=list(std),
    )  # fmt: skip
    return LlavaProcessor(
        image_processor=images, tokenizer=tokenizer, patch_size=image_size // side, image_token=IMAGE,
        vision_feature_select_strategy="full", num_additional_image_tokens=0, chat_template=template,
    )  # fmt: skip


def decoder_config(hidden_size: int, layers: int, heads: int) -> dict[str, Any]:
    """The configuration of a small text model that is trained from scratch."""
    return {
        "model_type": "qwen2", "hidden_size": hidden_size, "intermediate_size": 4 * hidden_size,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": heads,
        "max_position_embeddings": 512, "tie_word_embeddings": True,
    }  # fmt: skip


def assemble(trunk: nn.Module, text: dict[str, Any], tokenizer) -> FastVlmForConditionalGeneration:
    """A FastVLM with the weights of a timm trunk; the text model of configuration `text` is untrained."""
    vision = {
        "model_type": "timm_wrapper", "architecture": trunk.pretrained_cfg["architecture"], "do_pooling": False,
        "hidden_size": trunk.num_features, "model_args": {"global_pool": ""},
    }  # fmt: skip
    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = text | ends | {"vocab_size": len(tokenizer), "bos_token_id": None}
    shared = {"tie_word_embeddings": text["tie_word_embeddings"], "image_token_index": tokenizer.vocab[IMAGE]}
    model = FastVlmForConditionalGeneration(FastVlmConfig(vision_config=vision, text_config=text, **shared))
    model.model.vision_tower.timm_model.load_state_dict(trunk.state_dict(), strict=False)
    model.generation_config.update(**ends)
    return model


def whiten_projector(model: FastVlmForConditionalGeneration, features: torch.Tensor) -> None:
    """Fold (x - mean) / std of each feature channel into the projector's start; it shortens the plateau by half.

    Features are the vision tower's, (n, c, h, w).
    """
    linear, features = model.model.multi_modal_projector.linear_1, features.float()
    mean, std = features.mean((0, 2, 3)), features.std((0, 2, 3)) + 1e-6
    with torch.no_grad():
        nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        linear.weight /= std
        linear.bias -= linear.weight @ mean


@contextmanager
def features_as_pixels(tower: nn.Module) -> Iterator[None]:
    """Within it, the model takes the frozen vision tower's features in place of pixels."""
    tower.forward = lambda pixel_values, **_: BaseModelOutputWithPooling(last_hidden_state=pixel_values)
    try:
        yield
    finally:
        del tower.forward


def prompt_tokens(processor: LlavaProcessor, prompt: str, features: torch.Tensor) -> list[int]:
    """The tokens that ask for a caption of one image, up to where the caption begins.

    Raises:
        CimError: where the processor does not give each of the features (n, c, h, w) of an image its token.
    """
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    side = processor.image_processor.crop_size["height"]
    tokens = processor(images=[torch.zeros(3, side, side, dtype=torch.uint8)], text=[text])["input_ids"][0]
    if tokens.count(processor.image_token_id) != features[0, 0].numel():
        found = "x".join(map(str, features.shape[2:]))
        raise CimError(f"the vision tower's trunk makes {found} features of {side} pixels; use one of stride {STRIDE}")
    return tokens


def caption_batch(tokenizer, prompt: list[int], captions: list[str]) -> dict[str, torch.Tensor]:
    """Prompt and caption as one right-padded sequence; labels are the known words of the caption and its end."""
    answers = tokenizer(captions, add_special_tokens=False)["input_ids"]
    rows = [torch.tensor([*prompt, *answer, tokenizer.eos_token_id]) for answer in answers]
    tokens = pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    learned = mask.bool() & (tokens != tokenizer.unk_token_id)  # all of them where unk_token_id is None
    learned[:, : len(prompt)] = False
    return {"input_ids": tokens, "labels": tokens.where(learned, -100), "attention_mask": mask}
