"""What GRPO and SFT share: reading and checking a run's inputs, the trainer's arguments, training and saving."""

import os
import re
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import numpy as np
import torch
from datasets import Dataset
from torch.distributed.tensor import DTensor, Partial
from transformers import set_seed
from transformers.integrations import get_available_reporting_integrations

from cim.captioners.models import VISION, fit, load_model, longest_prompt
from cim.captioners.settings import ModelSettings
from cim.captioners.vision_cache import cache_vision
from cim.data.manifest import Manifest, read_manifest
from cim.encoders import weights_digest
from cim.errors import CimError
from cim.files import read_json, short_digest, write_json
from cim.images import open_image
from cim.params import group
from cim.processes import processes
from cim.runs import ON_SFT, SFT_METHODS, parse_run, with_variant
from cim.train import checkpoints
from cim.train.batches import Batches
from cim.train.card import write_card
from cim.train.log import StepLog
from cim.train.settings import ComputeSettings, SftSettings, TrainSettings

INPUTS = "inputs.json"  # the last file of a trained run: what it was made from
MERGED = "merged"  # the folder of an adapter's weights merged into its base
SAMPLES = "samples.jsonl"  # GRPO's samples; they lie with the checkpoints until the run is finished


class Job:
    """One training run. Creating it reads and checks all inputs but the model; `load` loads `model` and `processor`.

    Attributes:
        objective: the reward, or the SFT method, that it trains with.
        sft: the `sft` group of an SFT run, else None.
        images, validation: the training split, and the part of it that is held out to choose a checkpoint by.
        distributed: accelerate's distributed type; DEEPSPEED and FSDP divide the weights among the processes (sharded).
        plain: whether `model` holds the whole weights that are trained: neither divided nor an adapter's base.
        out, checkpoints: folders of the trained model, and of checkpoints by the digest of the run's inputs.

    Raises:
        CimError: for parameters that are invalid or do not fit together, and for missing images or packages.
    """

    def __init__(self, run: str, params: dict, artifacts: Path, distributed: str | None = None):
        self.run, self.artifacts = run, artifacts
        self.method, self.seed = parse_run(run)
        params, self.objective = with_variant(params, self.method)
        self.params = params
        self.settings = group(TrainSettings, params.get("train"), "train")
        self.sft = group(SftSettings, params.get("sft"), "sft") if self.objective in SFT_METHODS else None
        self.compute = group(ComputeSettings, params.get("compute"), "compute")
        self.model_settings = group(ModelSettings, params.get("model"), "model")
        if self.method == ON_SFT:
            start = artifacts / "train" / f"sft-{self.seed}"
            if not (start / INPUTS).is_file():
                raise CimError(f"{start}: not trained yet; '{run}' starts from run '{start.name}', so train that first")
            self.model_settings = self.model_settings.at(start)
        if Path(self.model_settings.name, "adapter_config.json").is_file():
            # A new adapter and TRL's reference model name the weights that they start from: these must be on disk.
            merged = Path(self.model_settings.name, MERGED)
            if not merged.is_dir():
                raise CimError(f"{merged.parent}: an adapter without merged weights; train it with train.merge=true")
            self.model_settings = self.model_settings.at(merged)
        launched = (kind for kind in ("DEEPSPEED", "FSDP") if os.environ.get(f"ACCELERATE_USE_{kind}") == "true")
        self.distributed = distributed or next(launched, "NO")
        self.sharded = self.distributed in ("DEEPSPEED", "FSDP")
        self.plain = not self.sharded and not self.settings.lora_rank
        check_possible(self.settings, self.compute, self.model_settings, self.distributed)
        labelled = self.sft and self.sft.images
        self.images, self.validation = training_images(artifacts, self.settings, labelled, self.seed)
        self.out = artifacts / "train" / run
        # Beside artifacts/train, which DVC owns, so that nothing it does to an output costs a checkpoint.
        self.checkpoints = artifacts / "checkpoints" / run

    def load(self) -> Self:
        """Seed everything, load the base model and check the length of prompts."""
        set_seed(self.seed)
        self.model, self.processor = load_model(self.model_settings, device=torch.device("cpu"))
        longest_prompt(self.processor, self.images.image_paths[:8], self.model_settings)
        return self

    def trainer(self, kind: type, folder: Path, batches: Batches, columns: Callable, better: str, config, **parts):
        """TRL's trainer of class `kind`, with the arguments that both methods share; checkpoints go to `folder`.

        Args:
            columns: of a manifest, the columns of its data set besides the images.
            better: the metric by which the best checkpoint is chosen where images are held out.
            config: makes the trainer's configuration, with the method's own arguments bound.
            parts: the trainer's own arguments.
        """
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(self.artifacts / "logs" / self.run)  # there is no argument for it
        s, c, gpu, held_out = self.settings, self.compute, torch.cuda.is_available(), len(self.validation) > 0
        shared = {
            "output_dir": str(folder), "save_steps": s.save_every, "seed": self.seed,
            "max_steps": batches.updates, "per_device_train_batch_size": batches.per_device,
            "gradient_accumulation_steps": batches.accumulation, "bf16": s.bf16, "optim": s.optimizer,
            # transformers 5.23 calls it activation_checkpointing; older ones know this name only.
            "gradient_checkpointing": c.gradient_checkpointing,
            "use_cpu": not gpu, "dataloader_pin_memory": gpu,
            "run_name": self.run, "report_to": c.log_to or "none", "logging_steps": 1, "disable_tqdm": True,
            "eval_strategy": "steps" if held_out else "no", "eval_steps": s.save_every,
            "metric_for_best_model": better, "greater_is_better": not better.endswith("loss"),
            "load_best_model_at_end": held_out and not self.plain,  # else `_train` restores it
        }  # fmt: skip
        train, validation = (
            image_dataset(images, columns(images), self.model_settings.max_pixels) if len(images) else None
            for images in (self.images, self.validation)
        )
        average_head_gradient(self.model)
        trainer = kind(
            args=config(**shared), model=self.model, processing_class=self.processor, train_dataset=train,
            eval_dataset=validation, peft_config=trainable(s, self.model, self.model_settings.revision),
            callbacks=[StepLog(c.warn_distinct), checkpoints.MarkComplete(), checkpoints.EpochOrder()], **parts,
        )  # fmt: skip
        # The ranks of a sharded tower must all run it.
        if c.cache_vision and s.freeze_vision and not self.sharded:
            for model in filter(None, (self.model, getattr(trainer, "ref_model", None))):
                cache_vision(model)
        return trainer

    def train(self, make_trainer: Callable[[Path], Any], train: dict, **inputs) -> None:
        """Train and save to `out`, unless the weights there were made from the same inputs; merge them where asked.

        Args:
            make_trainer: makes the trainer, given the folder for its checkpoints.
            train: the parameters of the `train` group that the method reads.
            inputs: its other inputs besides the base model and the images, as JSON values.
        """
        # Merging comes after training; without validation it does not matter when checkpoints are written.
        unread = {"merge"} if len(self.validation) else {"merge", "save_every"}
        train = {name: value for name, value in train.items() if name not in unread}
        model = self.model_settings.model_dump(include={"prompt", "dtype", "processor", "max_pixels"})
        inputs |= {"run": self.run, "objective": self.objective, "train": train}
        inputs |= {"weights": weights_digest(self.model), "model": model}
        inputs["images"] = [part.digest for part in (self.images, self.validation)]
        digest = short_digest(inputs)
        if (self.out / INPUTS).is_file() and read_json(self.out / INPUTS)["digest"] == digest:
            print(f"kept: {self.out} was trained from the same inputs ({digest})", flush=True)
        else:
            folder = self.checkpoints / digest
            resume = checkpoints.last_checkpoint(folder)
            trainer = make_trainer(folder)
            self._train(trainer, resume)
            self._save(trainer, folder)
            if trainer.accelerator.is_main_process:
                write_json(self.out / INPUTS, {"digest": digest, "inputs": inputs})
                shutil.rmtree(folder)
        if processes().is_main_process:
            self._merge()

    def _train(self, trainer, resume: str | None) -> None:
        if resume:
            print(f"resuming from {resume}", flush=True)
            if self.plain:
                checkpoints.restore(self.model, resume)
                trainer._load_from_checkpoint = lambda *args, **kwargs: None
            if Path(resume).name == f"checkpoint-{trainer.args.max_steps}":  # Trainer would train one step more
                trainer.args.max_steps, trainer.args.num_train_epochs = -1, 0
        trainer.train(resume_from_checkpoint=resume)
        if best := trainer.state.best_model_checkpoint:
            print(f"kept: step {trainer.state.best_global_step}, the best on validation images", flush=True)
            if self.plain:
                checkpoints.restore(self.model, best)

    def _save(self, trainer, folder: Path) -> None:
        main = trainer.accelerator.is_main_process
        if main:  # no file of an older run may stay: its adapter would be loaded with these weights
            shutil.rmtree(self.out, ignore_errors=True)
        trainer.accelerator.wait_for_everyone()
        trainer.save_model(str(self.out))
        if not main:
            return
        self.processor.save_pretrained(self.out)
        write_json(self.out / "log.json", trainer.state.log_history, indent=0)
        if (folder / SAMPLES).is_file():
            shutil.copy(folder / SAMPLES, self.out / SAMPLES)
        write_card(self, trainer.state)

    def _merge(self) -> None:
        """Write an adapter's merged weights where they are asked for and missing; cim_on_sft starts from sft's."""
        wanted = self.settings.lora_rank and (self.settings.merge or self.method == "sft")
        if wanted and not (self.out / MERGED).is_dir():
            partial = self.out / f"{MERGED}.partial"
            merged, _ = load_model(self.model_settings.at(self.out), device=torch.device("cpu"))
            merged.save_pretrained(partial)
            self.processor.save_pretrained(partial)
            partial.rename(self.out / MERGED)


