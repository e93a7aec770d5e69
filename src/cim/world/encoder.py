"""Stage `encoder`: the small world's own OpenCLIP model, trained from nothing in about a minute.

An image-text model that starts from noise waits long on a plateau where no object is named. So, as in
practice, the trunk first learns to recognise what lies in a scene (its ImageNet), and the
contrastive training then keeps it locked, which makes that a matter of small heads on cached features.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import open_clip
import torch
from open_clip.loss import ClipLoss
from open_clip_train.scheduler import cosine_lr
from pydantic import Field, PositiveFloat, PositiveInt
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from cim.images import open_image
from cim.params import Settings
from cim.processes import bfloat16_if_fast, default_device
from cim.world.scenes import Scene
from cim.world.vocabulary import BACKGROUNDS, COLOURS, NAMES, SIZES

EMPTY = len(NAMES)  # label of a cell with nothing in it
IGNORED = -100  # label that cross_entropy skips
Batch = Annotated[int, Field(ge=2)]


class EncoderTrainingSettings(Settings):
    """The `encoder` group: the architecture, and how long each of the three phases lasts."""

    trunk: str
    embed_dim: PositiveInt
    seed: int
    batch_size: Batch
    crop_epochs: PositiveInt
    scene_epochs: PositiveInt
    trunk_lr: PositiveFloat
    clip_steps: PositiveInt
    clip_batch: Batch
    clip_lr: PositiveFloat


@dataclass(frozen=True)
class SceneLabels:
    """Ground truth as class indices, by cell of the 2 x 2 layout in reading order."""

    names: torch.Tensor  # (n, 4), EMPTY where nothing lies
    colours: torch.Tensor  # (n, 4), IGNORED where nothing lies
    sizes: torch.Tensor  # (n, 4), likewise
    backgrounds: torch.Tensor  # (n,)

    @staticmethod
    def of(scenes: list[Scene]) -> SceneLabels:
        names = torch.full((len(scenes), 4), EMPTY)
        colours, sizes = torch.full((len(scenes), 4), IGNORED), torch.full((len(scenes), 4), IGNORED)
        for i, scene in enumerate(scenes):
            for o in scene.objects:
                cell = 2 * o.cell[0] + o.cell[1]
                names[i, cell] = NAMES.index(o.name)
                colours[i, cell] = list(COLOURS).index(o.colour)
                sizes[i, cell] = SIZES.index(o.size)
        return SceneLabels(names, colours, sizes, torch.tensor([BACKGROUNDS.index(s.background) for s in scenes]))


class SceneHeads(nn.Module):
    """Linear readouts of a feature map: what lies in each cell, and, from the average alone, what lies where.

    The last asks the trunk to keep the layout in its pooled features, which is all a CLIP head sees.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.name = nn.Linear(channels, len(NAMES) + 1)
        self.colour = nn.Linear(channels, len(COLOURS))
        self.size = nn.Linear(channels, len(SIZES))
        self.background = nn.Linear(channels, len(BACKGROUNDS))
        self.layout = nn.Sequential(nn.Linear(channels, 256), nn.GELU(), nn.Linear(256, 4 * (len(NAMES) + 1)))

    def cell_loss(self, cells: torch.Tensor, names, colours, sizes) -> torch.Tensor:
        """Loss of cell features (..., c) against labels of the same leading shape."""
        cells, names, colours, sizes = cells.flatten(0, -2), names.flatten(), colours.flatten(), sizes.flatten()
        return (
            cross_entropy(self.name(cells), names)
            + cross_entropy(self.colour(cells), colours, ignore_index=IGNORED)
            + 0.5 * cross_entropy(self.size(cells), sizes, ignore_index=IGNORED)
        )

    def scene_loss(self, features: torch.Tensor, labels: SceneLabels, rows: torch.Tensor) -> torch.Tensor:
        """Loss of feature maps (n, c, h, w) of whole scenes."""
        cells = nn.functional.adaptive_avg_pool2d(features, 2).flatten(2).transpose(1, 2)
        pooled = features.mean((2, 3))
        layout = self.layout(pooled).view(-1, len(NAMES) + 1)
        return (
            self.cell_loss(cells, labels.names[rows], labels.colours[rows], labels.sizes[rows])
            + 0.5 * cross_entropy(self.background(pooled), labels.backgrounds[rows])
            + 0.5 * cross_entropy(layout, labels.names[rows].flatten())
        )


