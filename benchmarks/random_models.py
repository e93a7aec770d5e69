"""What benchmarks/gpu.py measures: models of the published architectures with random weights, and made-up data."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import open_clip
import pandas as pd
import torch
import transformers as tf
from PIL import Image
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.models import Pooling, Transformer
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from cim.data.manifest import write_manifest
from cim.fastvlm import word_tokenizer
from cim.files import write_json
from cim.images import content_digest
from cim.processes import default_device

# Width, layers, heads, key-value heads, width of the MLP, vocabulary, and whether input and output share embeddings.
SIZES = {
    "7B": (3584, 28, 28, 4, 18_944, 152_064, False),
    "3B": (2048, 36, 16, 2, 11_008, 151_936, True),
    "tiny": (256, 2, 2, 1, 64, 1000, True),
}
VISION = {"depth": 32, "hidden_size": 1280, "num_heads": 16, "intermediate_size": 3420, "window_size": 112}
TINY_VISION = {**VISION, "depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64}
SPECIAL = ("<|im_end|>", "<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
CHAT = """{% for m in messages %}<|im_start|>{{ m['role'] }}
{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}\
{% if part['type'] == 'image' %}\
<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def captioner_config(size: str) -> tf.Qwen2_5_VLConfig:
    width, layers, heads, kv_heads, mlp, vocabulary, tied = SIZES[size]
    text = {
        "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads, "intermediate_size": mlp,
        "num_key_value_heads": kv_heads, "vocab_size": vocabulary, "max_position_embeddings": 128_000,
        "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1_000_000.0},
        "tie_word_embeddings": tied, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0,
    }  # fmt: skip
    vision = {**(TINY_VISION if size == "tiny" else VISION), "out_hidden_size": width}
    vision["fullatt_block_indexes"] = [i for i in (7, 15, 23, 31) if i < vision["depth"]]
    ids = {f"{name}_token_id": SPECIAL.index(f"<|{name}|>") for name in ("vision_start", "vision_end")}
    ids |= {f"{name}_token_id": SPECIAL.index(f"<|{name}_pad|>") for name in ("image", "video")}
    return tf.Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied, **ids)


def write_captioner(folder: Path, size: str, dtype: torch.dtype) -> None:
    """Qwen2.5-VL with random weights; its tokens are bytes and made-up words."""
    tokens = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens += [f"Ġw{i}" for i in range(SIZES[size][5] - len(tokens))]
    core = Tokenizer(BPE({token: i for i, token in enumerate(tokens)}, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.add_special_tokens(list(SPECIAL))
    words = tf.PreTrainedTokenizerFast(tokenizer_object=core, eos_token=SPECIAL[0], pad_token=SPECIAL[0])
    words.chat_template = CHAT
    torch.set_default_dtype(dtype)
    with default_device():
        model = tf.Qwen2_5_VLForConditionalGeneration(captioner_config(size))
    torch.set_default_dtype(torch.float32)
    model.generation_config.update(eos_token_id=0, pad_token_id=0)
    model.save_pretrained(folder)
    images = tf.Qwen2VLImageProcessor(min_pixels=56 * 56, max_pixels=12_845_056)
    tf.Qwen2_5_VLProcessor(images, words, tf.Qwen2VLVideoProcessor(), chat_template=CHAT).save_pretrained(folder)


def write_encoders(text: Path, image: Path, tiny: bool) -> None:
    """all-mpnet-base-v2's and ViT-H-14's architectures with random weights; a word is a token."""
    words = word_tokenizer(f"w{i}" for i in range(30_000))
    words.model_max_length = 384
    sizes = {"num_hidden_layers": 1, "hidden_size": 24, "intermediate_size": 24} if tiny else {}
    tf.MPNetModel(tf.MPNetConfig(vocab_size=30_527, **sizes)).save_pretrained(text.with_name("mpnet"))
    words.save_pretrained(text.with_name("mpnet"))
    body = Transformer(str(text.with_name("mpnet")), max_seq_length=384)
    SentenceTransformer(modules=[body, Pooling(body.get_embedding_dimension())]).save(str(text))
    name = "ViT-B-32" if tiny else "ViT-H-14"
    with default_device():
        model = open_clip.create_model(name)
    image.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous().cpu() for k, v in model.state_dict().items()}, image / "open_clip_model.safetensors")
    preprocess = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
    config = {"model_cfg": open_clip.get_model_config(name), "preprocess_cfg": preprocess}
    write_json(image / "open_clip_config.json", config)


def picture(rng: np.random.Generator, width: int, height: int) -> bytes:
    """A JPEG file: blurred colours and grain, as large on disk as a photo."""
    colours = Image.fromarray(rng.integers(0, 255, (24, 32, 3), np.uint8))
    smooth = colours.resize((width, height), Image.Resampling.BICUBIC)
    grain = np.asarray(smooth, np.float32) + rng.normal(0, 8, (height, width, 3))
    out = io.BytesIO()
    Image.fromarray(grain.clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=90)
    return out.getvalue()


def write_data(work: Path, photos: int, rng: np.random.Generator) -> None:
    """A WebDataset of `photos` rows, and a manifest of 128 larger pictures to train on."""
    say = lambda: " ".join(f"w{i}" for i in rng.integers(0, 30_000, 77))  # noqa: E731  COCO-LN500's mean length
    contents = [picture(rng, 500, 375) for _ in range(min(photos, 64))]  # each is decoded again for every row
    for name, count in (("few", photos // 8), ("all", photos)):
        with tarfile.open(work / f"{name}.tar", "w") as tar:
            for i in range(count):
                for suffix, content in (("jpg", contents[i % len(contents)]), ("txt", say().encode())):
                    member = tarfile.TarInfo(f"{i:06d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    dataset = work / "artifacts" / "dataset"
    dataset.mkdir(parents=True, exist_ok=True)
    names = [f"{i}.jpg" for i in range(128)]
    for name in names:
        (dataset / name).write_bytes(picture(rng, 1024, 768))
    rows = {"image_id": names, "image": names, "caption": [say() for _ in names], "split": "train", "template": -1}
    rows["digest"] = [content_digest((dataset / name).read_bytes()) for name in names]
    write_manifest(pd.DataFrame(rows), dataset / "manifest.parquet")
    for name, count in (("few", photos), ("all", 16 * photos)):  # many, since scoring them takes less than starting to
        lines = [{"image": str(dataset / names[i % 128]), "caption": say()} for i in range(count)]
        (work / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
