"""The model card that a trained run is saved with."""

from __future__ import annotations

from pathlib import Path

import yaml

from cim.captioners.models import ModelSettings
from cim.runs import SFT_METHODS, parse_run

CARD = """---
{head}---

# {base}, {how}

Run `{run}` of the CIM repository: {steps} steps on {images} images, seed {seed}. {chosen}

{about}

Asked with: `{prompt}`

## Parameters

```yaml
{params}```

## Limits

The weights keep the licence of `{base}`. The reward compares what a caption retrieves, so it cannot teach what text
retrieval ignores, such as grammar.
"""
ABOUT = {
    "rl": "Trained by GRPO with a retrieval reward (Cross-modal Identity Mapping, arXiv 2603.01696). No caption of the "
    "training images was used as a label.",
    "sft": "Supervised fine-tuning on captions of the training images.",
}


def write_card(out: Path, run: str, model: ModelSettings, params: dict, images: int, state) -> None:
    """Write README.md for the hub, beside the weights."""
    method, seed = parse_run(run)
    sft = method in SFT_METHODS
    named = ("train", "sft") if sft else ("train", "reward", "encoders")
    head = {"library_name": "transformers", "pipeline_tag": "image-text-to-text", "tags": ["cim", method]}
    if not Path(model.name).exists():  # the hub takes only its own names for this
        head["base_model"] = model.name
    best = state.best_global_step
    text = CARD.format(
        head=yaml.safe_dump(head, sort_keys=False),
        base=model.name,
        how="fine-tuned on captions" if sft else f"trained with the reward {method}",
        run=run,
        steps=state.max_steps,
        images=images,
        seed=seed,
        chosen=f"The weights are those of step {best}, best on validation images." if best else "",
        about=ABOUT["sft" if sft else "rl"],
        prompt=model.prompt,
        params=yaml.safe_dump({name: params[name] for name in named}, sort_keys=False),
    )
    (out / "README.md").write_text(text, encoding="utf-8")