def training_images(
    artifacts: Path, settings: TrainSettings, labelled: int | None = None, seed: int = 0
) -> tuple[Manifest, Manifest]:
    """The images to train on, only so many as are `labelled` where given, and those held out for validation."""
    split = read_manifest(artifacts / "dataset" / "manifest.parquet").split(settings.split)
    cut = len(split) - settings.validation
    if cut <= 0:
        raise CimError(
            f"parameters: train.validation={settings.validation} leaves none of the {len(split)} images "
            f"of split '{settings.split}' to train on; lower it"
        )
    if labelled and labelled > cut:
        raise CimError(
            f"parameters: sft.images={labelled} is more than the {cut} images of split '{settings.split}' to train on; "
            "lower it"
        )
    if missing := [path for path in split.image_paths if not path.is_file()]:
        raise CimError(
            f"{missing[0]}: image not found, as {len(missing)} of {len(split)} of split '{settings.split}'; "
            "restore the files or make the data set again"
        )
    # Drawn, since a split can be ordered: the small world's is, by what its scenes show.
    drawn = np.sort(np.random.default_rng(seed).permutation(cut)[: labelled or cut])
    return split.take(drawn), split.take(range(cut, len(split)))


def check_possible(settings: TrainSettings, compute: ComputeSettings, model: ModelSettings, distributed: str) -> None:
    """Refuse packages that are not installed, and updates of 16-bit weights, whose rounding loses a step of 1e-6."""
    installed = get_available_reporting_integrations()
    if missing := [name for name in compute.log_to if name not in installed]:
        raise CimError(
            f"parameters: compute.log_to names '{missing[0]}', which is not installed or not known to transformers; "
            f"install it, or choose from: {', '.join(installed)}"
        )
    if compute.vllm != "off" and find_spec("vllm") is None:
        raise CimError(
            f"parameters: compute.vllm={compute.vllm} needs vllm in an environment with an older torch "
            "(docs/published-setting.md); install it there or set it to off"
        )
    # LoRA's own weights are float32, and DeepSpeed keeps float32 copies.
    if model.dtype != "float32" and not settings.lora_rank and distributed != "DEEPSPEED":
        raise CimError(
            f"parameters: model.dtype={model.dtype} with all weights trained: updates of train.lr={settings.lr:g} "
            "would be rounded away; set model.dtype=float32 and train.bf16=true, or train.lora_rank, or a DeepSpeed "
            "configuration (compute.accelerate=conf/accelerate/zero3.yaml)"
        )


