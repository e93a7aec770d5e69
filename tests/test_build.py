"""Large galleries: sources, building in shards, enlarging, and everything that can go wrong on the way."""

import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from contextlib import chdir
from copy import copy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from cim.cli import __main__ as cli
from cim.data.manifest import Manifest
from cim.errors import CimError
from cim.files import locked
from cim.gallery import build, store
from cim.gallery.build import build_gallery, rebuild_index
from cim.gallery.settings import BuildSettings, GallerySettings
from cim.gallery.shards import Record, Shard, gallery_shards, shards_of
from cim.gallery.store import fingerprint, load_gallery
from cim.images import open_image
from conftest import ROOT, files_of, write_jsonl

SETTINGS = BuildSettings()


@pytest.fixture(scope="module")
def rows(world):
    """Forty captioned images: image_id, absolute image path, caption."""
    part = world.split("gallery").take(range(40))
    return pd.DataFrame(
        {
            "image_id": part.frame["image_id"],
            "image": [str(p.resolve()) for p in part.image_paths],
            "caption": part.captions,
        }
    )


def write_tar(path, rows, json_captions=False):
    with tarfile.open(path, "w") as tar:
        for r in rows.to_dict("records"):
            caption = json.dumps({"caption": r["caption"]}) if json_captions else r["caption"]
            members = {".png": Path(r["image"]).read_bytes(), ".json" if json_captions else ".txt": caption.encode()}
            for suffix, content in members.items():
                info = tarfile.TarInfo(r["image_id"] + suffix)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def read(shards):
    return [record for shard in shards for record in shard.read()]


def same_gallery(a, b):
    return (
        np.allclose(a.texts, b.texts, atol=2e-3 if torch.cuda.is_available() else 0)  # a GPU's depend on the batch
        and np.allclose(a.images, b.images, atol=2e-3)
        and a.rows["image_id"].tolist() == b.rows["image_id"].tolist()
    )


def test_every_kind_of_source_gives_the_same_records(rows, tmp_path, monkeypatch):
    content = rows.assign(image=[Path(p).read_bytes() for p in rows["image"]])
    struct = rows.assign(image=[{"bytes": Path(p).read_bytes(), "path": f"x/{i}"} for i, p in enumerate(rows["image"])])
    for name, frame in (("paths", rows), ("bytes", content), ("struct", struct)):
        frame.to_parquet(tmp_path / f"{name}.parquet", row_group_size=17)
    monkeypatch.setattr("cim.gallery.shards.READ", 4)  # shards of a row group begin within what is read at once
    sources = [
        tmp_path / "paths.parquet",
        tmp_path / "bytes.parquet",
        tmp_path / "struct.parquet",
        write_jsonl(tmp_path / "rows.jsonl", rows),
        write_tar(tmp_path / "txt.tar", rows),
        write_tar(tmp_path / "json.tar", rows, json_captions=True),
    ]
    expected = [np.asarray(Record("", "", image).open()) for image in rows["image"]]
    for source in sources:
        shards = shards_of([source], rows=7)
        assert len({shard.name for shard in shards}) == len(shards)
        records = read(shards)
        assert [r.image_id for r in records] == rows["image_id"].tolist(), source
        assert [r.caption for r in records] == rows["caption"].tolist(), source
        for record, pixels in zip(records[:3], expected, strict=False):
            assert (np.asarray(record.open()) == pixels).all(), source
    assert len(read(shards_of([tmp_path], rows=100))) == 6 * 40
    member = read(shards_of([tmp_path / "txt.tar"], 7))[0].image
    assert (np.asarray(open_image(member)) == expected[0]).all()


def test_sources_that_cannot_be_used_are_named(rows, tmp_path):
    (tmp_path / "empty").mkdir()
    rows.drop(columns="caption").to_parquet(tmp_path / "no_caption.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no")
    (tmp_path / "broken.jsonl").write_text('{"image": "a.png"}\n')
    (tmp_path / "cut.tar").write_bytes(write_tar(tmp_path / "whole.tar", rows).read_bytes()[:3000])
    (tmp_path / "rows.csv").write_text("image,caption\n")
    for name, says in (
        ("nowhere.jsonl", "not found"),
        ("empty", "no rows in .parquet, .tar, .jsonl files"),
        ("no_caption.parquet", "column 'caption' is missing"),
        ("broken.parquet", "not a readable Parquet"),
        ("broken.jsonl", "broken.jsonl:1"),
        ("cut.tar", "not a readable tar"),
        ("rows.csv", "unknown kind"),
    ):
        with pytest.raises(CimError, match=says):
            read(shards_of([tmp_path / name], 10))


def test_shards_are_the_same_gallery_as_one_piece(rows, encoders, tmp_path):
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    for name, shard_rows in (("one", 100), ("many", 8)):
        build_gallery(shards_of([source], shard_rows), SETTINGS, *encoders, tmp_path / name)
    one, many = load_gallery(tmp_path / "one", *encoders), load_gallery(tmp_path / "many", *encoders)
    np.testing.assert_allclose(one.texts, many.texts, atol=1e-3)
    np.testing.assert_allclose(one.images, many.images, atol=2e-3)
    assert one.rows.equals(many.rows)
    assert not (tmp_path / "many.building").exists()


