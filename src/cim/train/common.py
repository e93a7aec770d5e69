"""What GRPO and SFT share: settings, the start and the end of a run, checkpoints, logging."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, set_seed
from transformers.trainer_utils import get_last_checkpoint

from cim.encoders import weights_digest
from cim.generation import load_captioner
from cim.manifest import Manifest, read_manifest
from cim.runs import parse_run
from cim.settings import group, require


@dataclass(frozen=True)
class TrainSettings:
    """The `train` group: GRPO's optimisation. Batches count images; each gets `group_size` captions."""

    model: str
    prompt: str
    split: str
    steps: int
    images_per_step: int
    group_size: int
    lr: float
    kl: float
    temperature: float
    max_completion: int
    save_every: int
    freeze_vision: bool = True
    lora_rank: int = 0
    lora_targets: str = "all-linear"
    warn_distinct: float = 0.2

    def __post_init__(self):
        require(self.group_size >= 2, "group_size must be at least 2: an advantage compares captions of one image")
        require(
            min(self.steps, self.images_per_step, self.max_completion, self.save_every) >= 1, "counts must be positive"
        )
        require(
            self.lr > 0 and self.temperature > 0 and self.kl >= 0,
            "lr and temperature must be positive, kl not negative",
        )
        require(self.lora_rank >= 0, "lora_rank cannot be negative")


@dataclass(frozen=True)
class Job:
    """One run on its way: what it trains, on what, and where to.

    Attributes:
        images: the training split.
        out: where the model goes.
        checkpoints: where a killed run is gone on from.
    """

    run: str
    method: str
    seed: int
    settings: TrainSettings
    images: Manifest
    model: torch.nn.Module
    processor: Any
    out: Path
    checkpoints: Path

    @staticmethod
    def start(run: str, params: dict, artifacts: Path) -> Job:
        """Read and check parameters and images, seed everything and load the base model."""
        method, seed = parse_run(run)
        settings = group(TrainSettings, params.get("train"), "train")
        set_seed(seed)
        images = read_manifest(artifacts / "dataset" / "manifest.parquet").split(settings.split)
        model, processor = load_captioner(settings.model, device=torch.device("cpu"))
        out = artifacts / "train" / run
        out.mkdir(parents=True, exist_ok=True)
        # Beside artifacts/train, which DVC owns, so that nothing it does to an output costs a checkpoint.
        return Job(run, method, seed, settings, images, model, processor, out, artifacts / "checkpoints" / run)

    def resume_from(self, made_of: dict) -> str | None:
        """The checkpoint to go on from; checkpoints of other parameters, data or base models are deleted.

        Args:
            made_of: what the run depends on besides its base model, as JSON values.
        """
        return last_checkpoint(self.checkpoints, made_of | {"run": self.run, "model": weights_digest(self.model)})

    def trainer_arguments(self) -> dict:
        """Logging, checkpoints and device, for either configuration."""
        return {
            "output_dir": str(self.checkpoints),
            "seed": self.seed,
            "logging_steps": 1,
            "save_steps": self.settings.save_every,
            "save_total_limit": 2,
            "report_to": "none",
            "disable_tqdm": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "use_cpu": not torch.cuda.is_available(),
            "dataloader_pin_memory": torch.cuda.is_available(),
        }

    def trainer_parts(self) -> dict:
        """Model, processor, adapter and logging, for either trainer."""
        return {
            "model": self.model,
            "processing_class": self.processor,
            "peft_config": lora(self.settings, self.model),
            "callbacks": [StepLog(self.settings.warn_distinct)],
        }

    def finish(self, trainer, resume: str | None) -> None:
        """Train, then save what evaluation needs and drop the checkpoints."""
        if resume:
            print(f"resuming from {resume}", flush=True)
        trainer.train(resume_from_checkpoint=resume)
        trainer.save_model(str(self.out))
        if trainer.accelerator.is_main_process:
            self.processor.save_pretrained(self.out)
            (self.out / "log.json").write_text(json.dumps(trainer.state.log_history, indent=0))
            shutil.rmtree(self.checkpoints, ignore_errors=True)


class StepLog(TrainerCallback):
    """Prints a line for every step, and warns once where the captions collapse to a few."""

    def __init__(self, warn_distinct: float):
        self.warn_distinct = warn_distinct
        self.warned = False

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not logs:
            return
        step = f"step {state.global_step}/{state.max_steps}"
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


def lora(settings: TrainSettings, model):
    """peft's configuration, or None for full fine-tuning; freezes the vision tower where asked."""
    if settings.lora_rank:
        from peft import LoraConfig

        return LoraConfig(
            r=settings.lora_rank,
            lora_alpha=2 * settings.lora_rank,
            target_modules=settings.lora_targets,
            # Frozen towers stay free of adapters too.
            exclude_modules=r".*(vision_tower|visual|vision_model).*" if settings.freeze_vision else None,
            task_type="CAUSAL_LM",
        )
    if settings.freeze_vision:
        for name, parameter in model.named_parameters():
            if any(part in name for part in ("vision_tower", "visual.", "vision_model")):
                parameter.requires_grad = False
    return None


def last_checkpoint(folder: Path, made_of: dict) -> str | None:
    """The checkpoint to go on from; checkpoints made of something else are deleted.

    Args:
        made_of: everything that the run depends on, as JSON values.
    """
    mark = folder / "made_of.json"
    if folder.is_dir() and (not mark.is_file() or json.loads(mark.read_text()) != made_of):
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    mark.write_text(json.dumps(made_of))
    return get_last_checkpoint(str(folder))
