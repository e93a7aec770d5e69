"""Invalid input: one clear line each, exit status not 0, nothing lost."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image

from cim.data import flickr8k
from cim.data.dataset import DatasetSettings, make_dataset
from cim.data.flickr8k import human_captions
from cim.data.manifest import joined, read_manifest, row, write_manifest
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
    return pd.DataFrame(columns | {"digest": ["1", "2"]} | changes)


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
    for column in ("caption", "digest"):
        write_manifest(frame().drop(columns=column), tmp_path / "m.parquet")
        with pytest.raises(CimError, match=f"column '{column}' is missing"):
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


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_an_archive_in_a_folder_with_an_exclamation_mark(tmp_path, kind):
    for folder in ("hey!", "a.b!"):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (2, 3)).save(tmp_path / folder / "1!.png")
        shutil.make_archive(tmp_path / folder / "z", kind, tmp_path / folder, "1!.png")
        assert open_image(tmp_path / folder / "1!.png").size == (2, 3)
        assert open_image(f"{tmp_path}/{folder}/z.{kind}!1!.png").size == (2, 3)
    with pytest.raises(CimError, match="cannot be opened one by one"):
        open_image(f"{tmp_path}/hey!/z.parquet!0.1")


def test_no_image_is_left(tmp_path):
    with pytest.raises(CimError, match="no image is left"):
        joined([])


@pytest.mark.parametrize("kind", [RuntimeError, NotImplementedError, TypeError])
def test_whatever_pillow_says_of_a_damaged_image_is_one_error(tmp_path, monkeypatch, kind):
    def damaged(content):
        raise kind("truncated")

    monkeypatch.setattr(Image, "open", damaged)
    with pytest.raises(CimError, match=r"a\.avif: unreadable image \(truncated\)"):
        open_image(b"content", name="a.avif")


def test_an_image_of_two_splits_keeps_the_later_one(tmp_path, capsys):
    rows = [row(tmp_path / "images" / f"{name}.png", "x", split, "some") for name, split in ("at", "bt", "ae")]
    frame, root = joined(rows)
    assert "1 images are in more than one split" in capsys.readouterr().out
    assert frame[["image_id", "image", "split"]].to_numpy().tolist() == [["b", "b.png", "t"], ["a", "a.png", "e"]]
    assert root == tmp_path / "images"


@pytest.fixture
def flickr8k_folder(tmp_path):
    """Ten photos in Flickr8k's layout, each with three captions, and its split files; photo 9 is in none."""
    (tmp_path / "Images").mkdir()
    for i in range(10):
        Image.new("RGB", (8, 8)).save(tmp_path / "Images" / f"{i}.jpg")
    lines = [f"{i}.jpg,a {w} dog, running ." for i in range(10) for w in ("big", "brown", "happy")]
    (tmp_path / "captions.txt").write_text("\n".join(["image,caption", *lines]) + "\n")
    for name, images in {"train": (5, 4, 0, 1), "dev": (2, 3), "test": (8, 7, 6)}.items():
        (tmp_path / f"Flickr_8k.{name}Images.txt").write_text("".join(f"{i}.jpg\n" for i in images))
    return tmp_path


def read_flickr8k(folder, **settings):
    settings = DatasetSettings(source="flickr8k", folder=str(folder), **settings)
    return read_manifest(make_dataset(settings, folder / "out"))


def splits(manifest):
    return manifest.frame.groupby("split")["image_id"].agg("".join).to_dict()


