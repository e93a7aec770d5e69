"""What GRPO and SFT share: starting a run, the trainer's arguments, and finishing it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback, set_seed

from cim import code
from cim.captioners.models import ModelSettings, fit, load_model
from cim.data.manifest import Manifest
from cim.encoders import weights_digest
from cim.files import write_json
from cim.params import group
from cim.runs import parse_run
from cim.train import checkpoints, preflight
from cim.train.adapters import lora
from cim.train.card import write_card
from cim.train.settings import ComputeSettings, TrainSettings


@dataclass(frozen=True)
class Job:
    """State of one training run: what it trains, on what, and where the model goes.

    Attributes:
        images: the training split without what is held out.
        validation: what is held out to choose a checkpoint by; empty where nothing is chosen.
        params: all groups of parameters.
        out: where the model goes.
        checkpoints: the folder of the run's checkpoints, one subfolder for each digest of its inputs.
    """

    run: str
    method: str
    seed: int
    settings: TrainSettings
    compute: ComputeSettings
    model_settings: ModelSettings
    images: Manifest
    validation: Manifest
    model: torch.nn.Module
    processor: Any
    params: dict
    out: Path
    checkpoints: Path

    @staticmethod
    def start(run: str, params: dict, artifacts: Path) -> Job:
        """Read and check parameters and images, seed everything and load the base model."""
        method, seed = parse_run(run)
        settings = group(TrainSettings, params.get("train"), "train")
        compute = group(ComputeSettings, params.get("compute"), "compute")
        model_settings = preflight.start_of(run, group(ModelSettings, params.get("model"), "model"), artifacts)
        preflight.check_integrations(compute.log_to)
        preflight.check_precision(settings, model_settings, os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true")
        set_seed(seed)
        images, validation = preflight.training_images(artifacts, settings)
        model, processor = load_model(model_settings, device=torch.device("cpu"))
        preflight.prompt_tokens(processor, images, model_settings)
        out = artifacts / "train" / run
        out.mkdir(parents=True, exist_ok=True)
        # TensorBoard has no argument for it.
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(artifacts / "logs" / run)
        # Beside artifacts/train, which DVC owns, so that nothing it does to an output costs a checkpoint.
        kept = artifacts / "checkpoints" / run
        return Job(
            run, method, seed, settings, compute, model_settings, images, validation, model, processor, params, out, kept
        )

    def made_from(self, trainer: str, parameters: Iterable[str], **more) -> dict:
        """Everything that the trained weights depend on, as JSON values.

        Args:
            trainer: the module that trains; its code counts, but for comments and docstrings.
            parameters: what it reads of the `train` group.
            more: its inputs besides the base model, the images and these.
        """
        # Without validation it does not matter when checkpoints are written.
        ignored = set() if len(self.validation) else {"save_every"}
        train = self.settings.model_dump(include=set(parameters) - ignored)
        model = self.model_settings.model_dump(include={"prompt", "dtype", "processor", "max_pixels"})
        return {
            "run": self.run,
            "code": code.digest(trainer),
            "weights": weights_digest(self.model),
            "model": model,
            "images": [_images_digest(part) for part in (self.images, self.validation)],
            "train": train,
            **more,
        }

    def trainer_arguments(self, better: str, checkpoints_at: Path) -> dict:
        """Logging, checkpoints, precision and device, for either trainer.

        Args:
            better: the metric by which the best checkpoint is chosen where images are held out.
        """
        s, c = self.settings, self.compute
        arguments = {
            "output_dir": str(checkpoints_at),
            "seed": self.seed,
            "logging_steps": 1,
            "save_steps": s.save_every,
            "save_total_limit": 2,
            "report_to": c.log_to or "none",
            "run_name": self.run,
            "disable_tqdm": True,
            "bf16": s.bf16,
            "gradient_checkpointing": c.gradient_checkpointing,
            "optim": s.optimizer,
            "use_cpu": not torch.cuda.is_available(),
            "dataloader_pin_memory": torch.cuda.is_available(),
        }
        if c.gradient_checkpointing:
            arguments["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
        if len(self.validation):
            arguments |= {
                "eval_strategy": "steps",
                "eval_steps": s.save_every,
                # Plain weights are restored by `finish`; what DeepSpeed and FSDP divide, Trainer must join.
                "load_best_model_at_end": checkpoints.in_parts(),
                "metric_for_best_model": better,
                "greater_is_better": not better.endswith("loss"),
            }
        return arguments

    def trainer_parts(self) -> dict:
        """Model, processor, adapter and logging, for either trainer."""
        return {
            "model": self.model,
            "processing_class": self.processor,
            "peft_config": lora(self.settings, self.model),
            "callbacks": [StepLog(self.compute.warn_distinct), checkpoints.MarkComplete()],
        }

    def finish(self, trainer, resume: str | None, made_from: dict) -> None:
        """Train, then save weights, processor, log and model card, and delete the checkpoints."""
        plain = not checkpoints.in_parts() and not self.settings.lora_rank
        if resume:
            print(f"resuming from {resume}", flush=True)
            if plain:
                checkpoints.restore(self.model, Path(resume))
                trainer._load_from_checkpoint = lambda *args, **kwargs: None
        trainer.train(resume_from_checkpoint=resume)
        if best := trainer.state.best_model_checkpoint:
            print(f"kept: step {trainer.state.best_global_step}, the best on validation images", flush=True)
            if plain:
                checkpoints.restore(self.model, Path(best))
            elif not checkpoints.in_parts():
                trainer._load_best_model()
        trainer.save_model(str(self.out))
        if trainer.accelerator.is_main_process:
            self.processor.save_pretrained(self.out)
            write_json(self.out / "log.json", trainer.state.log_history, indent=0)
            if self.settings.lora_rank and self.settings.merge:
                merged, _ = load_model(self.model_settings.at(self.out), device=torch.device("cpu"))
                merged.save_pretrained(self.out / "merged")
                self.processor.save_pretrained(self.out / "merged")
            write_card(self.out, self.run, self.model_settings, self.params, len(self.images), trainer.state)
            checkpoints.mark_trained(self.out, checkpoints.inputs_digest(made_from), made_from)
            checkpoints.drop_checkpoints(Path(trainer.args.output_dir))


def _images_digest(manifest: Manifest) -> str:
    listing = zip(manifest.frame["image_id"], manifest.frame["digest"], strict=True)
    return hashlib.sha256(repr(list(listing)).encode()).hexdigest()[:16]


def with_fitted_images(data: Dataset, column: str, max_pixels: int | None) -> Dataset:
    """The data set, whose images are scaled down to max_pixels as they are read."""
    if max_pixels is None:
        return data

    def fitted(rows: dict) -> dict:
        rows[column] = [
            [fit(i, max_pixels) for i in value] if isinstance(value, list) else fit(value, max_pixels)
            for value in rows[column]
        ]
        return rows

    return data.with_transform(fitted)


class StepLog(TrainerCallback):
    """Prints a line for every step, and warns once where the captions collapse to a few."""

    def __init__(self, warn_distinct: float):
        self.warn_distinct = warn_distinct
        self.warned = False

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs:
            return
        step = f"step {state.global_step}/{state.max_steps}"
        for name in ("eval_reward", "eval_loss"):
            if name in logs:
                print(f"{step}  validation {name.removeprefix('eval_')} {logs[name]:.3f}", flush=True)
                return
        if "variety/distinct" not in logs:
            if "loss" in logs:
                print(f"{step}  loss {logs['loss']:.3f}", flush=True)
            return
        distinct = logs["variety/distinct"]
        print(
            f"{step}  reward {logs['reward']:.3f}  grc {logs['score/grc']:.3f}  qir {logs['score/qir']:.3f}  "
            f"kl {logs.get('kl', 0):.4f}  words {logs['variety/words']:.1f}  distinct {distinct:.2f}",
            flush=True,
        )
        if distinct < self.warn_distinct and not self.warned:
            self.warned = True
            print(
                f"WARNING: only {distinct:.0%} of the captions of this step are distinct: training is collapsing. "
                "A better base, a denser gallery, a larger kl or beta, or a smaller lr prevents it.",
                flush=True,
            )