def test_what_cannot_be_used_is_left_out_and_listed(rows, encoders, tmp_path):
    frame = rows.copy()
    (tmp_path / "broken.png").write_bytes(b"not an image")
    frame.loc[3, "image"] = str(tmp_path / "broken.png")
    frame.loc[11, "caption"] = " "
    frame.loc[12, "image"] = str(tmp_path / "nowhere.png")
    frame.loc[30, "image_id"] = frame.loc[2, "image_id"]
    shards = shards_of([write_jsonl(tmp_path / "rows.jsonl", frame)], 8)
    folder = tmp_path / "gallery"
    with pytest.raises(CimError, match=r"broken\.png.*fix or remove it"):
        build_gallery(shards, SETTINGS, *encoders, folder)
    settings = BuildSettings(max_skipped=0.05)
    with pytest.raises(CimError, match=r"4 of 40 rows cannot be used.*what is embedded is kept"):
        build_gallery(shards, settings, *encoders, folder)
    assert not folder.exists()
    settings = BuildSettings(max_skipped=0.1)
    info = build_gallery(shards, settings, *encoders, folder)
    assert (info["rows"], info["skipped"]) == (36, 4)
    reasons = [json.loads(line)["reason"] for line in (folder / "skipped.jsonl").read_text().splitlines()]
    assert [r.partition(":")[0].rpartition("/")[2] for r in reasons] == [
        "broken.png", "empty caption", "nowhere.png", "image_id occurs more than once",
    ]  # fmt: skip
    kept = rows.drop(index=[3, 11, 12, 30])
    assert load_gallery(folder).rows["image_id"].tolist() == kept["image_id"].tolist()


def test_rows_that_were_fixed_are_read_again(rows, encoders, tmp_path, capsys):
    """With their shards only; where max_skipped was raised instead, nothing is (the test above)."""
    frame = rows.copy()
    frame.loc[[3, 12], "image"] = [str(tmp_path / "a.png"), str(tmp_path / "b.png")]
    shards = shards_of([write_jsonl(tmp_path / "rows.jsonl", frame)], 8)
    settings = BuildSettings(max_skipped=0.01)
    with pytest.raises(CimError, match="2 of 40 rows cannot be used"):
        build_gallery(shards, settings, *encoders, tmp_path / "gallery")
    for row, name in ((3, "a.png"), (12, "b.png")):
        shutil.copy(rows.loc[row, "image"], tmp_path / name)
    capsys.readouterr()
    info = build_gallery(shards, settings, *encoders, tmp_path / "gallery")
    assert "shard 2 of 5 (2 of 2 to do here)" in capsys.readouterr().out
    assert (info["rows"], info["skipped"]) == (40, 0)


def test_a_manifest_with_other_captions_is_another_source(world):
    settings = GallerySettings(splits=["gallery"])
    other = Manifest(world.frame.assign(caption="another"), world.image_root, world.name)
    names = [{shard.name for shard in gallery_shards(manifest, settings)} for manifest in (world, world, other)]
    assert names[0] == names[1]
    assert not names[0] & names[2]


def test_a_nan_vector_stops_the_build_by_name(rows, encoders, tmp_path, monkeypatch):
    text, image = encoders
    encode = type(text).encode

    def broken(self, texts, progress=False):
        vectors = encode(self, texts, progress)
        vectors[[t == rows["caption"][20] for t in texts]] = np.nan
        return vectors

    monkeypatch.setattr(type(text), "encode", broken)
    shards = shards_of([write_jsonl(tmp_path / "rows.jsonl", rows)], 8)
    with pytest.raises(CimError, match=f"'{rows['image_id'][20]}'.*gives NaN"):
        build_gallery(shards, SETTINGS, text, image, tmp_path / "gallery")
    assert not (tmp_path / "gallery").exists()


def test_adding_embeds_only_what_is_new(rows, encoders, tmp_path, monkeypatch):
    def shards(part):
        return shards_of([write_jsonl(tmp_path / f"{len(part)}.jsonl", part)], 8)

    build_gallery(shards(rows), SETTINGS, *encoders, tmp_path / "whole")
    build_gallery(shards(rows[:25]), SETTINGS, *encoders, tmp_path / "grown")
    seen = []
    encode = type(encoders[1]).encode
    monkeypatch.setattr(
        type(encoders[1]), "encode", lambda self, images, *a, **k: seen.extend(images) or encode(self, images, *a, **k)
    )
    info = build_gallery(shards(rows), SETTINGS, *encoders, tmp_path / "grown", add=True)
    assert info["rows"] == 40
    assert len(seen) == 15
    assert same_gallery(load_gallery(tmp_path / "grown"), load_gallery(tmp_path / "whole"))
    # Adding them again adds nothing.
    assert build_gallery(shards(rows), SETTINGS, *encoders, tmp_path / "grown", add=True)["rows"] == 40


def test_another_image_of_the_same_image_id_is_not_dropped_in_silence(rows, encoders, tmp_path):
    """Two folders have a 1.png each. The same image is known, wherever it lies."""
    for name, image in (("a", rows["image"][0]), ("b", rows["image"][1]), ("copy", rows["image"][0])):
        (tmp_path / name).mkdir()
        shutil.copy(image, tmp_path / name / "1.png")
        write_jsonl(tmp_path / name / "list.jsonl", pd.DataFrame({"image": ["1.png"], "caption": ["an owl."]}))
    for name in ("gone", "broken"):
        (tmp_path / name).mkdir()
        shutil.copy(tmp_path / "a" / "list.jsonl", tmp_path / name)
    (tmp_path / "broken" / "1.png").write_bytes(b"no image")
    folder = tmp_path / "g"
    build_gallery(shards_of([tmp_path / "a"], 8), SETTINGS, *encoders, folder)
    assert build_gallery(shards_of([tmp_path / "copy"], 8), SETTINGS, *encoders, folder, add=True)["skipped"] == 0
    for name in ("b", "gone", "broken"):
        with pytest.raises(CimError, match=r"'1\.png': the gallery has another image of this image_id"):
            build_gallery(shards_of([tmp_path / name], 8), SETTINGS, *encoders, folder, add=True)
        assert len(load_gallery(folder)) == 1
    settings = BuildSettings(max_skipped=1.0)
    info = build_gallery(shards_of([tmp_path / "b"], 8), settings, *encoders, folder, add=True)
    assert (info["rows"], info["skipped"]) == (1, 1)
    assert json.loads((folder / "skipped.jsonl").read_text())["image_id"] == "1.png"


