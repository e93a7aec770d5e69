"""Downloads: published archives and the hub, both from servers on this machine."""

import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest

from cim.cli import __main__ as cli
from cim.data import downloads
from cim.data.downloads import Archive, Source, download_file
from cim.errors import CimError


@pytest.fixture
def server():
    """Serves `files` with ranges, at most `cut` bytes a connection, and records the ranges of GET requests."""

    class Handler(BaseHTTPRequestHandler):
        files: ClassVar[dict[str, bytes]] = {}
        requested: ClassVar[list[str | None]] = []
        cut: int | None = None
        ranges = True

        def do_HEAD(self):
            self.answer(body=False)

        def do_GET(self):
            self.requested.append(self.headers.get("Range"))
            self.answer(body=True)

        def answer(self, body):
            if self.path not in self.files:
                self.send_error(404)
                return
            whole = self.files[self.path]
            start = 0
            if self.ranges and (wanted := re.match(r"bytes=(\d+)-", self.headers.get("Range") or "")):
                start = int(wanted.group(1))
                if start >= len(whole):
                    self.send_error(416)
                    return
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(whole) - start))
            self.end_headers()
            if body:
                self.wfile.write(whole[start:][: self.cut])

        def log_message(self, *_):
            pass

    Handler.files, Handler.requested = {}, []
    served = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=served.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{served.server_port}", Handler
    served.shutdown()


def zipped(**members):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, text in members.items():
            archive.writestr(f"folder/{name}.txt", text)
    return content.getvalue()


@pytest.fixture
def toy(server, monkeypatch):
    """A data set "toy" of one archive, which holds folder/a.txt and folder/b.txt."""
    url, handler = server
    content = zipped(a="one", b="two")
    handler.files["/toy.zip"] = content
    archive = Archive(f"{url}/toy.zip", hashlib.md5(content).hexdigest())
    monkeypatch.setitem(downloads.SOURCES, "toy", Source("a toy", "CC0", [archive]))
    return handler


def test_an_interrupted_download_resumes(server, tmp_path, monkeypatch):
    url, handler = server
    content = zipped(a="".join(f"{i} " for i in range(60_000)))
    handler.files["/big.zip"], handler.cut = content, 100_000
    archive = Archive(f"{url}/big.zip", hashlib.md5(content).hexdigest())
    monkeypatch.setitem(downloads.SOURCES, "big", Source("", "", [archive]))
    for _ in range(2):
        with pytest.raises(CimError, match="rerun the same command to resume"):
            downloads.download("big", tmp_path)
    handler.cut = None
    downloads.download("big", tmp_path)
    assert (tmp_path / "folder" / "a.txt").stat().st_size == sum(len(f"{i} ") for i in range(60_000))
    assert handler.requested == [None, "bytes=65536-", "bytes=131072-"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".big.zip.done", "folder"]
    downloads.download("big", tmp_path)
    assert len(handler.requested) == 3


def test_a_complete_file_is_kept_and_a_server_without_ranges_starts_over(server, tmp_path):
    url, handler = server
    handler.files["/x.bin"], path = b"0123456789", tmp_path / "x.bin"
    download_file(f"{url}/x.bin", path)
    download_file(f"{url}/x.bin", path)
    assert path.read_bytes() == b"0123456789"
    assert handler.requested == [None, "bytes=10-"]
    handler.ranges = False
    path.write_bytes(b"01234")
    download_file(f"{url}/x.bin", path)
    assert path.read_bytes() == b"0123456789"


def test_another_checksum_is_an_error_and_is_not_kept(server, tmp_path, monkeypatch):
    url, handler = server
    handler.files["/x.zip"] = b"not what was published"
    with pytest.raises(CimError, match="not the published"):
        Archive(f"{url}/x.zip", "0" * 32).fetch(tmp_path)
    assert not list(tmp_path.iterdir())
    monkeypatch.setitem(downloads.SOURCES, "gone", Source("", "", [Archive(f"{url}/gone.zip")]))
    with pytest.raises(CimError, match="404"):
        downloads.download("gone", tmp_path)
    with pytest.raises(CimError, match="404"):
        downloads.describe("gone")


def test_the_command_prints_licence_and_size_and_asks(toy, tmp_path, capsys):
    with pytest.raises(SystemExit):
        cli.main(["download", "toy", "--to", str(tmp_path)])
    printed = capsys.readouterr()
    assert "licence: CC0" in printed.out
    assert "size: 0.00 GB" in printed.out
    assert "nothing was downloaded; confirm with y, or pass --yes" in printed.err
    assert toy.requested == []
    cli.main(["download", "toy", "--to", str(tmp_path), "--yes"])
    assert (tmp_path / "toy" / "folder" / "a.txt").read_text() == "one"
    assert not (tmp_path / "toy" / ".toy.zip").exists()
    cli.main(["download", "toy", "--to", str(tmp_path), "--yes"])
    assert len(toy.requested) == 1
    with pytest.raises(SystemExit):
        cli.main(["download", "nothing", "--yes"])
    assert "choose from sc-captioner, coco-train" in capsys.readouterr().err


