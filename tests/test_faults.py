"""Bad input and faults on the command line: each ends in one clear line, a status that is not 0, and changes no file."""

import errno
import io
import json
import re
import shutil
import struct
import tarfile
import tracemalloc
import zipfile
from contextlib import chdir

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor

from cim import encoders, files, score_files
from cim.cli.__main__ import main
from cim.data import downloads, flickr8k, sc_captioner
from cim.data.labels import read_captions
from cim.errors import CimError
from cim.evaluation import facts
from cim.gallery import build, shards
from cim.gallery.settings import BuildSettings
from cim.gallery.shards import Record, Shard, shards_of
from cim.gallery.store import load_gallery
from cim.images import open_image, read_stored
from conftest import ROOT, error_of, files_of, write_jsonl

COLOURS = ("red", "green", "blue", "black", "white", "yellow", "cyan", "magenta")


class Words(torch.nn.Linear):
    """Stands in for a SentenceTransformer: each word adds a random direction."""

    device = torch.device("cpu")

    def get_embedding_dimension(self):
        return 16

    def encode(self, texts, **_):
        for text in texts:
            text.encode()  # as tokenizers do: a lone surrogate is an error
        words = [[np.random.default_rng(list(w.encode())).normal(size=16) for w in text.split()] for text in texts]
        vectors = np.array([np.sum(of, axis=0) for of in words])
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture(autouse=True)
def stubs(monkeypatch):
    """Encoders without weights: hashed words, and the pixels of a 4 x 4 thumbnail."""

    def text(spec, *_, **__):
        return encoders.TextEncoder(spec, Words(1, 1))

    def image(spec, batch_size=128, *_):
        def pixels(picture):
            return pil_to_tensor(picture.resize((4, 4))).float() + 1

        model = torch.nn.Flatten()
        return encoders.ImageEncoder(spec, model, pixels, model, batch_size=batch_size)

    torch.manual_seed(0)
    weights = torch.zeros(1)
    monkeypatch.setattr(Words, "state_dict", lambda self: {"w": weights})
    # facts is imported before they are replaced: else it would keep the stand-ins for other test files.
    for module in (encoders, facts):
        monkeypatch.setattr(module, "load_text_encoder", text)
    monkeypatch.setattr(encoders, "load_image_encoder", image)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Images, captions of them, a gallery of them, and a benchmark; no test changes it."""
    folder = tmp_path_factory.mktemp("base")
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    for name in COLOURS:
        noise = rng.integers(0, 60, (8, 8, 3), dtype=np.uint8)
        Image.blend(Image.new("RGB", (8, 8), name), Image.fromarray(noise), 0.3).save(folder / "images" / f"{name}.png")
    rows = [{"image_id": name, "image": f"images/{name}.png", "caption": f"a {name} square"} for name in COLOURS]
    write_jsonl(folder / "rows.jsonl", rows)
    with pytest.MonkeyPatch.context() as patch:
        stubs.__wrapped__(patch)
        main(["gallery", "build", str(folder / "gallery"), str(folder / "rows.jsonl")])
    (folder / "labels").mkdir()
    (folder / "labels" / "references.json").write_text(json.dumps({name: f"a {name} square" for name in COLOURS}))
    (folder / "mine.json").write_text(json.dumps({name: f"a {name} thing" for name in COLOURS}))
    return folder


PNG = io.BytesIO()
Image.new("RGB", (8, 8), "red").save(PNG, "PNG")
PNG = PNG.getvalue()


def parquet(**columns) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table(columns), out, compression="none")
    return out.getvalue()


def tar_of(*members) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


WHOLE = parquet(image=[PNG] * 50, caption=["a red square"] * 50)
GOOD_TAR = tar_of(("a.png", PNG), ("a.txt", b"a red square"))
# Name of a source file, its content (None: it is missing), and what the error says.
SOURCES = [
    ("none.jsonl", None, "not found"),
    ("rows.csv", b"image,caption\n", "unknown kind"),
    ("empty.jsonl", b"", "no rows in"),
    ("text.jsonl", b"hello\n", "text.jsonl:1: should be JSON"),
    ("number.jsonl", b"7\n", "number.jsonl:1: should be JSON"),
    ("list.jsonl", b"[1, 2]\n", "list.jsonl:1: should be JSON"),
    ("nested.jsonl", b"[" * 100_000 + b"\n", "nested.jsonl:1: should be JSON"),
    ("latin1.jsonl", '{"image": "é.png", "caption": "x"}\n'.encode("latin-1"), "latin1.jsonl:1: should be JSON"),
    ("binary.jsonl", bytes(range(256)), "binary.jsonl:1: should be JSON"),
    ("no_caption.jsonl", b'{"image": "a.png"}\n', "KeyError('caption')"),
    ("no_image.jsonl", b'{"caption": "x"}\n', "KeyError('image_path')"),
    ("id_list.jsonl", b'{"image_id": [1], "image": "a.png", "caption": "x"}\n', "image_id should be text or a number"),
    ("id_map.jsonl", b'{"image_id": {}, "image": "a.png", "caption": "x"}\n', "image_id should be text or a number"),
    ("nul.jsonl", b'{"image": "a\\u0000.png", "caption": "x"}\n', "cannot be read"),
    ("folder.jsonl", b'{"image": ".", "caption": "x"}\n', "cannot be read"),
    ("long.jsonl", b'{"image": "%s", "caption": "x"}\n' % (b"a" * 5000), "cannot be read"),
    ("gone.jsonl", b'{"image": "gone.png", "caption": "x"}\n', "image not found"),
    ("text.parquet", b"PAR1 no", "not a readable Parquet file"),
    ("none.parquet", b"", "not a readable Parquet file"),
    ("cut.parquet", WHOLE[: len(WHOLE) // 2], "not a readable Parquet file"),
    ("torn.parquet", WHOLE[:4] + b"\xff" * 4000 + WHOLE[4004:], "not a readable Parquet file"),
    ("no_caption.parquet", parquet(image=["a.png"]), "column 'caption' is missing; it has image"),
    ("no_image.parquet", parquet(caption=["a"]), "column 'image' is missing; it has caption"),
    ("no_rows.parquet", parquet(image=[], caption=[]), "no rows in"),
    ("text.tar", b"not a tar file" * 100, "not a readable tar file"),
    ("none.tar", b"", "not a readable tar file"),
    ("cut.tar", GOOD_TAR[:700], "not a readable tar file"),
    ("json.tar", tar_of(("a.png", PNG), ("a.json", b"{")), "not a readable tar file"),
    ("gzip.tar", b"\x1f\x8b\x08\x00" + b"\0" * 100, "not a readable tar file"),
]  # fmt: skip


@pytest.mark.parametrize("command", ["build", "add", "score"])
@pytest.mark.parametrize(("name", "content", "says"), SOURCES, ids=[name for name, *_ in SOURCES])
def test_sources(base, tmp_path, capsys, command, name, content, says):
    source = tmp_path / name
    if content is not None:
        source.write_bytes(content)
    shutil.copytree(base / "gallery", gallery := tmp_path / "gallery")
    before = files_of(tmp_path)
    arguments = {
        "build": ["gallery", "build", tmp_path / "new", source, "--max-skipped", "0"],
        "add": ["gallery", "add", gallery, source, "--max-skipped", "0"],
        "score": ["score", source, "--gallery", gallery, "--out", tmp_path / "out.jsonl"],
    }
    assert says in error_of(capsys, *arguments[command])
    assert before.items() <= files_of(tmp_path).items()
    assert not (tmp_path / "new").exists()


INFOS = [
    (b"{", "not valid JSON"),
    (b"\xe9", "codec can't decode"),
    (b"[]", "not that of a gallery"),
    (b"{}", "not that of a gallery (rows: Field required)"),
    (lambda info: info.pop("index"), "(index: Field required)"),
    (lambda info: info["text_encoder"].pop("spec"), "(text_encoder.spec: Field required)"),
    (lambda info: info["files"]["rows.arrow"].update(quick=3), "rows.arrow.quick: Input should be a valid string"),
    (None, "no gallery there"),
]


@pytest.mark.parametrize("command", ["info", "search", "index", "add", "score", "evaluate"])
@pytest.mark.parametrize(("change", "says"), INFOS)
def test_gallery_json(base, tmp_path, capsys, command, change, says):
    shutil.copytree(base / "gallery", gallery := tmp_path / "gallery")
    path = gallery / "gallery.json"
    if callable(change):
        change(info := json.loads(path.read_text()))
        path.write_text(json.dumps(info))
    elif change:
        path.write_bytes(change)
    else:
        shutil.rmtree(gallery)
    before = files_of(tmp_path)
    arguments = {
        "info": ["gallery", "info", gallery],
        "search": ["gallery", "search", gallery, "red"],
        "index": ["gallery", "index", gallery],
        "add": ["gallery", "add", gallery, base / "rows.jsonl"],
        "score": ["score", base / "rows.jsonl", "--gallery", gallery, "--out", tmp_path / "out.jsonl"],
        "evaluate": ["evaluate", "--captions", base / "mine.json", "--benchmark", "x", "--labels", base / "labels",
                     "--gallery", gallery, "--images", base / "images", "--out", tmp_path / "out"],
    }  # fmt: skip
    assert says in error_of(capsys, *arguments[command])
    assert files_of(tmp_path) == before


@pytest.mark.parametrize("command", ["info", "search", "score"])
@pytest.mark.parametrize("name", ["texts.npy", "images.npy", "rows.arrow", "transform.npz"])
@pytest.mark.parametrize("cut", [True, False])
def test_other_files_of_a_gallery(base, tmp_path, capsys, command, name, cut):
    shutil.copytree(base / "gallery", gallery := tmp_path / "gallery")
    content = (gallery / name).read_bytes()
    (gallery / name).write_bytes(content[:-9]) if cut else (gallery / name).unlink()
    arguments = {
        "info": ["gallery", "info", gallery],
        "search": ["gallery", "search", gallery, "red"],
        "score": ["score", base / "rows.jsonl", "--gallery", gallery, "--out", tmp_path / "out.jsonl"],
    }
    assert name in error_of(capsys, *arguments[command])


# BASE and TMP stand for the folders of the test. Below: arguments, and what the error says.
BUILD = ("gallery", "build", "TMP/new", "BASE/rows.jsonl")
SCORE = ("score", "BASE/rows.jsonl", "--gallery", "BASE/gallery", "--out", "TMP/out.jsonl")
SEARCH = ("gallery", "search", "BASE/gallery", "red")
EVALUATE = (
    "evaluate",
    "--captions",
    "BASE/mine.json",
    "--benchmark",
    "x",
    "--labels",
    "BASE/labels",
    "--out",
    "TMP/out",
)
JUDGE = (
    "judge",
    "--benchmark",
    "flickr8k-expert",
    "--data",
    "BASE",
    "--gallery",
    "BASE/gallery",
    "--out",
    "TMP/out.json",
)
OPTIONS = [
    ((*BUILD, "--image-batch", "0"), "'encoders.image_batch' should be greater than 0"),
    ((*BUILD, "--image-batch", "-3"), "'encoders.image_batch' should be greater than 0"),
    ((*BUILD, "--shard-rows", "0"), "'gallery.shard_rows' should be greater than 0"),
    ((*BUILD, "--max-skipped", "2"), "'gallery.max_skipped' should be less than or equal to 1"),
    ((*BUILD, "--max-skipped", "nan"), "'gallery.max_skipped' should be"),
    ((*BUILD, "--recall", "-1"), "'gallery.recall' should be greater than or equal to 0"),
    ((*BUILD, "--index", "nonsense"), "FAISS refuses 'nonsense'"),
    ((*BUILD, "--index", "IVF0,Flat"), "FAISS refuses 'IVF0,Flat'"),
    ((*BUILD, "--index", "IVF64,Flat"), "FAISS cannot build 'IVF64,Flat' from 8 rows"),
    ((*BUILD, "--index", "PQ8"), "FAISS cannot build 'PQ8' from 8 rows"),
    ((*BUILD, "--index", "PQ5"), "FAISS"),
    ((*BUILD, "--index", "IVF4,PQ8"), "FAISS cannot build 'IVF4,PQ8' from 8 rows"),
    ((*BUILD, "--image-root", "TMP/none"), "image not found"),
    (("gallery", "build", "BASE/mine.json", "BASE/rows.jsonl"), "is a file"),
    (("gallery", "build", "BASE/rows.jsonl", "BASE/rows.jsonl"), "is within the gallery"),
    (("gallery", "build", "BASE/images", "BASE/rows.jsonl"), "is not empty and not a gallery"),
    (("gallery", "add", "BASE/labels", "BASE/rows.jsonl"), "is not empty and not a gallery"),
    (("gallery", "build", "/proc/none/new", "BASE/rows.jsonl"), "/proc/none"),
    ((*SEARCH, "-k", "0"), "k is 0"),
    ((*SEARCH, "-k", "-1"), "k is -1"),
    ((*SEARCH, "-k", "9"), "k is 9, but the gallery has 8 rows"),
    ((*SCORE, "-k", "0"), "'reward.k' should be greater than 0"),
    ((*SCORE, "-k", "8"), "one of them the excluded source image"),
    ((*SCORE, "-k", "9", "--include-source"), "k is 9, but the gallery has 8 rows"),
    ((*SCORE, "--beta", "inf"), "'reward.beta' should be a finite number"),
    ((*SCORE, "--beta", "nan"), "'reward.beta' should be"),
    ((*SCORE, "--beta", "-1"), "'reward.beta' should be greater than or equal to 0"),
    ((*SCORE, "--decay", "0"), "'reward.decay' should be greater than 0"),
    ((*SCORE, "--decay", "2"), "'reward.decay' should be less than or equal to 1"),
    ((*SCORE, "--decay", "nan"), "'reward.decay' should be"),
    ((*SCORE, "--reward", "TMP/none.yaml"), "none.yaml: not found"),
    ((*SCORE, "--reward", "BASE/images/red.png"), "red.png: cannot be read ('utf-8' codec"),
    ((*SCORE, "--reward", "BASE/images"), "images: "),
    ((*SCORE, "--out", "TMP"), "is a folder"),
    ((*SCORE, "--out", "TMP/out.csv"), "should end in .jsonl or .parquet"),
    ((*SCORE, "--out", "BASE/rows.jsonl"), "is an input"),
    ((*SCORE, "--out", "BASE/gallery/out.jsonl"), "within the gallery"),
    ((*SCORE, "--out", "/proc/out.jsonl"), "/proc/out.jsonl"),
    ((*SCORE, "--html", "TMP"), "is a folder"),
    ((*SCORE, "--html", "TMP/page.png"), "should end in .html or .htm"),
    ((*SCORE, "--image-root", "TMP"), "8 rows have no score"),
    ((*EVALUATE, "--out", "BASE/mine.json"), "is a file"),
    ((*EVALUATE, "--out", "BASE/images"), "is not empty and not a folder of an evaluation"),
    ((*EVALUATE, "--resamples", "0"), "'evaluate.resamples' should be greater than or equal to 100"),
    ((*EVALUATE, "--seed", "-1"), "'evaluate.seed' should be greater than or equal to 0"),
    ((*EVALUATE, "--labels", "TMP"), "references.json: cannot be read"),
    ((*EVALUATE, "--captions", "TMP/none.json"), "none.json: cannot be read"),
    ((*EVALUATE, "--captions", "BASE/images"), "images: cannot be read"),
    ((*EVALUATE, "--captions", "BASE/images/red.png"), "red.png: cannot be read ('utf-8' codec"),
    ((*EVALUATE, "--captions", "BASE/mine.json", "BASE/mine.json"), "rename one"),
    ((*EVALUATE, "--gallery", "BASE/gallery"), "--gallery needs --images"),
    ((*EVALUATE, "--gallery", "BASE/gallery", "--images", "TMP"), "8 of 8 images are missing"),
    ((*EVALUATE, "--gallery", "BASE/gallery", "--images", "TMP/none"), "none: not a folder"),
    ((*EVALUATE, "--gallery", "BASE/gallery", "--images", "BASE/images", "--beta", "inf"), "'reward.beta' should be a finite"),
    ((*JUDGE,), "not found"),
    ((*JUDGE, "--data", "TMP/none"), "not found"),
    ((*JUDGE, "--benchmark", "nonsense"), "unknown benchmark 'nonsense'"),
    ((*JUDGE, "--resamples", "0"), "'judge.resamples' should be greater than 0"),
    ((*JUDGE, "--seed", "-1"), "'judge.seed' should be greater than or equal to 0"),
    ((*JUDGE, "--out", "TMP"), "is a folder"),
    ((*JUDGE, "--out", "BASE/ExpertAnnotations.txt"), "should end in .json, outside the gallery"),
    ((*JUDGE, "--out", "BASE/gallery/gallery.json"), "should end in .json, outside the gallery"),
    (("rerank", *SCORE[1:-1], "."), "is a folder"),
    ((*JUDGE, "--decay", "2"), "'reward.decay' should be less than or equal to 1"),
    (("run", "dataset"), "params.yaml: not found"),
    (("train", "--run", "cim-0"), "params.yaml: not found"),
    (("params", "-S", "profile=none"), "config.yaml: not found"),
    (("download", "nonsense"), "data set 'nonsense' is unknown"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "says"), OPTIONS, ids=[" ".join(a[-2:]) for a, _ in OPTIONS])
def test_options_and_paths(base, tmp_path, capsys, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    before = files_of(base, tmp_path)
    arguments = [a.replace("BASE", str(base)).replace("TMP", str(tmp_path)) for a in arguments]
    assert says in error_of(capsys, *arguments)
    assert before.items() <= files_of(base, tmp_path).items()
    assert not list(tmp_path.rglob("*.partial*")) + list(base.rglob("*.lock"))


# Files of a benchmark: name, content, and what the error says.
REFERENCES = json.dumps(dict.fromkeys("ab", "a red square")).encode()
LABELS = [
    ("references.json", b"{", "should be {image: caption}"),
    ("references.json", b"[]", "should be {image: caption}"),
    ("references.json", b"{}", "holds no captions"),
    ("references.json", b'{"a": 3}', "should be {image: caption}"),
    ("references.json", b'{"a": "\xe9"}', "codec can't decode"),
    ("questions.json", b"{", "should be {image: {question: answer}}"),
    ("questions.json", b'{"a": ["q"]}', "should be {image: {question: answer}}"),
    ("questions.json", b'{"a": {"q": 1}}', "should be {image: {question: answer}}"),
    ("questions.json", b'{"c": {"q": "Yes"}}', "image 'c' is not in references.json"),
    ("extra_objects.jsonl", b'{"a": ["x"]}\n{"b": 3}\n', "extra_objects.jsonl:2: should be"),
    ("extra_attributes.json", b'{"a": ["x"]}', "should be {image: {object:"),
    ("mine.json", b"", "not JSON"),
    ("mine.json", b"3", "not a int"),
    ("mine.json", b'{"z": "x"}', "no caption of an image of the benchmark"),
    ("mine.json", b'{"a": "\xe9"}', "codec can't decode"),
    ("mine.json", b"[" * 100_000, "not JSON"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "says"), LABELS)
def test_benchmarks(tmp_path, capsys, name, content, says):
    (tmp_path / "references.json").write_bytes(REFERENCES)
    (tmp_path / "mine.json").write_bytes(REFERENCES)
    (tmp_path / name).write_bytes(content)
    out = tmp_path / "out"
    arguments = ["--captions", tmp_path / "mine.json", "--benchmark", "x", "--labels", tmp_path, "--out", out]
    assert says in error_of(capsys, "evaluate", *arguments)
    assert not out.exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO])
@pytest.mark.parametrize("command", [BUILD, SCORE])
def test_disks_that_refuse(base, tmp_path, capsys, monkeypatch, command, number):
    """Whatever the system says is one line, and the same command succeeds afterwards."""
    arguments = [a.replace("BASE", str(base)).replace("TMP", str(tmp_path)) for a in command]

    def refuse(source, target):
        raise OSError(number, files.os.strerror(number), str(target))

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", refuse)
        assert files.os.strerror(number) in error_of(capsys, *arguments)
    main(arguments)
    assert not list(tmp_path.rglob("*.partial*")) + list(tmp_path.rglob("*.lock"))


@pytest.mark.parametrize("command", [BUILD, SCORE])
def test_interrupted(base, tmp_path, capsys, monkeypatch, command):
    arguments = [a.replace("BASE", str(base)).replace("TMP", str(tmp_path)) for a in command]

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(encoders.ImageEncoder, "encode", interrupt)
        assert "interrupted; rerun the same command" in error_of(capsys, *arguments, status=130)
    main(arguments)


@pytest.mark.parametrize("command", [BUILD, SCORE, ("gallery", "index", "TMP/new")])
def test_two_at_once(base, tmp_path, capsys, command):
    shutil.copytree(base / "gallery", tmp_path / "new")
    arguments = [a.replace("BASE", str(base)).replace("TMP", str(tmp_path)) for a in command]
    target = tmp_path / ("out.jsonl" if command is SCORE else "new")
    with files.locked(target):
        assert f"{target}: another process is writing it" in error_of(capsys, *arguments)
    main(arguments)
    assert not list(tmp_path.rglob("*.lock"))


def test_a_damaged_zip_of_images(base, tmp_path, capsys):
    (tmp_path / "a.zip").write_bytes(b"PK no zip")
    source = write_jsonl(tmp_path / "rows.jsonl", [{"image": "a/1.png", "caption": "x"}])
    assert "a.zip: not a readable zip file" in error_of(capsys, "gallery", "build", tmp_path / "new", source)


# How browsers show an image: its mode and how it is saved, and the pixel that a correct reader gives.
def _wide(value):
    return Image.fromarray(np.full((8, 4), value, np.uint16))


def _palette():
    image = Image.new("P", (4, 8), 1)
    image.putpalette([255, 0, 0, 0, 0, 255])
    return image


SHOWN = {
    "rgb": (Image.new("RGB", (4, 8), (10, 20, 30)), {}, (10, 20, 30)),
    "grey": (Image.new("L", (4, 8), 77), {}, (77, 77, 77)),
    "two tones": (Image.new("1", (4, 8), 1), {}, (255, 255, 255)),
    "16 bits": (_wide(0x8012), {}, (128, 128, 128)),
    "16 bits, dark": (_wide(0x0200), {}, (2, 2, 2)),
    "alpha 0": (Image.new("RGBA", (4, 8), (200, 0, 0, 0)), {}, (255, 255, 255)),
    "alpha half": (Image.new("RGBA", (4, 8), (0, 0, 0, 128)), {}, (127, 127, 127)),
    "alpha 255": (Image.new("RGBA", (4, 8), (9, 8, 7, 255)), {}, (9, 8, 7)),
    "grey and alpha": (Image.new("LA", (4, 8), (0, 51)), {}, (204, 204, 204)),
    "palette": (_palette(), {}, (0, 0, 255)),
    "palette, transparent": (_palette(), {"transparency": 1}, (255, 255, 255)),
    "transparent colour": (Image.new("RGB", (4, 8), (1, 2, 3)), {"transparency": (1, 2, 3)}, (255, 255, 255)),
    "cmyk": (Image.new("CMYK", (4, 8), (255, 0, 0, 0)), {"format": "TIFF"}, (0, 255, 255)),
}


@pytest.mark.parametrize("kind", SHOWN)
def test_images_as_browsers_show_them(tmp_path, kind):
    image, options, pixel = SHOWN[kind]
    image.save(tmp_path / "a.png", **{"format": "PNG", **options})
    shown = open_image(tmp_path / "a.png")
    assert (shown.mode, shown.size) == ("RGB", (4, 8))
    assert set(shown.get_flattened_data()) == {pixel}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    upright = Image.fromarray(np.random.default_rng(0).integers(0, 255, (3, 5, 3), dtype=np.uint8))
    stored = {
        1: upright, 2: upright.transpose(0), 3: upright.rotate(180), 4: upright.transpose(1), 5: upright.transpose(5),
        6: upright.rotate(90, expand=True), 7: upright.transpose(6), 8: upright.rotate(270, expand=True),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    assert open_image(tmp_path / "a.png").tobytes() == upright.tobytes()
    # A resolution that is text, which Pillow reads and cannot write.
    entries = struct.pack("<HHIHH", 0x0112, 3, 1, orientation, 0) + struct.pack("<HHI4s", 0x011A, 2, 4, b"72")
    stored.save(tmp_path / "a.png", exif=b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + bytes(4))
    assert open_image(tmp_path / "a.png").tobytes() == upright.tobytes()
    stored.save(tmp_path / "a.png", exif=b"Exif\0\0not valid")
    assert open_image(tmp_path / "a.png").tobytes() == stored.tobytes()


def scored(tmp_path, base, rows, *more) -> pd.DataFrame:
    source = write_jsonl(tmp_path / "asked.jsonl", rows)
    main([str(a) for a in ("score", source, "--gallery", base / "gallery", "--out", tmp_path / "out.jsonl", *more)])
    return pd.read_json(tmp_path / "out.jsonl", lines=True, dtype=False)


def test_a_source_in_the_gallery_is_left_out_however_it_is_named(base, tmp_path, capsys):
    """By image_id, by another spelling of its path, through a link, as a copy, and from an archive."""
    (tmp_path / "link").symlink_to(base / "images")
    shutil.copy(base / "images" / "red.png", tmp_path / "copy.png")
    with zipfile.ZipFile(tmp_path / "more.zip", "w") as archive:
        archive.write(base / "images" / "red.png", "zipped.png")
    Image.new("RGB", (8, 8), "red").save(tmp_path / "other.png")
    rows = [
        {"image_id": "red", "image": str(tmp_path / "other.png")},
        *({"image": name} for name in (f"{base}/images/../images/red.png", "link/red.png", "copy.png", "zipped.png")),
        {"image_id": "stranger", "image": str(tmp_path / "other.png")},
    ]
    frame = scored(tmp_path, base, [row | {"caption": "a red square"} for row in rows])
    assert frame["in_gallery"].tolist() == [True] * 5 + [False]
    assert ["red" in {item["image_id"] for item in found} for found in frame["retrieved"]] == [False] * 5 + [True]
    assert "6 captions of 6 images, of which 5 are in the gallery themselves" in capsys.readouterr().out
    included = scored(tmp_path, base, [rows[3] | {"caption": "a red square"}], "--include-source")
    assert included["retrieved"][0][0]["image_id"] == "red"
    assert included["qir"][0] > frame["qir"][3]


def test_one_image_id_on_two_images(base, tmp_path, capsys, monkeypatch):
    rows = [{"image_id": "x", "image": f"{base}/images/{name}.png", "caption": "a"} for name in ("red", "red", "blue")]
    monkeypatch.setattr(score_files, "BATCH", 2)
    with pytest.raises(SystemExit):
        scored(tmp_path, base, rows)
    frame = pd.read_json(tmp_path / "out.jsonl", lines=True)
    assert frame["error"].isna().tolist() == [True, True, False]
    assert "image_id 'x' names another image in an earlier row" in capsys.readouterr().err
    assert np.isnan(frame["cim"][2])
    # Content within archives is compared, not its place.
    red, blue = ((base / "images" / f"{name}.png").read_bytes() for name in ("red", "blue"))
    table = pa.table({"image_id": ["x"] * 3, "image": [red, red, blue], "caption": ["a"] * 3})
    pq.write_table(table, tmp_path / "asked.parquet")
    out = tmp_path / "content.jsonl"
    with pytest.raises(SystemExit):
        main(["score", str(tmp_path / "asked.parquet"), "--gallery", str(base / "gallery"), "--out", str(out)])
    assert pd.read_json(out, lines=True)["cim"].round(4).equals(frame["cim"].round(4))


@pytest.mark.parametrize(("given", "image_id"), [(0, "0"), (7, "7"), ("", "IMAGE"), (None, "IMAGE"), ("a", "a")])
def test_image_ids(base, tmp_path, given, image_id):
    image = f"{base}/images/red.png"
    frame = scored(tmp_path, base, [{"image_id": given, "image": image, "caption": "a"}])
    assert frame["image_id"].astype(str).tolist() == [image_id.replace("IMAGE", image)]


def test_half_an_emoji_is_replaced_and_counted(base, tmp_path, capsys):
    """Model output that was cut within an emoji, as JSON holds it."""
    image = f"{base}/images/red.png"
    frame = scored(tmp_path, base, [{"image_id": "a\ud83d", "image": image, "caption": "a red square \ud83d"}])
    assert frame["caption"].tolist() == ["a red square \ufffd"]
    rows = [
        {"image_id": str(i), "image": image, "caption": text} for i, text in enumerate(("ok", "\ud83d", "x \ude00"))
    ]
    main(["gallery", "build", str(tmp_path / "new"), str(write_jsonl(tmp_path / "rows.jsonl", rows))])
    assert "2 captions hold U+FFFD in place of invalid characters" in capsys.readouterr().out
    assert load_gallery(tmp_path / "new").rows["caption"].tolist() == ["ok", "\ufffd", "x \ufffd"]
    (tmp_path / "mine.json").write_text('{"red": "a \\ud83d", "blue\\ud83d": "x"}')
    captions, problems = read_captions(tmp_path / "mine.json", {"red": "", "green": ""})
    assert captions["red"] == "a \ufffd"
    assert [p.what.partition(";")[0] for p in problems] == [
        "caption holds invalid characters, such as half an emoji", "no such image in the benchmark", "no caption",
    ]  # fmt: skip
    files.write_json(tmp_path / "problems.json", [list(problem) for problem in problems])


def test_members_of_a_tar_may_lie_apart(tmp_path):
    members = [("a.png", PNG), ("b.JPG", PNG), ("b.json", b'{"caption": "two"}'), ("a.txt", b"one"), ("c.png", PNG)]
    (tmp_path / "a.tar").write_bytes(tar_of(*members))
    records = list(shards_of([tmp_path / "a.tar"], 10)[0].read())
    assert [(r.image_id, r.caption) for r in records] == [("a", "one"), ("b", "two"), ("c", "")]
    assert all(record.content == PNG == read_stored(record.image) for record in records)


def test_images_in_zip_files_are_read_in_place(base, tmp_path, capsys):
    """DenseFusion-1M's layout: 000072/1.png is in 000072.zip, with its folder or without; one member is damaged."""
    images = tmp_path / "images"
    images.mkdir()
    red, blue = ((base / "images" / f"{name}.png").read_bytes() for name in ("red", "blue"))
    with zipfile.ZipFile(images / "000072.zip", "w") as archive:
        archive.writestr("000072/1.png", red)
        archive.writestr("000072/2.png", blue)
        archive.writestr("000072/both.png", blue)
    with zipfile.ZipFile(images / "000073.zip", "w") as archive:
        archive.writestr("3.png", blue)
        archive.writestr("000072/both.png", blue)
    content = (images / "000072.zip").read_bytes()
    (images / "000072.zip").write_bytes(content.replace(blue, blue[:-1] + b"x", 1))
    rows = [{"image_path": f"00007{i // 3 + 2}/{i}.png", "image_id": i, "caption": str(i)} for i in (1, 2, 3)]
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    command = ["gallery", "build", str(tmp_path / "new"), str(source), "--image-root", str(images)]
    main([*command, "--max-skipped", "0.5"])
    gallery = load_gallery(tmp_path / "new")
    assert gallery.rows["image_id"].tolist() == ["1", "3"]
    assert gallery.take([0])["image"][0].endswith("images/000072.zip!000072/1.png")
    assert open_image(gallery.take([1])["image"][0]).tobytes() == open_image(blue).tobytes()
    assert "Bad CRC-32" in (tmp_path / "new" / "skipped.jsonl").read_text()
    write_jsonl(source, [{"image_path": "000072/both.png", "caption": "x"}])
    assert "several zip files of that folder hold it" in error_of(capsys, *command)


