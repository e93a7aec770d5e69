"""Training as a whole: kept weights, several processes, kills at any moment, trackers, batches and plans."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import GenerationMixin

import two_processes
from cim import code, encoders
from cim.captioners.models import ModelSettings, load_model
from cim.captioners.vision_cache import VisionCache
from cim.cli import __main__ as cli
from cim.data.manifest import read_manifest, write_manifest
from cim.errors import CimError
from cim.files import short_digest
from cim.params import group, read_params
from cim.pipeline.compose import compose
from cim.train import checkpoints as checkpoints_module
from cim.train import grpo, job, launch, sft
from cim.train.batches import grpo_batches, sft_batches
from cim.train.checkpoints import COMPLETE, last_checkpoint
from cim.train.job import INPUTS, Job, check_possible, training_images
from cim.train.preflight import GIB, Size, memory, plan
from cim.train.reward import SampleLog
from cim.train.settings import ComputeSettings, SftSettings, TrainSettings
from cim.train.summary import curves, run_metrics
from conftest import ROOT, assert_the_same, change, train

ARTIFACTS = Path("artifacts")


def settings(**changes):
    given = {
        "split": "train", "steps": 1, "images_per_step": 4, "group_size": 5, "lr": 1e-3, "kl": 0.001, "temperature": 1.0,
        "max_completion": 8, "save_every": 1,
    }  # fmt: skip
    return TrainSettings(**(given | changes))


def checkpoints(run: str) -> list[Path]:
    return sorted((ARTIFACTS / "checkpoints" / run).glob("*/checkpoint-*"))


class Interrupt(Exception):
    """In place of a kill."""


@pytest.mark.slow
def test_a_variant_of_clipscore_trains_by_its_text_tower(workspace, capsys, encoder_folder, monkeypatch):
    """Its rewards are those of the tower, which is loaded once; a tower with other weights trains anew."""
    loaded, load = [], encoders.load_image_encoder
    monkeypatch.setattr(
        encoders, "load_image_encoder", lambda spec, *options: (loaded.append(spec), load(spec, *options))[1]
    )
    tower = workspace / "tower"
    shutil.copytree(encoder_folder / "text-8", tower)
    variants = {"small": {"of": "clipscore", "encoders": {"text_tower": f"open_clip:local-dir:{tower}"}}}
    params = change(variants=variants, train={"steps": 1})
    for run in ("small-0", "clipscore-0"):
        grpo.train(run, params, Path("artifacts"))
    small, own = (
        [row["reward"] for row in json.loads(Path(f"artifacts/train/{run}/log.json").read_text()) if "reward" in row]
        for run in ("small-0", "clipscore-0")
    )
    assert small[0] != own[0]
    image = params["encoders"]["image"]
    assert loaded == [image, f"open_clip:local-dir:{tower}", image]
    capsys.readouterr()
    grpo.train("small-0", params, Path("artifacts"))
    assert "kept: artifacts/train/small-0" in capsys.readouterr().out
    weights = load_file(tower / "open_clip_model.safetensors")
    name = next(name for name in weights if name.startswith("text.") and weights[name].ndim == 2)
    save_file(weights | {name: weights[name] + 1}, tower / "open_clip_model.safetensors")
    grpo.train("small-0", params, Path("artifacts"))
    assert "kept" not in capsys.readouterr().out


@pytest.fixture
def interrupted(monkeypatch):
    """A function that trains a run until the reward of this step is asked for."""

    def run(name: str, step: int, **groups):
        called = SampleLog.__call__

        def stop(self, *args, trainer_state, **columns):
            if trainer_state.global_step == step:
                raise Interrupt
            return called(self, *args, trainer_state=trainer_state, **columns)

        with monkeypatch.context() as patch:
            patch.setattr(SampleLog, "__call__", stop)
            with pytest.raises(Interrupt):
                train(name, **groups)

    return run


@pytest.mark.parametrize(
    ("says", "error"), [("error: lower k", "^lower k$"), ("Traceback", "cim-0 failed with status 3; see the log above")]
)
def test_a_run_that_fails_is_reported_by_its_own_error(monkeypatch, says, error):
    script = f"import sys; print('step 1'); print('{says}', file=sys.stderr); sys.exit(3)"
    monkeypatch.setattr(launch, "command", lambda *_: [sys.executable, "-c", script])
    with pytest.raises(CimError, match=error):
        list(launch.train("cim-0", {"compute": {}}))


def test_only_changes_that_matter_train_anew(workspace, trained, capsys, monkeypatch):
    shutil.copytree(trained / "artifacts" / "train", ARTIFACTS / "train")

    def kept(run: str = "cim-0", **groups) -> bool:
        train(run, **groups)
        return "kept: artifacts" in capsys.readouterr().out

    assert kept()
    assert kept(compute={"per_device": 5, "warn_distinct": 0.0}, sft={"lr": 1.0}, train={"save_every": 3})
    # Another digest of the code is another result; comments and docstrings do not change the digest (test_structure).
    with monkeypatch.context() as patch:
        patch.setattr(code, "digest", lambda module: "other code")
        assert not kept(train={"steps": 1})
        assert kept()
    assert not kept()
    assert not kept(reward={"beta": 0.5})
    assert kept()
    # SFT reads neither kl nor the reward.
    assert not kept("sft-0")
    assert kept("sft-0", train={"kl": 0.5, "temperature": 0.9}, reward={"beta": 2.0})
    assert not kept("sft-0", train={"lora_rank": 2})


def test_checkpoints_belong_to_what_they_were_made_from(workspace, trained, interrupted, capsys):
    """Interrupted, then trained with other parameters, then resumed as it was, with other computing."""
    interrupted("cim-0", step=3)
    (first,) = checkpoints("cim-0")
    interrupted("cim-0", step=3, train={"lr": 1e-3})
    assert len(checkpoints("cim-0")) == 2
    assert "note: artifacts/checkpoints/cim-0 keeps checkpoints for other parameters" in capsys.readouterr().out
    out = train("cim-0", train={"lr": 1e-4})
    printed = capsys.readouterr().out
    assert f"resuming from {first}" in printed
    assert [line.split("  ")[0] for line in printed.splitlines() if line.startswith("step")] == ["step 3/4", "step 4/4"]
    whole = trained / "artifacts" / "train" / "cim-0"
    for name in ("model.safetensors", "samples.jsonl"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    assert len(checkpoints("cim-0")) == 1  # the other parameters'
    interrupted("cim-0", step=3, train={"kl": 0.002})
    train("cim-0", compute={"per_device": 10, "gradient_checkpointing": True})
    assert "checkpoint-2" in capsys.readouterr().out


def test_gradient_checkpointing_changes_no_adapter(workspace):
    """Nothing would be learned where the frozen embeddings' output has no gradient."""
    change(train={"steps": 2, "images_per_step": 2, "warmup_steps": 0, "lora_rank": 2})
    folders = []
    for on in (False, True):
        folders.append(train("cim-0", compute={"gradient_checkpointing": on}).rename(f"checkpointing-{on}"))
    without, with_it = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    moved = [name for name, tensor in with_it.items() if "lora_B" in name and tensor.abs().max() > 0]
    assert len(moved) == sum("lora_B" in name for name in with_it)
    for name, tensor in without.items():
        torch.testing.assert_close(with_it[name], tensor, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="two processes need two GPUs, or none")