def load_pixels(images: Sequence[Path]) -> torch.Tensor:
    """Image files as (n, 3, h, w) uint8; they must be of one size."""
    images = [np.asarray(open_image(path)) for path in tqdm(images, desc="reading images", mininterval=2)]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def normalise(pixels: torch.Tensor, device: torch.device) -> torch.Tensor:
    """uint8 pixels as the saved preprocessing gives them to the trunk: (x / 255 - 0.5) / 0.5."""
    # Channels last is the fast layout for convolutions.
    return (pixels.to(device).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def train_trunk(
    trunk: nn.Module, pixels: torch.Tensor, labels: SceneLabels, settings: EncoderTrainingSettings
) -> float:
    """Teach the trunk to recognise: first objects in crops of single cells, then whole scenes.

    Args:
        trunk: timm model; its `forward_features` gives (n, c, h, w).
        pixels: (n, 3, 2s, 2s) uint8.

    Returns:
        The share of objects that the cell readout names rightly on the last 5 % of the scenes, held out.
    """
    device = default_device()
    side = pixels.shape[-1] // 2
    heads = SceneHeads(trunk.num_features).to(device)
    trunk.to(device, memory_format=torch.channels_last)
    labels = SceneLabels(*(t.to(device) for t in vars(labels).values()))
    held_out = max(1, len(pixels) // 20)
    known = len(pixels) - held_out
    occupied = (labels.names[:known] < EMPTY).nonzero().cpu()
    offsets = torch.arange(side)

    def features(images: torch.Tensor) -> torch.Tensor:
        with bfloat16_if_fast(device):
            return trunk.forward_features(normalise(images, device)).float()

    def crop_loss(rows: torch.Tensor) -> torch.Tensor:
        image, cell = occupied[rows].T
        shift = torch.randint(-side // 14, side // 14 + 1, (2, len(rows)))
        y = ((cell // 2) * side + shift[0]).clamp(0, side)[:, None] + offsets
        x = ((cell % 2) * side + shift[1]).clamp(0, side)[:, None] + offsets
        crops = pixels[image[:, None, None], :, y[:, :, None], x[:, None, :]].permute(0, 3, 1, 2)
        pooled = features(crops).mean((2, 3))
        return heads.cell_loss(
            pooled, labels.names[image, cell], labels.colours[image, cell], labels.sizes[image, cell]
        )

    def scene_loss(rows: torch.Tensor) -> torch.Tensor:
        return heads.scene_loss(features(pixels[rows]), labels, rows)

    parameters = [*trunk.parameters(), *heads.parameters()]
    for phase, epochs, items, loss_of, lr in (
        ("objects", settings.crop_epochs, len(occupied), crop_loss, settings.trunk_lr),
        ("scenes", settings.scene_epochs, known, scene_loss, settings.trunk_lr / 2),
    ):
        batches = max(1, items // settings.batch_size)
        optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.05)
        schedule = cosine_lr(optimizer, lr, epochs * batches // 5, epochs * batches)
        trunk.train()
        progress = tqdm(total=epochs * batches, desc=f"trunk: {phase}", mininterval=2)
        for epoch in range(epochs):
            for i, rows in enumerate(torch.randperm(items)[: batches * settings.batch_size].chunk(batches)):
                schedule(epoch * batches + i)
                loss = loss_of(rows)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                progress.update()
        progress.close()

    trunk.eval()
    with torch.inference_mode():
        maps = features(pixels[known:])
        cells = nn.functional.adaptive_avg_pool2d(maps, 2).flatten(2).transpose(1, 2)
        right = heads.name(cells).argmax(-1) == labels.names[known:]
    return float(right[labels.names[known:] < EMPTY].float().mean())


def clip_config(settings: EncoderTrainingSettings, image_size: int) -> dict:
    """OpenCLIP's model configuration: the timm trunk with an MLP head, and a small text tower."""
    return {
        "embed_dim": settings.embed_dim,
        "vision_cfg": {
            "timm_model_name": settings.trunk,
            "timm_model_pretrained": False,
            "timm_pool": "",
            "timm_proj": "mlp",
            "image_size": image_size,
        },
        "text_cfg": {"context_length": 64, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 2},
    }


PREPROCESS = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}


def train_clip(model: nn.Module, pixels: torch.Tensor, captions: list[str], settings: EncoderTrainingSettings) -> float:
    """Contrastive training of the image head and the text tower, the trunk locked and its features cached.

    Returns:
        Share of the last 5 % of the images, held out, whose own caption is their nearest among those captions.
    """
    device = default_device()
    model.to(device).eval()
    model.lock_image_tower()
    for parameter in model.visual.head.parameters():
        parameter.requires_grad = True
    tokens = open_clip.tokenizer.SimpleTokenizer(context_length=64)(captions).to(device)
    with torch.inference_mode(), bfloat16_if_fast(device):
        chunks = tqdm(pixels.split(256), desc="trunk features", mininterval=2)
        pooled = torch.cat([model.visual.trunk(normalise(chunk, device)).float() for chunk in chunks])
    pooled = pooled.clone()  # out of inference mode, so that the head's backward may keep it
    held_out = max(1, len(pixels) // 20)
    known = len(pixels) - held_out
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.clip_lr, weight_decay=0.1)
    schedule = cosine_lr(optimizer, settings.clip_lr, settings.clip_steps // 10, settings.clip_steps)
    loss_of = ClipLoss()
    batch = min(settings.clip_batch, known)
    model.train()
    model.visual.trunk.eval()
    for step in tqdm(range(settings.clip_steps), desc="contrastive heads", mininterval=2):
        schedule(step)
        rows = torch.randperm(known)[:batch].to(device)
        with bfloat16_if_fast(device):
            text = model.encode_text(tokens[rows], normalize=True)
            image = nn.functional.normalize(model.visual.head(pooled[rows]), dim=-1)
        loss = loss_of(image.float(), text.float(), model.logit_scale.exp())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, np.log(100))
    model.eval()
    with torch.inference_mode():
        text = model.encode_text(tokens[known:], normalize=True)
        image = nn.functional.normalize(model.visual.head(pooled[known:]), dim=-1)
        nearest = (image @ text.T).argmax(1)
    return float((nearest == torch.arange(held_out, device=device)).float().mean())


def train_encoder(
    images: Sequence[Path], scenes: Sequence[str], captions: list[str], settings: EncoderTrainingSettings, out: Path
) -> dict[str, float]:
    """Train on captioned images of known scenes and save an OpenCLIP folder.

    Args:
        images: files of one size.
        scenes: the scene graph of each image, as JSON.

    Returns:
        What it can do on the held-out last 5 %.
    """
    torch.manual_seed(settings.seed)
    pixels = load_pixels(images)
    labels = SceneLabels.of([Scene.from_json(scene) for scene in scenes])
    config = clip_config(settings, pixels.shape[-1])
    model = open_clip.CustomTextCLIP(**config)
    named = train_trunk(model.visual.trunk, pixels, labels, settings)
    retrieved = train_clip(model, pixels, captions, settings)
    out.mkdir(parents=True, exist_ok=True)
    state = {k: v.contiguous().cpu() for k, v in model.state_dict().items()}
    save_file(state, out / "open_clip_model.safetensors")
    saved = {"model_cfg": {**config, "custom_text": True}, "preprocess_cfg": PREPROCESS}
    (out / "open_clip_config.json").write_text(json.dumps(saved, indent=1))
    return {"objects_named": named, "captions_retrieved_of_heldout": retrieved}