def test_a_users_files_are_never_written_over(toy, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.txt").write_text("mine")
    (tmp_path / "toy.zip").write_text("mine too")
    with pytest.raises(CimError, match="folder: exists already"):
        downloads.download("toy", tmp_path)
    assert (tmp_path / "folder" / "a.txt").read_text() == "mine"
    (tmp_path / "folder").rename(tmp_path / "mine")
    downloads.download("toy", tmp_path)
    assert toy.requested == [None, f"bytes={len(toy.files['/toy.zip'])}-"]
    assert (tmp_path / "folder" / "a.txt").read_text() == "one"
    assert (tmp_path / "toy.zip").read_text() == "mine too"


def test_what_macos_adds_to_archives_is_left_out(server, tmp_path, monkeypatch):
    url, handler = server
    for name in ("photos", "text"):
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w") as archive:
            archive.writestr(f"{name}/a", "one")
            archive.writestr(f"__MACOSX/{name}/._a", "")
        handler.files[f"/{name}.zip"] = content.getvalue()
    parts = [Archive(f"{url}/photos.zip"), Archive(f"{url}/text.zip")]
    monkeypatch.setitem(downloads.SOURCES, "mac", Source("", "", parts))
    downloads.download("mac", tmp_path)
    assert sorted(path.name for path in tmp_path.glob("[!.]*")) == ["photos", "text"]


def test_archives_write_nothing_outside(server, tmp_path):
    url, handler = server
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        member = tarfile.TarInfo("../outside.txt")
        member.size = 1
        archive.addfile(member, io.BytesIO(b"x"))
    handler.files |= {"/evil.tar.gz": content.getvalue(), "/broken.zip": b"PK", "/cut.tar.gz": content.getvalue()[:60]}
    for name in ("evil.tar.gz", "broken.zip", "cut.tar.gz"):
        with pytest.raises(CimError, match=f"{name}: cannot be unpacked"):
            Archive(f"{url}/{name}").fetch(tmp_path)
    assert not (tmp_path.parent / "outside.txt").exists()
    assert not (tmp_path / "outside.txt").exists()


@pytest.fixture
def hub():
    """A hub on this machine: one gated model, one data set, and nothing else."""
    label = json.dumps([{"conversations": [{"value": "p"}, {"value": "c"}], "images": ["a.jpg"]}]).encode()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            if "/datasets/zl2048" in self.path:
                self.data_set()
                return
            status, code = (403, "GatedRepo") if "gated" in self.path else (401, "RepoNotFound")
            if "revision" in self.path or "/wrong/" in self.path:
                status, code = 404, "RevisionNotFound"
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def data_set(self):
            if self.path.startswith("/api/") and "/tree/" in self.path:
                body = json.dumps(
                    [{"type": "file", "path": "llamafactory_json/train.json", "size": len(label), "oid": "e"}]
                ).encode()
            elif self.path.startswith("/api/"):
                name = "llamafactory_json/train.json"
                body = json.dumps(
                    {
                        "id": "zl2048/SC-Captioner-data",
                        "sha": "a" * 40,
                        "siblings": [{"rfilename": name, "size": len(label)}],
                    }
                ).encode()
            else:
                body = label
            self.send_response(200)
            self.send_header("X-Repo-Commit", "a" * 40)
            self.send_header("ETag", '"etag"')
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_):
            pass

    served = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=served.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{served.server_port}"
    served.shutdown()


def at_hub(hub, tmp_path, code, *arguments, offline="0"):
    """Run Python where the hub is that server: huggingface_hub reads its address once, when it is imported."""
    env = {
        **os.environ,
        "HF_ENDPOINT": hub,
        "HF_HUB_OFFLINE": offline,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=env, capture_output=True, text=True, timeout=120
    )
    return done.stdout, done.stderr


LOAD = """
import sys
from contextlib import suppress
from cim.errors import one_line_errors
from cim.captioners.models import ModelSettings, load_model
for name in sys.argv[1:]:
    name, _, revision = name.partition("@")
    with suppress(SystemExit), one_line_errors():
        load_model(ModelSettings(name=name, prompt="x", revision=revision or None))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("offline", "models"),
    [
        (
            "0",
            {
                "some/gated-model": "it is gated; accept its terms",
                "some/no-such-model": "no such model, or it is private",
                "some/model@wrong": "no such revision",
            },
        ),
        ("1", {"some/model": "HF_HUB_OFFLINE forbids|not in the hub's cache"}),
    ],
)
def test_hub_errors_are_one_clear_line(hub, tmp_path, offline, models):
    _, errors = at_hub(hub, tmp_path, LOAD, *models, offline=offline)
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(lines) == len(models), errors[-2000:]
    for line, says in zip(lines, models.values(), strict=True):
        assert re.search(says, line), line
    assert "Traceback" not in errors


@pytest.mark.slow
def test_a_data_set_of_the_hub_is_described_and_downloaded(hub, tmp_path):
    code = "import sys; from cim.cli.__main__ import main; main(sys.argv[1:])"
    out, errors = at_hub(hub, tmp_path, code, "download", "sc-captioner", "--to", str(tmp_path / "to"), "--yes")
    assert "licence: Apache-2.0" in out, errors[-2000:]
    assert (tmp_path / "to" / "sc-captioner" / "llamafactory_json" / "train.json").is_file(), errors[-2000:]
