"""GRPO with a retrieval reward, and supervised fine-tuning as its baseline.

The notebook notebooks/train.ipynb starts one of these; they can be started by hand as well:

    accelerate launch --num_processes 1 --cpu -m cim.train --run cim-0              two CPU cores
    accelerate launch --num_processes 1 -m cim.train --run cim-0                    one GPU
    accelerate launch --num_processes 8 --mixed_precision bf16 -m cim.train --run cim-0    eight GPUs

A run is METHOD-SEED: the method is a reward (cim, grc, qir, self_retrieval, clipscore: GRPO), sft
(captions as annotators write them) or sft_perfect (captions that leave out nothing and err nowhere).
Killed, the same command goes on from the last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, Features, Image, List, Value
from transformers import TrainerCallback, set_seed
from transformers.trainer_utils import get_last_checkpoint

from cim.encoders import EncoderSettings, load_encoders, weights_digest
from cim.errors import CimError
from cim.gallery import load_gallery
from cim.generation import chat, load_captioner
from cim.manifest import Manifest, read_manifest
from cim.scorer import REWARDS, RewardSettings, Scorer, completion_text, trl_reward
from cim.settings import group, read_params, require

SFT_METHODS = ("sft", "sft_perfect")


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
class SftSettings:
    """The `sft` group: supervised steps, and how the annotators of method sft write."""

    steps: int
    batch_size: int
    lr: float
    annotators: dict[str, float]
    slip_rate: float

    def __post_init__(self):
        require(min(self.steps, self.batch_size) >= 1, "steps and batch_size must be positive")
        require(0 <= self.slip_rate <= 1, "slip_rate must lie in [0, 1]")


def parse_run(run: str) -> tuple[str, int]:
    """ "cim-0" to ("cim", 0).

    Raises:
        CimError: where it is not METHOD-SEED or the method is not known.
    """
    method, _, seed = run.rpartition("-")
    known = (*REWARDS, *SFT_METHODS)
    if not seed.isdigit() or method not in known:
        raise CimError(f"run '{run}' should be METHOD-SEED with a method of {', '.join(known)}")
    return method, int(seed)


def grpo_dataset(manifest: Manifest, prompt: str) -> Dataset:
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
    return Dataset.from_dict(rows, features=features)


class StepLog(TrainerCallback):
    """Keeps every logged step and warns where the captions collapse to a few."""

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


def train_grpo(run: str, params: dict, artifacts: Path, out: Path) -> None:
    """Train the base model with the run's reward and seed; write the model, log.json and samples.jsonl to `out`."""
    from trl import GRPOConfig, GRPOTrainer

    method, seed = parse_run(run)
    settings = group(TrainSettings, params.get("train"), "train")
    reward_settings = group(RewardSettings, params.get("reward"), "reward")
    encoders = group(EncoderSettings, params.get("encoders"), "encoders")
    set_seed(seed)
    manifest = read_manifest(artifacts / "dataset" / "manifest.parquet").split(settings.split)
    text, image = load_encoders(encoders)
    scorer = Scorer(load_gallery(artifacts / "gallery", text, image), text, image, reward_settings)
    scorer.add_sources(manifest, progress=True)
    scorer.retrieval_scores([manifest.captions[0]], [manifest.frame["image_id"][0]])  # a bad k fails here, not later
    model, processor = load_captioner(settings.model, device=torch.device("cpu"))

    out.mkdir(parents=True, exist_ok=True)
    checkpoints = checkpoint_folder(out)
    resume = last_checkpoint(
        checkpoints,
        {name: params[name] for name in ("train", "reward", "encoders")}
        | {"run": run, "gallery": scorer.gallery.info, "model": weights_digest(model)},
    )
    samples = out / "samples.jsonl"
    trim_samples(samples, resume)
    config = GRPOConfig(
        max_steps=settings.steps,
        per_device_train_batch_size=settings.images_per_step * settings.group_size // world_size(),
        num_generations=settings.group_size,
        steps_per_generation=1,
        max_completion_length=settings.max_completion,
        temperature=settings.temperature,
        learning_rate=settings.lr,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=min(5, settings.steps),
        beta=settings.kl,
        **trainer_arguments(settings.save_every, seed, checkpoints),
    )
    trainer = GRPOTrainer(
        model=model,
        processing_class=processor,
        args=config,
        reward_funcs=SampleLog(trl_reward(scorer, method), samples),
        train_dataset=grpo_dataset(manifest, settings.prompt),
        peft_config=lora(settings, model),
        callbacks=[StepLog(settings.warn_distinct)],
    )
    finish(trainer, processor, resume, out)


