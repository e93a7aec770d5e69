"""Checkpoints of a run, in a folder named by a digest of its inputs, and restoring weights from them."""

import shutil
from pathlib import Path

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint, rotate_checkpoints

from cim.files import explained
from cim.processes import processes

COMPLETE = "complete"  # the last file of a checkpoint; one that was cut short does not have it


def last_checkpoint(folder: Path) -> str | None:
    """The newest complete checkpoint in a run's folder, which is made if missing; incomplete ones are deleted.

    Folders beside it belong to other inputs. Their checkpoints are kept, and a printed line says so.
    """
    if processes().is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        for checkpoint in folder.glob("checkpoint-*"):
            if not (checkpoint / COMPLETE).is_file():
                shutil.rmtree(checkpoint)
        if others := {path.parent.name for path in folder.parent.glob("*/checkpoint-*")} - {folder.name}:
            kept = f"note: {folder.parent} keeps checkpoints for other parameters, data or code ({', '.join(others)})"
            print(f"{kept}; delete what you do not need", flush=True)
    processes().wait_for_everyone()
    return get_last_checkpoint(str(folder))


class MarkComplete(TrainerCallback):
    """Marks a checkpoint once all processes have written it, and only then deletes those before, but for the best.

    Set no save_total_limit: Trainer deletes before the mark, and a kill then leaves an older one marked but incomplete.
    """

    def on_save(self, args, state, control, **kwargs):
        processes().wait_for_everyone()
        if state.is_world_process_zero:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / COMPLETE).touch()
            rotate_checkpoints(args.output_dir, 2, state.best_model_checkpoint)


class EpochOrder(TrainerCallback):
    """Shuffles each epoch by a seed of its own, so that a resumed run takes the images in the order of an unbroken one.

    TRL's sampler draws the orders one after another, so a resumed run would start with the first epoch's again.
    Accelerate's takes the epoch, but after skipping batches in one of several processes nothing passes it on.
    """

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        batches = train_dataloader.batch_sampler
        sampler = getattr(batches, "batch_sampler", batches).sampler  # several processes have a sampler around it
        epoch = int(state.epoch or 0)
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)
        else:
            sampler.generator.manual_seed(args.seed + epoch)


def restore(model: torch.nn.Module, checkpoint: str) -> None:
    """Load a checkpoint's weights into the model; CimError where they do not fit.

    Trainer itself (transformers 5) compares the names in the file with those in memory. They differ for models whose
    names on the hub are older than their code, such as Qwen2.5-VL, and it silently loads nothing. from_pretrained
    knows both.
    """
    saved = type(model).from_pretrained(checkpoint, dtype=model.dtype).state_dict()
    with explained(f"{checkpoint}: its weights are not this model's", "delete it", RuntimeError):
        model.load_state_dict(saved)