def test_two_processes_give_the_rewards_and_advantages_of_one(workspace, monkeypatch):
    """Started as on two machines; with six captions each, the second of three groups of four lies in both processes."""
    # give_captions replaces it, in this process too: the next test must find it as it was.
    monkeypatch.setattr(GenerationMixin, "generate", GenerationMixin.generate)
    change(train={"steps": 1, "images_per_step": 3, "group_size": 4, "max_completion": 12})
    change(train={"truncated": "lowest", "repetition": 0.5})  # which look at all captions of the step
    for name in ("one", "two"):
        Path(name).mkdir()
    two_processes.main(Path("one"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "2", "--num_processes", "2",
        "--main_process_ip", "127.0.0.1", "--main_process_port", port, "--mixed_precision", "no", "--dynamo_backend", "no",
    ]  # fmt: skip
    script = [str(ROOT / "tests" / "two_processes.py"), "two"]
    machines = [
        subprocess.Popen(
            [*command, "--machine_rank", rank, *script], env={**os.environ, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        )
        for rank in "01"
    ]  # fmt: skip
    errors = [machine.communicate(timeout=120)[1] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], errors[0][-2000:]
    (one,), two = (
        [pd.DataFrame(json.loads(p.read_text())) for p in sorted(Path(d).glob("*.json"))] for d in ("one", "two")
    )
    assert [len(part) for part in two] == [6, 6]
    assert set(two[0]["image_id"]) & set(two[1]["image_id"])  # the group that both hold a part of
    keys = ["image_id", "caption"]
    together = pd.concat(two).sort_values(keys, ignore_index=True)
    one = one.sort_values(keys, ignore_index=True)
    assert together[keys].equals(one[keys])
    np.testing.assert_allclose(together["reward"], one["reward"], rtol=1e-5)
    np.testing.assert_allclose(together["advantage"], one["advantage"], rtol=1e-3, atol=1e-4)
    # And they are the group's: mean 0, standard deviation 1 but for the 1e-4 that TRL adds to the rewards'.
    by_group, spread = one.groupby("image_id")["advantage"], one.groupby("image_id")["reward"].std(ddof=1)
    np.testing.assert_allclose(by_group.mean(), 0, atol=1e-4)
    np.testing.assert_allclose(by_group.std(ddof=1), spread / (spread + 1e-4), rtol=1e-3)


@pytest.mark.parametrize("run", ["cim-0", "sft-0"])
def test_a_run_stopped_anywhere_ends_as_if_unbroken(workspace, monkeypatch, run):
    """Where checkpoints of Trainer and TRL alone are not enough."""
    change(train={"steps": 5, "images_per_step": 8, "save_every": 1}, sft={"steps": 5, "batch_size": 8})  # 2.5 epochs
    whole = train(run).rename("whole")

    def stop(*args, **kwargs):
        raise Interrupt

    def delete_half(folder, *_):
        next(Path(folder).glob("checkpoint-*/optimizer.pt")).unlink()
        raise Interrupt

    def stop_at(step, mark=checkpoints_module.MarkComplete.on_save):
        def on_save(self, args, state, control, **kwargs):
            mark(self, args, state, control, **kwargs)
            return stop() if state.global_step == step else None

        return on_save

    for owner, name, instead in (
        (checkpoints_module.MarkComplete, "on_save", stop),  # before a checkpoint is marked
        (checkpoints_module.MarkComplete, "on_save", stop_at(2)),  # between two epochs
        (checkpoints_module.MarkComplete, "on_save", stop_at(3)),  # within the second
        (checkpoints_module, "rotate_checkpoints", delete_half),  # while an older checkpoint is deleted
        (job, "write_card", stop),  # while the result is written
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, instead)
            with pytest.raises(Interrupt):
                train(run)
    assert_the_same(train(run), whole)


def spin():
    while True:
        pass


@pytest.mark.slow
def test_killed_at_random_moments_on_a_busy_machine_it_ends_as_if_unbroken(workspace, forkserver):
    change(train={"steps": 6, "save_every": 1, "validation": 2, "max_completion": 12})  # two epochs

    def start(target, *args):
        process = forkserver.Process(target=target, args=args, daemon=True)
        process.start()
        return process

    run = "cim-3", read_params(), ARTIFACTS
    start(grpo.train, *run).join()
    whole = (ARTIFACTS / "train" / "cim-3").rename("whole")
    log = json.loads((whole / "log.json").read_text())
    rewards = {row["step"]: row["eval_reward"] for row in log if "eval_reward" in row}
    assert len(rewards) == 6
    assert len(set(rewards.values())) > 1
    assert f"Weights of step {max(rewards, key=rewards.get)}." in (whole / "README.md").read_text()
    pace = log[-1]["train_runtime"] / 6
    busy, chance = start(spin), random.Random(0)
    for kill in range(3):
        before = set(checkpoints("cim-3"))
        process = start(grpo.train, *run)
        # Once this try has begun to write a checkpoint, at any moment of the next step.
        deadline = time.time() + 60
        while time.time() < deadline and process.is_alive() and not set(checkpoints("cim-3")) - before:
            time.sleep(0.005)
        time.sleep(chance.uniform(0, pace) if kill else 0.0)  # the first inside its checkpoint
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    busy.kill()
    start(grpo.train, *run).join()
    assert_the_same(ARTIFACTS / "train" / "cim-3", whole)


def test_an_incomplete_checkpoint_is_deleted_and_others_stay(tmp_path, capsys):
    folder = tmp_path / "digest"
    assert last_checkpoint(folder) is None
    for step in (1, 2):
        (folder / f"checkpoint-{step}").mkdir()
    (folder / "checkpoint-1" / COMPLETE).touch()
    assert last_checkpoint(folder) == str(folder / "checkpoint-1")
    assert not (folder / "checkpoint-2").exists()
    assert capsys.readouterr().out == ""
    assert last_checkpoint(tmp_path / "other") is None
    assert "(digest)" in capsys.readouterr().out
    assert (folder / "checkpoint-1").exists()


def test_trackers_are_written_or_missed_at_once(workspace):
    train("grc-0", train={"steps": 1}, compute={"log_to": ["tensorboard"]})
    assert list((ARTIFACTS / "logs" / "grc-0").rglob("events.out.tfevents*"))
    with pytest.raises(CimError, match="'no_such_tracker', which is not installed"):
        train("grc-1", compute={"log_to": ["no_such_tracker"]})


def test_the_published_batches_in_trls_terms():
    """256 prompts x 5 captions a rollout, mini-batches of 64 prompts, two epochs of 6,500 images on eight GPUs."""
    params = compose(["profile=paper"], ROOT / "conf")
    s, compute = group(TrainSettings, params["train"], "train"), group(ComputeSettings, params["compute"], "compute")
    batches = grpo_batches(s, compute.per_device, 6500, 8)
    assert batches.per_device * 8 * batches.accumulation == 64 * 5
    assert s.updates_per_rollout == 4
    assert batches.updates == 2 * (6500 // 256) * 4
    assert (s.lr, s.kl, s.group_size, s.max_completion, s.freeze_vision) == (1e-6, 0.001, 5, 1024, False)
    assert "256 images x 5 captions = 1280 captions" in batches.summary[0]
    fine_tuning = sft_batches(group(SftSettings, params["sft"], "sft"), compute.sft_per_device, 6500, 8)
    assert (fine_tuning.per_device, fine_tuning.accumulation, fine_tuning.updates) == (4, 2, 102)
    assert "64 captions = 8 processes x 4 at once x 2 accumulated" in fine_tuning.summary[0]


@pytest.mark.parametrize(("epochs", "updates"), [(0.1, 1), (0.5, 2), (1, 3), (2, 6), (2.5, 8)])
def test_an_epoch_of_sft_ends_with_what_is_left_of_its_images(epochs, updates):
    """As Trainer counts them: three updates of up to four of ten images."""
    assert sft_batches(SftSettings(epochs=epochs, batch_size=4, lr=1.0), None, 10, 1).updates == updates


@pytest.mark.parametrize(
    ("per_device", "images", "processes", "says"),
    [(None, 3, 1, "a rollout takes 4 images"), (3, 10, 1, "cannot be shared"), (None, 10, 3, "cannot be shared")],
)
def test_batches_that_do_not_divide_are_refused(per_device, images, processes, says):
    with pytest.raises(CimError, match=says):
        grpo_batches(settings(), per_device, images, processes)


@pytest.mark.parametrize(
    ("cls", "changes", "says"),
    [
        (TrainSettings, {"epochs": 1.0}, "train: give either steps or epochs"),
        (TrainSettings, {"steps": None}, "train: give either steps or epochs"),
        (TrainSettings, {"group_size": 1}, "'train.group_size' should be greater than or equal to 2"),
        (ComputeSettings, {"vllm": "somewhere"}, "'off', 'colocate' or 'server'"),
        (ComputeSettings, {"vllm": "server"}, "vllm=server needs vllm_url"),
        (ComputeSettings, {"vllm": "server", "vllm_url": "localhost:8000"}, "'train.vllm_url' .* not 'localhost:8000'"),
        (ComputeSettings, {"vllm_memory": 0.0}, "'train.vllm_memory' should be greater than 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(cls, changes, says):
    base = settings().model_dump() if cls is TrainSettings else {}
    with pytest.raises(CimError, match=says):
        group(cls, base | changes, "train")


def test_a_vllm_server_is_named_to_trl():
    compute = ComputeSettings(vllm="server", vllm_url="http://host:8000")
    assert grpo.vllm_options(compute)["vllm_server_base_url"] == "http://host:8000"
    assert grpo.vllm_options(ComputeSettings(vllm="colocate"))["vllm_gpu_memory_utilization"] == 0.3
    assert grpo.vllm_options(ComputeSettings()) == {}


def test_sixteen_bit_weights_are_not_updated_themselves():
    model = ModelSettings(name="x", prompt="y", dtype="bfloat16")
    with pytest.raises(CimError, match="rounded away"):
        check_possible(settings(), ComputeSettings(), model, "NO")
    check_possible(settings(), ComputeSettings(), model, "DEEPSPEED")
    check_possible(settings(lora_rank=4), ComputeSettings(), model, "NO")


@pytest.mark.parametrize("path", sorted((ROOT / "conf" / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerates_configurations_are_what_accelerate_reads(path):
    from accelerate.commands.config.config_args import load_config_from_file

    loaded = load_config_from_file(str(path))
    content = launch.configuration(str(path))
    assert loaded.num_processes == content["num_processes"] == launch.processes(str(path))
    assert str(getattr(loaded.distributed_type, "value", loaded.distributed_type)) == content["distributed_type"]
    assert "--config_file" in launch.command(str(path), 8)


def test_the_launch_command_follows_the_machine():
    assert launch.command(None, 0) == launch.command(None, 1) == [sys.executable, "-m", "cim.train"]
    several = launch.command(None, 8)
    assert "--multi_gpu" in several
    assert several[several.index("--num_processes") + 1] == "8"
    with pytest.raises(CimError, match=r"nowhere\.yaml"):
        launch.command("nowhere.yaml", 1)


def test_a_plan_shows_what_a_run_takes_and_starts_nothing(workspace):
    params = read_params()
    lines = plan("cim-0", params, ARTIFACTS, 1)
    assert len(lines) <= 12
    for part in (
        "M parameters in float32",
        "16 images to train on",
        "gallery: 80 captioned images",
        "4 images x 5 captions",
        "GiB",
    ):
        assert part in "\n".join(lines), lines
    assert not (ARTIFACTS / "train").exists()
    assert "4 captions = 1 processes x 4 at once" in "\n".join(plan("sft-0", params, ARTIFACTS, 1))
    params["train"]["lora_rank"] = 2
    assert "LoRA of rank 2" in "\n".join(plan("cim-0", params, ARTIFACTS, 1))
    params["compute"] |= {"vllm": "server", "vllm_url": "http://host:1"}
    with pytest.raises(CimError, match="needs vllm"):
        plan("cim-0", params, ARTIFACTS, 1)


def test_memory_that_may_not_suffice_is_warned_of(workspace, monkeypatch):
    monkeypatch.setattr(os, "sysconf", lambda name: 1024)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1024, 1024))
    assert plan("cim-0", read_params(), ARTIFACTS, 1)[-1].startswith("WARNING: that may not fit")


def test_the_plan_of_the_paper_on_its_machine_is_plausible():
    """Sizes as Qwen2.5-VL-7B has them; the estimates must lie where such runs are known to."""
    params = compose(["profile=paper"], ROOT / "conf")
    size = Size(8_292_000_000, 8_292_000_000, 28, 3584, 152_064, 28_672)
    job = SimpleNamespace(
        sft=None, settings=group(TrainSettings, params["train"], "train"), sharded=True, distributed="DEEPSPEED",
        compute=group(ComputeSettings, params["compute"], "compute"),
        model_settings=group(ModelSettings, params["model"], "model"),
    )  # fmt: skip
    on_eight = memory(job, size, 8, 830, 8, 80 * GIB)
    assert 10 < on_eight["optimizer"] / GIB < 13  # 12 bytes a weight, an eighth of them
    assert sum(v for k, v in on_eight.items() if k != "vllm") / GIB < 80
    # 160 captions of a rollout on each GPU: what they keep and read, and the weights, which DeepSpeed gathers.
    assert 15 + 15 < on_eight["sampling"] / GIB < 15 + 45
    job.compute = job.compute.model_copy(update={"vllm": "server"})
    assert "sampling" not in memory(job, size, 8, 830, 8, 80 * GIB)
    job.sharded, job.distributed, job.model_settings = False, "NO", ModelSettings(name="x", prompt="y")
    assert sum(memory(job, size, 8, 830, 1, 80 * GIB).values()) / GIB > 80


@pytest.mark.parametrize(
    ("asked", "bf16", "refused"), [("bf16", False, True), ("fp16", True, True), ("bf16", True, False)]
)
def test_accelerate_cannot_change_the_precision_behind_the_parameters(monkeypatch, asked, bf16, refused):
    from cim.train.__main__ import refuse_other_precision

    refuse_other_precision({})
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", asked)
    with pytest.raises(CimError, match=f"is {asked}, which") if refused else nullcontext():
        refuse_other_precision({"train": {"bf16": bf16}})


@pytest.mark.parametrize(
    ("run", "changes", "says"),
    [
        ("cim-0", {"model": {"name": "nowhere/none"}}, "model 'nowhere/none' could not be loaded"),
        ("cim-0", {"model": {"max_prompt": 3}}, "more than model.max_prompt=3"),
        ("cim-0", {"train": {"validation": 16}}, "leaves none of the 16 images"),
        ("cim-0", {"train": {"split": "none"}}, "no split 'none'"),
        ("cim-0", {"compute": {"accelerate": "gone.yaml"}}, "compute.accelerate: gone.yaml"),
        ("cim-0", {"compute": {"accelerate": "/dev/null"}}, "/dev/null: cannot be read (no mapping of options)"),
        ("cim-0", {"train": {"lora_rank": 2, "lora_targets": "q_proj"}}, "train.lora_targets='q_proj' cannot be used"),
        ("sft-0", {"train": {"lora_rank": 2, "lora_targets": "*q_proj"}}, "train.lora_targets='*q_proj' cannot"),
        ("cim_on_sft-0", {}, "starts from run 'sft-0', so train that first"),
    ],
)
def test_what_would_stop_a_run_stops_its_plan(workspace, run, changes, says):
    with pytest.raises(CimError) as stop:
        plan(run, change(**changes), ARTIFACTS, 1)
    assert says in str(stop.value)


def test_missing_images_are_reported_before_the_model_is_loaded(workspace):
    manifest = read_manifest(ARTIFACTS / "dataset" / "manifest.parquet")
    frame = manifest.frame.copy()
    frame.loc[frame["split"] == "train", "image"] = "images/gone.png"
    write_manifest(frame, Path("other/dataset/manifest.parquet"), image_root=manifest.image_root)
    with pytest.raises(CimError, match=r"gone.png: image not found, as 16 of 16"):
        training_images(Path("other"), settings())


def test_the_plan_from_the_command_line(workspace, capsys):
    (workspace / "conf").symlink_to(ROOT / "conf")
    cli.main(["train", "--run", "cim-0", "--plan", "--processes", "1"])
    assert "a rollout: 4 images x 5 captions = 20 captions" in capsys.readouterr().out
    small = ["-S", "train.images_per_step=2", "-S", f"model.name='{(ARTIFACTS / 'captioner').resolve()}'"]
    cli.main(["train", "--run", "cim-0", "--plan", "--processes", "1", *small])
    assert "a rollout: 2 images x 5 captions = 10 captions" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["train", "--run", "cim-0", "-S", "profile=paper"])
    assert "-S is for --plan" in capsys.readouterr().err


def test_curves_and_metrics_of_a_log(trained):
    out = trained / "artifacts" / "train" / "cim-0"
    log = pd.DataFrame(json.loads((out / "log.json").read_text()))
    table = curves(log)
    assert list(table) == ["step", "reward", "grc", "qir", "kl", "words", "distinct", "loss"]
    assert table["step"].tolist() == [1, 2, 3, 4]
    metrics = run_metrics(log, "cim", 0)
    assert list(metrics)[:4] == ["method", "seed", "steps", "loss_last_10"]
    assert metrics["steps"] == 4
    # Four steps: the first two and the last two.
    assert metrics["window"] == 2
    assert metrics["reward_first_10"] == table["reward"].head(2).mean()
    assert metrics["reward_last_10"] == table["reward"].tail(2).mean()
    # 24 updates on twelve rollouts, and validation: each row has what was logged at it.
    rows = [{"step": s, "loss": 0.0, "kl": float(s)} | ({"reward": float(s)} if s % 2 else {}) for s in range(1, 25)]
    for row in rows:
        if "reward" in row:
            row |= {"score/grc": 1.0, "score/qir": 0.0, "variety/distinct": 1.0, "variety/words": 2.0}
    metrics = run_metrics(pd.DataFrame([*rows, {"step": 24, "eval_reward": 1.0}]), "cim", 1)
    assert (metrics["reward_first_10"], metrics["reward_last_10"], metrics["kl_last_10"]) == (6.0, 18.0, 18.0)
    sft = pd.DataFrame([{"step": 1, "loss": 2.0}, {"step": 1, "train_loss": 2.0}])
    assert run_metrics(sft, "sft", 0) == {"method": "sft", "seed": 0, "steps": 1, "loss_last_10": 2.0}


def test_a_trained_run_says_what_it_was_made_from(trained):
    artifacts, params = trained / "artifacts", read_params(trained / "params.yaml")
    out = artifacts / "train" / "cim-0"
    base = ModelSettings(name=str(artifacts / "captioner"), prompt=params["model"]["prompt"])
    info = json.loads((artifacts / "gallery" / "gallery.json").read_text())
    assert json.loads((out / INPUTS).read_text())["inputs"] == {
        "run": "cim-0",
        "objective": "cim",
        "code": code.digest("cim.train.grpo"),
        "weights": encoders.weights_digest(load_model(base)[0]),
        "model": {name: params["model"][name] for name in ("prompt", "dtype", "processor", "max_pixels")},
        "images": [part.digest for part in training_images(artifacts, settings())],
        "train": {name: value for name, value in params["train"].items() if name not in ("merge", "save_every")},
        "reward": params["reward"],
        "precision": [params["encoders"]["text_precision"], params["encoders"]["image_precision"]],
        "towers": [info["image_encoder"]["digest"]],
        "gallery": {name: marks["whole"] for name, marks in info["files"].items()},
    }
    card = (out / "README.md").read_text()
    head = yaml.safe_load(card.split("---")[1])
    assert (head["pipeline_tag"], head["tags"]) == ("image-text-to-text", ["cim"])
    assert "4 steps on 16 images, seed 0" in card


def test_each_input_of_a_run_is_in_its_digest(workspace, monkeypatch):
    """What is read elsewhere than in groups `train` and `reward`, which `test_only_changes_that_matter...` changes."""

    def stop(job, scorer, folder):
        raise Interrupt(folder.name)

    monkeypatch.setattr(grpo, "make_trainer", stop)
    monkeypatch.setattr(grpo, "job_scorer", lambda job: None)

    def digest(**groups) -> str:
        with pytest.raises(Interrupt) as stopped:
            train("cim-0", **groups)
        return str(stopped.value)

    other, gallery = Path("other"), ARTIFACTS / "gallery"
    digests = [
        digest(),
        digest(model={"prompt": "describe it."}),
        digest(model={"max_pixels": 28 * 28}),
        digest(encoders={"text_precision": "float32"}),
        digest(encoders={"image_precision": "float32"}),
    ]
    shutil.copytree(ARTIFACTS / "captioner", other)
    weights = load_file(other / "model.safetensors")
    name = next(name for name in weights if "norm" in name)
    save_file(weights | {name: weights[name] + 1}, other / "model.safetensors", {"format": "pt"})
    digests.append(digest(model={"name": str(other)}))
    source = gallery.resolve()
    gallery.unlink()
    info = Path(shutil.copytree(source, gallery), "gallery.json")
    marks = json.loads(info.read_text())
    marks["files"]["images.npy"]["whole"] = "0" * 16
    info.write_text(json.dumps(marks))
    digests.append(digest())
    assert len(set(digests)) == len(digests)


def test_sft_s_digest_has_the_captions_of_training_and_validation(workspace, monkeypatch):
    seen = {}
    monkeypatch.setattr(Job, "train", lambda self, make_trainer, **inputs: seen.update(inputs))
    train("sft_perfect-0", train={"validation": 2})
    captions = read_manifest(ARTIFACTS / "dataset" / "manifest.parquet").split("train").captions
    assert seen["labels"] == short_digest([captions[:14], captions[14:]])


def test_the_settings_of_grpo_are_the_trainer_s(workspace):
    changes = {
        "temperature": 0.7, "kl": 0.05, "schedule": "cosine", "warmup_steps": 3, "scale_rewards": "none",
        "truncated": "mask", "lr": 3e-4, "max_completion": 9, "group_size": 4, "updates_per_rollout": 2, "optimizer": "sgd",
    }  # fmt: skip
    job = Job("cim-3", change(train=changes, compute={"per_device": 8}), ARTIFACTS).load()
    trainer = grpo.make_trainer(job, grpo.job_scorer(job), Path("checkpoints"))
    expected = {
        "temperature": 0.7, "beta": 0.05, "lr_scheduler_type": "cosine", "warmup_steps": 3, "scale_rewards": "none",
        "mask_truncated_completions": True, "learning_rate": 3e-4, "max_completion_length": 9, "num_generations": 4,
        "steps_per_generation": 4, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 8, "optim": "sgd",
        "max_steps": 4, "save_steps": 2, "seed": 3, "num_iterations": 1,
    }  # fmt: skip
    assert {name: getattr(trainer.args, name) for name in expected} == expected
    # Features are kept for the model and for the reference model of the KL term.
    for model in (trainer.model, trainer.ref_model):
        assert isinstance(model.model.vision_tower.forward, VisionCache)


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({"lora_rank": 2, "lora_targets": ".*(q_proj|conv2)"}, True),
        ({"lora_rank": 2, "lora_targets": ".*(q_proj|conv2)", "freeze_vision": False}, False),
        ({"freeze_vision": False}, False),
    ],
)
def test_features_are_kept_of_frozen_towers_alone(workspace, changes, kept):
    job = Job("sft-0", change(train=changes), ARTIFACTS).load()
    sft.make_trainer(job, Path("checkpoints"))
    tower = job.model.model.vision_tower
    assert isinstance(tower.forward, VisionCache) == kept
    assert any(parameter.requires_grad for parameter in tower.parameters()) != kept
