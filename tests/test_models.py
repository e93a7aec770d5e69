"""The captioner, its captions, and training it: short real runs."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cim.captioners.generate import caption_images, sample_captions
from cim.captioners.models import ModelSettings, chat, hold_batch_norm, load_model, prompt_inputs
from cim.data.annotators import written_captions
from cim.errors import CimError
from cim.fastvlm import END, IMAGE
from cim.gallery.store import fingerprint
from cim.images import open_image
from cim.runs import parse_run
from cim.train import __main__ as command
from cim.train import job
from cim.train.job import Job, image_dataset
from cim.train.log import StepLog
from cim.train.reward import SampleLog
from cim.train.sft import labels
from cim.world.captioner import build_processor
from cim.world.language import BACKGROUND_PHRASES, describe
from cim.world.scenes import Scene, random_scene
from cim.world.vocabulary import COLOURS
from conftest import PROMPT, change, moved, train


def at(folder) -> ModelSettings:
    return ModelSettings(name=str(folder), prompt=PROMPT)


def steps(out, key="reward"):
    """The rows of a run's log that have this value."""
    return [row for row in json.loads((out / "log.json").read_text()) if key in row]


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
    answered = [*chat(PROMPT), {"role": "assistant", "content": [{"type": "text", "text": "an owl."}]}]
    assert processor.apply_chat_template(answered, tokenize=False) == f"{asked}an owl.{END}"
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


