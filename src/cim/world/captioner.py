"""Stage `captioner`: a small image-text-to-text model of the small world, the base that CIM improves.

A FastVLM (LLaVA-like: timm trunk, projector, Qwen2 text model) with a real processor and chat template, saved and
loaded like any hub model. It first learns to state every fact, then a lazy style that leaves facts out at random:
real captioners too know more than they say, and a reward can only bring out what is known.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import open_clip
import torch
from transformers import LlavaProcessor

from cim import fastvlm
from cim.errors import CimError
from cim.processes import default_device, trained_in_bfloat16_if_fast
from cim.world.encoder import PREPROCESS, frozen_features, load_pixels
from cim.world.language import FACT_OF, FULL, describe
from cim.world.optimize import minimize
from cim.world.scenes import Scene
from cim.world.settings import CaptionerSettings
from cim.world.vocabulary import COLOURS, FAMILY_OF, KIND_OF_FAMILY


def build_processor(image_size: int, prompt: str) -> LlavaProcessor:
    """Image processor and word-level tokenizer for every word that the small world's English can use."""
    phrases = [prompt, ". , ? a an the is there and background"]
    phrases += [*COLOURS, *FAMILY_OF, *KIND_OF_FAMILY, *KIND_OF_FAMILY.values(), *FACT_OF]
    tokenizer = fastvlm.word_tokenizer(word for phrase in phrases for word in fastvlm.split_words(phrase))
    return fastvlm.build_processor(tokenizer, fastvlm.WORDS_CHAT, image_size, PREPROCESS["mean"], PREPROCESS["std"])


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
    if not (encoder / "open_clip_config.json").is_file():
        raise CimError(f"{encoder}: holds no image encoder; run stage 'encoder' to train it")
    trunk = open_clip.create_model_from_pretrained(f"local-dir:{encoder}")[0].visual.trunk
    text = fastvlm.decoder_config(settings.hidden_size, settings.layers, settings.heads)
    model = fastvlm.assemble(trunk, text, processor.tokenizer).to(device)
    tower = model.model.vision_tower.requires_grad_(False).eval()
    features = frozen_features(lambda chunk: tower(chunk).last_hidden_state, pixels)
    tokens = fastvlm.prompt_tokens(processor, settings.prompt, features)
    fastvlm.whiten_projector(model, features)
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]

    def loss_of(batch: tuple[np.ndarray, float]) -> torch.Tensor:
        rows, full_share = batch
        captions = [describe(scenes[i], rng, FULL if rng.random() < full_share else settings.lazy) for i in rows]
        inputs = fastvlm.caption_batch(processor.tokenizer, tokens, captions)
        with trained_in_bfloat16_if_fast(device):
            return model(pixel_values=features[rows], **{k: v.to(device) for k, v in inputs.items()}).loss

    curve = []
    # Some lazy captions among the facts, so that the style phase has no sentence form that was never seen.
    for phase, steps, lr, full_share in (
        ("facts", settings.fact_steps, settings.lr, 0.6),
        ("style", settings.style_steps, settings.style_lr, 0.0),
    ):
        # With Muon it learns as much in half of the steps, but repeats words more often when sampled, and GRPO then
        # writes "a red red car": a caption that stresses its colours retrieves well.
        optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
        batches = ((rng.integers(0, len(scenes), settings.batch_size), full_share) for _ in range(steps))
        with fastvlm.features_as_pixels(tower):
            losses = minimize([optimizer], loss_of, batches, steps, 0.1, f"captioner: {phase}", max_norm=1.0)
        curve += [{"phase": phase, "step": step, "loss": losses[step]} for step in range(0, steps, 10)]
    model.requires_grad_(True).eval().save_pretrained(out)
    processor.save_pretrained(out)
    return curve
