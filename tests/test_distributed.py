"""Two processes of a CPU that share a model as conf/accelerate/fsdp.yaml says (FSDP2), against one process."""

import faulthandler
import json
import os
import signal
import socket
import time
from pathlib import Path

import pytest
import torch

import standins
from cim.captioners.generate import caption_images
from cim.captioners.models import ModelSettings, load_model
from cim.data.manifest import read_manifest
from cim.params import group, read_params
from cim.train.checkpoints import COMPLETE
from conftest import ROOT, assert_the_same, change
from two_processes import allow_sharing_on_a_cpu, give_captions

ARTIFACTS = Path("artifacts")
FSDP = ROOT / "conf" / "accelerate" / "fsdp.yaml"
SMALL = {
    "steps": 4, "images_per_step": 4, "group_size": 4, "max_completion": 12, "save_every": 2, "validation": 4, "kl": 0.05,
    "lr": 0.3, "optimizer": "sgd",
}  # fmt: skip


def environment(config: Path) -> dict[str, str]:
    """What accelerate launch sets for two processes with this configuration."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    options = ["--config_file", str(config), "--num_processes", "2", "--mixed_precision", "no", "script.py"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "environ", {})
        arguments, *_ = _validate_launch_command(launch_command_parser().parse_args(options))
        return prepare_multi_gpu_env(arguments)


def train(run: str, given: bool, env: dict[str, str]) -> None:
    """A run, in a process of its own; with captions that are given, or sampled."""
    faulthandler.enable()
    os.environ.update(env)
    if "RANK" in env:
        allow_sharing_on_a_cpu()
    from cim.train import grpo, job, sft

    torch.set_num_threads(1)
    save = job.Job._save

    def saved(self, trainer, folder):
        kinds = {type(parameter).__name__ for parameter in trainer.model.parameters()}
        Path(f"kinds-{os.environ.get('RANK', 'one')}.json").write_text(json.dumps(sorted(kinds)))
        save(self, trainer, folder)

    job.Job._save = saved
    make = grpo.make_trainer
    grpo.make_trainer = lambda *parts: give_captions(make(*parts)) if given else make(*parts)
    (sft if run.startswith("sft") else grpo).train(run, read_params(), ARTIFACTS)


def start(server, run: str, processes: int, given: bool = True) -> list:
    env = {}
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        env = environment(FSDP) | {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [{"RANK": str(i), "LOCAL_RANK": str(i)} if env else {} for i in range(processes)]
    started = [server.Process(target=train, args=(run, given, env | rank), daemon=True) for rank in ranks]
    for process in started:
        process.start()
    return started


def finish(started: list) -> list[int]:
    for process in started:
        process.join(120)
    return [process.exitcode for process in started]


def train_in_two(server, run: str) -> list[int]:
    """Exit codes of two processes that train a run with given captions.

    PyTorch's gloo crashed once in some hundred runs, where it gathers the weights to save them: then they start again, as
    accelerate's --max_restarts would have them do.
    """
    codes = finish(start(server, run, 2))
    return finish(start(server, run, 2)) if -signal.SIGSEGV in codes else codes


def column(folder: Path, key: str) -> list[float]:
    return [row[key] for row in json.loads((folder / "log.json").read_text()) if key in row]


def weights_and_captions(folder: Path):
    settings = group(ModelSettings, read_params()["model"], "model").at(folder)
    model, processor = load_model(settings, torch.device("cpu"))
    test = read_manifest(ARTIFACTS / "dataset" / "manifest.parquet").split("test")
    return model.state_dict(), caption_images(model, processor, test, settings, 12, progress=False)


@pytest.fixture
def published(workspace):
    """The workspace with a model of a published class, its head apart from its embeddings."""
    model = standins.write("qwen2_5_vl", workspace / "model")
    change(model={"name": str(model), "max_pixels": 3000}, train=SMALL, sft={"steps": 4, "batch_size": 4, "lr": 0.3})
    return workspace


@pytest.mark.slow
@pytest.mark.parametrize(("run", "rank"), [("cim-0", 0), ("cim-0", 2), ("sft-0", 0), ("sft-0", 2)])
def test_two_processes_that_share_weights_train_as_one(published, forkserver, run, rank):
    """The same losses, KL, gradients, choice of a checkpoint, weights and captions, up to rounding.

    By SGD, since Adam would enlarge rounding where a gradient is almost zero.
    """
    change(train={"lora_rank": rank})
    out = ARTIFACTS / "train" / run
    assert finish(start(forkserver, run, 1)) == [0]
    one = out.rename("one")
    assert train_in_two(forkserver, run) == [0, 0]
    assert json.loads(Path("kinds-1.json").read_text()) == ["DTensor"]
    # TRL's loss of a validation depends on its batches; it chooses nothing.
    for key in ("loss", "kl", "reward", "grad_norm", "eval_loss" if run == "sft-0" else "eval_reward"):
        assert column(out, key) == pytest.approx(column(one, key), rel=1e-3, abs=1e-5), key
    (expected, said), (found, says) = weights_and_captions(one), weights_and_captions(out)
    assert says == said
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.slow
def test_a_shared_run_whose_processes_are_killed_ends_as_if_unbroken(published, forkserver):
    """One of them, which ends the other, and then both; with sampled captions."""
    change(train={"optimizer": "adamw_torch", "lr": 1e-3, "save_every": 1})
    assert finish(start(forkserver, "cim-0", 2, given=False)) == [0, 0]
    whole = (ARTIFACTS / "train" / "cim-0").rename("whole")
    for step, victims in ((1, [1]), (2, [0, 1])):
        started = start(forkserver, "cim-0", 2, given=False)
        deadline = time.time() + 120
        while time.time() < deadline and not list(ARTIFACTS.glob(f"checkpoints/cim-0/*/checkpoint-{step}/{COMPLETE}")):
            time.sleep(0.01)
        for victim in victims:
            started[victim].kill()
        assert all(finish(started))  # none hangs, none pretends to have finished
    assert finish(start(forkserver, "cim-0", 2, given=False)) == [0, 0]
    assert_the_same(ARTIFACTS / "train" / "cim-0", whole)
