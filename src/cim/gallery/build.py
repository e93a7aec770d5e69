"""Building and enlarging a gallery, shard by shard: whatever is killed, at most one shard is embedded again.

Next to the gallery's folder grows FOLDER.building: a plan, and one finished folder a shard. Each is
written aside and renamed, so what is there is whole. With `accelerate launch` every process embeds its
share of the shards, on several machines too where they share the folder. At the end one process joins
them, makes the index, and puts the gallery in its place.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from itertools import chain
from pathlib import Path

import faiss
import numpy as np
import pandas as pd
import pyarrow as pa

from cim.data.manifest import Manifest
from cim.encoders import ImageEncoder, TextEncoder
from cim.errors import CimError
from cim.files import clear_disk_errors, write_json
from cim.gallery.files import SCHEMA, described, write_array, write_rows
from cim.gallery.search import (
    add_to_index,
    build_index,
    calibrate,
    choose_kind,
    open_search,
)
from cim.gallery.shards import Record, Shard, shards_of, shards_of_manifest
from cim.gallery.store import (
    IMAGES,
    INDEX,
    INFO,
    ROWS,
    TEXTS,
    GallerySettings,
    id_hashes,
    load_gallery,
    read_info,
)
from cim.processes import processes

SKIPPED = "skipped.jsonl"


def build_gallery(
    source: Manifest | list[Shard],
    settings: GallerySettings,
    text_encoder: TextEncoder,
    image_encoder: ImageEncoder,
    folder: Path,
) -> dict:
    """Embed a source and write the gallery; return its gallery.json.

    Args:
        source: a manifest, whose splits the settings choose and add shards to, or shards by cim.sources.shards_of.

    Raises:
        CimError: for images and captions that cannot be used, naming the first, where they are more than
            `settings.max_skipped` allows; where the disk is full; where nothing is left to build from.
    """
    shards = source
    if isinstance(source, Manifest):
        shards = shards_of_manifest(source.split(*settings.splits), settings.shard_rows)
        if settings.shards:
            root = Path(settings.image_root) if settings.image_root else None
            shards = [*shards, *shards_of([Path(p) for p in settings.shards], settings.shard_rows, root)]
    folder = Path(folder)
    _recover(folder)
    parts = _embed(shards, settings, text_encoder, image_encoder, folder, base=None)
    return _publish(folder, parts, settings, text_encoder, image_encoder, base=None)


def add_to_gallery(
    shards: list[Shard],
    settings: GallerySettings,
    text_encoder: TextEncoder,
    image_encoder: ImageEncoder,
    folder: Path,
) -> dict:
    """Add images to a gallery without embedding again those it has, which are passed over by their image_id.

    Raises:
        CimError: as build_gallery does, and where the gallery was built with other encoders.
    """
    folder = Path(folder)
    _recover(folder)
    base = load_gallery(folder, text_encoder, image_encoder)
    parts = _embed(shards, settings, text_encoder, image_encoder, folder, base=base)
    return _publish(folder, parts, settings, text_encoder, image_encoder, base=base)


def rebuild_index(folder: Path, kind: str, recall: float) -> dict:
    """Give a gallery another kind of index; its vectors stay. Returns its gallery.json.

    Raises:
        CimError: where there is no gallery, or the disk is full.
    """
    folder = Path(folder)
    info = read_info(folder)
    vectors = np.load(folder / TEXTS, mmap_mode="r")
    with clear_disk_errors(folder):
        info["index"] = _make_index(folder, vectors, kind, recall)
        if info["index"]["kind"] != "exact":
            info["files"][INDEX] = described(folder / INDEX)
        else:
            info["files"].pop(INDEX, None)
        write_json(folder / INFO, info)
    if info["index"]["kind"] == "exact":
        (folder / INDEX).unlink(missing_ok=True)
    return info


def _recover(folder: Path) -> None:
    """Bring back a gallery that a kill caught between being moved aside and being replaced."""
    old = _work_folder(folder) / "old"
    if processes().is_main_process and not folder.exists() and old.is_dir():
        os.replace(old, folder)
    processes().wait_for_everyone()


def _embed(shards, settings, text_encoder, image_encoder, folder: Path, base) -> list[Path]:
    """Embed this process's share of the shards; return the folders of all shards once all are done."""
    state = processes()
    work = _work_folder(folder)
    plan = {
        "shards": [shard.name for shard in shards],
        "text_encoder": _encoder_info(text_encoder),
        "image_encoder": _encoder_info(image_encoder),
        "base": base.info["files"] if base is not None else None,
    }
    if state.is_main_process:
        _start_or_resume(work, plan)
    state.wait_for_everyone()
    parts = [work / f"{i:06d}" for i in range(len(shards))]
    mine = [i for i in range(state.process_index, len(shards), state.num_processes) if not parts[i].is_dir()]
    for done, i in enumerate(mine):
        if len(shards) > 1:
            print(f"shard {i + 1} of {len(shards)} ({done + 1} of {len(mine)} to do here)", flush=True)
        with clear_disk_errors(folder):
            _embed_shard(shards[i], settings, text_encoder, image_encoder, parts[i], base, len(shards) == 1)
    state.wait_for_everyone()
    return parts


