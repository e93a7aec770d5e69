"""Score files of user captions in batches; if interrupted, the same call resumes."""

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from cim.errors import CimError
from cim.files import replacing, write_text
from cim.gallery.shards import Record, shards_of, source_files
from cim.scorer import Scorer

BATCH = 512  # captions scored between two writes
SCORES = ("grc", "qir", "cim")


def score_files(scorer: Scorer, sources: list[Path], out: Path, image_root: Path | None = None) -> pd.DataFrame:
    """Score every caption of these files against the scorer's gallery and write one row for each.

    Args:
        sources: JSON Lines, Parquet or WebDataset: see cim.gallery.shards.
        out: .jsonl or .parquet. OUT.progress holds the finished rows until all are done.

    Returns:
        Columns image_id, image, caption, grc, qir, cim, retrieved (the k retrieved items, best first) and error:
        why a row could not be scored, else null.

    Raises:
        CimError: where a source or the gallery cannot be used, or `out` must not be written.
    """
    check_outputs(sources, scorer.gallery.folder, out)
    shards = shards_of(sources, rows=BATCH, image_root=image_root)
    inputs = {
        "shards": [shard.name for shard in shards],
        "gallery": scorer.gallery.info["files"],
        "reward": scorer.settings.model_dump(),
    }
    progress = _progress(out)
    done = _resume(progress, {"made_of": inputs})
    records = islice((record for shard in shards for record in shard.read()), done, None)
    with progress.open("a", encoding="utf-8") as lines, tqdm(desc="captions", initial=done, mininterval=2) as bar:
        while batch := list(islice(records, BATCH)):
            lines.write(_lines(_score_batch(scorer, batch)))
            lines.flush()
            bar.update(len(batch))
    rows = _read(progress)[1:]
    if not rows:
        raise CimError(f"{', '.join(map(str, sources))}: no captions there")
    frame = pd.DataFrame(rows)
    with replacing(out) as partial:
        if out.suffix == ".parquet":
            frame.to_parquet(partial, index=False)
        else:
            partial.write_text(_lines(rows), encoding="utf-8")
    progress.unlink()
    return frame


def check_outputs(sources: list[Path], gallery: Path, out: Path, html: Path | None = None) -> None:
    """Refuse output files of another kind, and those that would overwrite a source or a file of the gallery.

    Raises:
        CimError: naming the file.
    """
    inputs = {gallery.resolve(), *(path.resolve() for path in source_files(sources))}
    outputs = {out: (".jsonl", ".parquet")} | ({html: (".html", ".htm")} if html else {})
    for path, suffixes in outputs.items():
        if path.is_dir():
            raise CimError(f"{path}: is a folder; give the name of a file")
        if path.suffix not in suffixes:
            raise CimError(f"{path}: should end in {' or '.join(suffixes)}")
        if inputs & {path.resolve(), path.resolve().parent}:
            raise CimError(f"{path}: is an input or within the gallery, and would be overwritten; choose another file")
    progress = _progress(out)
    if progress.is_file() and not progress.read_bytes().startswith(b'{"made_of": '):
        raise CimError(f"{progress}: is not the unfinished output of this command; move it or choose another output")


def _progress(out: Path) -> Path:
    return out.with_name(f"{out.name}.progress")


def _score_batch(scorer: Scorer, records: list[Record]) -> Iterator[dict]:
    unreadable: dict[str, str] = {}
    scorer.add_images({record.image_id: record.open for record in records}, unreadable)
    good = [record for record in records if record.image_id not in unreadable]
    scores, found = scorer.scores_and_rows([r.caption for r in good], [r.image_id for r in good])
    # One look-up for the batch: an empty caption, which retrieves nothing, takes row 0 and drops it below.
    retrieved = iter(scorer.gallery.take(found.clip(min=0)).to_dict("records"))
    items = iter(zip(scores.to_dict("records"), found, strict=True))
    for record in records:
        row = {"image_id": record.image_id, "image": record.image, "caption": record.caption}
        if record.image_id in unreadable:
            yield {**row, **dict.fromkeys(SCORES), "retrieved": [], "error": unreadable[record.image_id]}
            continue
        values, rows = next(items)
        nearest = list(islice(retrieved, len(rows)))
        values = {name: round(value, 6) for name, value in values.items()}
        yield {**row, **values, "retrieved": nearest if rows[0] >= 0 else [], "error": None}


def _resume(progress: Path, head: dict) -> int:
    """How many rows an interrupted call on the same inputs has scored; else start a file with `head` as first line."""
    rows = _read(progress) if progress.is_file() else []
    rows = rows if rows[:1] == [head] else [head]
    write_text(progress, _lines(rows))
    return len(rows) - 1


def _read(path: Path) -> list[dict]:
    """The rows of a JSON Lines file, without a last line that an interruption cut short."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8", errors="ignore").split("\n")[:-1]]


def _lines(rows: Iterable[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def summary(frame: pd.DataFrame, shown: int = 10) -> str:
    """A table for the terminal: the mean of each score with its 95 % interval, and the first captions."""
    good = frame[frame["error"].isna()]
    lines = [f"{len(good)} captions", *(f"{name:>4}  {_interval(good[name])}" for name in SCORES), ""]
    head = good.head(shown)[["image_id", *SCORES, "caption"]]
    head = head.assign(caption=head["caption"].str.slice(0, 60))
    lines.append(head.to_string(index=False, float_format=lambda v: f"{v:.3f}", justify="left"))
    return "\n".join(lines + ([f"... and {len(good) - shown} more"] if len(good) > shown else []))


def _interval(values: pd.Series) -> str:
    mean, margin = values.mean(), 1.96 * values.sem()
    return f"{mean:.4f}" + (f" [{mean - margin:.4f}, {mean + margin:.4f}]" if len(values) > 1 else "")
