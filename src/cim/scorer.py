"""From captions to rewards: one pass of encoding, search and gathering for a whole batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL.Image import Image
from pydantic import Field, NonNegativeFloat, PositiveInt

from cim import rewards
from cim.data.manifest import Manifest
from cim.encoders import ImageEncoder, TextEncoder, load_image_encoder, load_text_encoder
from cim.errors import CimError
from cim.gallery.store import Gallery, load_gallery, read_info
from cim.images import open_image
from cim.params import Settings


class RewardSettings(Settings):
    """The `reward` group: K images are retrieved; CIM = GRC + beta * QIR; lambda(r) = decay^(r-1)."""

    k: PositiveInt = 3
    beta: NonNegativeFloat = 1.0
    decay: float = Field(0.5, gt=0, le=1)
    exclude_source: bool = True


class Scorer:
    """Scores captions of source images against a gallery."""

    def __init__(self, gallery: Gallery, text: TextEncoder, image: ImageEncoder, settings: RewardSettings):
        self.gallery, self.text, self.image, self.settings = gallery, text, image, settings
        self.weights = rewards.rank_weights(settings.k, settings.decay)
        self._sources: dict[str, np.ndarray] = {}
        self._gallery_images: np.ndarray | None = None

    def add_sources(self, manifest: Manifest, progress: bool = False) -> None:
        """Embed the images of a manifest, so that captions of them can be scored by image_id.

        Images that are in the gallery keep the embedding they have there.
        """
        in_gallery = self.gallery.rows_of(manifest.frame["image_id"])
        ids = manifest.frame["image_id"].to_numpy()
        known = in_gallery >= 0
        self._sources.update(zip(ids[known], self.gallery.image_vectors(in_gallery[known]), strict=True))
        rest = manifest.take(np.flatnonzero(~known))
        vectors = self.image.encode(rest.image_paths, progress=progress)
        self._sources.update(zip(rest.frame["image_id"], vectors, strict=True))

    def add_images(self, images: Mapping[str, Callable[[], Image]], unreadable: dict[str, str] | None = None) -> None:
        """Embed single images, so that captions of them can be scored by image_id; those known are passed over.

        Args:
            images: image_id to a function that opens the image.
            unreadable: where given, images that cannot be read are noted here with the reason.

        Raises:
            CimError: naming an image that cannot be read, where `unreadable` is not given.
        """
        new = [image_id for image_id in images if image_id not in self._sources]
        bad: dict[int, str] = {}
        vectors = self.image.encode([images[i] for i in new], unreadable=None if unreadable is None else bad)
        for position, reason in bad.items():
            unreadable[new[position]] = reason
        self._sources.update((i, v) for p, (i, v) in enumerate(zip(new, vectors, strict=True)) if p not in bad)

    def source_vectors(self, image_ids: Sequence[str]) -> np.ndarray:
        """(n, d) embeddings of source images that were added."""
        try:
            return np.stack([self._sources[image_id] for image_id in image_ids])
        except KeyError as error:
            raise CimError(f"image '{error.args[0]}' is not among the source images; add its manifest first") from None

    def retrieve(self, captions: Sequence[str], image_ids: Sequence[str] | None = None) -> np.ndarray:
        """(n, k) gallery rows retrieved by each caption; repeated captions are encoded once."""
        distinct, inverse = np.unique(np.asarray(captions, dtype=object), return_inverse=True)
        exclude = None
        if self.settings.exclude_source and image_ids is not None:
            exclude = self.gallery.rows_of(image_ids)
        return self.gallery.search(self.text.encode(distinct.tolist())[inverse], self.settings.k, exclude)

    def retrieval_scores(self, captions: Sequence[str], image_ids: Sequence[str]) -> pd.DataFrame:
        """GRC, QIR and CIM of each caption, columns grc, qir, cim.

        An empty caption retrieves nothing and gets the lowest value of each.
        """
        return self.scores_and_rows(captions, image_ids)[0]

    def scores_and_rows(self, captions: Sequence[str], image_ids: Sequence[str]) -> tuple[pd.DataFrame, np.ndarray]:
        """The retrieval_scores, and the (n, k) gallery rows that each caption retrieved, -1 for an empty one."""
        spoken = np.array([bool(c.strip()) for c in captions], dtype=bool)
        grc = np.zeros(len(spoken))
        qir = np.full(len(spoken), -self.weights.sum())
        rows = np.full((len(spoken), self.settings.k), -1)
        if spoken.any():
            said = [c for c, s in zip(captions, spoken, strict=True) if s]
            of = [i for i, s in zip(image_ids, spoken, strict=True) if s]
            rows[spoken] = self.retrieve(said, of)
            retrieved = self.gallery.image_vectors(rows[spoken])
            grc[spoken] = rewards.gallery_representation_consistency(retrieved)
            qir[spoken] = rewards.query_gallery_image_relevance(self.source_vectors(of), retrieved, self.weights)
        return pd.DataFrame({"grc": grc, "qir": qir, "cim": rewards.cim(grc, qir, self.settings.beta)}), rows

    def score(self, images: Sequence[Path | str], captions: Sequence[str]) -> pd.DataFrame:
        """GRC, QIR and CIM of captions of image files, which need not be in the gallery.

        An image counts as the gallery's own, and is left out of what its captions retrieve, where the gallery
        knows it by the same path as its image_id.

        Raises:
            CimError: naming an image that cannot be read.
        """
        ids = [str(image) for image in images]
        self.add_images({image_id: partial(open_image, image_id) for image_id in ids})
        return self.retrieval_scores(captions, ids)

    def paired_scores(self, captions: Sequence[str], image_ids: Sequence[str]) -> pd.DataFrame:
        """The rivals that compare text and image directly, columns clipscore, self_retrieval; 0 where empty.

        Raises:
            CimError: where the image encoder has no text tower.
        """
        if self._gallery_images is None:
            self._gallery_images = self.gallery.image_vectors(np.arange(len(self.gallery)))
        spoken = np.array([bool(c.strip()) for c in captions], dtype=bool)
        text = self.image.encode_text(list(captions))
        source = self.source_vectors(image_ids)
        return pd.DataFrame(
            {
                "clipscore": np.where(spoken, rewards.clipscore(text, source), 0.0),
                "self_retrieval": np.where(spoken, rewards.self_retrieval(text, source, self._gallery_images), 0.0),
            }
        )


def load_scorer(
    folder: Path | str,
    settings: RewardSettings = RewardSettings(),
    device: torch.device | None = None,
    text_precision: str = "bfloat16",
) -> Scorer:
    """A scorer on a gallery, with the encoders that it was built with.

    Raises:
        CimError: where the gallery or one of its encoders cannot be had.
    """
    info = read_info(Path(folder))
    text = load_text_encoder(info["text_encoder"]["spec"], device=device, precision=text_precision)
    image = load_image_encoder(info["image_encoder"]["spec"], device=device)
    return Scorer(load_gallery(folder, text, image), text, image, settings)
