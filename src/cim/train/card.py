"""The model card of a trained run, written beside its weights."""

from pathlib import Path

import yaml
from huggingface_hub import ModelCardData

from cim.train.settings import SHARED

CARD = """---
{head}
---

# {base}, run {run}

{how} {steps} steps on {images} images, seed {seed}. Weights of step {best}.
The prompt is `{prompt}`. The weights keep the license of `{base}`. Parameters:

```yaml
{params}```
"""
GRPO = """Trained by GRPO with the retrieval reward `{}` (Cross-modal Identity Mapping, arXiv 2603.01696), without
captions of the training images. The reward cannot teach what text retrieval ignores, such as grammar."""
SFT = "Fine-tuned on captions of the training images (`{}`)."


def write_card(job, state) -> None:
    """Write the card of a trained Job in the hub's format; `state` is the trainer's."""
    model, params = job.model_settings, job.params
    how, shown = GRPO, {name: params[name] for name in ("train", "reward", "encoders")}
    if job.sft:
        read = {name: value for name, value in params["train"].items() if name in SHARED}
        how, shown = SFT, {"train": read, "sft": params["sft"]}
    head = ModelCardData(
        base_model=None if Path(model.name).exists() else model.name,  # the hub refuses names that it does not have
        library_name="transformers", pipeline_tag="image-text-to-text", tags=["cim", job.method],
    )  # fmt: skip
    text = CARD.format(
        head=head.to_yaml(), base=model.name, run=job.run, how=how.format(job.method), steps=state.global_step,
        images=len(job.images), seed=job.seed, best=state.best_global_step or state.global_step, prompt=model.prompt,
        params=yaml.safe_dump(shown, sort_keys=False),
    )  # fmt: skip
    (job.out / "README.md").write_text(text, encoding="utf-8")
