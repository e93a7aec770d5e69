"""What GRPO and SFT share: the start and the end of a run, checkpoints, logging."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback, set_seed
from transformers.trainer_utils import get_last_checkpoint

from cim.encoders import weights_digest
from cim.errors import CimError
from cim.manifest import Manifest, open_image, read_manifest
from cim.models import ModelSettings, check_prompts, fit, is_vision, load_model
from cim.runs import ON_SFT, parse_run
from cim.settings import group
from cim.train.card import write_card
from cim.train.settings import TrainSettings

COMPLETE = "complete"  # the last file of a checkpoint: a kill while it is written leaves none


@dataclass(frozen=True)
class Job:
    """One run on its way: what it trains, on what, and where to.

    Attributes:
        images: the training split without what is held out.
        validation: what is held out to choose a checkpoint by; empty where nothing is chosen.
        out: where the model goes.
        checkpoints: where a killed run is gone on from.
    """

    run: str
    method: str
    seed: int
    settings: TrainSettings
    model_settings: ModelSettings
    images: Manifest
    validation: Manifest
    model: torch.nn.Module
    processor: Any
    out: Path
    checkpoints: Path

    @staticmethod
    def start(run: str, params: dict, artifacts: Path) -> Job:
        """Read and check parameters and images, seed everything and load the base model."""
        method, seed = parse_run(run)
        settings = group(TrainSettings, params.get("train"), "train")
        model_settings = start_of(run, group(ModelSettings, params.get("model"), "model"), artifacts)
        check_integrations(settings.log_to)
        check_precision(settings, model_settings, os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true")
        set_seed(seed)
        images, validation = training_images(artifacts, settings)
        model, processor = load_model(model_settings, device=torch.device("cpu"))
        check_prompts(processor, [open_image(path) for path in images.image_paths[:8]], model_settings)
        out = artifacts / "train" / run
        out.mkdir(parents=True, exist_ok=True)
        # TensorBoard has no argument for it.
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(artifacts / "logs" / run)
        # Beside artifacts/train, which DVC owns, so that nothing it does to an output costs a checkpoint.
        checkpoints = artifacts / "checkpoints" / run
        return Job(run, method, seed, settings, model_settings, images, validation, model, processor, out, checkpoints)

    def resume_from(self, made_of: dict) -> str | None:
        """The checkpoint to go on from; checkpoints of other parameters, data or base models are deleted.

        Args:
            made_of: what the run depends on besides its base model, as JSON values.
        """
        model = {"weights": weights_digest(self.model), "settings": asdict(self.model_settings)}
        return last_checkpoint(self.checkpoints, made_of | {"run": self.run, "model": model})

    def trainer_arguments(self, better: str) -> dict:
        """Logging, checkpoints, precision and device, for either configuration.

        Args:
            better: the metric by which the best checkpoint is chosen where images are held out.
        """
        s = self.settings
        arguments = {
            "output_dir": str(self.checkpoints),
            "seed": self.seed,
            "logging_steps": 1,
            "save_steps": s.save_every,
            "save_total_limit": 2,
            "report_to": s.log_to or "none",
            "run_name": self.run,
            "disable_tqdm": True,
            "bf16": s.bf16,
            "gradient_checkpointing": s.gradient_checkpointing,
            "optim": s.optimizer,
            "use_cpu": not torch.cuda.is_available(),
            "dataloader_pin_memory": torch.cuda.is_available(),
        }
        if s.gradient_checkpointing:
            arguments["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
        if len(self.validation):
            arguments |= {
                "eval_strategy": "steps",
                "eval_steps": s.save_every,
                # Plain weights are restored by `finish`; what DeepSpeed and FSDP cut, Trainer must join.
                "load_best_model_at_end": in_parts(),
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
            "callbacks": [StepLog(self.settings.warn_distinct), MarkComplete()],
        }

    def finish(self, trainer, resume: str | None, params: dict) -> None:
        """Train, then save weights, processor, log and model card, and drop the checkpoints."""
        plain = not in_parts() and not self.settings.lora_rank
        if resume:
            print(f"resuming from {resume}", flush=True)
            if plain:
                restore(self.model, Path(resume))
                trainer._load_from_checkpoint = lambda *args, **kwargs: None
        trainer.train(resume_from_checkpoint=resume)
        if best := trainer.state.best_model_checkpoint:
            print(f"kept: step {trainer.state.best_global_step}, the best on validation images", flush=True)
            if plain:
                restore(self.model, Path(best))
            elif not in_parts():
                trainer._load_best_model()
        trainer.save_model(str(self.out))
        if trainer.accelerator.is_main_process:
            self.processor.save_pretrained(self.out)
            (self.out / "log.json").write_text(json.dumps(trainer.state.log_history, indent=0))
            if self.settings.lora_rank and self.settings.merge:
                merged, _ = load_model(self.model_settings.at(self.out), device=torch.device("cpu"))
                merged.save_pretrained(self.out / "merged")
                self.processor.save_pretrained(self.out / "merged")
            write_card(self.out, self.run, self.model_settings, params, len(self.images), trainer.state)
            shutil.rmtree(self.checkpoints, ignore_errors=True)


def start_of(run: str, model: ModelSettings, artifacts: Path) -> ModelSettings:
    """Where a run starts: the base, or the fine-tuned model of the same seed.

    Raises:
        CimError: where that is not trained yet.
    """
    method, seed = parse_run(run)
    if method != ON_SFT:
        return model
    folder = artifacts / "train" / f"sft-{seed}"
    if not (folder / "log.json").is_file():
        raise CimError(f"{folder}: not trained yet; run '{run}' starts from run 'sft-{seed}', so train that first")
    return model.at(folder)


def training_images(artifacts: Path, settings: TrainSettings) -> tuple[Manifest, Manifest]:
    """The images to train on, and those of the same split that are held out for validation.

    Raises:
        CimError: where nothing would be left, or an image file is missing: before anything heavy starts.
    """
    split = read_manifest(artifacts / "dataset" / "manifest.parquet").split(settings.split)
    if settings.validation >= len(split):
        raise CimError(
            f"parameters: train.validation={settings.validation} leaves none of the {len(split)} images "
            f"of split '{settings.split}' to train on; lower it"
        )
    missing = [path for path in split.image_paths if not path.is_file()]
    if missing:
        raise CimError(
            f"{missing[0]}: image not found, as {len(missing)} of {len(split)} of split '{settings.split}'; "
            "restore the files or mend the manifest"
        )
    cut = len(split) - settings.validation
    return split.take(range(cut)), split.take(range(cut, len(split)))


def check_precision(settings: TrainSettings, model: ModelSettings, deepspeed: bool) -> None:
    """Refuse to update 16-bit weights themselves: a step of 1e-6 is lost in their rounding.

    LoRA's own weights are float32, and DeepSpeed keeps float32 copies.

    Raises:
        CimError: saying what to choose instead.
    """
    if model.dtype != "float32" and not settings.lora_rank and not deepspeed:
        raise CimError(
            f"parameters: model.dtype={model.dtype} with all weights trained: updates of train.lr={settings.lr:g} "
            "would be rounded away; set model.dtype=float32 and train.bf16=true, or train.lora_rank, or a DeepSpeed "
            "configuration (train.accelerate=conf/accelerate/zero3.yaml)"
        )


def in_parts() -> bool:
    """Whether DeepSpeed or FSDP holds the weights in parts, as accelerate tells its processes."""
    return any(os.environ.get(f"ACCELERATE_USE_{kind}") == "true" for kind in ("DEEPSPEED", "FSDP"))


def restore(model: torch.nn.Module, checkpoint: Path) -> None:
    """Load a checkpoint's weights into the model.

    Trainer itself (transformers 5) compares the names in the file with those in memory, which differ for models whose
    hub names are older than their code, Qwen2.5-VL among them: it loads nothing and
    goes on. from_pretrained knows both.

    Raises:
        CimError: where a weight is missing.
    """
    saved = type(model).from_pretrained(checkpoint, dtype=model.dtype).state_dict()
    try:
        model.load_state_dict(saved, strict=True)
    except RuntimeError as error:
        raise CimError(
            f"{checkpoint}: its weights are not this model's ({' '.join(str(error).split())[:150]})"
        ) from None


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
        if "eval_reward" in logs or "eval_loss" in logs:
            name = "eval_reward" if "eval_reward" in logs else "eval_loss"
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


class MarkComplete(TrainerCallback):
    """Marks a checkpoint once all of it is written."""

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE).touch()


def lora(settings: TrainSettings, model):
    """peft's configuration, or None for full fine-tuning; freezes the vision tower where asked."""
    if settings.lora_rank:
        from peft import LoraConfig

        return LoraConfig(
            r=settings.lora_rank,
            lora_alpha=2 * settings.lora_rank,
            target_modules=settings.lora_targets,
            # Frozen towers stay free of adapters too.
            exclude_modules=r"(.*\.)?(vision_tower|visual|vision_model)\..*" if settings.freeze_vision else None,
            task_type="CAUSAL_LM",
        )
    if settings.freeze_vision:
        for name, parameter in model.named_parameters():
            if is_vision(name):
                parameter.requires_grad = False
    return None


def check_integrations(names: list[str]) -> None:
    """Refuse an experiment tracker that is not installed before anything is loaded.

    Raises:
        CimError: naming it.
    """
    for name in names:
        if find_spec(name) is None:
            raise CimError(f"parameters: train.log_to names '{name}', which is not installed; run 'pip install {name}'")


def last_checkpoint(folder: Path, made_of: dict) -> str | None:
    """The checkpoint to go on from; those made of something else, or cut short by a kill, are deleted.

    Args:
        made_of: everything that the run depends on, as JSON values.
    """
    mark = folder / "made_of.json"
    made_of = json.loads(json.dumps(made_of))
    if folder.is_dir() and (not mark.is_file() or json.loads(mark.read_text()) != made_of):
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    mark.write_text(json.dumps(made_of))
    for checkpoint in folder.glob("checkpoint-*"):
        if not (checkpoint / COMPLETE).is_file():
            shutil.rmtree(checkpoint)
    return get_last_checkpoint(str(folder))
