"""GRPO with a retrieval reward."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Image, List, Value

from cim.encoders import EncoderSettings, load_encoders
from cim.errors import CimError
from cim.gallery import load_gallery
from cim.manifest import Manifest
from cim.processes import processes
from cim.runs import reward_of
from cim.scorer import RewardSettings, Scorer, completion_text, trl_reward
from cim.settings import group
from cim.train.common import Job, with_fitted_images
from cim.train.settings import TrainSettings, batches


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
    if not path.is_file():
        return
    upto = int(resume.rpartition("-")[2]) if resume else 0
    kept = [line for line in path.read_text().splitlines() if json.loads(line)["step"] < upto]
    path.write_text("".join(line + "\n" for line in kept))


def vllm_options(settings: TrainSettings) -> dict:
    """Where captions are sampled, as TRL takes it.

    Raises:
        CimError: where vllm is wanted and not installed.
    """
    if settings.vllm == "off":
        return {}
    if find_spec("vllm") is None:
        raise CimError(f"parameters: train.vllm={settings.vllm}, but vllm is not installed; run 'pip install cim[gpu]'")
    options = {"use_vllm": True, "vllm_mode": settings.vllm}
    if settings.vllm == "server":
        return options | {"vllm_server_base_url": settings.vllm_url}
    return options | {"vllm_gpu_memory_utilization": settings.vllm_memory, "vllm_enable_sleep_mode": True}


def reference_options(job: Job) -> dict | None:
    """What TRL needs to load the reference model as the policy was loaded; None where its own choice is the same."""
    model = job.model_settings
    return {"revision": model.revision} if model.revision else None


def prepare(run: str, params: dict, artifacts: Path) -> tuple[Job, Any, str | None]:
    """Everything that a run needs before its first step: the job, TRL's trainer, and the checkpoint to go on from."""
    from trl import GRPOConfig, GRPOTrainer

    reward_settings = group(RewardSettings, params.get("reward"), "reward")
    encoders = group(EncoderSettings, params.get("encoders"), "encoders")
    job = Job.start(run, params, artifacts)
    settings = job.settings
    text, image = load_encoders(encoders)
    scorer = Scorer(load_gallery(artifacts / "gallery", text, image), text, image, reward_settings)
    scorer.add_sources(job.images, progress=True)
    scorer.add_sources(job.validation)
    # A k that the gallery cannot give fails here, not after the first rollout.
    scorer.retrieval_scores([job.images.captions[0]], [job.images.frame["image_id"][0]])

    made_of = {name: params[name] for name in ("train", "reward", "encoders")}
    cut = batches(settings, len(job.images), processes().num_processes)
    for line in cut.lines(settings, len(job.images), processes().num_processes):
        print(line, flush=True)
    resume = job.resume_from(made_of | {"gallery": scorer.gallery.info})
    samples = job.out / "samples.jsonl"
    trim_samples(samples, resume)
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
        **vllm_options(settings),
        **job.trainer_arguments("eval_reward"),
    )
    prompt, pixels = job.model_settings.prompt, job.model_settings.max_pixels
    trainer = GRPOTrainer(
        args=config,
        reward_funcs=SampleLog(trl_reward(scorer, reward_of(job.method)), samples),
        train_dataset=grpo_dataset(job.images, prompt, pixels),
        eval_dataset=grpo_dataset(job.validation, prompt, pixels) if len(job.validation) else None,
        **job.trainer_parts(),
    )
    return job, trainer, resume


def train(run: str, params: dict, artifacts: Path) -> None:
    """Train on the run's reward; write model, log.json and samples.jsonl to artifacts/train/RUN."""
    job, trainer, resume = prepare(run, params, artifacts)
    job.finish(trainer, resume, params)