def sft_dataset(manifest: Manifest, captions: list[str], prompt: str) -> Dataset:
    """Columns prompt, completion, images."""
    rows = {
        "prompt": [chat(prompt)] * len(manifest),
        "completion": [[{"role": "assistant", "content": [{"type": "text", "text": c}]}] for c in captions],
        "images": [[str(path)] for path in manifest.image_paths],
    }
    message = List({"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})})
    return Dataset.from_dict(
        rows, features=Features({"prompt": message, "completion": message, "images": List(Image())})
    )


def sft_captions(method: str, manifest: Manifest, settings: SftSettings, seed: int) -> list[str]:
    """What the annotators wrote: the manifest's captions, or for the small world ones with omissions and slips."""
    if method == "sft_perfect" or "scene" not in manifest.frame or manifest.frame["scene"].isna().any():
        return manifest.captions
    from cim.captioner import detail_of
    from cim.world.language import describe, with_slips
    from cim.world.scenes import Scene

    rng = np.random.default_rng(seed)
    detail = detail_of(settings.annotators, "annotators")
    scenes = (Scene.from_json(s) for s in manifest.frame["scene"])
    return [describe(with_slips(scene, rng, settings.slip_rate), rng, detail) for scene in scenes]


def train_sft(run: str, params: dict, artifacts: Path, out: Path) -> None:
    """Fine-tune the base model on captions of the same images that the RL sees; write the model and log.json."""
    from trl import SFTConfig, SFTTrainer

    method, seed = parse_run(run)
    settings = group(TrainSettings, params.get("train"), "train")
    sft = group(SftSettings, params.get("sft"), "sft")
    set_seed(seed)
    manifest = read_manifest(artifacts / "dataset" / "manifest.parquet").split(settings.split)
    model, processor = load_captioner(settings.model, device=torch.device("cpu"))
    out.mkdir(parents=True, exist_ok=True)
    checkpoints = checkpoint_folder(out)
    made_of = {name: params[name] for name in ("train", "sft")} | {"run": run, "model": weights_digest(model)}
    resume = last_checkpoint(checkpoints, made_of)
    config = SFTConfig(
        max_steps=sft.steps,
        per_device_train_batch_size=max(1, sft.batch_size // world_size()),
        learning_rate=sft.lr,
        lr_scheduler_type="cosine",
        warmup_steps=min(5, sft.steps),
        max_length=None,
        **trainer_arguments(settings.save_every, seed, checkpoints),
    )
    trainer = SFTTrainer(
        model=model,
        processing_class=processor,
        args=config,
        train_dataset=sft_dataset(manifest, sft_captions(method, manifest, sft, seed), settings.prompt),
        peft_config=lora(settings, model),
        callbacks=[StepLog(settings.warn_distinct)],
    )
    finish(trainer, processor, resume, out)


def trainer_arguments(save_every: int, seed: int, checkpoints: Path) -> dict:
    """What GRPO and SFT have in common: logging, checkpoints, device."""
    return {
        "output_dir": str(checkpoints),
        "seed": seed,
        "logging_steps": 1,
        "save_steps": save_every,
        "save_total_limit": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
    }


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


def checkpoint_folder(out: Path) -> Path:
    # Beside `out`, not in it: DVC removes a stage's outputs before it runs it, and checkpoints must survive that.
    return out.parent.parent / "checkpoints" / out.name


def last_checkpoint(folder: Path, made_of: dict) -> str | None:
    """The checkpoint to go on from; checkpoints of a run on other parameters or data are deleted.

    Args:
        made_of: everything that the run depends on, as JSON values.
    """
    mark = folder / "made_of.json"
    if folder.is_dir() and (not mark.is_file() or json.loads(mark.read_text()) != made_of):
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    mark.write_text(json.dumps(made_of))
    return get_last_checkpoint(str(folder))


def trim_samples(path: Path, resume: str | None) -> None:
    """Drop samples that a resumed run will write again."""
    if not path.is_file():
        return
    upto = int(resume.rpartition("-")[2]) if resume else 0
    kept = [line for line in path.read_text().splitlines() if json.loads(line)["step"] < upto]
    path.write_text("".join(line + "\n" for line in kept))


def world_size() -> int:
    from accelerate import PartialState

    return PartialState().num_processes


def finish(trainer, processor, resume: str | None, out: Path) -> None:
    """Train, then save what evaluation needs and drop the checkpoints."""
    if resume:
        print(f"resuming from {resume}", flush=True)
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(str(out))
    if trainer.accelerator.is_main_process:
        processor.save_pretrained(out)
        (out / "log.json").write_text(json.dumps(trainer.state.log_history, indent=0))
        shutil.rmtree(trainer.args.output_dir, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="METHOD-SEED, as in cim-0")
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument("--artifacts", type=Path, default=Path("artifacts"))
    arguments = parser.parse_args()
    from cim.cli import one_line_errors

    with one_line_errors():
        method, _ = parse_run(arguments.run)
        train = train_sft if method in SFT_METHODS else train_grpo
        train(
            arguments.run,
            read_params(arguments.params),
            arguments.artifacts,
            arguments.artifacts / "train" / arguments.run,
        )


if __name__ == "__main__":
    main()
