"""Training as a whole: several processes, kills at any moment, trackers, batches and plans."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import yaml

from cim.errors import CimError
from cim.params import group
from cim.train.job import COMPLETE, check_precision, last_checkpoint
from cim.train.launch import command, configuration
from cim.train.preflight import Device, duration, plan
from cim.train.settings import TrainSettings, batches
from cim.pipeline.workspace import compose
from conftest import ROOT, train

CALM = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}


def settings(**changes):
    given = {
        "split": "train", "steps": 1, "images_per_step": 4, "group_size": 5, "lr": 1e-3, "kl": 0.001, "temperature": 1.0,
        "max_completion": 8, "save_every": 1,
    }  # fmt: skip
    return TrainSettings(**(given | changes))


def change(workspace, **changes):
    params = yaml.safe_load((workspace / "params.yaml").read_text())
    params["train"] |= changes
    (workspace / "params.yaml").write_text(yaml.safe_dump(params))


def scored(workspace, *launcher):
    out = workspace / f"scored-{len(launcher)}"
    out.mkdir()
    done = subprocess.run(
        [sys.executable, *launcher, str(ROOT / "tests" / "two_processes.py"), str(out)],
        cwd=workspace, env=CALM, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    parts = [pd.DataFrame(json.loads(path.read_text())) for path in sorted(out.glob("*.json"))]
    return parts


def test_two_processes_give_the_rewards_and_advantages_of_one(workspace):
    """Of the same batch; with six captions each, the second of three groups of four lies in both processes."""
    change(workspace, steps=1, images_per_step=3, group_size=4, max_completion=12)
    (one,) = scored(workspace)
    two = scored(workspace, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    assert [len(part) for part in two] == [6, 6]
    assert set(two[0]["image_id"]) & set(two[1]["image_id"])  # the group that both hold a part of
    keys = ["image_id", "caption"]
    together = pd.concat(two).sort_values(keys, ignore_index=True)
    one = one.sort_values(keys, ignore_index=True)
    assert together[keys].equals(one[keys])
    np.testing.assert_allclose(together["reward"], one["reward"], rtol=1e-5)
    np.testing.assert_allclose(together["advantage"], one["advantage"], rtol=1e-3, atol=1e-4)
    # And they are the group's: mean 0, standard deviation 1.
    by_group = one.groupby("image_id")["advantage"]
    np.testing.assert_allclose(by_group.mean(), 0, atol=1e-4)
    np.testing.assert_allclose(by_group.std(ddof=1), 1, atol=1e-2)


@pytest.mark.timeout(600)
def test_killed_at_five_random_moments_it_ends_as_if_unbroken(workspace):
    change(workspace, steps=8, save_every=1, validation=2, max_completion=12, images_per_step=2)
    whole = train(workspace, "cim-3")
    assert whole.returncode == 0, whole.stderr[-2000:]
    out = workspace / "artifacts" / "train" / "cim-3"
    expected = json.loads((out / "log.json").read_text())
    weights = (out / "model.safetensors").read_bytes()
    samples = (out / "samples.jsonl").read_text()
    for path in out.iterdir():
        path.unlink()

    chance = random.Random(0)
    checkpoints = workspace / "artifacts" / "checkpoints" / "cim-3"
    for kill in range(5):
        process = subprocess.Popen(
            [sys.executable, "-m", "cim.train", "--run", "cim-3"], cwd=workspace, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        # Once this try has begun to write a checkpoint, at any moment of the next two steps.
        before = {path.name for path in checkpoints.glob("checkpoint-*")}
        deadline = time.time() + 60
        while time.time() < deadline and process.poll() is None:
            if {path.name for path in checkpoints.glob("checkpoint-*")} - before:
                break
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.25) if kill else 0.0)  # the first inside its checkpoint
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    done = train(workspace, "cim-3")
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((out / "log.json").read_text())

    def told(log, key):
        return [(row["step"], row[key]) for row in log if key in row]

    for key in ("reward", "loss", "kl", "eval_reward"):
        assert [step for step, _ in told(found, key)] == [step for step, _ in told(expected, key)], key
        np.testing.assert_allclose(
            [v for _, v in told(found, key)], [v for _, v in told(expected, key)], rtol=1e-4, atol=1e-6
        )
    assert (out / "model.safetensors").read_bytes() == weights
    assert (out / "samples.jsonl").read_text() == samples


def test_a_checkpoint_that_a_kill_cut_short_is_not_gone_on_from(tmp_path):
    made_of = {"run": "cim-0"}
    assert last_checkpoint(tmp_path / "c", made_of) is None
    for step in (1, 2):
        (tmp_path / "c" / f"checkpoint-{step}").mkdir()
    (tmp_path / "c" / "checkpoint-1" / COMPLETE).touch()
    assert last_checkpoint(tmp_path / "c", made_of).endswith("checkpoint-1")
    assert not (tmp_path / "c" / "checkpoint-2").exists()
    assert last_checkpoint(tmp_path / "c", {"run": "cim-1"}) is None


def test_trackers_are_written_or_missed_at_once(workspace):
    pytest.importorskip("tensorboard")
    change(workspace, steps=1, log_to=["tensorboard"])
    done = train(workspace, "grc-0")
    assert done.returncode == 0, done.stderr[-2000:]
    assert list((workspace / "artifacts" / "logs" / "grc-0").rglob("events.out.tfevents*"))
    change(workspace, log_to=["no_such_tracker"])
    done = train(workspace, "grc-1")
    assert done.returncode == 2
    assert "no_such_tracker', which is not installed" in done.stderr


def test_the_published_batches_in_trls_terms():
    """256 prompts x 5 captions a rollout, mini-batches of 64 prompts, two epochs of 6,500 images on eight GPUs."""
    params = compose(["profile=paper"], ROOT / "conf")
    s = group(TrainSettings, params["train"], "train")
    cut = batches(s, 6500, 8)
    assert cut.captions == 256 * 5
    assert cut.per_device * 8 * cut.accumulation == 64 * 5
    assert cut.per_device * 8 * cut.per_rollout == 256 * 5
    assert cut.rollouts == 2 * (6500 // 256)
    assert cut.updates == cut.rollouts * 4
    assert (s.lr, s.kl, s.group_size, s.max_completion, s.freeze_vision) == (1e-6, 0.001, 5, 1024, False)
    assert "256 images x 5 captions = 1280 captions" in cut.lines(s, 6500, 8)[0]


@pytest.mark.parametrize(
    ("changes", "images", "processes", "says"),
    [
        ({}, 3, 1, "a rollout takes 4 images"),
        ({"per_device": 3}, 10, 1, "cannot be shared"),
        ({}, 10, 3, "cannot be shared"),
    ],
)
def test_batches_that_do_not_divide_are_refused(changes, images, processes, says):
    with pytest.raises(CimError, match=says):
        batches(settings(**changes), images, processes)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"epochs": 1.0}, "either steps or epochs"),
        ({"steps": None}, "either steps or epochs"),
        ({"vllm": "somewhere"}, "off, colocate, server"),
        ({"vllm": "server"}, "vllm_url"),
        ({"group_size": 1}, "at least 2"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, says):
    with pytest.raises(ValueError, match=says):
        settings(**changes)


def test_sixteen_bit_weights_are_not_updated_themselves():
    from cim.captioners.models import ModelSettings

    model = ModelSettings(name="x", prompt="y", dtype="bfloat16")
    with pytest.raises(CimError, match="rounded away"):
        check_precision(settings(), model, deepspeed=False)
    check_precision(settings(), model, deepspeed=True)
    check_precision(settings(lora_rank=4), model, deepspeed=False)


@pytest.mark.parametrize("path", sorted((ROOT / "conf" / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerates_configurations_are_what_accelerate_reads(path):
    from accelerate.commands.config.config_args import load_config_from_file

    loaded = load_config_from_file(str(path))
    told = configuration(str(path))
    assert loaded.num_processes == told["num_processes"]
    assert str(getattr(loaded.distributed_type, "value", loaded.distributed_type)) == told["distributed_type"]
    assert "--config_file" in command("cim-0", str(path), 8)


def test_the_launch_command_follows_the_machine():
    assert "--cpu" in command("cim-0", None, 0)
    assert "--multi_gpu" in command("cim-0", None, 8)
    assert command("cim-0", None, 8)[-2:] == ["--run", "cim-0"]
    with pytest.raises(CimError, match=r"nowhere\.yaml"):
        command("cim-0", "nowhere.yaml", 1)


def test_a_plan_tells_what_a_run_takes_and_starts_nothing(workspace):
    params = yaml.safe_load((workspace / "params.yaml").read_text())
    device = Device("a card", 24 * 2**30, 1e14, 1e12)
    lines = "\n".join(plan("cim-0", params, workspace / "artifacts", 1, device))
    for part in (
        "M parameters in float32",
        "16 images to train on",
        "gallery: 80 captioned images",
        "4 images x 5 captions",
        "GiB",
        "time: about",
    ):
        assert part in lines, lines
    assert not (workspace / "artifacts" / "train").exists()
    assert "captions = 1 processes x 4 at once" in "\n".join(plan("sft-0", params, workspace / "artifacts", 1, device))
    with pytest.raises(CimError, match=r"on a device that has 0\.0 GiB"):
        plan("cim-0", params, workspace / "artifacts", 1, Device("a watch", 2**20, 1e9, 1e9))
    params["train"]["lora_rank"] = 2
    assert "LoRA of rank 2" in "\n".join(plan("cim-0", params, workspace / "artifacts", 1, device))


def test_the_plan_of_the_paper_on_its_machine_is_plausible():
    """Sizes as Qwen2.5-VL-7B has them; the estimates must lie where such runs are known to."""
    from cim.captioners.models import ModelSettings
    from cim.train.preflight import GIB, Size, memory

    params = compose(["profile=paper"], ROOT / "conf")
    s, model = group(TrainSettings, params["train"], "train"), group(ModelSettings, params["model"], "model")
    size = Size(8_292_000_000, 8_292_000_000, 28, 3584, 152_064)
    on_eight = memory(size, model, s, 8, 1800, True, 8, "DEEPSPEED")
    assert 10 < on_eight["optimizer"] / GIB < 13  # 12 bytes a weight, an eighth of them
    assert sum(v for k, v in on_eight.items() if k != "vllm") / GIB < 80
    alone = memory(size, ModelSettings(name="x", prompt="y"), s, 8, 1800, True, 1)
    assert sum(alone.values()) / GIB > 80


def test_durations_read_like_a_persons():
    assert [duration(s) for s in (30, 600, 7 * 3600, 86_400 * 3)] == ["30 seconds", "10 minutes", "7 hours", "3 days"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": {"name": "nowhere/none"}}, "model 'nowhere/none' could not be loaded"),
        ({"model": {"max_prompt": 3}}, "more than model.max_prompt=3"),
        ({"train": {"validation": 16}}, "leaves none of the 16 images"),
        ({"train": {"split": "none"}}, "no split 'none'"),
    ],
)
def test_what_would_stop_a_run_stops_its_plan(workspace, changes, says):
    params = yaml.safe_load((workspace / "params.yaml").read_text())
    for name, values in changes.items():
        params[name] |= values
    with pytest.raises(CimError) as stop:
        plan("cim-0", params, workspace / "artifacts", 1, Device("x", 2**40, 1e14, 1e12))
    assert says in str(stop.value)


def test_missing_images_are_told_before_the_model_is_loaded(workspace):
    from cim.data.manifest import read_manifest, write_manifest
    from cim.train.job import training_images

    manifest = read_manifest(workspace / "artifacts" / "dataset" / "manifest.parquet")
    frame = manifest.frame.copy()
    frame.loc[frame["split"] == "train", "image"] = "images/gone.png"
    (workspace / "other").mkdir()
    write_manifest(frame, workspace / "other" / "dataset" / "manifest.parquet", image_root=manifest.image_root)
    with pytest.raises(CimError, match=r"gone.png: image not found, as 16 of 16"):
        training_images(workspace / "other", settings())


def test_the_plan_from_the_command_line(workspace, capsys):
    from cim.cli import __main__ as cli

    cli.main(["train", "--run", "cim-0", "--plan", "--processes", "1"])
    told = capsys.readouterr().out
    assert "a rollout: 4 images x 5 captions = 20 captions" in told
    with pytest.raises(SystemExit):
        cli.main(["train", "--run", "cim-0", "-S", "profile=paper"])
    assert "-S is for --plan" in capsys.readouterr().err