def trainable(settings: TrainSettings, model: torch.nn.Module, revision: str | None = None):
    """peft's LoRA configuration, or None to train the weights; freezes the vision tower where the settings say so.

    Args:
        revision: of the base model on the hub, to which the adapter will be added when it is loaded.
    """
    if settings.lora_rank:
        from peft import LoraConfig

        return LoraConfig(
            r=settings.lora_rank, lora_alpha=2 * settings.lora_rank, target_modules=settings.lora_targets,
            exclude_modules=VISION if settings.freeze_vision else None, task_type="CAUSAL_LM", revision=revision,
        )  # fmt: skip
    for name, parameter in model.named_parameters():
        if settings.freeze_vision and re.fullmatch(VISION, name):
            parameter.requires_grad = False
    return None


def average_head_gradient(model: torch.nn.Module) -> None:
    """Average the gradient of the output layer over the processes where FSDP2 shares it among them.

    TRL 1.16 reads that layer's weight without calling it, so that FSDP does not see it used: each process would keep
    its own gradient. (accelerate 1.15 prevents this for models whose last norm it finds, which vision models hide.)
    """
    whole = model.get_output_embeddings

    def get_output_embeddings():
        head = whole()
        if not isinstance(head.weight, DTensor):
            return head
        average = [Partial("avg")] * head.weight.device_mesh.ndim
        gathered = {name: part.full_tensor(grad_placements=average) for name, part in head.named_parameters()}
        return SimpleNamespace(**{"bias": None} | gathered)

    model.get_output_embeddings = get_output_embeddings


def image_dataset(images: Manifest, columns: dict[str, list], max_pixels: int | None) -> Dataset:
    """These columns and `images`, a list of one image each, opened and scaled down when a batch needs it."""
    kept = {}  # of the batch before: in each pass over a rollout, TRL's GRPO asks for all of it, a row for each caption

    def opened(batch: dict) -> dict:
        nonlocal kept
        paths = [path for (path,) in batch["images"]]
        kept = {path: kept.get(path) or fit(open_image(path), max_pixels) for path in set(paths)}
        return batch | {"images": [[kept[path]] for path in paths]}

    rows = columns | {"images": [[str(path)] for path in images.image_paths]}
    return Dataset.from_dict(rows).with_transform(opened)