class Content(bytes):
    """Content of images that counts how much of it is in memory."""

    alive = most = 0

    def __init__(self, _):
        Content.alive += 1
        Content.most = max(Content.most, Content.alive)

    def __del__(self):
        Content.alive -= 1


def test_a_build_holds_the_content_of_one_block_of_images(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "BLOCK", 16)
    text, image = encoders.load_text_encoder("text"), encoders.load_image_encoder("image")
    records = (Record(str(i), f"caption {i}", "x.tar!x", Content(PNG)) for i in range(200))
    build.build_gallery([Shard("all", lambda: records)], BuildSettings(), text, image, tmp_path / "g")
    assert len(load_gallery(tmp_path / "g")) == 200
    assert 16 <= Content.most <= 18


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_archives_are_read_record_by_record(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(shards, "READ", 4)
    path, size = tmp_path / f"a.{kind}", 2**18
    content = [np.random.default_rng(i).bytes(size) for i in range(80)]
    if kind == "tar":
        path.write_bytes(tar_of(*(m for i, c in enumerate(content) for m in ((f"{i}.png", c), (f"{i}.txt", b"x")))))
    else:
        pq.write_table(
            pa.table({"image": content, "caption": ["x"] * 80}), path, compression="none", write_batch_size=4
        )
    del content
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    arrow = max(pa.total_allocated_bytes() - before for shard in shards_of([path], 100) for _ in shard.read())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert max(arrow, peak) < 80 * size / 4, (arrow, peak)


def test_json_without_nan(base, tmp_path, monkeypatch):
    values = {"nan": float("nan"), "inf": [np.inf, np.float32("-inf")], 1: (1.23456789, True, None, "x", 3)}
    files.write_json(tmp_path / "a.json", values)
    assert files.read_json(tmp_path / "a.json") == {
        "nan": None,
        "inf": [None, None],
        "1": [1.23456789, True, None, "x", 3],
    }
    files.write_metrics(tmp_path / "a.json", values)
    assert files.read_json(tmp_path / "a.json")["1"] == [1.23457, True, None, "x", 3]
    encode = encoders.ImageEncoder.encode
    monkeypatch.setattr(encoders.ImageEncoder, "encode", lambda *a, **k: encode(*a, **k) * np.nan)
    with pytest.raises(SystemExit):
        scored(tmp_path, base, [{"image": f"{base}/images/red.png", "caption": "a red square"}])
    row = json.loads((tmp_path / "out.jsonl").read_text(), parse_constant=pytest.fail)
    assert row["cim"] is None
    assert row["error"].startswith("an encoder gives NaN")


def test_thumbnails_are_found_from_any_folder(base, tmp_path):
    with chdir(tmp_path):
        scored(tmp_path, base, [{"image": f"{base}/images/red.png", "caption": "a"}], "--html", "page.html")
    assert (tmp_path / "page.html").read_text().count("data:image/jpeg") == 4
    moved = tmp_path / "moved"
    shutil.copytree(base, moved)
    place = load_gallery(moved / "gallery").take([0])["image"][0]
    assert (moved / "images" / "red.png").samefile(place)


def test_a_full_disk_while_a_download_is_unpacked(tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    def fetch(url, path):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.txt", "x")

    archive = downloads.Archive("http://localhost/a.zip")
    monkeypatch.setattr(downloads, "SOURCES", {"x": downloads.Source("content", "licence", [archive])})
    monkeypatch.setattr(downloads.Archive, "size", lambda self: 1)
    monkeypatch.setattr(downloads, "download_file", fetch)
    with monkeypatch.context() as patch:
        patch.setattr(downloads.shutil, "unpack_archive", full)
        assert "No space left on device" in error_of(capsys, "download", "x", "--to", tmp_path, "--yes")
    main(["download", "x", "--to", str(tmp_path), "--yes"])
    assert (tmp_path / "x" / "a.txt").read_text() == "x"


@pytest.mark.parametrize("content", [b"", "é\t1\n".encode("latin-1"), bytes(range(256))])
@pytest.mark.parametrize("benchmark", ["flickr8k-expert", "flickr8k-cf", "composite", "pascal50s"])
def test_judgements_without_rows(base, tmp_path, capsys, benchmark, content):
    names = ("ExpertAnnotations.txt", "CrowdFlowerAnnotations.txt", "8k_correctness.csv")
    for name in (*names, "pair_pascal.mat", "consensus_pascal.mat"):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "Flickr8k.token.txt").write_text("a.png#0\ta red square\n")
    options = [
        "--benchmark",
        benchmark,
        "--data",
        tmp_path,
        "--gallery",
        base / "gallery",
        "--out",
        tmp_path / "out.json",
    ]
    assert str(tmp_path) in error_of(capsys, "judge", *options)
    assert not (tmp_path / "out.json").exists()


PARAMETERS = [
    (b"", "should hold named groups"),
    (b"- 1\n", "should hold named groups"),
    (b"a: [1\n", "not valid YAML"),
    (b"a: \xe9\n", "codec can't decode"),
    (("  steps: 70\n", "  steps: abc\n"), "'train.steps' should be a valid integer, not 'abc'"),
    (("\nreward:\n", "\nrewards:\n"), "group 'reward' is missing"),
    (("\ncompute:\n", "\ncompute: 3\nx:\n"), "group 'compute' is missing or not a mapping"),
    (("  beta: 1.0\n", "  beta: .inf\n"), "reward.beta' should be a finite number"),
]


@pytest.mark.parametrize("stage", ["dataset", "gallery", "evaluate"])
@pytest.mark.parametrize(("change", "says"), PARAMETERS, ids=[says for _, says in PARAMETERS])
def test_parameters_of_any_stage(tmp_path, capsys, monkeypatch, stage, change, says):
    monkeypatch.chdir(tmp_path)
    if isinstance(change, tuple):
        whole = (ROOT / "params.yaml").read_text()
        assert change[0] in whole
        change = whole.replace(*change).encode()
    (tmp_path / "params.yaml").write_bytes(change)
    assert says in error_of(capsys, "run", stage)
    assert [path.name for path in tmp_path.iterdir()] == ["params.yaml"]


def test_a_pipeline_outside_git(tmp_path, capsys, monkeypatch):
    """A zip download of the repository has no .git."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    for name in ("conf", "params.yaml"):
        (tmp_path / name).symlink_to(ROOT / name)
    assert "needs a git checkout" in error_of(capsys, "pipeline", tmp_path / "new", "-S", "profile=smoke")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_byte_order_mark_in_a_listing(base, tmp_path, mark):
    shutil.copytree(base / "images", tmp_path / "Images")
    (tmp_path / "captions.txt").write_text(f"{mark}image,caption\nred.png,a red square\n", encoding="utf-8")
    frame, root = flickr8k.read(tmp_path, None, 0, 0, 0)
    assert frame[["image", "caption"]].to_numpy().tolist() == [["red.png", "a red square"]]
    assert root == tmp_path / "Images"


@pytest.mark.parametrize(
    ("image", "says"),
    [
        ("coco/gone.png", "gone.png"),
        ("coco/../../gone.png", "gone.png"),
        ("", "images"),
        ("a\u0000.png", "a\u0000.png"),
    ],
)
def test_missing_images_of_a_listing_stop_stage_dataset(base, tmp_path, image, says):
    entry = {"conversations": [{"value": "Caption this."}, {"value": "a red square"}], "images": [image]}
    (tmp_path / sc_captioner.TRAIN_FILE).write_text(json.dumps([entry]))
    with pytest.raises(CimError, match=re.escape(says)):
        sc_captioner.read(tmp_path, str(base / "images"), 0, 0, 0)
