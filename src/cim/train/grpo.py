"""GRPO with a retrieval reward."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Image, List, Value

from cim.data.manifest import Manifest
from cim.encoders import EncoderSettings, load_encoders
from cim.errors import CimError
from cim.files import write_text
from cim.gallery.store import load_gallery
from cim.params import group
from cim.processes import processes
from cim.runs import reward_of
from cim.scorer import RewardSettings, Scorer
from cim.train import checkpoints
from cim.train.job import Job, with_fitted_images
from cim.train.reward import completion_text, trl_reward
from cim.train.settings import ComputeSettings, TrainSettings, batches


def grpo_dataset(manifest: Manifest, prompt: str, max_pixels: int | None = None) -> Dataset:
    """Columns prompt, image, image_id; the images stay files until a batch needs them."""
    rows = {
        "prompt": [[{"role": "user", "content": prompt}]] * len(manifest),
        "image": [str(path) for path in manifest.image_paths],
        "image_id": manifest.frame["image_id"].tolist(),
    }
    features = Features(
        {
            "prompt": List({"role": Value("string"), "content": Value("string")}),
            "image": Image(),
            "image_id": Value("string"),
        }
    )
    return with_fitted_images(Dataset.from_dict(rows, features=features), "image", max_pixels)


class SampleLog:
    """Wraps a reward and keeps the captions of a few images of every tenth step, with their rewards."""

    def __init__(self, reward, path: Path, every: int = 10, images: int = 2):
        self.reward, self.path, self.every, self.images = reward, path, every, images
        self.__name__ = reward.__name__

    def __call__(self, completions, image_id, trainer_state=None, **columns) -> list[float]:
        values = self.reward(completions=completions, image_id=image_id, **columns)
        step = trainer_state.global_step if trainer_state is not None else 0
        if trainer_state is not None and trainer_state.is_world_process_zero and step % self.every == 0:
            shown = list(dict.fromkeys(image_id))[: self.images]
            with self.path.open("a") as lines:
                for completion, image, value in zip(completions, image_id, values, strict=True):
                    if image in shown:
                        row = {"step": step, "image_id": image, "caption": completion_text(completion), "reward": value}
                        lines.write(json.dumps(row) + "\n")
        return values


def trim_samples(path: Path, resume: str | None) -> None:
    """Drop samples that a resumed run will write again."""
    if processes().is_main_process and path.is_file():
        upto = int(resume.rpartition("-")[2]) if resume else 0
        kept = [line for line in path.read_text().splitlines() if json.loads(line)["step"] < upto]
        write_text(path, "".join(line + "\n" for line in kept))
    processes().wait_for_everyone()


def vllm_options(compute: ComputeSettings) -> dict:
    """Where captions are sampled, as TRL takes it.

    Raises:
        CimError: where vllm is wanted and not installed.
    """
    if compute.vllm == "off":
        return {}
    if find_spec("vllm") is None:
        raise CimError(
            f"parameters: compute.vllm={compute.vllm}, but vllm is not installed; run 'pip install cim[gpu]'"
        )
    options = {"use_vllm": True, "vllm_mode": compute.vllm}
    if compute.vllm == "server":
        return options | {"vllm_server_base_url": compute.vllm_url}
    return options | {"vllm_gpu_memory_utilization": compute.vllm_memory, "vllm_enable_sleep_mode": True}


def reference_options(job: Job) -> dict | None:
    """What TRL needs to load the reference model as the policy was loaded; None where its own choice is the same."""
    model = job.model_settings
    return {"revision": model.revision} if model.revision else None


def load_scorer(job: Job, artifacts: Path) -> Scorer:
    """The scorer of the run's images, checked before anything is sampled."""
    text, image = load_encoders(group(EncoderSettings, job.params.get("encoders"), "encoders"))
    settings = group(RewardSettings, job.params.get("reward"), "reward")
    scorer = Scorer(load_gallery(artifacts / "gallery", text, image), text, image, settings)
    scorer.add_sources(job.images, progress=True)
    scorer.add_sources(job.validation)
    # A k that the gallery cannot give fails here, not after the first rollout.
    scorer.retrieval_scores([job.images.captions[0]], [job.images.frame["image_id"][0]])
    return scorer


def make_trainer(job: Job, scorer: Scorer, checkpoints_at: Path) -> Any:
    """TRL's trainer for the job."""
    from trl import GRPOConfig, GRPOTrainer

    settings, world = job.settings, processes().num_processes
    cut = batches(settings, job.compute.per_device, len(job.images), world)
    for line in cut.lines(settings, len(job.images), world):
        print(line, flush=True)
    config = GRPOConfig(
        max_steps=cut.updates,
        per_device_train_batch_size=cut.per_device,
        gradient_accumulation_steps=cut.accumulation,
        steps_per_generation=cut.per_rollout,
        num_generations=settings.group_size,
        # A batch of validation holds whole groups on every process.
        per_device_eval_batch_size=settings.group_size * max(1, cut.per_device // settings.group_size),
        max_completion_length=settings.max_completion,
        temperature=settings.temperature,
        learning_rate=settings.lr,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=min(settings.warmup_steps, cut.updates),
        beta=settings.kl,
        model_init_kwargs=reference_options(job),
        **vllm_options(job.compute),
        **job.trainer_arguments("eval_reward", checkpoints_at),
    )
    prompt, pixels = job.model_settings.prompt, job.model_settings.max_pixels
    return GRPOTrainer(
        args=config,
        reward_funcs=SampleLog(trl_reward(scorer, reward_of(job.method)), job.out / "samples.jsonl"),
        train_dataset=grpo_dataset(job.images, prompt, pixels),
        eval_dataset=grpo_dataset(job.validation, prompt, pixels) if len(job.validation) else None,
        **job.trainer_parts(),
    )


def train(run: str, params: dict, artifacts: Path) -> None:
    """Train on the run's reward; write model, log.json and samples.jsonl to artifacts/train/RUN.

    Weights that were made from the same inputs are kept.
    """
    job = Job.start(run, params, artifacts)
    scorer = load_scorer(job, artifacts)
    made_from = job.made_from(
        "cim.train.grpo",
        TrainSettings.model_fields,
        reward=scorer.settings.model_dump(),
        precision=params["encoders"].get("text_precision"),
        gallery={name: marks["whole"] for name, marks in scorer.gallery.info["files"].items()},
    )
    digest = checkpoints.inputs_digest(made_from)
    if checkpoints.is_trained(job.out, digest):
        print(f"kept: {job.out} was trained from the same inputs ({digest})", flush=True)
        return
    resume = checkpoints.last_checkpoint(job.checkpoints / digest)
    trim_samples(job.out / "samples.jsonl", resume)
    job.finish(make_trainer(job, scorer, job.checkpoints / digest), resume, made_from)
