"""Features of a frozen vision tower, kept for each image: sampling, loss and evaluation see the same ones often."""

import hashlib
import re

import torch
from torch.utils._pytree import tree_leaves, tree_map

from cim.captioners.models import VISION


class VisionCache:
    """Replaces the `forward` of a vision tower that is frozen, and whole in memory (no FSDP, no ZeRO-3).

    Each image is computed alone, so that its features do not depend on its batch. They are kept by a digest of its
    pixels, the options and the precision. A tower that takes other tensors beside the pixels (Qwen's sizes of images,
    SmolVLM's masks) is called as it is. The tower must compute the same in training mode as in evaluation mode;
    `load_model` sees to that for BatchNorm.

    Args:
        max_bytes: of the features that are kept; where they become more, all are dropped.
    """

    def __init__(self, tower: torch.nn.Module, max_bytes: int):
        self.forward, self.max_bytes = tower.forward, max_bytes
        self.kept, self.bytes = {}, 0

    def __call__(self, pixel_values: torch.Tensor, **options):
        if not all(isinstance(value, bool | int | float | str | None) for value in options.values()):
            return self.forward(pixel_values, **options)
        features = [self._features(image, options) for image in pixel_values.split(1)]
        return tree_map(lambda *parts: None if parts[0] is None else torch.cat(parts), *features)

    def _features(self, pixels: torch.Tensor, options: dict):
        digest = hashlib.sha256(pixels.detach().contiguous().view(torch.uint8).cpu().numpy()).digest()
        device = pixels.device.type
        precision = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        key = digest, pixels.shape, pixels.dtype, precision, *sorted(options.items())
        if key not in self.kept:
            # Not as an inference tensor, which could not be used in training.
            with torch.inference_mode(False), torch.no_grad():
                self.kept[key] = self.forward(pixels, **options)
            self.bytes += sum(leaf.nbytes for leaf in tree_leaves(self.kept[key]) if leaf is not None)
        features = self.kept[key]
        if self.bytes > self.max_bytes:
            self.kept, self.bytes = {}, 0
        return features


def cache_vision(model: torch.nn.Module, max_bytes: int = 2**31) -> VisionCache | None:
    """Cache the features of the model's vision tower, which must be frozen; None where no module has a usual name."""
    for name, module in model.named_modules():
        if re.fullmatch(VISION, f"{name}."):  # the first is the outermost
            module.forward = VisionCache(module, max_bytes)
            return module.forward
    return None
