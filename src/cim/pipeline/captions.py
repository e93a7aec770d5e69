"""Stage `captions`: greedy captions of the test images by the base model and by every run."""

import numpy as np

from cim import code
from cim.captioners.generate import caption_images
from cim.captioners.models import load_model
from cim.captioners.settings import CaptionSettings, ModelSettings
from cim.data.manifest import read_manifest
from cim.encoders import weights_digest
from cim.files import read_json, write_json
from cim.params import group
from cim.pipeline.paths import ARTIFACTS, MANIFEST, RESULTS
from cim.runs import BASE, all_runs


def run(params: dict) -> None:
    """Write results/captions/SPLIT/RUN.json, {image_id: caption}, for the base model and every run.

    Files that were made of the same weights, images, settings and code are kept, so that a kill or one new run costs
    only what is missing; files of other runs are removed.
    """
    settings = group(CaptionSettings, params.get("captions"), "captions")
    model = group(ModelSettings, params.get("model"), "model")
    manifest, out = read_manifest(MANIFEST), RESULTS / "captions"
    parts = {split: manifest.split(split) for split in settings.splits}
    sources = {BASE: model, **{run: model.at(ARTIFACTS / "train" / run) for run in all_runs(params["runs"])}}
    mark = out / "made_of.json"
    made = read_json(mark) if mark.is_file() else {}
    given = {"captions": settings.model_dump(), "code": code.digest("cim.captioners.generate")}
    for run, source in sources.items():
        loaded, processor = load_model(source)
        made_of = given | {"weights": weights_digest(loaded), "model": source.model_dump()}
        for split, part in parts.items():
            path = out / split / f"{run}.json"
            of = made_of | {"images": part.digest}
            if path.is_file() and made.get(f"{split}/{run}") == of:
                print(f"{split}, {run}: kept", flush=True)
                continue
            captions = caption_images(loaded, processor, part, source, settings.max_new_tokens, settings.batch)
            words = np.mean([len(c.split()) for c in captions])
            print(f"{split}, {run}: {words:.1f} words, e.g. {captions[0]!r}", flush=True)
            write_json(path, dict(zip(part.frame["image_id"], captions, strict=True)), indent=0)
            write_json(mark, made := made | {f"{split}/{run}": of})
        del loaded  # before the next one is loaded
    for path in out.glob("*/*.json"):
        if path.stem not in sources or path.parent.name not in parts:
            path.unlink()
