"""From captions to rewards: one pass of encoding, search and gathering for a whole batch."""

from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import pandas as pd

from cim import rewards
from cim.data.manifest import Manifest
from cim.encoders import ImageEncoder, TextEncoder, load_encoders
from cim.errors import CimError
from cim.gallery.search import blocks
from cim.gallery.store import SMALL, Gallery, load_gallery, read_info
from cim.images import content_digest, open_image, read_stored
from cim.params import EncoderSettings
from cim.rewards import RewardSettings

PAIRED = ("clipscore", "self_retrieval")
GATHERED = 16_384  # retrieved embeddings in memory at once


class Scorer:
    """Scores captions of source images against a gallery."""

    def __init__(self, gallery: Gallery, text: TextEncoder, image: ImageEncoder, settings: RewardSettings):
        self.gallery, self.text, self.image, self.settings = gallery, text, image, settings
        self._sources: dict[str, np.ndarray] = {}
        self._copies: dict[str, int] = {}  # gallery row of source images by their content, or -1

    def at(self, settings: RewardSettings, kind: type["Scorer"] | None = None) -> "Scorer":
        """The same scorer, with its source images, at other settings of the reward, and of another kind where given."""
        other = (kind or type(self))(self.gallery, self.text, self.image, settings)
        other._sources, other._copies = self._sources, self._copies
        return other

    @cached_property
    def k(self) -> int:
        """How many images a caption retrieves.

        Raises:
            CimError: for the whole of a gallery that is too large for it.
        """
        s, rows = self.settings, len(self.gallery)
        if s.k is None and rows > SMALL:
            raise CimError(f"{self.gallery.folder}: has more than the {SMALL:,} rows of reward.k=null; set reward.k")
        # An image may have several rows, none of which its captions retrieve.
        return s.k or rows - s.exclude_source * int(self.gallery.rows["digest"].value_counts().max())

    def add_sources(self, manifest: Manifest, progress: bool = False) -> None:
        """Embed the images of a manifest, so that captions can be scored by their image_id.

        Images of the gallery keep the embedding they have there.
        """
        ids = manifest.frame["image_id"].to_numpy()
        rows = self.gallery.rows_of(manifest.frame["digest"], "digest")
        self._copies.update(zip(ids, rows, strict=True))
        known = rows >= 0
        self._sources.update(zip(ids[known], self.gallery.image_vectors(rows[known]), strict=True))
        rest = manifest.take(np.flatnonzero(~known))
        self._sources.update(zip(ids[~known], self.image.encode(rest.image_paths, progress=progress), strict=True))

    def add_images(self, images: Mapping[str, Path | str | bytes], unreadable: dict[str, str] | None = None) -> None:
        """Embed single images, so that captions can be scored by their image_id; known ones are skipped.

        Args:
            images: image_id to the image's place or content, as open_image takes it.
            unreadable: receives the images that cannot be read, with the reason; if None, the first is an error.
        """
        new = [image_id for image_id in images if image_id not in self._sources]
        bad: dict[int, str] = {}
        opened = [partial(open_image, images[image_id], image_id) for image_id in new]
        vectors = self.image.encode(opened, unreadable=None if unreadable is None else bad)
        if bad:
            unreadable.update((new[position], reason) for position, reason in bad.items())
        read = {i: vector for p, (i, vector) in enumerate(zip(new, vectors, strict=True)) if p not in bad}
        self._sources.update(read)
        digests = [content_digest(read_stored(images[image_id])) for image_id in read]
        self._copies.update(zip(read, self.gallery.rows_of(digests, "digest"), strict=True))

    def gallery_rows(self, image_ids: Sequence[str]) -> np.ndarray:
        """(n,) gallery row of each source image, by its file's content or else its image_id; -1 if it is not there."""
        rows = np.array([self._copies.get(image_id, -1) for image_id in image_ids], int)
        return np.where(rows < 0, self.gallery.rows_of(image_ids), rows)

    def source_vectors(self, image_ids: Sequence[str]) -> np.ndarray:
        """(n, d) embeddings of source images that were added."""
        try:
            return np.stack([self._sources[image_id] for image_id in image_ids])
        except KeyError as error:
            raise CimError(f"image '{error.args[0]}' is not among the source images; add its manifest first") from None

    def retrieve(
        self, captions: Sequence[str], image_ids: Sequence[str] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """(n, k) gallery rows that each caption retrieves, and their weights, (k,) or (n, k), in QIR.

        Repeated captions are encoded once.
        """
        s, (distinct, inverse) = self.settings, np.unique(np.asarray(captions, dtype=object), return_inverse=True)
        queries = self.text.encode(distinct.tolist())[inverse]
        exclude = self.gallery_rows(image_ids) if s.exclude_source and image_ids is not None else None
        rows = self.gallery.search(queries, self.k, exclude)
        if s.temperature is None:
            return rows, rewards.rank_weights(self.k, s.decay)
        return rows, rewards.similarity_weights(self.gallery.similarity(queries, rows), s.temperature)

    def retrieval_scores(self, captions: Sequence[str], image_ids: Sequence[str]) -> pd.DataFrame:
        """GRC, QIR and CIM of each caption, columns grc, qir, cim; an empty caption gets the lowest value of each."""
        # In blocks, since scores of all captions with all gallery rows may be more than fit into memory.
        parts = blocks(max(1, len(captions)), max(512, 2**27 // len(self.gallery)))
        return pd.concat([self.scores_and_rows(captions[p], image_ids[p])[0] for p in parts], ignore_index=True)

    def scores_and_rows(self, captions: Sequence[str], image_ids: Sequence[str]) -> tuple[pd.DataFrame, np.ndarray]:
        """The retrieval_scores, and the (n, k) gallery rows that each caption retrieved, -1 for an empty one."""
        s, filled = self.settings, _not_empty(captions)
        grc = np.zeros(len(filled))
        qir = np.full(len(filled), -1.0 if s.temperature else -rewards.rank_weights(self.k, s.decay).sum())
        rows = np.full((len(filled), self.k), -1)
        if filled.any():
            texts, ids = (np.asarray(values, object)[filled] for values in (captions, image_ids))
            rows[filled], weights = self.retrieve(texts, ids)
            grc[filled], qir[filled] = self._compare(rows[filled], weights, self.source_vectors(ids))
        return pd.DataFrame({"grc": grc, "qir": qir, "cim": rewards.cim(grc, qir, s.beta, s.grc_weight)}), rows

    def _compare(self, rows: np.ndarray, weights: np.ndarray, source: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(n,) GRC and (n,) QIR of (n, k) retrieved rows with these weights, for (n, d) source embeddings."""
        source, soft, scores = self._transformed(source), weights.ndim == 2, []
        if soft and len(self.gallery) <= SMALL:
            # Much of the gallery has a weight: one product, instead of gathering k images for each caption.
            spread = np.zeros((len(rows), len(self.gallery)), np.float32)
            np.put_along_axis(spread, rows, weights, 1)
            centroid = spread @ self._compared
            return np.linalg.norm(centroid, axis=1), np.einsum("nd,nd->n", source, centroid)
        for part in blocks(len(rows), max(1, GATHERED // self.k)):
            retrieved, own = self._images(rows[part]), weights[part] if soft else weights
            grc = rewards.gallery_representation_consistency(retrieved, own if soft else None)
            scores.append((grc, rewards.query_gallery_image_relevance(source[part], retrieved, own)))
        return tuple(map(np.concatenate, zip(*scores, strict=True)))

    @cached_property
    def _gallery_images(self) -> np.ndarray:
        return self.gallery.image_vectors(np.arange(len(self.gallery)))

    @cached_property
    def _compared(self) -> np.ndarray:
        return self._transformed(self._gallery_images)

    def _images(self, rows: np.ndarray) -> np.ndarray:
        """(*rows.shape, d) transformed embeddings of gallery images."""
        if len(self.gallery) <= SMALL:
            return self._compared[rows]
        # Captions of one image retrieve much the same rows: each is read and transformed once.
        distinct, place = np.unique(rows, return_inverse=True)
        return self._transformed(self.gallery.image_vectors(distinct))[place.reshape(rows.shape)]

    def _transformed(self, vectors: np.ndarray) -> np.ndarray:
        s = self.settings
        return self.gallery.transform.apply(vectors, s.center, s.whiten) if s.center or s.whiten else vectors

    def score(self, images: Sequence[Path | str], captions: Sequence[str]) -> pd.DataFrame:
        """GRC, QIR and CIM of captions of image files, which need not be in the gallery.

        An image that is in the gallery is not retrieved by its own captions.
        """
        ids = [str(image) for image in images]
        self.add_images(dict(zip(ids, ids, strict=True)))
        return self.retrieval_scores(captions, ids)

    def paired_scores(
        self, captions: Sequence[str], image_ids: Sequence[str], names: Sequence[str] = PAIRED
    ) -> pd.DataFrame:
        """Rival rewards that compare text and image directly, a column for each of `names`; 0 for an empty caption.

        Raises:
            CimError: where the image encoder has no text tower.
        """
        text, source = self.image.encode_text(list(captions)), self.source_vectors(image_ids)
        score_of = {
            "clipscore": lambda: rewards.clipscore(text, source),
            "self_retrieval": lambda: rewards.self_retrieval(text, source, self._gallery_images),
        }
        scores = {name: score_of[name]() for name in names}
        return pd.DataFrame(scores).mul(_not_empty(captions), axis=0)


def _not_empty(captions: Sequence[str]) -> np.ndarray:
    return np.array([bool(c.strip()) for c in captions], dtype=bool)


def load_scorer(
    folder: Path | str, settings: RewardSettings | None = None, encoders: EncoderSettings | None = None
) -> Scorer:
    """A scorer on a gallery, with these encoders; None for those that the gallery names.

    Raises:
        CimError: where the gallery or an encoder cannot be loaded, or the gallery was built with others.
    """
    if encoders is None:
        info = read_info(Path(folder))
        specs = {name: info[f"{name}_encoder"]["spec"] for name in ("text", "image")}
        encoders = EncoderSettings(**specs, text_precision="bfloat16")
    text, image = load_encoders(encoders)
    return Scorer(load_gallery(folder, text, image), text, image, settings or RewardSettings())