def test_likelihoods_are_those_of_the_models_own_logits(captioner_folder, world):
    """Which `generate` can return, if there is memory for those of all steps; a penalty of its own changes none."""
    model, processor = load_model(at(captioner_folder))
    model.generation_config.repetition_penalty = 1.3
    end = processor.tokenizer.eos_token_id
    images = world.split("test").take(range(4))
    sampled = sample_captions(model, processor, images, at(captioner_folder), 3, 12, seed=5, batch=2, progress=False)
    torch.manual_seed(5)
    likelihoods = []
    for rows in ([0, 1], [2, 3]):
        part = images.take(rows)
        inputs = prompt_inputs(processor, [open_image(path) for path in part.image_paths], at(captioner_folder))
        out = model.generate(
            **inputs.to(model.device), max_new_tokens=12, do_sample=True, top_k=0, num_return_sequences=3,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        answers = out.sequences[:, inputs["input_ids"].shape[1] :]
        chosen = torch.stack(out.logits, 1).log_softmax(-1).gather(-1, answers[..., None])[..., 0].tolist()
        for row, answer in zip(chosen, answers.tolist(), strict=True):
            said = answer.index(end) + 1 if end in answer else len(answer)
            likelihoods.append(np.mean(row[:said]))
    assert sampled["likelihood"].tolist() == pytest.approx(likelihoods, abs=1e-6)


def test_its_vision_tower_is_the_encoders_trunk(captioner_folder, encoder_folder):
    import open_clip

    clip, _ = open_clip.create_model_from_pretrained(f"local-dir:{encoder_folder}")
    tower = load_model(at(captioner_folder))[0].model.vision_tower.timm_model.state_dict()
    for name, tensor in clip.visual.trunk.state_dict().items():
        assert torch.equal(tensor, tower[name].cpu()), name


def test_batch_norm_is_held(captioner_folder):
    model, _ = load_model(at(captioner_folder))
    hold_batch_norm(model)
    model.train()
    norms = [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    assert norms
    assert not any(m.training for m in norms)


@pytest.mark.parametrize("run", ["cim", "be.st-0", "cim-x", "-1"])
def test_runs_are_named_method_and_seed(run):
    with pytest.raises(CimError, match="METHOD-SEED"):
        parse_run(run)


def test_a_missing_model_is_one_clear_error(tmp_path):
    with pytest.raises(CimError, match="could not be loaded"):
        load_model(at(tmp_path / "nothing"))


def test_weights_that_are_damaged_or_incomplete_are_one_clear_error(captioner_folder, tmp_path):
    folder = shutil.copytree(captioner_folder, tmp_path / "model")
    path = folder / "model.safetensors"
    weights = load_file(path)
    lacking = next(name for name in weights if "layers.0" in name)
    save_file({name: tensor for name, tensor in weights.items() if name != lacking}, path, {"format": "pt"})
    with pytest.raises(CimError, match=r"could not be loaded: its weights lack .*layers\.0.* and 0 more"):
        load_model(at(folder))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CimError, match="could not be loaded"):
        load_model(at(folder))


def test_annotators_leave_out_and_slip(world):
    train_split = world.split("train")
    true = [{item.colour for item in Scene.from_json(scene).objects} for scene in train_split.frame["scene"]]

    def false_colours(slip_rate: float) -> int:
        written = written_captions(train_split, {}, slip_rate, seed=0)
        stated = [set(caption.split()) & set(COLOURS) for caption in written]
        return sum(len(said - known) for said, known in zip(stated, true, strict=True))

    assert false_colours(0.0) == 0
    assert false_colours(0.5) > 4
    written = written_captions(train_split, {"colour": 0.0}, 0.0, seed=0)
    assert not any(colour in " ".join(written).split() for colour in ("red", "blue", "purple"))
    assert written_captions(train_split, {"colour": 0.0}, 0.0, seed=0) == written


def test_training_data_keeps_images_as_files(world):
    images = world.split("train")
    data = image_dataset(images, {"image_id": images.frame["image_id"].tolist()}, max_pixels=None)
    assert set(data.column_names) == {"image_id", "images"}
    assert data[0]["images"][0].size == (112, 112)
    assert image_dataset(images, {}, max_pixels=784)[:2]["images"][1][0].size == (28, 28)


def test_an_image_is_opened_once_for_all_captions_and_passes_of_a_rollout(world, monkeypatch):
    images, opened = world.split("train"), []
    monkeypatch.setattr(job, "open_image", lambda path: opened.append(Path(path)) or open_image(path))
    data = image_dataset(images, {}, max_pixels=None)
    for rollout in ([0, 0, 1], [1, 0, 0], [2, 2], [0, 1]):  # the last: only the batch before is kept
        expected = [[open_image(images.image_paths[i])] for i in rollout]
        assert data[rollout]["images"] == expected
    assert sorted(map(images.image_paths.index, opened)) == [0, 0, 1, 1, 2]


def test_grpo_trains_logs_and_leaves_the_vision_tower_alone(trained, captioner_folder):
    out = trained / "artifacts" / "train" / "cim-0"
    assert [row["step"] for row in steps(out)] == [1, 2, 3, 4]
    assert {"score/grc", "score/qir", "kl", "variety/distinct", "variety/words"} <= set(steps(out)[0])
    changed = moved(at(captioner_folder), at(out))
    assert changed
    assert not [name for name in changed if "vision_tower" in name]
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert {"step", "image_id", "caption", "reward"} == set(samples[0])
    assert len(samples) == 2 * 5  # two images of step 0
    assert not list((trained / "artifacts" / "checkpoints").rglob("checkpoint-*"))


def test_the_same_seed_gives_the_same_run_and_another_does_not(workspace, trained):
    first = trained / "artifacts" / "train" / "cim-0" / "model.safetensors"
    assert (train("cim-0") / "model.safetensors").read_bytes() == first.read_bytes()
    assert (train("cim-1") / "model.safetensors").read_bytes() != first.read_bytes()


def test_lora_trains_and_is_loaded_merged(workspace, captioner_folder, world, capsys):
    out = train("qir-0", train={"lora_rank": 4, "steps": 2})
    assert json.loads((out / "adapter_config.json").read_text())["target_modules"]
    changed = moved(at(captioner_folder), at(out))
    assert changed
    assert not [name for name in changed if "vision_tower" in name]
    model, processor = load_model(at(out))
    assert len(caption_images(model, processor, world.split("test"), at(out), 8, progress=False)) == 8
    assert not (out / "merged").exists()
    capsys.readouterr()
    train("qir-0", train={"merge": True})  # later: the kept adapter is merged
    assert "kept: artifacts/train/qir-0" in capsys.readouterr().out
    assert not moved(at(out), at(out / "merged"))
    # A run with other parameters in the same folder leaves no adapter behind.
    out = train("qir-0", train={"lora_rank": 0})
    assert not (out / "adapter_config.json").exists()
    assert not (out / "merged").exists()
    assert moved(at(captioner_folder), at(out))


def test_sft_learns_its_captions(workspace):
    params = change(sft={"slip_rate": 0.5, "annotators": {"colour": 0.0}})
    perfect, usual = (Job(run, params, Path("artifacts")) for run in ("sft_perfect-3", "sft-3"))
    assert labels(perfect, perfect.images) == perfect.images.captions
    written = written_captions(usual.images, {"colour": 0.0}, 0.5, seed=3)
    assert labels(usual, usual.images) == written != usual.images.captions


def test_grpo_raises_the_reward(workspace, gallery):
    """Real steps of GRPO on a gallery in which snowy captions retrieve the source's look and others do not.

    The image vectors are set by hand, since an encoder trained for a moment hardly distinguishes images.
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

    out = train("qir-2", train={"steps": 30, "lr": 2e-3, "images_per_step": 8, "max_completion": 16, "kl": 0.0})
    rewards = np.array([row["reward"] for row in steps(out)])
    assert rewards[-10:].mean() > rewards[:10].mean() + np.std(rewards[:10], ddof=1)


@pytest.mark.parametrize(
    ("reward", "says"),
    [
        ({"k": 10_000}, "lower k"),
        ({"beta": -1.0}, "reward.beta"),
        ({"best": 1}, "'reward.best' is unknown"),
        ({"k": "three"}, "'reward.k' should be a valid integer"),
    ],
)
def test_a_wrong_reward_parameter_stops_training_in_one_line(workspace, monkeypatch, capsys, reward, says):
    change(reward=reward)
    monkeypatch.setattr("sys.argv", ["cim.train", "--run", "cim-0"])
    with pytest.raises(SystemExit) as stop:
        command.main()
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert says in errors[0]
    assert "Traceback" not in printed


def test_samples_are_of_training_images_and_those_of_repeated_steps_are_dropped(tmp_path):
    from types import SimpleNamespace

    path = tmp_path / "samples.jsonl"
    path.write_text("".join(json.dumps({"step": s}) + "\n" for s in (0, 10, 20)))

    def reward(completions, image_id, **columns):
        return [1.0] * len(completions)

    log = SampleLog(reward, path, {"a", "b", "c"})
    for step, images in ((15, "ab"), (20, "xabc"), (21, "ab")):
        state = SimpleNamespace(is_world_process_zero=True, global_step=step)
        said = [[{"role": "assistant", "content": f"an {image}."}] for image in images]
        assert log(completions=said, image_id=list(images), trainer_state=state) == [1.0] * len(images)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["step"], row.get("caption")) for row in rows] == [(0, None), (10, None), (20, "an a."), (20, "an b.")]


def test_a_collapse_is_warned_of_once(capsys):
    from types import SimpleNamespace

    log = StepLog(warn_distinct=0.2)
    state, given = SimpleNamespace(global_step=0, save_steps=8), SimpleNamespace(save_steps=2, eval_steps=2)
    log.on_train_begin(given, state, None)
    assert (state.save_steps, state.eval_steps) == (2, 2)  # of the parameters, not of a checkpoint
    state = SimpleNamespace(is_world_process_zero=True, global_step=1, max_steps=2)
    logs = {"reward": 1.0, "score/grc": 1.0, "score/qir": 0.0, "variety/words": 5.0, "variety/distinct": 0.9}
    log.on_log(None, state, None, logs=logs)
    assert (
        capsys.readouterr().out
        == "step 1/2  reward 1.000  grc 1.000  qir 0.000  words 5.0  distinct 0.90  0:00:00 left\n"
    )
    for _ in range(2):
        log.on_log(None, state, None, logs={**logs, "variety/distinct": 0.1})
    assert capsys.readouterr().out.count("WARNING") == 1
    log.on_log(None, state, None, logs={"eval_loss": 1.5, "eval_runtime": 3.0})
    log.on_log(None, state, None, logs={"train_runtime": 3.0})
    assert capsys.readouterr().out == "step 1/2  validation loss 1.500  0:00:00 left\n"
