"""Checkpoints of a run, kept under a digest of everything that its result depends on, and restoring weights."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from cim.errors import CimError
from cim.files import read_json, write_json
from cim.processes import processes

COMPLETE = "complete"  # the last file of a checkpoint: one that was cut short by a kill does not have it
INPUTS = "inputs.json"  # the last file of a trained run: what it was made from


def inputs_digest(made_from: dict) -> str:
    """Short SHA-256 of what a run is made from, as JSON values."""
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:16]


def is_trained(out: Path, digest: str) -> bool:
    """Whether the weights in `out` were made from these inputs."""
    path = out / INPUTS
    return path.is_file() and read_json(path).get("digest") == digest


def mark_trained(out: Path, digest: str, made_from: dict) -> None:
    """Record what the weights in `out` were made from, once all of them are written."""
    write_json(out / INPUTS, {"digest": digest, "made from": made_from})


def last_checkpoint(folder: Path) -> str | None:
    """The newest complete checkpoint in the folder of a run's digest; those that a kill cut short are deleted."""
    if processes().is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        for checkpoint in folder.glob("checkpoint-*"):
            if not (checkpoint / COMPLETE).is_file():
                shutil.rmtree(checkpoint)
        if others := [path for path in folder.parent.iterdir() if path != folder]:
            print(
                f"{folder.parent}: holds checkpoints of {len(others)} run(s) with other parameters or data; "
                "they stay until you delete them",
                flush=True,
            )
    processes().wait_for_everyone()
    return get_last_checkpoint(str(folder))


def drop_checkpoints(folder: Path) -> None:
    """Delete the checkpoints of a run that is done."""
    shutil.rmtree(folder, ignore_errors=True)
    if folder.parent.is_dir() and not any(folder.parent.iterdir()):
        folder.parent.rmdir()


class MarkComplete(TrainerCallback):
    """Marks a checkpoint once all of it is written."""

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE).touch()


def in_parts() -> bool:
    """Whether DeepSpeed or FSDP holds the weights in parts, as accelerate tells its processes."""
    return any(os.environ.get(f"ACCELERATE_USE_{kind}") == "true" for kind in ("DEEPSPEED", "FSDP"))


def restore(model: torch.nn.Module, checkpoint: Path) -> None:
    """Load a checkpoint's weights into the model.

    Trainer itself (transformers 5) compares the names in the file with those in memory, which differ for models whose
    hub names are older than their code, Qwen2.5-VL among them: it loads nothing and continues. from_pretrained knows
    both.

    Raises:
        CimError: where a weight is missing.
    """
    saved = type(model).from_pretrained(checkpoint, dtype=model.dtype).state_dict()
    try:
        model.load_state_dict(saved, strict=True)
    except RuntimeError as error:
        raise CimError(
            f"{checkpoint}: its weights are not this model's ({' '.join(str(error).split())[:150]}); delete it"
        ) from None