def test_flickr8k_splits(flickr8k_folder):
    published = {"pretrain": "45", "train": "01", "dev": "23", "test": "678", "other": "9"}
    manifest = read_flickr8k(flickr8k_folder)
    assert splits(manifest) == published
    assert human_captions(manifest.frame)[3] == [
        "a big dog, running .",
        "a brown dog, running .",
        "a happy dog, running .",
    ]
    # A limit takes the first of the split file.
    limited = read_flickr8k(flickr8k_folder, pretrain=1, train=1, test=2)
    assert splits(limited) == {"pretrain": "5", "train": "0", "dev": "23", "test": "78", "other": "9"}
    # The published archives: another folder of photos, and captions by their ids.
    (flickr8k_folder / "Images").rename(flickr8k_folder / "Flicker8k_Dataset")
    (flickr8k_folder / "captions.txt").rename(flickr8k_folder / "old.txt")
    lines = [f'{i}.jpg#{j}\ta "{w} dog' for i in range(10) for j, w in enumerate(("big", "small"))]
    (flickr8k_folder / "Flickr8k.token.txt").write_text("\n".join(lines))
    manifest = read_flickr8k(flickr8k_folder)
    assert splits(manifest) == published
    assert human_captions(manifest.frame) == [['a "big dog', 'a "small dog']] * 10
    for name in ("train", "dev", "test"):
        (flickr8k_folder / f"Flickr_8k.{name}Images.txt").unlink()
    assert splits(read_flickr8k(flickr8k_folder, train=1)) == {"gallery": "0123456789"}


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("captions.txt", None, "holds neither Flickr8k.token.txt nor captions.txt"),
        ("captions.txt", "photo;text\n", "captions.txt: the first line should be 'image,caption'"),
        ("captions.txt", "", "captions.txt: the first line"),
        ("captions.txt", "image,caption\n1.jpg\n,text\n", "captions.txt: holds no captions"),
        ("captions.txt", "image,caption\n1.jpg,a dog\n", "trainImages.txt: 3 of 4 images have no caption, '5.jpg'"),
        ("Flickr8k.token.txt", "1.jpg a dog\n1.jpg\ta dog\n", "token.txt: holds no captions"),
        ("Flickr_8k.devImages.txt", None, "devImages.txt: not found; restore it, or remove the other"),
        ("Flickr_8k.devImages.txt", "2.jpg\n3.png\n", "devImages.txt: 1 of 2 images have no caption, '3.png'"),
        ("Flickr_8k.testImages.txt", "8.jpg\n1.jpg\n", "testImages.txt: '1.jpg' is in Flickr_8k.trainImages.txt too"),
        ("Images", None, "Images: none of the 10 photos with captions is there; set dataset.images"),
    ],
)
def test_bad_flickr8k_folders(flickr8k_folder, file, content, says):
    if content is None:
        (flickr8k_folder / file).rename(flickr8k_folder / "away")
    else:
        (flickr8k_folder / file).write_text(content)
    with pytest.raises(CimError, match=says):
        read_flickr8k(flickr8k_folder)


def test_damaged_flickr8k_captions_are_left_out(flickr8k_folder, capsys):
    listing = flickr8k_folder / "captions.txt"
    good = listing.read_bytes()
    damaged = b'10.jpg,gone\n\n3.jpg, \n,nothing\n4.jpg\n5.jpg,"never closed\n6.jpg,not \xff UTF-8\n'
    # A byte order mark, Windows line ends and empty lines are accepted.
    listing.write_bytes(b"\xef\xbb\xbf" + good.replace(b"\n", b"\r\n") + damaged)
    Image.new("RGB", (8, 8)).save(flickr8k_folder / "Images" / "x.jpg")
    manifest = read_flickr8k(flickr8k_folder)
    printed = capsys.readouterr().out
    assert "captions.txt: 4 of 36 lines are damaged" in printed
    assert "1 of 11 photos are not in" in printed
    assert "1 photos in" in printed
    assert "'x.jpg' among them" in printed
    assert manifest.captions == ["a big dog, running ."] * 10
    assert [len(own) for own in human_captions(manifest.frame)] == [3, 3, 3, 3, 3, 4, 3, 3, 3, 3]
    ladder = graded_captions(manifest, np.random.default_rng(0))
    first = ladder[ladder["image_id"] == "0"].set_index("label")["caption"]
    assert first["first two words"] == "a brown"
    assert first["all captions"] == "a brown dog, running . a happy dog, running ."
    assert open_image(manifest.image_paths[0]).size == (8, 8)


