"""Captions by any image-text-to-text model, and the stage that writes those of the base and of every run."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from cim.encoders import weights_digest
from cim.manifest import Manifest, open_image, read_manifest
from cim.models import ModelSettings, load_model, prompt_inputs
from cim.runs import BASE
from cim.settings import require


@dataclass(frozen=True)
class CaptionSettings:
    """The `captions` group: greedy captions of these splits."""

    splits: list[str]
    max_new_tokens: int
    batch: int = 64

    def __post_init__(self):
        require(bool(self.splits), "splits is empty; name at least one")
        require(min(self.max_new_tokens, self.batch) >= 1, "max_new_tokens and batch must be positive")


@torch.inference_mode()
def caption_images(
    model,
    processor,
    manifest: Manifest,
    settings: ModelSettings,
    max_new_tokens: int,
    batch: int = 64,
    progress: bool = True,
) -> list[str]:
    """Greedy captions of all images of a manifest."""
    captions: list[str] = []
    for start in tqdm(range(0, len(manifest), batch), desc="captioning", disable=not progress, mininterval=2):
        images = [open_image(path) for path in manifest.image_paths[start : start + batch]]
        inputs = prompt_inputs(processor, images, settings).to(model.device, dtype=model.dtype)
        out = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        answers = out[:, inputs["input_ids"].shape[1] :]
        captions += [c.strip() for c in processor.batch_decode(answers, skip_special_tokens=True)]
    return captions


def caption_runs(model: ModelSettings, settings: CaptionSettings, runs: list[str], artifacts: Path, out: Path) -> None:
    """Write OUT/SPLIT/RUN.json, {image_id: caption}, for the base model and every run.

    Files that were made of the same weights, images and settings are kept, so that a kill or one new run costs only
    what is missing; files of other runs are removed.
    """
    manifest = read_manifest(artifacts / "dataset" / "manifest.parquet")
    parts = {split: manifest.split(split) for split in settings.splits}
    sources = {BASE: model, **{run: model.at(artifacts / "train" / run) for run in runs}}
    mark = out / "made_of.json"
    made = json.loads(mark.read_text()) if mark.is_file() else {}
    for run, source in sources.items():
        loaded, processor = load_model(source)
        made_of = {"weights": weights_digest(loaded), "model": asdict(source), "captions": asdict(settings)}
        for split, part in parts.items():
            path = out / split / f"{run}.json"
            of = made_of | {"images": _images_digest(part)}
            if path.is_file() and made.get(f"{split}/{run}") == of:
                print(f"{split}, {run}: kept", flush=True)
                continue
            captions = caption_images(loaded, processor, part, source, settings.max_new_tokens, settings.batch)
            words = np.mean([len(c.split()) for c in captions])
            print(f"{split}, {run}: {words:.1f} words, e.g. {captions[0]!r}", flush=True)
            _write(path, dict(zip(part.frame["image_id"], captions, strict=True)))
            _write(mark, made := made | {f"{split}/{run}": of})
    for path in out.glob("*/*.json"):
        if path.stem not in sources or path.parent.name not in parts:
            path.unlink()


def _images_digest(manifest: Manifest) -> str:
    listing = [
        f"{image_id} {path.stat().st_size if path.is_file() else 'missing'}"
        for image_id, path in zip(manifest.frame["image_id"], manifest.image_paths, strict=True)
    ]
    return hashlib.sha256("\n".join(listing).encode()).hexdigest()[:16]


def _write(path: Path, value: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".partial")
    aside.write_text(json.dumps(value, indent=0, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(aside, path)
