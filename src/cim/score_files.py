"""Score files of user captions in batches; if interrupted, the same call resumes."""

import json
import math
import sys
from collections.abc import Iterable, Iterator
from itertools import islice, takewhile
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from cim.errors import CimError
from cim.files import explained, locked, refuse_folder, replacing, write_text
from cim.gallery.shards import Record, shards_of, source_files
from cim.scorer import Scorer

BATCH = 512  # captions scored between two writes
SCORES = ("grc", "qir", "cim")
SHOWN = 20  # retrieved items that are listed


def score_files(scorer: Scorer, sources: list[Path], out: Path, image_root: Path | None = None) -> pd.DataFrame:
    """Score every caption of these files against the scorer's gallery and write one row for each.

    Args:
        sources: JSON Lines, Parquet or WebDataset: see cim.gallery.shards.
        out: .jsonl or .parquet. OUT.progress holds the finished rows until all are done.

    Returns:
        Columns image_id, image, caption, grc, qir, cim, in_gallery (whether the gallery holds the image itself),
        retrieved (the best SHOWN of the k retrieved items) and error: why a row could not be scored, else null.

    Raises:
        CimError: where a source or the gallery cannot be used, or `out` must not be written.
    """
    check_outputs(sources, scorer.gallery.folder, out)
    # Without source images: these files may name others by the same image_ids.
    scorer = Scorer(scorer.gallery, scorer.text, scorer.image, scorer.settings)
    with locked(out):
        shards = shards_of(sources, rows=sys.maxsize, image_root=image_root)  # records are resumed, not shards
        made_of = {"shards": [shard.name for shard in shards], "gallery": scorer.gallery.info["files"]}
        progress = _progress(out)
        done = _resume(progress, {"made_of": made_of | {"reward": scorer.settings.model_dump()}})
        records = islice(_named_once(record for shard in shards for record in shard.read()), done, None)
        with progress.open("a", encoding="utf-8") as lines, tqdm(desc="captions", initial=done, mininterval=2) as bar:
            while batch := list(islice(records, BATCH)):
                lines.write(_lines(_score_batch(scorer, batch)))
                lines.flush()
                bar.update(len(batch))
        if not (rows := _read(progress)[1:]):
            raise CimError(f"{', '.join(map(str, sources))}: no captions there")
        frame = pd.DataFrame(rows)
        write_scores(frame, out)
        progress.unlink()
        return frame


def write_scores(frame: pd.DataFrame, out: Path) -> None:
    """Write rows of score_files to a .jsonl or .parquet file."""
    with replacing(out) as partial:
        if out.suffix == ".parquet":
            frame.to_parquet(partial, index=False)
        else:
            rows = frame.astype(object).where(frame.notna(), None)  # pandas has NaN where JSON has null
            partial.write_text(_lines(rows.to_dict("records")), encoding="utf-8")


def best_captions(scores: pd.DataFrame, by: str = "cim") -> pd.DataFrame:
    """Of the rows of score_files, the one of each image with the highest score `by`; the first of equal ones."""
    scored = scores[scores["error"].isna()].sort_values(by, ascending=False, kind="stable")
    return scored.drop_duplicates("image_id").sort_index()


def check_outputs(sources: list[Path], gallery: Path, out: Path, html: Path | None = None) -> None:
    """Refuse output files of another kind, and those that would overwrite a source or a file of the gallery.

    Raises:
        CimError: naming the file.
    """
    inputs = {gallery.resolve(), *(path.resolve() for path in source_files(sources))}
    outputs = {out: (".jsonl", ".parquet")} | ({html: (".html", ".htm")} if html else {})
    for path, suffixes in outputs.items():
        refuse_folder(path)
        if path.suffix not in suffixes:
            raise CimError(f"{path}: should end in {' or '.join(suffixes)}")
        if (inputs | set(map(Path.resolve, sources))) & {path.resolve(), path.resolve().parent}:
            raise CimError(f"{path}: is an input, would become one, or is within the gallery; choose another file")
    progress = _progress(out)
    if progress.is_file() and not progress.read_bytes().startswith(b'{"made_of": '):
        raise CimError(f"{progress}: is not the unfinished output of this command; move it or choose another output")