def test_adding_keeps_the_list_of_what_was_left_out(rows, encoders, tmp_path):
    """Until it is used after all, and each image_id once."""
    settings, folder = BuildSettings(max_skipped=0.5), tmp_path / "g"
    frame = rows[:8].copy()
    frame.loc[[2, 5], "caption"] = ""
    build_gallery(shards_of([write_jsonl(tmp_path / "a.jsonl", frame)], 8), settings, *encoders, folder)

    def add(part):
        info = build_gallery(
            shards_of([write_jsonl(tmp_path / "b.jsonl", part)], 8), settings, *encoders, folder, add=True
        )
        left_out = [json.loads(line)["image_id"] for line in (folder / "skipped.jsonl").read_text().splitlines()]
        assert info["skipped"] == len(left_out)
        return left_out

    ids = rows["image_id"]
    assert add(rows[8:12]) == [ids[2], ids[5]]
    assert add(rows[11:14].assign(caption=["x", "", "y"])) == [ids[2], ids[5], ids[12]]
    assert add(pd.concat([rows[2:3], frame[5:6], rows[14:16]])) == [ids[12], ids[5]]
    assert len(load_gallery(folder)) == 6 + 4 + 1 + 3


def test_a_source_that_has_grown_is_added_though_it_has_rows_that_were_left_out(rows, encoders, tmp_path):
    some = rows.assign(caption=["", "", *rows["caption"][2:]])
    folder, strict = tmp_path / "g", SETTINGS.model_copy(update={"max_skipped": 0.1})
    build_gallery(shards_of([write_jsonl(tmp_path / "a.jsonl", some.iloc[:30])], 8), strict, *encoders, folder)
    shards = shards_of([write_jsonl(tmp_path / "b.jsonl", some.iloc[:34])], 8)
    for settings in (strict, SETTINGS):
        assert build_gallery(shards, settings, *encoders, folder, add=True)["rows"] == 32
    assert len((folder / store.SKIPPED).read_text().splitlines()) == 2
    # Rows of one image_id count one by one.
    empty = rows.assign(caption="", image_id="same").iloc[:8]
    shards = shards_of([write_jsonl(tmp_path / "c.jsonl", pd.concat([empty, rows.iloc[34:]]))], 20)
    with pytest.raises(CimError, match="8 of 14 rows cannot be used"):
        build_gallery(shards, SETTINGS.model_copy(update={"max_skipped": 0.5}), *encoders, folder, add=True)


def test_a_path_from_a_linked_folder_is_that_of_the_folder_itself(rows, tmp_path):
    (tmp_path / "real" / "lists").mkdir(parents=True)
    image = shutil.copy(rows["image"][0], tmp_path / "real" / "a.png")
    shutil.copy(rows["image"][1], tmp_path / "a.png")  # what the path would be if ".." were taken from the link
    write_jsonl(tmp_path / "real" / "lists" / "x.jsonl", [{"image": "../a.png", "caption": "an owl."}])
    (tmp_path / "link").symlink_to(tmp_path / "real" / "lists")
    (record,) = read(shards_of([tmp_path / "link"], 8))
    assert read(shards_of([tmp_path / "real" / "lists"], 8))[0].digest() == record.digest()
    assert os.path.samefile(record.image, image)


@pytest.mark.parametrize("kind", ["IVF4,SQ8", "HNSW32,SQ8", "SQ4"])
def test_an_index_grows_with_its_gallery(rows, encoders, tmp_path, kind):
    settings = BuildSettings(index=kind)
    first, more = (shards_of([write_jsonl(tmp_path / f"{len(part)}.jsonl", part)], 8) for part in (rows[:30], rows))
    build_gallery(first, settings, *encoders, tmp_path / "g")
    info = build_gallery(more, settings, *encoders, tmp_path / "g", add=True)
    assert info["index"]["kind"] == kind
    assert info["index"]["trained_on"] == 30
    gallery = load_gallery(tmp_path / "g", *encoders)
    found = gallery.search(encoders[0].encode(rows["caption"].tolist()), 1)[:, 0]
    assert (np.array(rows["caption"])[found] == rows["caption"]).all()


def test_another_index_for_the_same_vectors(rows, encoders, tmp_path):
    folder = tmp_path / "g"
    build_gallery(shards_of([write_jsonl(tmp_path / "a.jsonl", rows)], 8), SETTINGS, *encoders, folder)
    query = encoders[0].encode(rows["caption"].tolist()[:5])
    exact = load_gallery(folder).search(query, 3)
    for kind in ("IVF4,SQ8", "IVF2,Flat"):
        assert rebuild_index(folder, kind, 1.0)["index"]["kind"] == kind
        assert load_gallery(folder).info["index"]["kind"] == kind
        assert (load_gallery(folder).search(query, 3)[:, 0] == exact[:, 0]).all()
        assert len(list(folder.glob("*.faiss"))) == 1
    assert rebuild_index(folder, "auto", 0.99)["index"]["kind"] == "exact"
    assert load_gallery(folder).info["index"]["kind"] == "exact"
    assert not list(folder.glob("*.faiss"))


