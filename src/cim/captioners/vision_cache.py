"""Features of a vision tower, computed once for each image: sampling, loss and evaluation see the same ones often."""

import hashlib
from collections import OrderedDict
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

TOWERS = ("vision_tower", "visual", "vision_model")  # the names that transformers' models give it
# What a tower takes besides pixels, with a row for each image; it may also take options that are no tensors.
PER_IMAGE = ("grid_thw", "patch_attention_mask")


class VisionCache:
    """Replaces the `forward` of a vision tower, whose weights must be whole in memory (no FSDP, no ZeRO-3).

    Each image is computed alone, so that its features do not depend on its batch. They are kept by a digest of all that
    decides them: pixels, options, precision and the version of the weights. So they are exact for a tower that is
    trained too; where gradients of it are needed, nothing is kept. The tower must compute the same in training mode as
    in evaluation mode; `load_model` sees to that for BatchNorm.

    Args:
        max_bytes: of the features that are kept; those used least recently are dropped.
    """

    def __init__(self, tower: nn.Module, max_bytes: int):
        self.tower, self.forward, self.max_bytes = tower, tower.forward, max_bytes
        self.bytes = 0
        self._kept: OrderedDict[bytes, Any] = OrderedDict()

    def __call__(self, pixel_values: torch.Tensor | None = None, **options):
        needs_gradients = torch.is_grad_enabled() and any(p.requires_grad for p in self.tower.parameters())
        images = None if pixel_values is None or needs_gradients else split_images(pixel_values, options)
        if images is None:
            return self.forward(*([] if pixel_values is None else [pixel_values]), **options)
        version = sum(tensor._version for tensor in (*self.tower.parameters(), *self.tower.buffers()))
        features = [self._features(version, *image) for image in images]
        return tree_map(lambda *parts: None if parts[0] is None else torch.cat(parts), *features)

    def _features(self, version: int, pixels: torch.Tensor, options: dict[str, Any]):
        device = pixels.device.type
        precision = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        rest = {name: v.tolist() if isinstance(v, torch.Tensor) else v for name, v in sorted(options.items())}
        digest = hashlib.sha256(repr((pixels.shape, pixels.dtype, precision, version, rest)).encode())
        digest.update(pixels.detach().contiguous().view(torch.uint8).cpu().numpy())
        features = self._kept.pop(digest.digest(), None)
        if features is None:
            # Not as an inference tensor, which could not be used in training.
            with torch.inference_mode(False), torch.no_grad():
                features = self.forward(pixels, **options)
            self.bytes += _bytes(features)
        self._kept[digest.digest()] = features  # the last is the one used most recently
        while self.bytes > self.max_bytes:
            self.bytes -= _bytes(self._kept.popitem(last=False)[1])
        return features


def cache_vision(model: nn.Module, max_bytes: int = 2**31) -> VisionCache | None:
    """Cache the features of the model's vision tower; None where it has none by the usual names."""
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in TOWERS:  # the first is the outermost
            module.forward = VisionCache(module, max_bytes)
            return module.forward
    return None


def split_images(pixels: torch.Tensor, options: dict[str, Any]) -> list[tuple[torch.Tensor, dict[str, Any]]] | None:
    """A vision tower's inputs for each image alone; None where it is unknown how to split them.

    Args:
        pixels: (n, ...), or patches of all images (p, ...) if `options` has `grid_thw`, each image's (n, 3) grid.
    """
    rows = {name: value for name, value in options.items() if isinstance(value, torch.Tensor)}
    known = all(isinstance(value, torch.Tensor | bool | int | float | str | None) for value in options.values())
    if not known or not set(rows) <= set(PER_IMAGE):
        return None
    sizes = options["grid_thw"].prod(1).tolist() if "grid_thw" in rows else 1
    parts = {name: value.split(1) for name, value in rows.items()}
    images = enumerate(pixels.split(sizes))
    return [(image, options | {name: part[i] for name, part in parts.items()}) for i, image in images]


def _bytes(features) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(features) if leaf is not None)
