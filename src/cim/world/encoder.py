"""Stage `encoder`: the small world's own OpenCLIP model, trained from scratch in half a minute.

Contrastive training from scratch stays long on a plateau where no object is named. So, as in practice, the trunk is
first trained to recognize the objects of a scene, and then locked: contrastive training is a matter of small heads on
cached features.
"""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from open_clip.loss import ClipLoss
from safetensors.torch import save_model
from torch import nn
from torch.nn.functional import adaptive_avg_pool2d, cross_entropy, normalize
from tqdm import tqdm

from cim.files import write_text
from cim.images import open_image
from cim.processes import bfloat16_if_fast, default_device, trained_in_bfloat16_if_fast
from cim.world.optimize import minimize, muon
from cim.world.scenes import CELLS, Scene
from cim.world.settings import EncoderTrainingSettings
from cim.world.vocabulary import BACKGROUNDS, COLOURS, NAMES, SIZES

EMPTY = len(NAMES)  # label of a cell without object
IGNORED = -100  # label that cross_entropy skips, by default
PREPROCESS = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}


def train_encoder(
    images: Sequence[Path], scenes: Sequence[str], captions: list[str], settings: EncoderTrainingSettings, out: Path
) -> dict[str, float]:
    """Train on image files of one size, their scene graphs as JSON and their captions, and save an OpenCLIP folder.

    Text towers on fewer captions are saved as OpenCLIP folders in it, text-COUNT, with the same image tower.

    Returns:
        The accuracies of all trainings on the last 5 % of the images, held out.
    """
    torch.manual_seed(settings.seed)
    pixels = load_pixels(images)
    trunk = {"timm_model_name": settings.trunk, "timm_model_pretrained": False, "timm_pool": "", "timm_proj": "mlp"}
    config = {
        "embed_dim": settings.embed_dim,
        "vision_cfg": {**trunk, "image_size": pixels.shape[-1]},
        "text_cfg": {"context_length": 64, "vocab_size": 49408, "width": 128, "heads": 4, "layers": 2},
    }
    model = open_clip.CustomTextCLIP(**config)
    named = train_trunk(model.visual.trunk, pixels, [Scene.from_json(scene) for scene in scenes], settings)
    pooled = frozen_features(model.visual.trunk, pixels)
    metrics = {"objects_named": named, "captions_retrieved_of_heldout": train_clip(model, pooled, captions, settings)}
    _save(model, config, out)
    for count in settings.text_towers:
        other = open_clip.CustomTextCLIP(**config)
        other.visual = model.visual
        metrics[f"captions_retrieved_after_{count}"] = train_clip(other, pooled, captions, settings, count)
        _save(other, config, out / f"text-{count}")
    return metrics


