"""Invalid input: one clear line each, exit status not 0, nothing lost."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from cim.data.dataset import DatasetSettings, make_dataset
from cim.data.manifest import read_manifest, write_manifest
from cim.errors import CimError
from cim.evaluation.correlation import graded_captions
from cim.images import open_image
from cim.params import group, read_params
from cim.pipeline.compose import compose
from cim.scorer import RewardSettings
from cim.world.raw import directory_hash, make_raw_data
from conftest import ROOT


def cim(*arguments, cwd):
    return subprocess.run([sys.executable, "-m", "cim.cli", *arguments], cwd=cwd, capture_output=True, text=True)


def only_error(done) -> str:
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    return errors[0]


def frame(**changes):
    columns = {"image_id": ["a", "b"], "image": ["a.png", "b.png"], "caption": ["x", "y"], "split": ["test", "test"]}
    return pd.DataFrame(columns | changes)


@pytest.mark.parametrize("image", ["../a.png", "/etc/passwd", "x/../../a.png"])
def test_a_path_that_leaves_the_data_folder(tmp_path, image):
    write_manifest(frame(image=["a.png", image]), tmp_path / "m.parquet")
    with pytest.raises(CimError, match="leaves the data folder"):
        read_manifest(tmp_path / "m.parquet")


def test_other_bad_manifests(tmp_path):
    with pytest.raises(CimError, match="not found"):
        read_manifest(tmp_path / "m.parquet")
    (tmp_path / "m.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(CimError, match="not a readable Parquet"):
        read_manifest(tmp_path / "m.parquet")
    write_manifest(frame(image_id=["a", "a"]), tmp_path / "m.parquet")
    with pytest.raises(CimError, match="'a' occurs more than once"):
        read_manifest(tmp_path / "m.parquet")
    write_manifest(frame().drop(columns="caption"), tmp_path / "m.parquet")
    with pytest.raises(CimError, match="column 'caption' is missing"):
        read_manifest(tmp_path / "m.parquet")
    write_manifest(frame(), tmp_path / "m.parquet")
    with pytest.raises(CimError, match="no split 'train'; it has test"):
        read_manifest(tmp_path / "m.parquet").split("train")


def test_unreadable_images_are_named(tmp_path):
    with pytest.raises(CimError, match=r"a\.png: image not found"):
        open_image(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    with pytest.raises(CimError, match=r"a\.png: unreadable image"):
        open_image(tmp_path / "a.png")


def test_flickr8k_folders(tmp_path, capsys):
    from PIL import Image

    settings = DatasetSettings(source="flickr8k", folder=str(tmp_path))
    with pytest.raises(CimError, match=r"captions\.txt: not found"):
        make_dataset(settings, tmp_path / "out")
    (tmp_path / "captions.txt").write_text("photo;text\n")
    with pytest.raises(CimError, match="first line"):
        make_dataset(settings, tmp_path / "out")
    lines = ["image,caption"] + [f"{i}.jpg,a {w} dog, running ." for i in range(4) for w in ("big", "brown", "happy")]
    (tmp_path / "captions.txt").write_text("\n".join(lines) + "\n9.jpg,gone\n")
    with pytest.raises(CimError, match=r"none of the 5 photos in captions\.txt is there"):
        make_dataset(settings, tmp_path / "out")
    (tmp_path / "Images").mkdir()
    for i in range(4):
        Image.new("RGB", (8, 8)).save(tmp_path / "Images" / f"{i}.jpg")
    assert len(read_manifest(make_dataset(settings, tmp_path / "out"))) == 4
    assert "1 of 5 photos are not in" in capsys.readouterr().out
    # A byte order mark and empty lines are accepted; empty captions are left out.
    (tmp_path / "captions.txt").write_text("\ufeff" + "\n".join([*lines, "", "3.jpg, "]) + "\n", encoding="utf-8")
    manifest = read_manifest(make_dataset(settings, tmp_path / "out"))
    assert manifest.captions == ["a big dog, running ."] * 4
    assert open_image(manifest.image_paths[0]).size == (8, 8)
    ladder = graded_captions(manifest, np.random.default_rng(0))
    first = ladder[ladder["image_id"] == "0"].set_index("label")["caption"]
    assert first["first two words"] == "a brown"
    assert first["all captions"] == "a brown dog, running . a happy dog, running ."


def test_the_reference_photos(reference, tmp_path):
    settings = DatasetSettings(source="flickr8k", folder=str(reference / "flickr8k_sample"))
    manifest = read_manifest(make_dataset(settings, tmp_path / "out"))
    assert len(manifest) == 1000
    ladder = graded_captions(manifest, np.random.default_rng(0))
    assert len(ladder) == 7000
    # The caption of another image is never the image's own.
    foreign = ladder[ladder["label"] == "another image's"].set_index("image_id")["caption"]
    own = ladder[ladder["label"] == "one caption"].drop_duplicates("image_id").set_index("image_id")["caption"]
    assert (foreign != own.loc[foreign.index]).mean() > 0.99


def test_oxford_pets_photos_are_not_confused_with_their_masks(tmp_path):
    """The published layout: photos in images/, masks of the same stems in annotations/trimaps/."""
    from PIL import Image

    names = [f"{breed}_{i}" for breed in ("Abyssinian", "beagle") for i in range(1, 5)]
    for folder, suffix in (("images", "jpg"), ("annotations/trimaps", "png")):
        (tmp_path / folder).mkdir(parents=True)
        for name in names:
            Image.new("RGB", (8, 8)).save(tmp_path / folder / f"{name}.{suffix}")
    (tmp_path / "annotations" / "trimaps" / "._Abyssinian_1.png").write_bytes(b"")  # as in the published archive
    lines = ["#Image CLASS-ID SPECIES BREED ID", *(f"{n} 1 {1 + n.startswith('b')} 1" for n in names)]
    (tmp_path / "annotations" / "list.txt").write_text("\n".join(lines) + "\n")
    settings = DatasetSettings(source="oxford_pet", folder=str(tmp_path))
    manifest = read_manifest(make_dataset(settings, tmp_path / "out"))
    assert [path.relative_to(tmp_path) for path in manifest.image_paths] == [Path("images", f"{n}.jpg") for n in names]
    assert manifest.frame["split"].tolist() == ["gallery", "test"] * 4
    whole = settings.model_copy(update={"images": str(tmp_path)})
    with pytest.raises(CimError, match=r"may be .*trimaps/Abyssinian_1\.png or .*images/Abyssinian_1\.jpg"):
        make_dataset(whole, tmp_path / "out")
    (tmp_path / "images" / "beagle_2.jpg").unlink()
    with pytest.raises(CimError, match="1 of 8 images are missing, 'beagle_2' among them"):
        make_dataset(settings, tmp_path / "out")


def test_raw_inputs_go_into_no_folder_that_holds_something_else(tmp_path):
    (tmp_path / "data" / "objects").mkdir(parents=True)
    (tmp_path / "data" / "objects" / "owl.png").write_text("mine")
    with pytest.raises(CimError, match=r"is not empty and not a folder of raw inputs \(it has no ATTRIBUTION\.txt\)"):
        make_raw_data(tmp_path / "data", tmp_path / "data.dvc")
    assert (tmp_path / "data" / "objects" / "owl.png").read_text() == "mine"


def test_raw_data_is_deterministic_and_checked_against_its_hash(raw_data, tmp_path):
    pinned = yaml.safe_load((ROOT / "data.dvc").read_text())["outs"][0]["md5"]
    assert directory_hash(raw_data) == pinned
    make_raw_data(tmp_path / "data", ROOT / "data.dvc")
    (tmp_path / "data" / "stray.txt").write_text("x")
    with pytest.raises(CimError, match="is not the"):
        make_raw_data(tmp_path / "data", ROOT / "data.dvc")


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (None, "group 'reward' is missing"),
        ({"kk": 3}, "'reward.kk' is unknown; 'reward' takes k, beta"),
        ({"k": 0}, "'reward.k' should be greater than 0, not 0"),
        ({"k": 2.5}, "'reward.k' should be a valid integer, not 2.5"),
        ({"decay": 0}, "'reward.decay' should be greater than 0, not 0"),
        ({"exclude_source": "yes"}, "'reward.exclude_source' should be a valid boolean, not 'yes'"),
    ],
)
def test_wrong_parameters_are_named(values, says):
    with pytest.raises(CimError, match=says):
        group(RewardSettings, values, "reward")


def test_params_files(tmp_path):
    with pytest.raises(CimError, match="not found"):
        read_params(tmp_path / "params.yaml")
    (tmp_path / "params.yaml").write_text("a: [")
    with pytest.raises(CimError, match="not valid YAML"):
        read_params(tmp_path / "params.yaml")
    (tmp_path / "params.yaml").write_text("- a")
    with pytest.raises(CimError, match="named groups"):
        read_params(tmp_path / "params.yaml")


@pytest.mark.parametrize("override", ["profile=none", "train.stepz=3", "nonsense"])
def test_overrides_that_do_not_compose(override):
    with pytest.raises(CimError, match="parameters: "):
        compose([override], ROOT / "conf")


def test_the_command_line_fails_in_one_line(tmp_path):
    assert "params.yaml: not found" in only_error(cim("run", "dataset", cwd=tmp_path))
    (tmp_path / "params.yaml").write_text("dataset: {source: world, folder: nowhere, pretrain: 2}\n")
    assert "cim data" in only_error(cim("run", "dataset", cwd=tmp_path))
    (tmp_path / "params.yaml").write_text("dataset: {source: mars, folder: nowhere}\n")
    assert "'mars' is unknown" in only_error(cim("run", "dataset", cwd=tmp_path))
    assert "conf" in only_error(cim("params", "-S", "profile=smoke", cwd=tmp_path))


def test_a_failing_notebook_stage_fails_in_one_line_and_keeps_its_report(tmp_path):
    (tmp_path / "notebooks").symlink_to(ROOT / "notebooks")
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    message = only_error(cim("run", "gallery", cwd=tmp_path))
    assert "manifest not found" in message
    assert "reports/gallery.failed.ipynb" in message
    assert (tmp_path / "reports" / "gallery.failed.ipynb").is_file()
    assert not (tmp_path / "reports" / "gallery.ipynb").exists()


def test_help_names_the_commands():
    done = cim("--help", cwd=Path.cwd())
    assert done.returncode == 0
    assert "pipeline" in done.stdout
