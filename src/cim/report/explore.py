"""Trying captions of one image: what they retrieve and how they score, with the widgets of notebooks/explore.ipynb."""

from pathlib import Path

import ipywidgets as widgets
import pandas as pd

from cim.data.manifest import read_manifest
from cim.errors import CimError
from cim.files import read_json
from cim.report.pages import render, thumbnail
from cim.rewards import RewardSettings
from cim.scorer import load_scorer

LISTED = 1000  # images in the menu; any other can be typed


class Explorer:
    """Captions of one image at a time against a gallery, whose own encoders are loaded.

    Args:
        gallery: a folder.
        manifest, split: a file with source images and references; None for the gallery's own images.
        captions: a folder of RUN.json files, {image_id: caption}, to start from; it may be missing.

    Raises:
        CimError: where the gallery, its encoders or the manifest cannot be read.
    """

    def __init__(self, gallery: str, manifest: str | None = None, split: str = "test", captions: str | None = None):
        self.scorer = load_scorer(gallery, RewardSettings())
        self.gallery = self.scorer.gallery
        if manifest is None:
            sources = self.gallery.take(range(min(LISTED, len(self.gallery))))
        else:
            part = read_manifest(Path(manifest)).split(split)
            sources = part.frame.assign(image=list(map(str, part.image_paths)))
        self.sources = sources.set_index("image_id")[["image", "caption"]]
        self.runs = {path.stem: read_json(path) for path in sorted(Path(captions or "none").glob("*.json"))}

    def source(self, name: str) -> tuple[str, str]:
        """Where an image is stored, and its reference caption; for a name that is no image_id, the name and ""."""
        if name in self.sources.index:
            return tuple(self.sources.loc[name])
        row = self.gallery.rows_of([name])[0]
        return tuple(self.gallery.take([row]).loc[0, ["image", "caption"]]) if row >= 0 else (name, "")

    def captions(self, name: str) -> dict[str, str]:
        """The known captions of an image by origin: "reference" or a run."""
        known = {"reference": self.source(name)[1]} | {run: said.get(name) for run, said in self.runs.items()}
        return {origin: caption for origin, caption in known.items() if caption}

    def compare(self, name: str, captions: list[str], k: int, beta: float) -> pd.DataFrame:
        """Score captions of one image, an image_id or an image file.

        Returns:
            Columns grc, qir, cim, caption and retrieved: image_id, image and caption of the k gallery rows that the
            caption retrieves, best first; none for an empty caption.

        Raises:
            CimError: where the image cannot be read, or the gallery is too small for k.
        """
        scorer = self.scorer.at(RewardSettings(k=k, beta=beta))
        scorer.add_images({name: self.source(name)[0]})
        scores, found = scorer.scores_and_rows(captions, [name] * len(captions))
        retrieved = [self.gallery.take(rows[rows >= 0]).to_dict("records") for rows in found]
        return scores.assign(caption=captions, retrieved=retrieved)

    def show(self, name: str, captions: list[str], k: int, beta: float) -> str:
        """The comparison as HTML, or the reason why there is none."""
        try:
            sides = self.compare(name, captions, k, beta).to_dict("records")
        except CimError as error:
            return render("explore.html", error=error)
        return render("explore.html", source=self.source(name)[0], sides=sides, picture=thumbnail)

    def panel(self, first: str = "reference", second: str = "reference") -> widgets.Widget:
        """Menus, text fields and sliders, and what both captions retrieve; `first` and `second`: their origins."""
        late = {"continuous_update": False}  # update when a slider is released or a field is left
        half = {"layout": widgets.Layout(width="49%")}
        image = widgets.Dropdown(options=self.sources.index[:LISTED].tolist(), description="image", **half)
        other = widgets.Text(placeholder="or an image file, or an image_id of the gallery", **half, **late)
        k = widgets.IntSlider(3, 1, min(20, len(self.gallery) - 1), description="K", **late)
        beta = widgets.FloatSlider(1.0, min=0, max=3, description="beta", **late)
        origins = [widgets.Dropdown(description=f"caption {side}", **half) for side in "AB"]
        texts = [widgets.Textarea(rows=4, **half, **late) for _ in origins]
        shown = widgets.HTML()

        def update(_=None) -> None:
            name = other.value.strip() or image.value
            shown.value = self.show(name, [text.value for text in texts], k.value, beta.value)

        def offer(_=None) -> None:
            known = self.captions(other.value.strip() or image.value)
            for origin, start in zip(origins, (first, second), strict=True):
                label = origin.label or start
                origin.options = list(known.items())
                origin.label = label if label in known else next(iter(known), None)
            update()

        for origin, text in zip(origins, texts, strict=True):
            widgets.dlink((origin, "value"), (text, "value"), lambda caption: caption or "")
        offer()
        for function, controls in ((offer, (image, other)), (update, (*texts, k, beta))):
            for control in controls:
                control.observe(function, "value")
        return widgets.VBox([*map(widgets.HBox, ([image, other], [k, beta], origins, texts)), shown])