def test_an_index_is_made_of_the_gallery_s_own_vectors_only(rows, encoders, tmp_path):
    folder = tmp_path / "g"
    build_gallery(shards_of([write_jsonl(tmp_path / "rows.jsonl", rows)], 40), SETTINGS, *encoders, folder)
    path = folder / store.TEXTS
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CimError, match=r"texts\.npy: not the file that gallery\.json describes; rebuild the gallery"):
        rebuild_index(folder, "Flat", 0.9)


def test_two_do_not_replace_an_index_at_once(rows, encoders, tmp_path):
    """One of them by a symbolic link; and the second sees what the first has written."""
    folder, link = tmp_path / "g", tmp_path / "link"
    build_gallery(shards_of([write_jsonl(tmp_path / "a.jsonl", rows)], 8), SETTINGS, *encoders, folder)
    link.symlink_to(folder)
    with locked(folder), pytest.raises(CimError, match="another process is writing it"):
        rebuild_index(link, "Flat", 0.99)
    read, done = store.read_info, []

    def another_was_faster(path):
        if not done:
            done.append(read(path))
            rebuild_index(folder, "IVF2,Flat", 0.99)
            return done[0]
        return read(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "read_info", another_was_faster)
        rebuild_index(link, "Flat", 0.99)
    assert load_gallery(folder).info["index"]["kind"] == "Flat"
    assert [path.name for path in folder.glob("*.faiss")] == [store.INDEXES[1]]
    with pytest.raises(CimError, match="no gallery there"):
        rebuild_index(tmp_path / "no" / "gallery", "Flat", 0.99)
    assert not (tmp_path / "no").exists()


