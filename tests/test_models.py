"""The captioner, its captions, and training it: short real runs."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import yaml

from cim.world.captioner import END, IMAGE, build_processor
from cim.errors import CimError
from cim.gallery.store import fingerprint
from cim.captioners.generate import caption_images
from cim.captioners.models import ModelSettings, chat, hold_batch_norm, load_model
from cim.runs import parse_run
from cim.train.job import StepLog
from cim.train.grpo import grpo_dataset, trim_samples
from cim.train.sft import SftSettings, sft_captions
from cim.world.language import BACKGROUND_PHRASES, describe
from cim.world.scenes import random_scene
from conftest import PROMPT, train


def at(folder) -> ModelSettings:
    return ModelSettings(name=str(folder), prompt=PROMPT)


def weights(folder):
    return load_model(at(folder))[0].state_dict()


def test_the_tokenizer_knows_every_word_and_gives_back_the_text(rng):
    processor = build_processor(112, PROMPT)
    tokenizer = processor.tokenizer
    texts = [describe(random_scene(rng), rng) for _ in range(200)]
    texts += [f"the background is {p}." for phrases in BACKGROUND_PHRASES.values() for p in phrases]
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_the_chat_template_places_image_prompt_and_answer():
    processor = build_processor(112, PROMPT)
    asked = processor.apply_chat_template(chat(PROMPT), add_generation_prompt=True, tokenize=False)
    assert asked == f"<user>{IMAGE}{PROMPT}<assistant>"
    told = [*chat(PROMPT), {"role": "assistant", "content": [{"type": "text", "text": "an owl."}]}]
    assert processor.apply_chat_template(told, tokenize=False) == f"{asked}an owl.{END}"
    blank = torch.zeros(3, 112, 112, dtype=torch.uint8)
    ids = processor(images=[blank], text=[asked])["input_ids"][0]
    assert list(ids).count(processor.tokenizer.convert_tokens_to_ids(IMAGE)) == 16


def test_the_captioner_is_saved_and_loaded_like_any_model(captioner_folder, world):
    assert (captioner_folder / "model.safetensors").is_file()
    model, processor = load_model(at(captioner_folder))
    test = world.split("test")
    captions = caption_images(model, processor, test, at(captioner_folder), 16, batch=8, progress=False)
    assert len(captions) == len(test)
    assert all(isinstance(c, str) for c in captions)
    assert any(captions)
    # The batch does not matter, padding included.
    assert caption_images(model, processor, test, at(captioner_folder), 16, batch=3, progress=False) == captions


def test_its_vision_tower_is_the_encoders_trunk(captioner_folder, encoder_folder):
    import open_clip

    clip, _ = open_clip.create_model_from_pretrained(f"local-dir:{encoder_folder}")
    tower = load_model(at(captioner_folder))[0].model.vision_tower.timm_model.state_dict()
    for name, tensor in clip.visual.trunk.state_dict().items():
        assert torch.equal(tensor, tower[name]), name


def test_batch_norm_is_held(captioner_folder):
    model, _ = load_model(at(captioner_folder))
    assert hold_batch_norm(model) > 0
    model.train()
    norms = [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    assert not any(m.training for m in norms)


@pytest.mark.parametrize("run", ["cim", "best-0", "cim-x", "-1"])
def test_runs_are_named_method_and_seed(run):
    with pytest.raises(CimError, match="METHOD-SEED"):
        parse_run(run)


def test_a_missing_model_is_one_clear_error(tmp_path):
    with pytest.raises(CimError, match="could not be loaded"):
        load_model(at(tmp_path / "nothing"))


def test_annotators_leave_out_and_slip(world):
    settings = SftSettings(batch_size=1, lr=1e-3, steps=1, annotators={"colour": 0.0})
    train_split = world.split("train")
    written = sft_captions("sft", train_split, settings, 0)
    assert not any(colour in " ".join(written).split() for colour in ("red", "blue", "purple"))
    assert sft_captions("sft", train_split, settings, 0) == written
    assert sft_captions("sft_perfect", train_split, settings, 0) == train_split.captions


def test_the_grpo_data_keeps_images_as_files(world):
    data = grpo_dataset(world.split("train"), PROMPT)
    assert set(data.column_names) == {"prompt", "image", "image_id"}
    assert data[0]["image"].size == (112, 112)


def test_grpo_trains_logs_and_leaves_the_vision_tower_alone(workspace, captioner_folder):
    done = train(workspace, "cim-0")
    assert done.returncode == 0, done.stderr[-2000:]
    out = workspace / "artifacts" / "train" / "cim-0"
    log = json.loads((out / "log.json").read_text())
    steps = [row for row in log if "reward" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    assert {"score/grc", "score/qir", "kl", "variety/distinct", "variety/words"} <= set(steps[0])
    before, after = weights(captioner_folder), weights(out)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert not [name for name in moved if "vision_tower" in name]
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert {"step", "image_id", "caption", "reward"} == set(samples[0])
    assert not (workspace / "artifacts" / "checkpoints" / "cim-0").exists()
    # The same seed gives the same run.
    again = train(workspace, "cim-0")
    assert again.returncode == 0
    repeated = [row["reward"] for row in json.loads((out / "log.json").read_text()) if "reward" in row]
    np.testing.assert_allclose(repeated, [row["reward"] for row in steps], rtol=1e-5)


def test_a_killed_run_goes_on_from_its_checkpoint(workspace):
    whole = train(workspace, "cim-1", steps=6)
    assert whole.returncode == 0, whole.stderr[-2000:]
    out = workspace / "artifacts" / "train" / "cim-1"
    expected = [row["reward"] for row in json.loads((out / "log.json").read_text()) if "reward" in row]

    process = subprocess.Popen(
        [sys.executable, "-m", "cim.train", "--run", "cim-1"], cwd=workspace, stdout=subprocess.PIPE, text=True
    )
    checkpoints = workspace / "artifacts" / "checkpoints" / "cim-1"
    deadline = time.time() + 120
    while not list(checkpoints.glob("checkpoint-2/trainer_state.json")) and time.time() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert list(checkpoints.glob("checkpoint-*"))
    resumed = train(workspace, "cim-1")
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    assert "resuming from" in resumed.stdout
    log = [row for row in json.loads((out / "log.json").read_text()) if "reward" in row]
    assert [row["step"] for row in log] == [1, 2, 3, 4, 5, 6]
    np.testing.assert_allclose([row["reward"] for row in log], expected, rtol=1e-4)


def test_lora_trains_and_is_loaded_merged(workspace, captioner_folder, world):
    done = train(workspace, "qir-0", lora_rank=4, steps=2)
    assert done.returncode == 0, done.stderr[-2000:]
    out = workspace / "artifacts" / "train" / "qir-0"
    assert (out / "adapter_config.json").is_file()
    targets = json.loads((out / "adapter_config.json").read_text())["target_modules"]
    assert targets
    before, after = weights(captioner_folder), weights(out)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert not [name for name in moved if "vision_tower" in name]
    model, processor = load_model(at(out))
    assert len(caption_images(model, processor, world.split("test"), at(out), 8, progress=False)) == 8


def test_sft_learns_its_captions(workspace):
    done = train(workspace, "sft_perfect-0")
    assert done.returncode == 0, done.stderr[-2000:]
    log = json.loads((workspace / "artifacts" / "train" / "sft_perfect-0" / "log.json").read_text())
    assert [row["step"] for row in log if "loss" in row] == [1, 2, 3]


def test_grpo_raises_the_reward(workspace, gallery):
    """Real steps of GRPO on a gallery in which snowy captions retrieve the source's look and others do not.

    The image vectors are set by hand, since an encoder trained for a moment tells hardly any images apart.
    """
    folder = workspace / "artifacts" / "gallery"
    folder.unlink()
    shutil.copytree(gallery.folder, folder)
    rewarded = gallery.rows["caption"].str.contains("snow") | gallery.rows["image_id"].str.startswith("train")
    vectors = np.zeros_like(gallery.images)
    vectors[rewarded, 0] = vectors[~rewarded, 1] = 1
    np.save(folder / "images.npy", vectors)
    info = json.loads((folder / "gallery.json").read_text())
    info["files"]["images.npy"]["quick"] = fingerprint(folder / "images.npy")
    (folder / "gallery.json").write_text(json.dumps(info))

    done = train(workspace, "qir-2", steps=36, lr=1e-3, images_per_step=16, max_completion=32, kl=0.0)
    assert done.returncode == 0, done.stderr[-2000:]
    log = json.loads((workspace / "artifacts" / "train" / "qir-2" / "log.json").read_text())
    rewards = np.array([row["reward"] for row in log if "reward" in row])
    assert rewards[-10:].mean() > rewards[:10].mean() + np.std(rewards[:10], ddof=1)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"k": 10_000}, "lower k"),
        ({"beta": -1.0}, "beta"),
        ({"best": 1}, "'reward.best' is not known"),
        ({"k": "three"}, "of type int"),
    ],
)
def test_a_wrong_reward_parameter_stops_training_in_one_line(workspace, change, says):
    params = yaml.safe_load((workspace / "params.yaml").read_text())
    params["reward"] |= change
    (workspace / "params.yaml").write_text(yaml.safe_dump(params))
    done = train(workspace, "cim-0")
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert says in errors[0]
    assert "Traceback" not in done.stderr


def test_samples_of_lost_steps_are_dropped(tmp_path):
    path = tmp_path / "samples.jsonl"
    path.write_text("".join(json.dumps({"step": s}) + "\n" for s in (0, 10, 20)))
    trim_samples(path, str(tmp_path / "checkpoint-15"))
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 10]
    trim_samples(path, None)
    assert path.read_text() == ""


def test_a_collapse_is_warned_of_once(capsys):
    from types import SimpleNamespace

    log = StepLog(warn_distinct=0.2)
    state = SimpleNamespace(is_world_process_zero=True, global_step=1, max_steps=2)
    logs = {"reward": 1.0, "score/grc": 1.0, "score/qir": 0.0, "variety/words": 5.0, "variety/distinct": 0.9}
    log.on_log(None, state, None, logs=logs)
    assert "WARNING" not in capsys.readouterr().out
    for _ in range(2):
        log.on_log(None, state, None, logs={**logs, "variety/distinct": 0.1})
    assert capsys.readouterr().out.count("WARNING") == 1
