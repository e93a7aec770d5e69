"""The `gallery` group of parameters; imports no heavy library."""

from pydantic import PositiveInt

from cim.params import Names, Settings, Share


class BuildSettings(Settings):
    """How a gallery is built."""

    index: str = "auto"  # exact, auto (by size), or any string that faiss.index_factory takes
    recall: Share = 0.99  # an approximate index is tuned until it finds this share of the exact nearest captions
    shard_rows: PositiveInt = 10_000  # rows embedded between two checkpoints
    max_skipped: Share = 0.0  # share of unreadable images and empty captions that may be left out


class GallerySettings(BuildSettings):
    """The `gallery` group: how the gallery is built, and from what."""

    splits: Names  # splits of the manifest that can be retrieved
    shards: str | None = None  # file or folder of more captioned images, in the formats of cim.gallery.shards
    image_root: str | None = None  # what their image paths are relative to; None or `shards` itself: their own folder
