"""Training in several processes of a CPU, with captions that are given, not sampled, so that they do not depend on them.

Called by test_training.py, or started by accelerate, one GRPO batch; writes RANK.json: each caption of this process with
its image, reward and advantage.
"""

import json
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState, DistributedType
from transformers import GenerationMixin

from cim.params import read_params
from cim.train.grpo import job_scorer, make_trainer
from cim.train.job import Job

CAPTIONS = (
    "an owl.",
    "a red owl is above a car.",
    "a car is left of a small blue owl.",
    "snow.",
    "a large green apple.",
    "a boat.",
)


def allow_sharing_on_a_cpu() -> None:
    """Let accelerate divide weights among processes of a CPU: 1.15 knows FSDP on GPUs only, and would copy them."""
    init = AcceleratorState.__init__

    def shared(self, *args, fsdp_plugin=None, **kwargs):
        init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = shared


def give_captions(trainer):
    """The trainer, for which any model says the same for the same place in a group, whichever process holds it."""
    tokenizer, group = trainer.processing_class.tokenizer, trainer.num_generations

    def generate(self, input_ids, **_):
        first = trainer.accelerator.process_index * len(input_ids)
        texts = [CAPTIONS[(first + row) % group] for row in range(len(input_ids))]
        words = tokenizer(texts, padding=True, padding_side="right", add_special_tokens=False, return_tensors="pt")[
            "input_ids"
        ]
        words[words == tokenizer.pad_token_id] = tokenizer.eos_token_id
        return torch.cat([input_ids, words.to(input_ids.device)], dim=1)

    GenerationMixin.generate = generate
    return trainer


def main(out: Path) -> None:
    job = Job("cim-0", read_params(), Path("artifacts")).load()
    trainer = give_captions(make_trainer(job, job_scorer(job), out / "checkpoints"))
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
        out.joinpath(f"{trainer.accelerator.process_index}.json").write_text(json.dumps(record))
        return batch

    trainer._generate_and_score_completions = scored
    trainer.train()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