def test_an_index_is_replaced_at_once_or_not_at_all(rows, encoders, tmp_path, monkeypatch):
    folder = tmp_path / "g"
    settings = BuildSettings(index="IVF4,SQ8")
    build_gallery(shards_of([write_jsonl(tmp_path / "a.jsonl", rows)], 8), settings, *encoders, folder)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(build, "write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            rebuild_index(folder, "HNSW8,SQ8", 0.99)
    assert load_gallery(folder).info["index"]["kind"] == "IVF4,SQ8"
    with pytest.raises(CimError, match="FAISS cannot build 'IVF64,SQ8' from 40 rows"):
        rebuild_index(folder, "IVF64,SQ8", 0.99)
    assert load_gallery(folder).info["index"]["kind"] == "IVF4,SQ8"
    rebuild_index(folder, "HNSW8,SQ8", 0.99)
    assert load_gallery(folder).info["index"]["kind"] == "HNSW8,SQ8"


def test_an_index_that_faiss_refuses_stops_a_build_before_anything_is_embedded(rows, encoders, tmp_path):
    shards = [Shard("none", lambda: pytest.fail("the shard was read"))]
    with pytest.raises(CimError, match="parameter index: FAISS refuses 'ivf' for 384 dimensions"):
        build_gallery(shards, BuildSettings(index="ivf"), *encoders, tmp_path / "g")
    assert not list(tmp_path.iterdir())
    # Whether the rows are enough to train it is known later; what is embedded is kept.
    shards = shards_of([write_jsonl(tmp_path / "a.jsonl", rows[:8])], 8)
    with pytest.raises(CimError, match="parameter index: FAISS cannot build 'IVF16,SQ8' from 8 rows"):
        build_gallery(shards, BuildSettings(index="IVF16,SQ8"), *encoders, tmp_path / "g")
    assert (tmp_path / "g.building" / "parts" / "000000").is_file()
    assert build_gallery(shards, SETTINGS, *encoders, tmp_path / "g")["rows"] == 8


def test_the_pipelines_shards_are_the_splits_and_then_the_files(world, rows, tmp_path, capsys):
    settings = {"splits": ["train", "gallery"], "shard_rows": 7}
    images = world.split("train", "gallery")
    shards = gallery_shards(images, GallerySettings(**settings))
    assert [r.image_id for r in read(shards)] == images.frame["image_id"].tolist()
    assert len({shard.name for shard in shards}) == len(shards) == -(-len(images) // 7)
    relative = rows.assign(image=[Path(image).name for image in rows["image"]], image_id="x" + rows["image_id"])
    folder = tmp_path / "more"
    folder.mkdir()
    assert len(read(gallery_shards(images, GallerySettings(**settings, shards=str(folder))))) == len(images)
    assert f"{folder}: no .parquet, .tar, .jsonl file" in capsys.readouterr().out
    source = write_jsonl(folder / "rows.jsonl", relative)
    images_folder = Path(rows["image"][0]).parent
    for shards_at, root, expected in (
        (folder, None, folder),
        (source, None, folder),
        (source, source, folder),
        (folder, folder, folder),
        (folder, images_folder, images_folder),
    ):
        more = GallerySettings(**settings, shards=str(shards_at), image_root=root and str(root))
        added = read(gallery_shards(images, more))[len(images) :]
        assert len(added) == len(rows)
        assert {Path(record.image).resolve().parent for record in added} == {expected.resolve()}
    with pytest.raises(CimError, match="nowhere: not found"):
        gallery_shards(images, GallerySettings(**settings, shards=str(tmp_path / "nowhere")))


def test_a_gallery_whose_parts_were_swapped_is_refused(rows, encoders, tmp_path):
    for name, part in (("a", rows[:20]), ("b", rows[20:])):
        build_gallery(
            shards_of([write_jsonl(tmp_path / f"{name}.jsonl", part)], 8), SETTINGS, *encoders, tmp_path / name
        )
    for name in ("texts.npy", "images.npy", "rows.arrow"):
        copy = tmp_path / f"copy-{name}"
        shutil.copytree(tmp_path / "a", copy)
        shutil.copy(tmp_path / "b" / name, copy / name)
        with pytest.raises(CimError, match=f"{name}: not the file"):
            load_gallery(copy)
    # Nor does a consistent gallery.json make an array of another shape right.
    info = json.loads((tmp_path / "a" / "gallery.json").read_text())
    np.save(tmp_path / "a" / "texts.npy", np.zeros((20, 7), np.float16))
    info["files"]["texts.npy"]["quick"] = fingerprint(tmp_path / "a" / "texts.npy")
    (tmp_path / "a" / "gallery.json").write_text(json.dumps(info))
    with pytest.raises(CimError, match="has shape"):
        load_gallery(tmp_path / "a")


def test_a_large_file_is_told_apart_by_samples(tmp_path):
    path = tmp_path / "large"
    content = np.random.default_rng(0).bytes(2**26 + 2**20)
    path.write_bytes(content)
    before = fingerprint(path)
    path.write_bytes(content[:-1])
    assert fingerprint(path) != before
    path.write_bytes(content[::-1])
    assert fingerprint(path) != before
    path.write_bytes(content)
    assert fingerprint(path) == before


def build_arguments(encoder_folder, source, folder):
    options = ["--image", f"open_clip:local-dir:{encoder_folder}", "--shard-rows", "8"]
    return ["gallery", "build", str(folder), str(source), *options]


@pytest.mark.slow
def test_a_killed_build_resumes(rows, encoder_folder, forkserver, tmp_path, capsys):
    source = write_jsonl(
        tmp_path / "rows.jsonl", pd.concat([rows.assign(image_id=rows["image_id"] + f"-{i}") for i in range(12)])
    )
    folder, work = tmp_path / "gallery", tmp_path / "gallery.building" / "parts"
    arguments = build_arguments(encoder_folder, source, folder)
    first = forkserver.Process(target=cli.main, args=(arguments,), daemon=True)
    first.start()
    deadline = time.time() + 120
    while not (work / "000002").is_file() and time.time() < deadline:
        time.sleep(0.02)
    first.kill()
    first.join()
    assert not folder.exists()
    done = {p.name: p.stat().st_mtime_ns for p in work.iterdir() if not p.suffix}
    assert 3 <= len(done) < 60
    # A shard that was being written is not taken for a finished one.
    (work / "000059.partial").touch()
    cli.main(arguments)
    printed = capsys.readouterr().out
    assert f"{len(done)} of 60 shards are done" in printed
    assert f"of {60 - len(done)} to do here" in printed
    assert len(load_gallery(folder)) == 480


def test_a_full_disk_is_one_clear_error_and_loses_nothing(rows, encoders, tmp_path):
    """The kernel refuses to write files beyond a size, which is what a full disk looks like to a program."""
    shards = shards_of([write_jsonl(tmp_path / "rows.jsonl", rows)], 8)
    folder = tmp_path / "gallery"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        # The shards fit (8 rows of 384 dimensions), the joined array of 40 does not.
        resource.setrlimit(resource.RLIMIT_FSIZE, (16_000, hard))
        with pytest.raises(
            CimError, match=r"gallery: not completed .*File too large.*run the same command again to resume"
        ):
            build_gallery(shards, SETTINGS, *encoders, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    assert not folder.exists()
    embedded = {p: p.stat().st_mtime_ns for p in (tmp_path / "gallery.building" / "parts").glob("00000?")}
    assert len(embedded) == 5
    build_gallery(shards, SETTINGS, *encoders, folder)
    assert len(load_gallery(folder)) == 40


def test_a_disk_without_room_for_the_whole_is_named_before_it_is_full(rows, encoders, tmp_path, monkeypatch):
    shards = shards_of([write_jsonl(tmp_path / "rows.jsonl", rows[:8])], 8)
    with monkeypatch.context() as patch:
        patch.setattr(build.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
        with pytest.raises(CimError, match=r"gallery: joining the shards takes .* GiB.*run the same command again"):
            build_gallery(shards, SETTINGS, *encoders, tmp_path / "gallery")
    assert build_gallery(shards, SETTINGS, *encoders, tmp_path / "gallery")["rows"] == 8


def test_a_gallery_moved_aside_by_a_killed_call_comes_back(rows, encoders, tmp_path):
    folder = tmp_path / "gallery"
    shards = shards_of([write_jsonl(tmp_path / "rows.jsonl", rows[:20])], 8)
    build_gallery(shards, SETTINGS, *encoders, folder)
    (tmp_path / "gallery.building").mkdir()
    (tmp_path / "gallery.building" / "plan.json").write_text("null")
    os.replace(folder, tmp_path / "gallery.building" / "old")
    assert build.read_former(folder)["rows"] == 20  # which `cim gallery add` asks first
    more = shards_of([write_jsonl(tmp_path / "more.jsonl", rows)], 8)
    assert build_gallery(more, SETTINGS, *encoders, folder, add=True)["rows"] == 40


@pytest.mark.slow
@pytest.mark.parametrize("add", [False, True])
def test_a_kill_at_any_step_of_publishing_blocks_nothing(rows, encoders, tmp_path, monkeypatch, add):
    """Every rename and removal of the last step is interrupted once, before and after it, and the call repeated."""
    folder = tmp_path / "gallery"
    source = shards_of([write_jsonl(tmp_path / "rows.jsonl", rows[:12])], 8)
    build_gallery(shards_of([write_jsonl(tmp_path / "some.jsonl", rows[:4])], 8), SETTINGS, *encoders, folder)
    (folder / "notes.txt").write_text("mine")
    shutil.copytree(folder, tmp_path / "start")
    step = 0
    while True:
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / "start", folder)
        left = [step]

        def interrupted(call, left=left):
            def run(path, *args, **kwargs):
                if "joined" in str(path) or "gallery" not in str(path):
                    return call(path, *args, **kwargs)
                left[0] -= 1
                if left[0] == -1:
                    raise KeyboardInterrupt
                result = call(path, *args, **kwargs)
                left[0] -= 1
                if left[0] == -1:
                    raise KeyboardInterrupt
                return result

            return run

        with monkeypatch.context() as patch:
            for module, name in ((build.os, "replace"), (build.shutil, "rmtree"), (build, "write_json")):
                patch.setattr(module, name, interrupted(getattr(module, name)))
            try:
                build_gallery(source, SETTINGS, *encoders, folder, add=add)
                break
            except KeyboardInterrupt:
                pass
        assert build_gallery(source, SETTINGS, *encoders, folder, add=add)["rows"] == 12, step
        assert (folder / "notes.txt").read_text() == "mine", step
        assert not (tmp_path / "gallery.building").exists(), step
        step += 1
    assert step > 10


def test_a_build_with_other_sources_starts_again(rows, encoders, tmp_path, capsys):
    folder = tmp_path / "gallery"
    bad = Shard("bad", lambda: (_ for _ in ()).throw(CimError("gone")))
    with pytest.raises(CimError, match="gone"):
        build_gallery([*shards_of([write_jsonl(tmp_path / "a.jsonl", rows[:8])], 8), bad], SETTINGS, *encoders, folder)
    build_gallery(shards_of([write_jsonl(tmp_path / "b.jsonl", rows[8:])], 8), SETTINGS, *encoders, folder)
    assert "starting again" in capsys.readouterr().out
    assert load_gallery(folder).rows["image_id"].tolist() == rows["image_id"][8:].tolist()


@pytest.mark.parametrize("which", [0, 1])
def test_a_build_with_another_encoder_starts_again(rows, encoders, tmp_path, capsys, which):
    """The shards are the same; what the other encoder embedded is not joined with them."""
    good = shards_of([write_jsonl(tmp_path / "a.jsonl", rows[:8])], 4)
    bad = Shard(good[1].name, lambda: (_ for _ in ()).throw(CimError("gone")))
    with pytest.raises(CimError, match="gone"):
        build_gallery([good[0], bad], SETTINGS, *encoders, tmp_path / "g")
    other = list(encoders)
    other[which] = copy(encoders[which])
    other[which].digest = "another"
    capsys.readouterr()
    info = build_gallery(good, SETTINGS, *other, tmp_path / "g")
    assert "started with other sources or encoders; starting again" in (printed := capsys.readouterr().out)
    assert "shard 1 of 2 (1 of 2 to do here)" in printed
    assert [info[f"{name}_encoder"]["digest"] == "another" for name in ("text", "image")] == [which == 0, which == 1]


def test_a_gallery_behind_a_symbolic_link_is_replaced_there(rows, encoders, tmp_path):
    build_gallery(shards_of([write_jsonl(tmp_path / "a.jsonl", rows[:8])], 8), SETTINGS, *encoders, tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    build_gallery(shards_of([write_jsonl(tmp_path / "b.jsonl", rows)], 8), SETTINGS, *encoders, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert len(load_gallery(tmp_path / "real")) == 40


def refused(capsys, *arguments) -> str:
    """The one line with which a command ends at status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main([str(argument) for argument in arguments])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_a_build_never_writes_over_something_else(rows, tmp_path, capsys, monkeypatch):
    from cim import encoders as module

    monkeypatch.setattr(module, "load_text_encoder", lambda *a, **k: pytest.fail("an encoder was loaded"))
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    photos = tmp_path / "photos"
    photos.mkdir()
    write_jsonl(photos / "more.jsonl", rows)
    (tmp_path / "empty").mkdir()
    (tmp_path / "other.building").mkdir()
    (tmp_path / "other.building" / "mine.txt").write_text("mine")
    (tmp_path / "gallery").mkdir()
    (tmp_path / "gallery" / "gallery.json").write_text("{}")
    write_jsonl(tmp_path / "gallery" / "inside.jsonl", rows)
    before = files_of(tmp_path)
    for folder, sources, says in (
        (photos, [source], "is not empty and not a gallery"),
        (source, [photos], "is a file"),
        (tmp_path / "other", [source], "other.building: is not empty"),
        (photos, [photos], "is within the gallery"),
        (photos, [photos / "more.jsonl"], "is within the gallery"),
        (tmp_path / "gallery", [source, tmp_path / "gallery" / "inside.jsonl"], "is within the gallery"),
        (tmp_path / "empty", [tmp_path / "empty"], "is within the gallery"),
    ):
        assert says in refused(capsys, "gallery", "build", folder, *sources)
        assert files_of(tmp_path) == before
    with pytest.raises(CimError, match="is not empty and not a gallery"):
        build_gallery([], SETTINGS, None, None, photos)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="two processes need two GPUs, or none")
def test_two_processes_build_what_one_does(rows, encoder_folder, encoders, tmp_path):
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    build_gallery(shards_of([source], 8), SETTINGS, *encoders, tmp_path / "one")
    # torchrun, since accelerate starts several processes on GPUs only; both set the same variables.
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    module = ["-m", "cim.cli", *build_arguments(encoder_folder, source, tmp_path / "two")]
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, *module], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("(1 of 3 to do here)") == 1  # shards 1, 3 and 5
    assert done.stdout.count("(1 of 2 to do here)") == 1  # shards 2 and 4
    one, two = load_gallery(tmp_path / "one"), load_gallery(tmp_path / "two")
    assert one.rows.equals(two.rows)
    np.testing.assert_allclose(one.images, two.images, atol=2e-3)


def test_vectors_are_never_all_in_memory(rows, encoders, tmp_path, monkeypatch):
    """No array that is written or encoded at once holds more than a shard."""
    largest = []
    write = store.write_array

    def watched(path, n, dim, arrays):
        def watch():
            for array in arrays:
                largest.append(len(array))
                yield array

        write(path, n, dim, watch())

    monkeypatch.setattr(store, "write_array", watched)
    build_gallery(shards_of([write_jsonl(tmp_path / "rows.jsonl", rows)], 8), SETTINGS, *encoders, tmp_path / "g")
    assert max(largest) == 8


@pytest.fixture(scope="module")
def photos_gallery(rows, encoder_folder, tmp_path_factory):
    """A gallery made on the command line; as deep as tmp_path, so that the paths to its images hold in copies there."""
    folder = tmp_path_factory.mktemp("photos")
    source = write_jsonl(folder / "rows.jsonl", rows)
    cli.main(["gallery", "build", str(folder / "g"), str(source), "--image", f"open_clip:local-dir:{encoder_folder}"])
    return folder / "g"


@pytest.fixture
def photos(photos_gallery, rows, tmp_path):
    """A copy of that gallery, and a file of captions to score."""
    shutil.copytree(photos_gallery, tmp_path / "g")
    asked = rows[:6].copy()
    asked.loc[1, "caption"] = ""
    asked["caption"] += ["", "", " there is an owl."] * 2
    return tmp_path, write_jsonl(tmp_path / "asked.jsonl", asked), asked


def test_galleries_on_the_command_line(photos, rows, capsys):
    folder, _, _ = photos
    capsys.readouterr()
    cli.main(["gallery", "info", str(folder / "g"), "--verify"])
    out = capsys.readouterr().out
    assert "40 rows, 0 left out" in out
    assert "every byte" in out
    cli.main(["gallery", "search", str(folder / "g"), rows["caption"][7], "-k", "2"])
    out = capsys.readouterr().out
    assert rows["caption"][7] in out.splitlines()[1]
    assert len(out.splitlines()) == 3
    write_jsonl(folder / "more.jsonl", rows.assign(image_id="new-" + rows["image_id"]))
    cli.main(["gallery", "add", str(folder / "g"), str(folder / "more.jsonl")])
    assert "added 40 rows" in capsys.readouterr().out
    cli.main(["gallery", "index", str(folder / "g"), "--index", "HNSW8,SQ8"])
    assert "index: HNSW8,SQ8 (requested)" in capsys.readouterr().out
    assert "parameter index" in refused(capsys, "gallery", "index", folder / "g", "--index", "hnsw")
    with (folder / "g" / "images.npy").open("r+b") as file:
        file.seek(5000)
        file.write(b"xx")
    assert "images.npy" in refused(capsys, "gallery", "info", folder / "g")


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_scores_on_the_command_line(photos, capsys, suffix):
    folder, asked_file, asked = photos
    out = folder / f"scores{suffix}"
    cli.main(
        [
            "score",
            str(asked_file),
            "--gallery",
            str(folder / "g"),
            "--out",
            str(out),
            "--html",
            str(folder / "page.html"),
        ]
    )
    frame = pd.read_parquet(out) if suffix == ".parquet" else pd.read_json(out, lines=True)
    assert frame["image_id"].tolist() == asked["image_id"].tolist()
    np.testing.assert_allclose(frame["cim"], frame["grc"] + frame["qir"], atol=2e-6)
    assert frame["cim"].idxmin() == 1  # the empty caption
    assert frame["cim"][1] == -1.75
    for image_id, retrieved in zip(frame["image_id"], frame["retrieved"], strict=True):
        assert image_id not in [item["image_id"] for item in retrieved]
    assert "6 captions" in capsys.readouterr().out
    page = (folder / "page.html").read_text()
    assert page.count("<section>") == 6
    assert page.count("data:image/jpeg") == 6 + 5 * 3
    assert not list(folder.glob("*.partial")) + list(folder.glob("*.progress"))
    with chdir(folder / "g"):
        cli.main(["gallery", "index", "."])
    cli.main(["score", str(asked_file), "--gallery", str(folder / "g"), "--out", str(out)])  # over its own output


def test_scores_never_overwrite_an_input(photos, capsys):
    folder, asked_file, asked = photos
    gallery = folder / "g"
    (folder / "folder.html").mkdir()
    write_jsonl(folder / "mine.jsonl.progress", asked)
    before = files_of(folder)
    for options, says in (
        (["--out", asked_file], "is an input"),
        (["--out", folder / "g" / ".." / asked_file.name], "is an input"),
        (["--out", gallery / "skipped.jsonl"], "within the gallery"),
        (["--out", folder], "is a folder"),
        (["--out", folder / "scores.csv"], "should end in .jsonl or .parquet"),
        (["--html", folder / "folder.html"], "is a folder"),
        (["--html", asked_file], "should end in .html"),
        (["--html", gallery / "page.html"], "within the gallery"),
        (["--out", folder / "mine.jsonl"], "is not the unfinished output"),
    ):
        options = ["--out", folder / "new.jsonl", *options]
        assert says in refused(capsys, "score", asked_file, "--gallery", gallery, *options)
        assert files_of(folder) == before


def test_an_unreadable_image_costs_only_its_own_score(photos, capsys):
    folder, _, asked = photos
    asked.loc[4, "image"] = str(folder / "nowhere.png")
    asked.loc[4, "image_id"] = "stranger"
    source = write_jsonl(folder / "asked.jsonl", asked)
    with pytest.raises(SystemExit):
        cli.main(["score", str(source), "--gallery", str(folder / "g"), "--out", str(folder / "s.jsonl")])
    assert "1 rows have no score" in (error := capsys.readouterr().err)
    assert "nowhere.png" in error
    frame = pd.read_json(folder / "s.jsonl", lines=True)
    assert frame["cim"].notna().tolist() == [True, True, True, True, False, True]
    rows = [json.loads(line, parse_constant=pytest.fail) for line in (folder / "s.jsonl").read_text().splitlines()]
    assert [row["error"] is None for row in rows] == frame["cim"].notna().tolist()


def test_a_row_that_was_restored_is_scored_when_resuming(photos, monkeypatch):
    from cim import score_files as caption_scores
    from cim.scorer import load_scorer

    folder, _, asked = photos
    source, image = write_jsonl(folder / "asked.jsonl", asked.assign(image_id=None)), Path(asked["image"][1])
    aside = shutil.move(image, folder / "aside.png")
    monkeypatch.setattr(caption_scores, "BATCH", 2)
    scorer = load_scorer(folder / "g")
    killed_at(monkeypatch, scorer, 2)
    with pytest.raises(KeyboardInterrupt):
        caption_scores.score_files(scorer, [source], folder / "s.jsonl")
    shutil.move(aside, image)
    assert caption_scores.score_files(scorer, [source], folder / "s.jsonl")["error"].isna().all()


def test_an_image_id_of_one_file_is_another_image_in_the_next(photos):
    from cim.score_files import score_files
    from cim.scorer import load_scorer

    folder, _, asked = photos
    scorer = load_scorer(folder / "g")
    one, two = (write_jsonl(folder / f"{i}.jsonl", asked.iloc[[i]].assign(image_id="0")) for i in (0, 2))
    alone = score_files(load_scorer(folder / "g"), [two], folder / "alone.jsonl")["cim"]
    score_files(scorer, [one], folder / "one.jsonl")
    assert score_files(scorer, [two], folder / "two.jsonl")["cim"].equals(alone)


def killed_at(monkeypatch, scorer, number) -> list:
    """Interrupt scorers at their call of this number; returns the captions of each call."""
    calls, whole = [], type(scorer).scores_and_rows

    def scores_and_rows(scorer, captions, ids):
        calls.append(captions)
        if len(calls) == number:
            raise KeyboardInterrupt
        return whole(scorer, captions, ids)

    monkeypatch.setattr(type(scorer), "scores_and_rows", scores_and_rows)
    return calls


def test_scoring_resumes_after_a_kill(photos, encoders, monkeypatch):
    from cim import score_files as caption_scores
    from cim.scorer import load_scorer

    folder, asked_file, _ = photos
    monkeypatch.setattr(caption_scores, "BATCH", 2)
    scorer, out = load_scorer(folder / "g"), folder / "s.jsonl"
    whole = caption_scores.score_files(scorer, [asked_file], folder / "whole.jsonl")
    calls = killed_at(monkeypatch, scorer, 3)
    with pytest.raises(KeyboardInterrupt):
        caption_scores.score_files(scorer, [asked_file], out)
    progress = folder / "s.jsonl.progress"
    progress.write_text(progress.read_text() + '{"image_id": "half a li')
    frame = caption_scores.score_files(scorer, [asked_file], out)
    assert sum(map(len, calls)) == 6 + 2
    assert frame["image_id"].equals(whole["image_id"])
    np.testing.assert_allclose(frame["cim"], whole["cim"], atol=1e-5)


def test_scoring_with_another_reward_starts_again(photos, monkeypatch):
    from cim import score_files as caption_scores
    from cim.rewards import RewardSettings
    from cim.scorer import load_scorer

    folder, asked_file, _ = photos
    monkeypatch.setattr(caption_scores, "BATCH", 2)
    scorer = load_scorer(folder / "g")
    other = scorer.at(RewardSettings(k=2, decay=0.25))
    whole = caption_scores.score_files(other, [asked_file], folder / "whole.jsonl")

    killed_at(monkeypatch, scorer, 2)
    with pytest.raises(KeyboardInterrupt):
        caption_scores.score_files(scorer, [asked_file], folder / "s.jsonl")
    assert len((folder / "s.jsonl.progress").read_text().splitlines()) == 1 + 2
    frame = caption_scores.score_files(other, [asked_file], folder / "s.jsonl")
    assert frame["retrieved"].map(len).max() == 2
    np.testing.assert_allclose(frame["cim"], whole["cim"], atol=1e-5)


def test_three_lines_of_python(photos, rows):
    from cim.scorer import load_scorer

    folder, _, _ = photos
    scorer = load_scorer(folder / "g")
    scores = scorer.score(rows["image"][:4].tolist(), rows["caption"][:4].tolist())
    assert list(scores) == ["grc", "qir", "cim"]
    assert scores.notna().all().all()
    with pytest.raises(CimError, match=r"nowhere\.png"):
        scorer.score(["nowhere.png"], ["an owl."])


def test_a_shard_reader_that_fails_leaves_the_others(rows, encoders, tmp_path):
    good = shards_of([write_jsonl(tmp_path / "rows.jsonl", rows)], 8)

    def fails():
        raise CimError("shard 3: gone")

    shards = [*good[:2], Shard("bad", fails), *good[2:]]
    with pytest.raises(CimError, match="gone"):
        build_gallery(shards, SETTINGS, *encoders, tmp_path / "g")
    assert len(list((tmp_path / "g.building" / "parts").glob("00000?"))) == 2