def test_all_of_flickr8k(reference):
    frame, _ = flickr8k.read(reference / "flickr8k", None)
    counts = {"pretrain": 3000, "train": 3000, "dev": 1000, "test": 1000, "other": 91}
    assert frame["split"].value_counts().to_dict() == counts
    assert {len(own) for own in human_captions(frame)} == {5}


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


@pytest.mark.parametrize("path", sorted((ROOT / "conf" / "reward").glob("*.yaml")), ids=lambda path: path.stem)
def test_each_named_reward_is_the_same_as_a_file_and_in_the_pipeline(path):
    settings = group(RewardSettings, read_params(path), "reward")
    assert settings.model_dump() == compose([f"reward={path.stem}"], ROOT / "conf")["reward"]
    default = RewardSettings()
    named = {"cim": default, "published": default.model_copy(update={"exclude_source": False})}
    assert settings == named.get(path.stem, settings)


def test_params_files(tmp_path):
    with pytest.raises(CimError, match="not found"):
        read_params(tmp_path / "params.yaml")
    (tmp_path / "params.yaml").write_text("a: [")
    with pytest.raises(CimError, match="not valid YAML"):
        read_params(tmp_path / "params.yaml")
    (tmp_path / "params.yaml").write_text("- a")
    with pytest.raises(CimError, match="named groups"):
        read_params(tmp_path / "params.yaml")


@pytest.mark.parametrize("override", ["profile=none", "train.stepz=3", "nonsense", "captioner=null"])
def test_overrides_that_do_not_compose(override):
    with pytest.raises(CimError, match="parameters: "):
        compose([override], ROOT / "conf")


@pytest.mark.slow
def test_the_command_line_fails_in_one_line(tmp_path):
    assert "params.yaml: not found" in only_error(cim("run", "dataset", cwd=tmp_path))
    params = (ROOT / "params.yaml").read_text()
    (tmp_path / "params.yaml").write_text(params.replace("  folder: data\n", "  folder: nowhere\n"))
    assert "cim data" in only_error(cim("run", "dataset", cwd=tmp_path))
    (tmp_path / "params.yaml").write_text(params.replace("  source: world\n", "  source: mars\n"))
    assert "'mars' is unknown" in only_error(cim("run", "dataset", cwd=tmp_path))
    assert "conf" in only_error(cim("params", "-S", "profile=smoke", cwd=tmp_path))


@pytest.mark.slow
def test_a_failing_notebook_stage_fails_in_one_line_and_keeps_its_report(tmp_path):
    (tmp_path / "notebooks").symlink_to(ROOT / "notebooks")
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    message = only_error(cim("run", "gallery", cwd=tmp_path))
    assert "manifest not found" in message
    assert "reports/gallery.failed.ipynb" in message
    assert (tmp_path / "reports" / "gallery.failed.ipynb").is_file()
    assert not (tmp_path / "reports" / "gallery.ipynb").exists()


@pytest.mark.slow
def test_help_names_the_commands():
    done = cim("--help", cwd=Path.cwd())
    assert done.returncode == 0
    assert "pipeline" in done.stdout


def test_the_reference_of_an_image_with_several_captions_is_all_of_them():
    from cim.data.labels import labels_of
    from cim.data.manifest import Manifest

    frame = pd.DataFrame({"image_id": ["a", "b"], "caption": ["One.", "Two."], "queries": ['["More.", "Most."]', "[]"]})
    assert labels_of(Manifest(frame, Path()), "x").references == {"a": "One.\nMore.\nMost.", "b": "Two."}
    assert labels_of(Manifest(frame.drop(columns="queries"), Path()), "x").references == {"a": "One.", "b": "Two."}