def _save(model: nn.Module, config: dict[str, Any], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    save_model(model, out / "open_clip_model.safetensors")
    saved = {"model_cfg": {**config, "custom_text": True}, "preprocess_cfg": PREPROCESS}
    write_text(out / "open_clip_config.json", json.dumps(saved, indent=1))


def scene_labels(scenes: list[Scene]) -> tuple[torch.Tensor, torch.Tensor]:
    """Class indices of name, colour and size (n, 4, 3) by cell in reading order, and of the background (n,).

    A cell without object has the name EMPTY; its colour and size are IGNORED.
    """
    cells = torch.tensor([EMPTY, IGNORED, IGNORED]).repeat(len(scenes), len(CELLS), 1)
    for i, scene in enumerate(scenes):
        for o in scene.objects:
            indices = NAMES.index(o.name), list(COLOURS).index(o.colour), SIZES.index(o.size)
            cells[i, CELLS.index(o.cell)] = torch.tensor(indices)
    return cells, torch.tensor([BACKGROUNDS.index(scene.background) for scene in scenes])


def train_trunk(
    trunk: nn.Module, pixels: torch.Tensor, scenes: list[Scene], settings: EncoderTrainingSettings
) -> float:
    """Train the trunk to recognize: first objects in crops of single cells, then whole scenes.

    Linear heads read the object in each cell from the trunk's features (n, c, h, w). In whole scenes they also read
    background and all cells from the average alone, so that the pooled features, which are all that a CLIP head sees,
    keep the layout. Pixels are (n, 3, 2s, 2s) uint8.

    Returns:
        The share of objects that are named correctly on the last 5 % of the scenes, held out.
    """
    device = default_device()
    side, channels = pixels.shape[-1] // 2, trunk.num_features
    classes = {"name": EMPTY + 1, "colour": len(COLOURS), "size": len(SIZES), "background": len(BACKGROUNDS)}
    heads = nn.ModuleDict({head: nn.Linear(channels, count) for head, count in classes.items()})
    heads["layout"] = nn.Sequential(nn.Linear(channels, 256), nn.GELU(), nn.Linear(256, 4 * (EMPTY + 1)))
    heads.to(device)
    trunk.to(device, memory_format=torch.channels_last)
    labels, backgrounds = (part.to(device) for part in scene_labels(scenes))
    known = len(pixels) - max(1, len(pixels) // 20)
    occupied = (labels[:known, :, 0] < EMPTY).nonzero().cpu()
    offsets = torch.arange(side)

    def features(images: torch.Tensor) -> torch.Tensor:
        with bfloat16_if_fast(device):
            return trunk.forward_features(normalise(images, device)).float()

    def cells_of(maps: torch.Tensor) -> torch.Tensor:  # (n, c, h, w) -> (4 n, c)
        return adaptive_avg_pool2d(maps, 2).flatten(2).transpose(1, 2).flatten(0, 1)

    def object_loss(cells: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        name, colour, size = labels.flatten(0, -2).T
        named = cross_entropy(heads["name"](cells), name) + cross_entropy(heads["colour"](cells), colour)
        return named + 0.5 * cross_entropy(heads["size"](cells), size)

    def crop_loss(rows: torch.Tensor) -> torch.Tensor:
        image, cell = occupied[rows].T
        shift = torch.randint(-side // 14, side // 14 + 1, (2, len(rows)))
        y = ((cell // 2) * side + shift[0]).clamp(0, side)[:, None] + offsets
        x = ((cell % 2) * side + shift[1]).clamp(0, side)[:, None] + offsets
        crops = pixels[image[:, None, None], :, y[:, :, None], x[:, None, :]].permute(0, 3, 1, 2)
        return object_loss(features(crops).mean((2, 3)), labels[image, cell])

    def scene_loss(rows: torch.Tensor) -> torch.Tensor:
        maps = features(pixels[rows])
        pooled = maps.mean((2, 3))
        objects = object_loss(cells_of(maps), labels[rows])
        background = cross_entropy(heads["background"](pooled), backgrounds[rows])
        layout = cross_entropy(heads["layout"](pooled).view(-1, EMPTY + 1), labels[rows, :, 0].flatten())
        return objects + 0.5 * background + 0.5 * layout

    trunk.train()
    for phase, epochs, items, loss_of, lr in (
        ("objects", settings.crop_epochs, len(occupied), crop_loss, settings.trunk_lr),
        ("scenes", settings.scene_epochs, known, scene_loss, settings.trunk_lr / 2),
    ):
        count = max(1, items // settings.batch_size)
        batches = (b for _ in range(epochs) for b in torch.randperm(items)[: count * settings.batch_size].chunk(count))
        optimizers = muon(nn.ModuleList([trunk, heads]), lr, weight_decay=0.05)
        minimize(optimizers, loss_of, batches, epochs * count, 0.2, f"trunk: {phase}")
    trunk.eval()
    with torch.inference_mode():
        names = labels[known:, :, 0].flatten()
        correct = heads["name"](cells_of(features(pixels[known:]))).argmax(-1) == names
    return float(correct[names < EMPTY].float().mean())


def frozen_features(embed: Callable[[torch.Tensor], torch.Tensor], pixels: torch.Tensor) -> torch.Tensor:
    """What `embed`, on the default device and not trained, gives for uint8 pixels (n, 3, h, w)."""
    device = default_device()
    with torch.inference_mode(), bfloat16_if_fast(device):
        chunks = tqdm(pixels.split(256), desc="trunk features", mininterval=2)
        features = torch.cat([embed(normalise(chunk, device)).float() for chunk in chunks])
    return features.clone()  # out of inference mode, so that a backward may keep it


def train_clip(
    model: nn.Module, pooled: torch.Tensor, captions: list[str], settings: EncoderTrainingSettings,
    captioned: int | None = None,
) -> float:  # fmt: skip
    """Contrastive training of the image head and the text tower on (n, c) features of the locked trunk.

    Args:
        captioned: so many of the images, drawn by the seed, have a caption; the image head is then locked too.

    Returns:
        The share of the last 5 % of the images, held out, whose own caption is the nearest among those captions.
    """
    device = default_device()
    model.to(device).eval()
    model.lock_image_tower()
    model.visual.head.requires_grad_(captioned is None)
    tokens = open_clip.tokenizer.SimpleTokenizer(context_length=64)(captions).to(device)
    known = len(pooled) - max(1, len(pooled) // 20)
    drawn = torch.arange(known)
    if captioned is not None:
        drawn = torch.randperm(known, generator=torch.Generator().manual_seed(settings.seed))[:captioned]
    contrast = ClipLoss()

    def embed(rows) -> tuple[torch.Tensor, torch.Tensor]:
        text = model.encode_text(tokens[rows], normalize=True)
        return normalize(model.visual.head(pooled[rows]), dim=-1), text

    def loss_of(rows: torch.Tensor) -> torch.Tensor:
        with trained_in_bfloat16_if_fast(device):
            image, text = embed(rows.to(device))
        return contrast(image.float(), text.float(), model.logit_scale.exp())

    matrices, others = muon(model, settings.clip_lr, weight_decay=0.1)
    others.register_step_post_hook(lambda *_: model.logit_scale.data.clamp_(0, math.log(100)))
    batches = (drawn[torch.randperm(len(drawn))[: settings.clip_batch]] for _ in range(settings.clip_steps))
    model.train()
    model.visual.train(captioned is None)
    model.visual.trunk.eval()
    minimize([matrices, others], loss_of, batches, settings.clip_steps, 0.1, "contrastive heads")
    model.eval()
    with torch.inference_mode():
        image, text = embed(slice(known, None))
        nearest = (image @ text.T).argmax(1)
    return float((nearest == torch.arange(len(nearest), device=device)).float().mean())


def load_pixels(images: Sequence[Path]) -> torch.Tensor:
    """Image files of one size as (n, 3, h, w) uint8."""
    pixels = [np.asarray(open_image(path)) for path in tqdm(images, desc="reading images", mininterval=2)]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()


def normalise(pixels: torch.Tensor, device: torch.device) -> torch.Tensor:
    """uint8 pixels as the saved preprocessing passes them to the trunk: (x / 255 - 0.5) / 0.5."""
    # Channels last is the fast layout for convolutions.
    return (pixels.to(device).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
