"""Called by test_training.py, or started by torchrun: one GRPO batch of captions that are given, not sampled.

Writes RANK.json: each caption of this process with its image, reward and advantage.
"""

import json
import sys
from pathlib import Path

import torch
from accelerate import PartialState

from cim.params import read_params
from cim.train.grpo import load_scorer, make_trainer
from cim.train.job import Job

CAPTIONS = (
    "an owl.",
    "a red owl is above a car.",
    "a car is left of a small blue owl.",
    "snow.",
    "a large green apple.",
    "a boat.",
)


def main(out: Path) -> None:
    job = Job("cim-0", read_params(), Path("artifacts")).load()
    trainer = make_trainer(job, load_scorer(job, job.artifacts), out / "checkpoints")
    state, group = PartialState(), job.settings.group_size
    tokenizer = job.processor.tokenizer

    def generate(input_ids, **_):
        """In place of the model's: the same caption for the same place in its group, whichever process holds it."""
        first = state.process_index * len(input_ids)
        texts = [CAPTIONS[(first + row) % group] for row in range(len(input_ids))]
        words = tokenizer(texts, padding=True, padding_side="right", add_special_tokens=False, return_tensors="pt")[
            "input_ids"
        ]
        words[words == tokenizer.pad_token_id] = tokenizer.eos_token_id
        return torch.cat([input_ids, words.to(input_ids.device)], dim=1)

    trainer.accelerator.unwrap_model(trainer.model).generate = generate
    record, reward = {}, trainer.reward_funcs[0]

    def recorded(completions, image_id, **columns):
        values = reward(completions=completions, image_id=image_id, **columns)
        record.update(image_id=list(image_id), caption=[c[0]["content"] for c in completions], reward=values)
        return values

    recorded.__name__ = "recorded"
    trainer.reward_funcs[0] = recorded
    score = trainer._generate_and_score_completions

    def scored(inputs):
        batch = score(inputs)
        record["advantage"] = batch["advantages"].tolist()
        out.joinpath(f"{state.process_index}.json").write_text(json.dumps(record))
        return batch

    trainer._generate_and_score_completions = scored
    trainer.train()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
