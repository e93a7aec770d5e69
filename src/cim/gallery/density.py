"""How dense a gallery is: whether an image has similar images in it that a caption can tell apart."""

import numpy as np

from cim.gallery.store import Gallery


def image_similarities(
    gallery: Gallery, rng: np.random.Generator, rows: int = 100_000, images: int = 1000, others: int = 50
) -> tuple[np.ndarray, np.ndarray]:
    """Cosine similarities of a random sample of the gallery's images.

    Args:
        rows: random rows of the gallery that are searched, so that a large gallery is not read whole.
        images: images sampled from these rows.
        others: random rows that each sampled image is compared with.

    Returns:
        (images,) similarity of each image to its nearest other image, and (images * others,) to random images.
    """
    vectors = gallery.image_vectors(np.sort(rng.permutation(len(gallery))[:rows]))
    sample = rng.choice(len(vectors), min(images, len(vectors)), replace=False)
    similarity = vectors[sample] @ vectors.T
    random = similarity[:, rng.permutation(len(vectors))[:others]].ravel()
    similarity[np.arange(len(sample)), sample] = -1  # an image is not its own neighbour
    return similarity.max(axis=1), random
