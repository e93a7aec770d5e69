"""The published setting at its true sizes on one GPU: gallery, scores, and where a GRPO step's time and memory go.

    python benchmarks/gpu.py /tmp/gpu-3b --steps 5
    python benchmarks/gpu.py /tmp/gpu-7b --size 7B -S model.max_pixels=602112
    python benchmarks/gpu.py /tmp/gpu-all -S train.lora_rank=0 -S train.merge=false -S model.dtype=float32
    python benchmarks/gpu.py /tmp/gpu-tiny --size tiny --steps 2 --photos 64 -S train.images_per_step=4     a dry run

Parameters are those of profile single-gpu, whose captioner and encoders are replaced by random weights of the published
architectures (Qwen2.5-VL, ViT-H-14, all-mpnet-base-v2), written to the folder once: nothing is downloaded. Such a
captioner hardly ever ends a caption, so each has train.max_completion tokens. Pictures are grain of a photo's size.
docs/scale.md has what one H100 gave.
"""

import argparse
import statistics
import subprocess
import sys
import time
from contextlib import chdir
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from common import report
from grpo import Steps, Watch
from random_models import SIZES, write_captioner, write_data, write_encoders

from cim.captioners.models import DTYPES
from cim.pipeline.compose import add_overrides, compose
from cim.train.grpo import job_scorer, make_trainer
from cim.train.job import Job
from cim.train.preflight import GIB, plan


def rate(few: list[str], every: list[str], more: int) -> dict[str, float]:
    """Rows a second of a `cim` command: what `more` rows add to its time, so that starting it does not count."""
    seconds = []
    for command in (few, every):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "cim.cli", *command], check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds[1], "a_second": more / (seconds[1] - seconds[0])}


def train(params: dict, steps: int) -> tuple[dict[str, float], dict[str, float]]:
    """Median seconds of a GRPO step and its parts, after one that warms up; GiB at most, by sampling and in all."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    job = Job("cim-0", params, Path("artifacts")).load()
    trainer = make_trainer(job, job_scorer(job), Path("checkpoints"))
    sampling, reward, reference, forward, backward = watches = [Watch() for _ in range(5)]
    peaks = []

    def sampled(generate):
        def call(*args, **kwargs):
            out = generate(*args, **kwargs)
            peaks.append(peak())
            return out

        return call

    def read(call):
        with_gradient, without = forward.around(call), reference.around(call)
        return lambda *args, **kw: (with_gradient if torch.is_grad_enabled() else without)(*args, **kw)

    trainer._generate_single_turn = sampled(sampling.around(trainer._generate_single_turn))
    trainer.reward_funcs[0] = reward.around(trainer.reward_funcs[0])
    trainer._get_per_token_logps_and_entropies = read(trainer._get_per_token_logps_and_entropies)
    trainer.accelerator.backward = backward.around(trainer.accelerator.backward)
    steps_taken = Steps(*watches)
    trainer.add_callback(steps_taken)
    trainer.train()
    names = ("sampling", "reward", "reference", "forward", "backward")
    seconds = {name: statistics.median(watch.steps[1:]) for name, watch in zip(names, watches, strict=True)}
    whole = statistics.median(steps_taken.whole[1:])
    seconds |= {"other": whole - sum(seconds.values()), "step": whole}
    return seconds, {"sampling": max(peaks, default=0.0), "in_all": peak()}


def peak() -> float:
    """GiB of the GPU that tensors have taken at most; 0 without one."""
    return torch.cuda.max_memory_allocated() / GIB if torch.cuda.is_available() else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="a folder for models and data; what is there is used again")
    parser.add_argument("--size", choices=SIZES, default="3B")
    parser.add_argument("--steps", type=int, default=5, help="of GRPO, measured after one that warms up")
    parser.add_argument("--photos", type=int, default=4096, help="gallery rows; captions scored: 16 times as many")
    add_overrides(parser)
    options = parser.parse_args()
    work, photos, few = options.work.resolve(), options.photos, options.photos // 8
    text, image = work / "text", work / "image"
    params = compose(["profile=single-gpu", *options.overrides])
    params["model"] |= {"name": str(work / "model"), "revision": None}
    params["encoders"] |= {"text": str(text), "image": f"open_clip:local-dir:{image}"}
    params["train"] |= {"steps": options.steps + 1, "validation": 0, "save_every": 10_000}
    if not (work / "complete").is_file():
        write_captioner(work / "model", options.size, DTYPES[params["model"]["dtype"]])
        write_encoders(text, image, options.size == "tiny")
        write_data(work, photos, np.random.default_rng(0))
        (work / "complete").touch()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # what writing them took is not left to the commands below
    result = {"size": options.size, "photos": photos, "overrides": options.overrides}
    with chdir(work):
        encoders = ["--text", str(text), "--image", params["encoders"]["image"]]
        scored = ["--gallery", "all-gallery", "--out", "scores.jsonl"]
        build = [["gallery", "build", f"{name}-gallery", f"{name}.tar", *encoders] for name in ("few", "all")]
        score = [["score", f"{name}.jsonl", *scored] for name in ("few", "all")]
        for name, commands, more in (("gallery", build, photos - few), ("score", score, 15 * photos)):
            result[name] = rate(*commands, more)
            print(f"{name}: {result[name]['a_second']:.1f} rows a second", flush=True)
        if not Path("artifacts", "gallery").exists():
            Path("artifacts", "gallery").symlink_to(work / "all-gallery")
        result["plan"] = plan("cim-0", params, Path("artifacts"), 1)
        print(*result["plan"], sep="\n", flush=True)
        seconds, result["peak_gib"] = train(params, options.steps)
    result |= {"seconds": seconds, "share": {name: value / seconds["step"] for name, value in seconds.items()}}
    print("GiB at most:", result["peak_gib"])
    report(work.name, result, pd.DataFrame({"seconds": seconds, "share of a step": result["share"]}))


if __name__ == "__main__":
    main()