def _start_or_resume(work: Path, plan: dict) -> None:
    path = work / "plan.json"
    if path.is_file() and json.loads(path.read_text()) == plan:
        done = sum(1 for i in range(len(plan["shards"])) if (work / f"{i:06d}").is_dir())
        print(f"{work}: going on, {done} of {len(plan['shards'])} shards are done", flush=True)
        return
    if work.exists():
        print(f"{work}: was begun with other sources or encoders; starting anew", flush=True)
        shutil.rmtree(work)
    work.mkdir(parents=True)
    write_json(path, plan)


def _embed_shard(shard: Shard, settings, text_encoder, image_encoder, part: Path, base, only: bool) -> None:
    records, skipped = [], []
    for record in shard.read():
        (records if record.caption else skipped).append(record)
    reasons = {record.image_id: "empty caption" for record in skipped}
    if base is not None:
        new = base.rows_of([r.image_id for r in records]) < 0
        records = [r for r, is_new in zip(records, new, strict=True) if is_new]
    _complain(reasons, settings, shard.name)
    unreadable: dict[int, str] = {}
    images = image_encoder.encode([r.open for r in records], progress=True, unreadable=unreadable)
    reasons |= {records[i].image_id: reason for i, reason in unreadable.items()}
    _complain(reasons, settings, shard.name)
    kept = [i for i in range(len(records)) if i not in unreadable]
    records = [records[i] for i in kept]
    texts = text_encoder.encode([r.caption for r in records], progress=only)
    vectors = {TEXTS: texts, IMAGES: images[kept]}
    for what, name in ((text_encoder, TEXTS), (image_encoder, IMAGES)):
        if len(bad := np.flatnonzero(~np.isfinite(vectors[name]).all(axis=1))):
            raise CimError(
                f"image '{records[bad[0]].image_id}': encoder '{what.spec}' gives NaN for it, {len(bad)} in all; "
                "use another precision or encoder"
            )
    aside = part.with_name(part.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    for name, values in vectors.items():
        write_array(aside / name, len(records), values.shape[1], [values])
    write_rows(aside / ROWS, [_table(records)])
    (aside / SKIPPED).write_text(
        "".join(json.dumps({"image_id": k, "reason": v}) + "\n" for k, v in reasons.items()), encoding="utf-8"
    )
    os.replace(aside, part)


def _complain(reasons: dict[str, str], settings: GallerySettings, where: str) -> None:
    """Where nothing may be left out, stop at once; a share is only known at the end."""
    if reasons and settings.max_skipped == 0:
        image_id, reason = next(iter(reasons.items()))
        raise CimError(
            f"{where}: image '{image_id}': {reason} ({len(reasons)} such in this shard); mend or drop it, "
            "or allow a share with max_skipped"
        )


def _publish(folder: Path, parts: list[Path], settings, text_encoder, image_encoder, base) -> dict:
    """Join the parts into a gallery beside the old one and put it in its place, in the main process."""
    state = processes()
    if state.is_main_process:
        with clear_disk_errors(folder):
            _join(folder, parts, settings, text_encoder, image_encoder, base)
    state.wait_for_everyone()
    return read_info(folder)


def _join(folder: Path, parts: list[Path], settings, text_encoder, image_encoder, base) -> None:
    skipped = [json.loads(line) for part in parts for line in (part / SKIPPED).read_text().splitlines()]
    tables = [pa.ipc.open_file(pa.memory_map(str(part / ROWS))).read_all() for part in parts]
    kept = _first_of_each_id(tables, skipped)
    before = len(base) if base is not None else 0
    added = sum(map(len, kept))
    total = before + added
    considered = added + len(skipped)
    if skipped and len(skipped) > settings.max_skipped * considered:
        raise CimError(
            f"{folder}: {len(skipped)} of {considered} rows cannot be used, such as '{skipped[0]['image_id']}' "
            f"({skipped[0]['reason']}); mend them or raise max_skipped: what is embedded is kept"
        )
    if total == 0:
        raise CimError(f"{folder}: no row is left to build from; see the reasons above")

    work = _work_folder(folder)
    aside = work / "joined"
    shutil.rmtree(aside, ignore_errors=True)
    need = sum(total * encoder.dim * 2 for encoder in (text_encoder, image_encoder)) + total * text_encoder.dim
    if (free := shutil.disk_usage(work).free) < need:
        raise OSError(
            errno.ENOSPC, f"{need / 2**30:.1f} GiB are wanted to join the shards, {free / 2**30:.1f} are free"
        )
    aside.mkdir()
    for name, encoder, old in (
        (TEXTS, text_encoder, base.texts if base is not None else None),
        (IMAGES, image_encoder, base.images if base is not None else None),
    ):
        # Generators: one shard at a time is in memory.
        new = (np.load(p / name, mmap_mode="r")[k] for p, k in zip(parts, kept, strict=True))
        write_array(aside / name, total, encoder.dim, chain([] if old is None else [old], new))
    new_rows = (t.take(pa.array(k)) for t, k in zip(tables, kept, strict=True))
    write_rows(aside / ROWS, chain([] if base is None else [base.table], new_rows))
    (aside / SKIPPED).write_text("".join(json.dumps(row) + "\n" for row in skipped), encoding="utf-8")
    vectors = np.load(aside / TEXTS, mmap_mode="r")
    info = {
        "rows": total,
        "skipped": len(skipped),
        "text_encoder": _encoder_info(text_encoder),
        "image_encoder": _encoder_info(image_encoder),
        "index": _enlarged_index(folder, aside, vectors, base, settings),
    }
    names = [TEXTS, IMAGES, ROWS, *([INDEX] if info["index"]["kind"] != "exact" else [])]
    info["files"] = {name: described(aside / name) for name in names}
    write_json(aside / INFO, info)

    old = work / "old"
    if folder.exists():
        os.replace(folder, old)
    os.replace(aside, folder)
    shutil.rmtree(work)
    if skipped:
        print(f"{folder}: {len(skipped)} rows were left out; {folder / SKIPPED} says why", flush=True)


def _first_of_each_id(tables: list[pa.Table], skipped: list[dict]) -> list[np.ndarray]:
    """Row positions to keep in each part; later rows of an image_id that has been are added to `skipped`."""
    if not tables:
        return []
    repeated = pd.Series(np.concatenate([id_hashes(t) for t in tables])).duplicated().to_numpy()
    kept, start = [], 0
    for table in tables:
        twice = repeated[start : start + len(table)]
        start += len(table)
        for row in np.flatnonzero(twice):
            skipped.append(
                {"image_id": table["image_id"][int(row)].as_py(), "reason": "image_id occurs more than once"}
            )
        kept.append(np.flatnonzero(~twice))
    return kept


def _make_index(folder: Path, vectors: np.ndarray, kind: str, recall: float) -> dict:
    """Make the index of this kind, or of the kind that fits, in `folder`; returns gallery.json's entry for it."""
    reason = "asked for"
    if kind == "auto":
        kind, reason = choose_kind(*vectors.shape)
    print(f"index: {kind} ({reason})", flush=True)
    if kind == "exact":
        return {"kind": kind, "reason": reason, "effort": 0, "candidates": 0, "recall": 1.0}
    build_index(vectors, kind, folder / INDEX)
    return {"kind": kind, "reason": reason, **_tuned(folder, vectors, kind, recall)}


def _tuned(folder: Path, vectors: np.ndarray, kind: str, recall: float) -> dict:
    search = open_search(kind, vectors, folder / INDEX, effort=0, candidates=0)
    measured = calibrate(search, vectors, recall)
    print(f"index: effort {search.effort}, {search.candidates} candidates: {measured:.1%} of the nearest three found")
    return {"effort": search.effort, "candidates": search.candidates, "recall": round(measured, 4)}


def _enlarged_index(folder: Path, aside: Path, vectors: np.ndarray, base, settings: GallerySettings) -> dict:
    """The index of a gallery that grew: the old one with the new rows added, unless another kind now fits."""
    if base is None:
        return _make_index(aside, vectors, settings.index, settings.recall)
    before = base.info["index"]
    wanted = settings.index if settings.index != "auto" else choose_kind(*vectors.shape)[0]
    # An index trained on a fraction of what it holds serves badly: past twice its size it is trained anew.
    if wanted != before["kind"] or wanted == "exact" or len(vectors) > 2 * before.get("trained_on", len(base)):
        return _make_index(aside, vectors, settings.index, settings.recall)
    index = faiss.read_index(str(folder / INDEX))
    add_to_index(index, vectors, len(base))
    faiss.write_index(index, str(aside / INDEX))
    tuned = _tuned(aside, vectors, wanted, settings.recall)
    return {**before, **tuned, "trained_on": before.get("trained_on", len(base))}


def _work_folder(folder: Path) -> Path:
    return folder.with_name(folder.name + ".building")


def _encoder_info(encoder: TextEncoder | ImageEncoder) -> dict:
    return {"spec": encoder.spec, "dim": encoder.dim, "digest": encoder.digest}


def _table(records: list[Record]) -> pa.Table:
    rows = [{"image_id": r.image_id, "image": r.image, "caption": r.caption} for r in records]
    return pa.Table.from_pylist(rows, schema=SCHEMA)
