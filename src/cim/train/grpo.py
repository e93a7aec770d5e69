"""GRPO with a retrieval reward."""

from functools import cache, partial
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np

from cim import code
from cim.captioners.models import prompt_inputs
from cim.data.manifest import Manifest
from cim.errors import CimError
from cim.gallery.store import read_info
from cim.images import open_image
from cim.params import EncoderSettings, group
from cim.processes import processes
from cim.rewards import RewardSettings
from cim.scorer import Scorer, load_scorer
from cim.train.batches import grpo_batches
from cim.train.job import SAMPLES, Job
from cim.train.reward import SampleLog, trl_reward
from cim.train.settings import ComputeSettings


def train(run: str, params: dict, artifacts: Path) -> None:
    """Train on the run's reward; write model, log.json and samples.jsonl to artifacts/train/RUN.

    Weights that were made from the same inputs are kept.
    """
    job = Job(run, params, artifacts).load()
    encoders = group(EncoderSettings, job.params.get("encoders"), "encoders")
    info, scorer = read_info(artifacts / "gallery"), cache(partial(job_scorer, job))
    # Weights that are kept need no scorer, but for the digest of a text tower.
    towers = [scorer().image.text_digest] if encoders.text_tower else []
    job.train(
        lambda folder: make_trainer(job, scorer(), folder),
        train=job.settings.model_dump(),
        code=code.digest("cim.train.grpo"),
        reward=group(RewardSettings, job.params.get("reward"), "reward").model_dump(),
        precision=[encoders.text_precision, encoders.image_precision],
        towers=[info["image_encoder"]["digest"], *towers],
        gallery={name: marks["whole"] for name, marks in info["files"].items()},
    )


def job_scorer(job: Job) -> Scorer:
    """The scorer of the run, still without its images."""
    encoders = group(EncoderSettings, job.params.get("encoders"), "encoders")
    return load_scorer(job.artifacts / "gallery", group(RewardSettings, job.params.get("reward"), "reward"), encoders)


def make_trainer(job: Job, scorer: Scorer, folder: Path) -> Any:
    """TRL's trainer for the job; checkpoints and samples go to `folder`."""
    from trl import GRPOConfig, GRPOTrainer

    scorer.add_sources(job.images, progress=True)
    scorer.add_sources(job.validation)
    # A k that the gallery cannot give fails here, not after the first rollout.
    scorer.retrieval_scores([job.images.captions[0]], [job.images.frame["image_id"][0]])
    settings, model = job.settings, job.model_settings
    refuse_unknown_inputs(job, GRPOTrainer)
    batches = grpo_batches(settings, job.compute.per_device, len(job.images), processes().num_processes)
    config = partial(
        GRPOConfig,
        steps_per_generation=batches.accumulation * settings.updates_per_rollout,
        num_generations=settings.group_size,
        # A batch of validation holds whole groups on every process.
        per_device_eval_batch_size=settings.group_size * max(1, batches.per_device // settings.group_size),
        max_completion_length=settings.max_completion, temperature=settings.temperature,
        learning_rate=settings.lr, lr_scheduler_type=settings.schedule,
        warmup_steps=min(settings.warmup_steps, batches.updates), beta=settings.kl,
        scale_rewards=settings.scale_rewards, mask_truncated_completions=settings.truncated == "mask",
        # TRL loads the reference model of the KL term itself, by name.
        model_init_kwargs={"revision": model.revision} if model.revision else None,
        trust_remote_code=model.trust_remote_code,
        generation_kwargs=never_sampled(job.model.config, job.compute), **vllm_options(job.compute),
    )  # fmt: skip

    def columns(images: Manifest) -> dict[str, list]:
        prompts = [[{"role": "user", "content": model.prompt}]] * len(images)
        return {"prompt": prompts, "image_id": images.frame["image_id"].tolist()}

    ends = job.model.generation_config.eos_token_id, job.processor.tokenizer.eos_token_id
    ends = set(np.hstack([end for end in ends if end is not None]))
    reward = trl_reward(scorer, job.objective, settings, ends)
    reward = SampleLog(reward, folder / SAMPLES, set(job.images.frame["image_id"]))
    return job.trainer(GRPOTrainer, folder, batches, columns, "eval_reward", config, reward_funcs=reward)


def refuse_unknown_inputs(job: Job, trainer: type) -> None:
    """Refuse a model whose processor gives inputs that TRL's trainer drops, such as the aspect ratios of Mllama."""
    given = prompt_inputs(job.processor, [open_image(job.images.image_paths[0])], job.model_settings)
    taken = signature(trainer._get_per_token_logps_and_entropies).parameters
    if unknown := sorted(set(given) - set(taken)):
        raise CimError(
            f"model '{job.model_settings.name}': TRL's GRPO drops its inputs {', '.join(unknown)}; "
            "choose another model (stage captions can still caption with this one)"
        )


def never_sampled(config: Any, compute: ComputeSettings) -> dict[str, Any]:
    """Bars placeholders of images and videos from captions, as TRL takes it: a caption with one has no such image."""
    names = ("image_token_id", "video_token_id")
    tokens = [token for name in names if (token := getattr(config, name, None)) is not None]
    return {"suppress_tokens": tokens} if compute.vllm == "off" else {"logit_bias": dict.fromkeys(tokens, -100.0)}


def vllm_options(compute: ComputeSettings) -> dict[str, Any]:
    """Where captions are sampled, as TRL takes it."""
    options = {
        "server": {"vllm_server_base_url": compute.vllm_url},
        "colocate": {"vllm_gpu_memory_utilization": compute.vllm_memory, "vllm_enable_sleep_mode": True},
    }
    return {"use_vllm": True, "vllm_mode": compute.vllm} | options[compute.vllm] if compute.vllm != "off" else {}
