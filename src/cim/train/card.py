"""The model card of a trained run, written beside its weights."""

from pathlib import Path

import yaml
from huggingface_hub import ModelCardData

from cim.captioners.settings import ModelSettings
from cim.runs import SFT_METHODS, parse_run, with_variant

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


def write_card(out: Path, run: str, model: ModelSettings, params: dict, images: int, state) -> None:
    """Write OUT/README.md in the hub's format; `state` is the trainer's."""
    method, seed = parse_run(run)
    supervised = with_variant(params, method)[1] in SFT_METHODS
    how, groups = (SFT, ("train", "sft")) if supervised else (GRPO, ("train", "reward", "encoders"))
    head = ModelCardData(
        base_model=None if Path(model.name).exists() else model.name,  # the hub refuses names that it does not have
        library_name="transformers", pipeline_tag="image-text-to-text", tags=["cim", method],
    )  # fmt: skip
    shown = yaml.safe_dump({name: params[name] for name in groups}, sort_keys=False)
    text = CARD.format(
        head=head.to_yaml(), base=model.name, run=run, how=how.format(method), steps=state.global_step, images=images,
        seed=seed, best=state.best_global_step or state.global_step, prompt=model.prompt, params=shown,
    )  # fmt: skip
    (out / "README.md").write_text(text, encoding="utf-8")