def _progress(out: Path) -> Path:
    return out.with_name(f"{out.name}.progress")


def _named_once(records: Iterable[Record]) -> Iterator[tuple[Record, str | None]]:
    """The records, each with an error where an earlier one has its image_id for another image."""
    images: dict[str, str] = {}
    for record in records:
        image = record.image if record.content is None else record.digest()
        clash = f"image_id '{record.image_id}' names another image in an earlier row; give each image its own"
        yield record, None if images.setdefault(record.image_id, image) == image else clash


def _score_batch(scorer: Scorer, batch: list[tuple[Record, str | None]]) -> Iterator[dict]:
    errors: dict[str, str] = {}
    scorer.add_images({record.image_id: record.source for record, clash in batch if not clash}, errors)
    batch = [(record, clash or errors.get(record.image_id)) for record, clash in batch]
    good = [record for record, error in batch if not error]
    ids = [record.image_id for record in good]
    scores, found = scorer.scores_and_rows([record.caption for record in good], ids)
    found = found[:, :SHOWN]
    scores["in_gallery"] = scorer.gallery_rows(ids) >= 0
    distinct = pd.unique(found[found >= 0])  # an empty caption retrieves nothing: -1
    items = dict(zip(distinct.tolist(), scorer.gallery.take(distinct).to_dict("records"), strict=True))
    scored = iter(zip(scores.round(6).to_dict("records"), found.tolist(), strict=True))
    for record, error in batch:
        row = {"image_id": record.image_id, "image": record.image, "caption": record.caption}
        values, rows = (dict.fromkeys(scores), []) if error else next(scored)
        if not error and not math.isfinite(values["cim"]):
            values, error = dict.fromkeys(scores), "an encoder gives NaN for it; use another precision or encoder"
        yield {**row, **values, "retrieved": [items[row] for row in rows if row >= 0], "error": error}


def _resume(progress: Path, head: dict) -> int:
    """How many rows an interrupted call on the same inputs has scored; else start a file with `head` as first line."""
    rows = _read(progress) if progress.is_file() else []
    # From the first row without a score on they are scored again: its image may have been restored.
    rows = [head, *takewhile(lambda row: row["error"] is None, rows[1:])] if rows[:1] == [head] else [head]
    write_text(progress, _lines(rows))
    return len(rows) - 1


def _read(path: Path) -> list[dict]:
    """The rows of a JSON Lines file, without a last line that an interruption cut short."""
    with explained(f"{path}: damaged", "delete it", ValueError):
        return [json.loads(line) for line in path.read_text(encoding="utf-8", errors="ignore").split("\n")[:-1]]


def _lines(rows: Iterable[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def summary(frame: pd.DataFrame, shown: int = 10) -> str:
    """A table for the terminal: the mean of each score with its 95 % interval, and the first captions."""
    good = frame[frame["error"].isna()]
    images = good.groupby("image_id")["in_gallery"].first().astype(bool)
    lines = [f"{len(good)} captions of {len(images)} images, of which {images.sum()} are in the gallery themselves"]
    lines += [*(f"{name:>4}  {_interval(good[name])}" for name in SCORES), ""]
    head = good.head(shown)[["image_id", *SCORES, "caption"]].assign(caption=lambda rows: rows["caption"].str[:60])
    lines.append(head.to_string(index=False, float_format=lambda v: f"{v:.3f}", justify="left"))
    return "\n".join(lines + ([f"... and {len(good) - shown} more"] if len(good) > shown else []))


def _interval(values: pd.Series) -> str:
    mean, margin = values.mean(), 1.96 * values.sem()
    return f"{mean:.4f}" + (f" [{mean - margin:.4f}, {mean + margin:.4f}]" if len(values) > 1 else "")
