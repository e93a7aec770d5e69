"""From captions to rewards: one pass of encoding, search and gathering for a whole batch."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from PIL.Image import Image
from pydantic import Field, NonNegativeFloat, PositiveInt

from cim import rewards
from cim.data.manifest import Manifest
from cim.encoders import ImageEncoder, TextEncoder, load_image_encoder, load_text_encoder
from cim.errors import CimError
from cim.gallery.search import blocks
from cim.gallery.store import Gallery, load_gallery, read_info
from cim.images import open_image
from cim.params import Settings, Share

GATHERED = 16_384  # retrieved embeddings in memory at once


class RewardSettings(Settings):
    """The `reward` group: K images are retrieved; CIM = grc_weight * GRC + beta * QIR; lambda(r) = decay^(r-1).

    Attributes:
        exclude_source: a caption may not retrieve its own source image.
        center: image embeddings without the gallery's mean.
        whiten: 0 to 1; their principal components divided by this power of their standard deviations, centred too.
    """

    k: PositiveInt = 3
    beta: NonNegativeFloat = 1.0
    decay: float = Field(0.5, gt=0, le=1)
    grc_weight: NonNegativeFloat = 1.0
    exclude_source: bool = True
    center: bool = False
    whiten: Share = 0.0


class Scorer:
    """Scores captions of source images against a gallery."""

    def __init__(self, gallery: Gallery, text: TextEncoder, image: ImageEncoder, settings: RewardSettings):
        self.gallery, self.text, self.image, self.settings = gallery, text, image, settings
        self.weights = rewards.rank_weights(settings.k, settings.decay)
        self._sources: dict[str, np.ndarray] = {}
        self._gallery_images: np.ndarray | None = None

    def add_sources(self, manifest: Manifest, progress: bool = False) -> None:
        """Embed the images of a manifest, so that captions can be scored by their image_id.

        Images of the gallery keep the embedding they have there.
        """
        ids = manifest.frame["image_id"].to_numpy()
        rows = self.gallery.rows_of(ids)
        known = rows >= 0
        self._sources.update(zip(ids[known], self.gallery.image_vectors(rows[known]), strict=True))
        rest = manifest.take(np.flatnonzero(~known))
        self._sources.update(zip(ids[~known], self.image.encode(rest.image_paths, progress=progress), strict=True))

    def add_images(self, images: Mapping[str, Callable[[], Image]], unreadable: dict[str, str] | None = None) -> None:
        """Embed single images, so that captions can be scored by their image_id; known ones are skipped.

        Args:
            images: image_id to a function that opens the image.
            unreadable: receives the images that cannot be read, with the reason; if None, the first is an error.
        """
        new = [image_id for image_id in images if image_id not in self._sources]
        bad: dict[int, str] = {}
        vectors = self.image.encode([images[i] for i in new], unreadable=None if unreadable is None else bad)
        if bad:
            unreadable.update((new[position], reason) for position, reason in bad.items())
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
        excludes = self.settings.exclude_source and image_ids is not None
        exclude = self.gallery.rows_of(image_ids) if excludes else None
        return self.gallery.search(self.text.encode(distinct.tolist())[inverse], self.settings.k, exclude)

    def retrieval_scores(self, captions: Sequence[str], image_ids: Sequence[str]) -> pd.DataFrame:
        """GRC, QIR and CIM of each caption, columns grc, qir, cim; an empty caption gets the lowest value of each."""
        return self.scores_and_rows(captions, image_ids)[0]

    def scores_and_rows(self, captions: Sequence[str], image_ids: Sequence[str]) -> tuple[pd.DataFrame, np.ndarray]:
        """The retrieval_scores, and the (n, k) gallery rows that each caption retrieved, -1 for an empty one."""
        filled = _not_empty(captions)
        grc = np.zeros(len(filled))
        qir = np.full(len(filled), -self.weights.sum())
        rows = np.full((len(filled), self.settings.k), -1)
        if filled.any():
            texts = [c for c, keep in zip(captions, filled, strict=True) if keep]
            ids = [i for i, keep in zip(image_ids, filled, strict=True) if keep]
            rows[filled] = self.retrieve(texts, ids)
            grc[filled], qir[filled] = self._compare(rows[filled], self.source_vectors(ids))
        cim = rewards.cim(grc, qir, self.settings.beta, self.settings.grc_weight)
        return pd.DataFrame({"grc": grc, "qir": qir, "cim": cim}), rows

    def _compare(self, rows: np.ndarray, source: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(n,) GRC and (n,) QIR of (n, k) retrieved rows, for (n, d) source embeddings."""
        # Captions of one image retrieve much the same rows: each is read and transformed once.
        distinct, place = np.unique(rows, return_inverse=True)
        images, source = self._transformed(self.gallery.image_vectors(distinct)), self._transformed(source)
        scores = []
        for part in blocks(len(rows), max(1, GATHERED // self.settings.k)):
            retrieved = images[place.reshape(rows.shape)[part]]
            grc = rewards.gallery_representation_consistency(retrieved)
            scores.append((grc, rewards.query_gallery_image_relevance(source[part], retrieved, self.weights)))
        grc, qir = map(np.concatenate, zip(*scores, strict=True))
        return grc, qir

    def _transformed(self, vectors: np.ndarray) -> np.ndarray:
        s = self.settings
        return self.gallery.transform.apply(vectors, s.center, s.whiten) if s.center or s.whiten else vectors

    def score(self, images: Sequence[Path | str], captions: Sequence[str]) -> pd.DataFrame:
        """GRC, QIR and CIM of captions of image files, which need not be in the gallery.

        An image whose path is an image_id of the gallery is not retrieved by its own captions.
        """
        ids = [str(image) for image in images]
        self.add_images({image_id: partial(open_image, image_id) for image_id in ids})
        return self.retrieval_scores(captions, ids)

    def paired_scores(self, captions: Sequence[str], image_ids: Sequence[str]) -> pd.DataFrame:
        """Rival rewards that compare text and image directly, columns clipscore, self_retrieval; 0 where empty.

        Raises:
            CimError: where the image encoder has no text tower.
        """
        if self._gallery_images is None:
            self._gallery_images = self.gallery.image_vectors(np.arange(len(self.gallery)))
        text, source = self.image.encode_text(list(captions)), self.source_vectors(image_ids)
        scores = {
            "clipscore": rewards.clipscore(text, source),
            "self_retrieval": rewards.self_retrieval(text, source, self._gallery_images),
        }
        filled = _not_empty(captions)
        return pd.DataFrame({name: np.where(filled, values, 0.0) for name, values in scores.items()})


def _not_empty(captions: Sequence[str]) -> np.ndarray:
    return np.array([bool(c.strip()) for c in captions], dtype=bool)


def load_scorer(folder: Path | str, settings: RewardSettings | None = None) -> Scorer:
    """A scorer on a gallery, with the encoders that it was built with.

    Raises:
        CimError: where the gallery or one of its encoders cannot be loaded.
    """
    info = read_info(Path(folder))
    text = load_text_encoder(info["text_encoder"]["spec"], precision="bfloat16")
    image = load_image_encoder(info["image_encoder"]["spec"])
    return Scorer(load_gallery(folder, text, image), text, image, settings or RewardSettings())
