"""Where the time of a GRPO step goes: rollout, reward, update. Needs the pipeline's ./artifacts (make repro).

python benchmarks/grpo.py --steps 10
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import pandas as pd
import torch
from common import report
from transformers import TrainerCallback

from cim.params import read_params
from cim.train.grpo import job_scorer, make_trainer
from cim.train.job import Job


class Watch:
    """Adds up the time of calls, step by step."""

    def __init__(self):
        self.steps: list[float] = []
        self.now = 0.0

    def around(self, call):
        def timed(*args, **kwargs):
            start = time.perf_counter()
            result = call(*args, **kwargs)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.now += time.perf_counter() - start
            return result

        timed.__name__ = getattr(call, "__name__", "timed")
        return timed

    def end_of_step(self):
        self.steps.append(self.now)
        self.now = 0.0


class Steps(TrainerCallback):
    def __init__(self, *watches: Watch):
        self.watches, self.whole, self.start = watches, [], 0.0

    def on_step_begin(self, *args, **kwargs):
        self.start = self.start or time.perf_counter()

    def on_step_end(self, *args, **kwargs):
        now = time.perf_counter()
        self.whole.append(now - self.start)
        self.start = now
        for watch in self.watches:
            watch.end_of_step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10, help="measured, after two that warm up")
    options = parser.parse_args()
    params = read_params()
    params["train"] |= {"steps": options.steps + 2, "save_every": 10_000}
    with tempfile.TemporaryDirectory() as aside:
        work = Path(aside)
        for name in ("dataset", "gallery"):
            (work / name).symlink_to(Path("artifacts", name).resolve())
        job = Job("cim-0", params, work).load()
        trainer = make_trainer(job, job_scorer(job), work / "checkpoints")
        reward, rollout = Watch(), Watch()
        trainer.reward_funcs[0] = reward.around(trainer.reward_funcs[0])
        trainer._generate_and_score_completions = rollout.around(trainer._generate_and_score_completions)
        steps = Steps(reward, rollout)
        trainer.add_callback(steps)
        trainer.train()
    median = {
        "step": statistics.median(steps.whole[2:]),
        "rollout": statistics.median(a - b for a, b in zip(rollout.steps[2:], reward.steps[2:], strict=True)),
        "reward": statistics.median(reward.steps[2:]),
    }
    median["update"] = median["step"] - median["rollout"] - median["reward"]
    share = {key: value / median["step"] for key, value in median.items()}
    table = pd.DataFrame({"seconds": median, "share of a step": share})
    batch = {key: params["train"][key] for key in ("images_per_step", "group_size", "max_completion")}
    name = "grpo" + ("-gpu" if torch.cuda.is_available() else "")
    report(name, {"steps": options.steps, "batch": batch, "seconds": median, "share": share}, table)


if __name__ == "__main__":
    main()
