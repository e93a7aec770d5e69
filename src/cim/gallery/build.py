"""Building and enlarging a gallery shard by shard; after an interruption, finished shards are not embedded again.

FOLDER.building, next to the gallery, holds a plan and one file per finished shard. Each is written under another name
and renamed, so that only complete ones count. With `accelerate launch` every process embeds its share of the shards, on
several machines too where they share the folder. At the end one process joins them, builds the index, and
puts the gallery in its place.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from itertools import chain, compress, islice, repeat
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.feather
from tqdm import tqdm

from cim.encoders import ImageEncoder, TextEncoder
from cim.errors import CimError
from cim.files import explained, locked, read_json, refuse_foreign, replacing, write_json
from cim.gallery import store
from cim.gallery.search import index_at, new_index
from cim.gallery.settings import BuildSettings
from cim.gallery.shards import Record, Shard
from cim.gallery.transform import ImageTransform
from cim.processes import processes

PLAN = "plan.json"
BLOCK = 1024  # records in memory at once: they may hold the content of their images
DATA = (store.TEXTS, store.IMAGES, store.ROWS, store.TRANSFORM, *store.INDEXES)


def build_gallery(
    shards: list[Shard], settings: BuildSettings, text: TextEncoder, image: ImageEncoder, out: Path, add: bool = False
) -> dict:
    """Embed shards and write the gallery, in place of a former one; returns its gallery.json.

    Args:
        add: enlarge the gallery in `out` by the images whose image_id it lacks; nothing else is embedded.

    Raises:
        CimError: for more unusable images and captions than `settings.max_skipped` allows, naming the first; where no
            row is left; where `out` holds something else, or with `add` a gallery of other encoders; where FAISS
            refuses the index; where the disk is full, what is embedded being kept; while another process builds there.
    """
    check_target(out)
    lock = locked(_folders(out)[0]) if processes().is_main_process else nullcontext()
    with explained(f"{out}: not completed", "fix this and run the same command again to resume", OSError), lock:
        return _Build(shards, settings, text, image, out, add).run()


def rebuild_index(folder: Path, kind: str, recall: float) -> dict:
    """Replace the index of a gallery; its vectors stay. Returns its gallery.json.

    Until gallery.json is replaced, by one rename, the former index remains valid.

    Raises:
        CimError: where there is no gallery, FAISS refuses `kind`, or the disk is full.
    """
    folder = _folders(folder)[0]
    store.read_info(folder)  # a lock beside what is no gallery would make its folder
    with locked(folder), explained(f"{folder}: index not replaced", "fix this and rerun the same command", OSError):
        info = store.read_info(folder)
        store.check_file(folder / store.TEXTS, info["files"][store.TEXTS])
        former = info["index"].get("file")
        new = store.INDEXES[former == store.INDEXES[0]]
        info["index"] = index_at(folder / new, np.load(folder / store.TEXTS, mmap_mode="c"), kind, recall)
        info["files"].pop(former, None)
        if "file" in info["index"]:
            info["files"][new] = store.described(folder / new)
        write_json(folder / store.INFO, info)
        for name in set(store.INDEXES) - set(info["files"]):
            (folder / name).unlink(missing_ok=True)
    return info


def check_target(folder: Path, sources: Iterable[Path] = ()) -> None:
    """Refuse to build in a folder that holds something else, or one of the sources.

    Raises:
        CimError: naming it.
    """
    folder, work = _folders(folder)
    for source in map(Path, sources):
        if {folder.resolve(), work.resolve()} & {source.resolve(), *source.resolve().parents}:
            raise CimError(f"{source}: is within the gallery {folder}, which is to be written; choose another folder")
    refuse_foreign(folder, store.INFO, "gallery")
    # A kill may have come before the first plan was complete.
    if not (work / f"{PLAN}.partial").is_file():
        refuse_foreign(work, PLAN, "gallery that is being built")


def read_former(folder: Path) -> dict:
    """gallery.json of a gallery, also where its rebuild was killed in its last step, which the next build completes."""
    folder, work = _folders(folder)
    return store.read_info(folder if folder.exists() else work / "old")


def _folders(folder: Path) -> tuple[Path, Path]:
    """The gallery by its own name, not that of a symbolic link, and the folder in which it is built."""
    folder = Path(folder).resolve() if Path(folder).is_symlink() or Path(folder).name in ("", "..") else Path(folder)
    return folder, folder.with_name(f"{folder.name}.building")


class _Build:
    def __init__(self, shards, settings: BuildSettings, text, image, folder: Path, add: bool):
        self.shards, self.settings, self.text, self.image = shards, settings, text, image
        self.folder, self.work = _folders(folder)
        # Tables of SCHEMA's columns and both embeddings; what was left out is in their metadata.
        self.parts = [self.work / "parts" / f"{i:06d}" for i in range(len(shards))]
        self._in_main_process(self._settle)
        self.base = store.load_gallery(self.folder, text, image) if add else None
        encoders = {"text_encoder": text, "image_encoder": image}
        self.info = {name: {"spec": e.spec, "dim": e.dim, "digest": e.digest} for name, e in encoders.items()}
        # What the gallery left out before counts no more: a source that has grown may be added again.
        former = (self.folder / store.SKIPPED).read_text(encoding="utf-8") if add else ""
        self.former = {(row := json.loads(line))["image_id"]: row["reason"] for line in former.splitlines()}
        base = self.base and self.base.info["files"]
        self.plan = {"shards": [shard.name for shard in shards], **self.info, "base": base}

    def run(self) -> dict:
        if self.settings.index not in ("exact", "auto"):
            new_index(self.settings.index, self.text.dim)  # fail now, not after hours of embedding
        self._in_main_process(self._start_or_resume)
        rank, count = processes().process_index, processes().num_processes
        mine = [i for i in range(rank, len(self.parts), count) if not self.parts[i].is_file()]
        for done, i in enumerate(mine, 1):
            if len(self.parts) > 1:
                print(f"shard {i + 1} of {len(self.parts)} ({done} of {len(mine)} to do here)", flush=True)
            self._embed(self.shards[i], self.parts[i])
        processes().wait_for_everyone()
        self._in_main_process(self._publish)
        return store.read_info(self.folder)

    def _in_main_process(self, step: Callable[[], None]) -> None:
        processes().on_main_process(step)()
        processes().wait_for_everyone()

    def _settle(self) -> None:
        """Complete the last step of a build, or undo what a killed one did of it: its former gallery is in `old`."""
        old = self.work / "old"
        if old.is_dir() and not (self.folder / store.INFO).is_file():
            os.replace(old, self.folder)
        elif old.is_dir():
            # Files that are not the gallery's own, such as a user's notes, stay in the folder.
            for path in old.iterdir():
                if path.name.removesuffix(".partial") not in (*DATA, store.INFO, store.SKIPPED):
                    os.replace(path, self.folder / path.name)
            shutil.rmtree(old)

    def _start_or_resume(self) -> None:
        path = self.work / PLAN
        if path.is_file() and read_json(path) == self.plan:
            done = sum(part.is_file() for part in self.parts)
            print(f"{self.work}: resuming, {done} of {len(self.parts)} shards are done", flush=True)
            if done == len(self.parts):
                self._try_again()
            return
        if path.is_file():
            print(f"{self.work}: started with other sources or encoders; starting again", flush=True)
        shutil.rmtree(self.work / "parts", ignore_errors=True)
        write_json(path, self.plan)

    def _try_again(self) -> None:
        """Delete shards with rows that could not be used, where these are too many still: they may have been fixed."""
        parts = [pyarrow.feather.read_table(part, memory_map=True) for part in self.parts]
        skipped = [len(self._new(_skipped(part))) for part in parts]
        if sum(skipped) > self.settings.max_skipped * (sum(map(len, parts)) + sum(skipped)):
            for path in compress(self.parts, skipped):
                path.unlink()
            print(f"{self.work}: trying shards with rows that could not be used again", flush=True)

    def _new(self, skipped: list[tuple[str, str]]) -> list[tuple[str, str]]:
        """Rows that cannot be used, without those that the gallery left out before."""
        return [row for row in skipped if row[0] not in self.former]

    def _embed(self, shard: Shard, part: Path) -> None:
        rows, skipped, images = [], [], [np.zeros((0, self.image.dim), np.float32)]
        records = iter(shard.read())
        with tqdm(desc="encoding images", mininterval=2) as bar:
            while block := list(islice(records, BLOCK)):
                found, vectors = self._embed_images(block, skipped)
                if (new := self._new(skipped)) and self.settings.max_skipped == 0:  # a larger share: at the end
                    fix = f"({len(new)} so far in this shard); fix or remove it, or allow a share with max_skipped"
                    raise CimError(f"{shard.name}: image '{new[0][0]}': {new[0][1]} {fix}")
                rows += found
                images.append(vectors)
                bar.update(len(block))
                del block  # before the next is read
        texts = self.text.encode([row["caption"] for row in rows], progress=len(self.parts) == 1)
        table = pa.Table.from_pylist(rows, schema=store.SCHEMA)
        embedded = (store.TEXTS, self.text, texts), (store.IMAGES, self.image, np.concatenate(images))
        for name, encoder, vectors in embedded:
            if len(bad := np.flatnonzero(~np.isfinite(vectors).all(axis=1))):
                where = f"image '{rows[bad[0]]['image_id']}': encoder '{encoder.spec}'"
                raise CimError(f"{where} gives NaN for it, {len(bad)} in all; use another precision or encoder")
            flat = vectors.astype(np.float16).ravel()
            table = table.append_column(name, pa.FixedSizeListArray.from_arrays(flat, encoder.dim))
        with replacing(part) as partial:
            table = table.replace_schema_metadata({"skipped": json.dumps(skipped)})
            pyarrow.feather.write_feather(table, str(partial), compression="uncompressed")

    def _embed_images(self, records: list[Record], skipped: list[tuple[str, str]]) -> tuple[list[dict], np.ndarray]:
        """The rows and (n, d) image embeddings of the records that are new and can be used; the rest to `skipped`."""
        skipped += [(r.image_id, "empty caption") for r in records if not r.caption]
        records, root = [r for r in records if r.caption], os.path.realpath(self.folder)
        if self.base is not None:
            rows = list(zip(records, self.base.rows_of([r.image_id for r in records]), strict=True))
            taken = [r.image_id for r, row in rows if row >= 0 and not r.is_of(self.base.table.slice(row, 1), root)]
            skipped += [(image_id, "the gallery has another image of this image_id") for image_id in taken]
            records = [r for r, row in rows if row < 0]
        unreadable: dict[int, str] = {}
        images = self.image.encode([r.open for r in records], unreadable=unreadable)
        skipped += [(records[i].image_id, reason) for i, reason in unreadable.items()]
        records = [r for i, r in enumerate(records) if i not in unreadable]
        with ThreadPoolExecutor(4) as pool:  # files are read again, perhaps from a network
            rows = list(pool.map(Record.row, records, repeat(root)))
        return rows, np.delete(images, list(unreadable), axis=0)

    def _publish(self) -> None:
        """Join the parts next to a former gallery and put the result in its place."""
        parts = [pyarrow.feather.read_table(part, memory_map=True) for part in self.parts]
        table = pa.concat_tables(parts)
        first = ~pd.Series(store.hashes(table["image_id"])).duplicated().to_numpy()
        skipped = [row for part in parts for row in _skipped(part)]
        repeated = table["image_id"].filter(pa.array(~first)).to_pylist()
        skipped += [(image_id, "image_id occurs more than once") for image_id in repeated]
        added, new, base = int(first.sum()), self._new(skipped), self.base
        if len(new) > self.settings.max_skipped * (added + len(new)):
            image_id, reason = new[0]
            problem = f"{len(new)} of {added + len(new)} rows cannot be used, such as '{image_id}' ({reason})"
            fix = "fix them or raise max_skipped, and run the same command again: what is embedded is kept"
            raise CimError(f"{self.folder}: {problem}; {fix}")
        if base is not None:
            named = {image_id for image_id, _ in skipped} | set(table["image_id"].to_pylist())
            skipped = [*(row for row in self.former.items() if row[0] not in named), *skipped]
        total = added + (0 if base is None else len(base))
        if total == 0:
            raise CimError(f"{self.folder}: no row is left to build from; see the reasons above")
        # float16 vectors, and an index of a byte per dimension
        need = total * (3 * self.text.dim + 2 * self.image.dim)
        if (free := shutil.disk_usage(self.work).free) < need:
            problem = f"joining the shards takes {need / 2**30:.1f} GiB, {free / 2**30:.1f} are free"
            raise CimError(f"{self.folder}: {problem}; free some space and run the same command again to resume")
        aside = self.work / "joined"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        # Memory-mapped batches of at most one shard, filtered one at a time.
        batches = table.append_column("first", pa.array(first)).to_batches()
        texts, images, rows = ([], [], []) if base is None else ([base.texts], [base.images], [base.table])
        for name, dim, former in ((store.TEXTS, self.text.dim, texts), (store.IMAGES, self.image.dim, images)):
            new = (np.asarray(b[name].filter(b["first"]).flatten()).reshape(-1, dim) for b in batches)
            store.write_array(aside / name, total, dim, chain(former, new))
        store.write_rows(aside / store.ROWS, chain(rows, (b.filter(b["first"]) for b in batches)))
        left_out = (json.dumps({"image_id": image_id, "reason": reason}) + "\n" for image_id, reason in skipped)
        (aside / store.SKIPPED).write_text("".join(left_out), encoding="utf-8")
        vectors = np.load(aside / store.TEXTS, mmap_mode="c")
        former = base and (base.folder, base.info["index"])
        index = index_at(aside / store.INDEXES[0], vectors, self.settings.index, self.settings.recall, former)
        transform = ImageTransform.fit(np.load(aside / store.IMAGES, mmap_mode="c"))
        np.savez(aside / store.TRANSFORM, **vars(transform))
        files = {name: store.described(aside / name) for name in DATA if (aside / name).is_file()}
        info = {"rows": total, "skipped": len(skipped), **self.info, "index": index, "files": files}
        write_json(aside / store.INFO, info)
        if self.folder.exists():
            os.replace(self.folder, self.work / "old")
        os.replace(aside, self.folder)
        self._settle()
        # First the parts, since a folder without a plan is not taken for that of a build.
        shutil.rmtree(self.work / "parts")
        shutil.rmtree(self.work)
        if skipped:
            print(f"{self.folder}: {len(skipped)} rows were left out, see {self.folder / store.SKIPPED}", flush=True)
        if cut := pc.sum(pc.match_substring(table["caption"], "\ufffd")).as_py():
            print(f"{self.folder}: {cut} captions hold U+FFFD in place of invalid characters", flush=True)


def _skipped(part: pa.Table) -> list[tuple[str, str]]:
    """The rows of a shard that could not be used: (image_id, reason)."""
    return json.loads(part.schema.metadata[b"skipped"])
