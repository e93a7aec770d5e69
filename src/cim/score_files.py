"""Scores of anybody's captions: read, score in batches, write; killed, the same call goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pandas as pd
from tqdm.auto import tqdm

from cim.errors import CimError
from cim.gallery.shards import Record, shards_of
from cim.scorer import Scorer

AT_ONCE = 512  # captions scored between two writes
SCORES = ("grc", "qir", "cim")


def score_files(scorer: Scorer, sources: list[Path], out: Path, image_root: Path | None = None) -> pd.DataFrame:
    """Score every caption of these files against the scorer's gallery and write one row each.

    Args:
        sources: JSON Lines, Parquet or WebDataset: see cim.sources.
        out: .jsonl or .parquet. Until it is whole, it grows as OUT.partial.

    Returns:
        Columns image_id, image, caption, grc, qir, cim, retrieved (the k items that were found, best first)
        and error: why a row could not be scored, else null.

    Raises:
        CimError: where a source or the gallery cannot be used.
    """
    if out.suffix not in (".jsonl", ".parquet"):
        raise CimError(f"{out}: should end in .jsonl or .parquet")
    shards = shards_of(sources, rows=AT_ONCE, image_root=image_root)
    made_of = {
        "shards": [shard.name for shard in shards],
        "gallery": scorer.gallery.info["files"],
        "reward": scorer.settings.model_dump(),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    done = _resume(partial, made_of)
    records = islice((record for shard in shards for record in shard.read()), done, None)
    with partial.open("a", encoding="utf-8") as lines, tqdm(desc="captions", initial=done, mininterval=2) as progress:
        while batch := list(islice(records, AT_ONCE)):
            lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in _score_batch(scorer, batch))
            lines.flush()
            progress.update(len(batch))
    rows = _read(partial)[1:]
    if not rows:
        raise CimError(f"{', '.join(map(str, sources))}: no captions there")
    frame = pd.DataFrame(rows)
    aside = out.with_name(out.name + ".whole")
    if out.suffix == ".parquet":
        frame.to_parquet(aside, index=False)
    else:
        aside.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    os.replace(aside, out)
    partial.unlink()
    return frame


def _score_batch(scorer: Scorer, records: list[Record]) -> Iterator[dict]:
    unreadable: dict[str, str] = {}
    scorer.add_images({record.image_id: record.open for record in records}, unreadable)
    good = [record for record in records if record.image_id not in unreadable]
    scores, found = scorer.scores_and_rows([r.caption for r in good], [r.image_id for r in good])
    # One look-up for the batch; an empty caption, which found nothing, is given row 0 here and drops it below.
    retrieved = iter(scorer.gallery.take(found.clip(min=0)).to_dict("records"))
    items = iter(zip(scores.to_dict("records"), found, strict=True))
    for record in records:
        row = {"image_id": record.image_id, "image": record.image, "caption": record.caption}
        if record.image_id in unreadable:
            yield {**row, **dict.fromkeys(SCORES), "retrieved": [], "error": unreadable[record.image_id]}
            continue
        values, rows = next(items)
        nearest = list(islice(retrieved, len(rows)))
        nearest = nearest if rows[0] >= 0 else []
        yield {**row, **{name: round(values[name], 6) for name in SCORES}, "retrieved": nearest, "error": None}


def _resume(partial: Path, made_of: dict) -> int:
    """Rows that a former call on the same has scored; else begin the file, whose first line says what it is made of."""
    head = json.dumps({"made_of": made_of})
    if partial.is_file():
        rows = _read(partial)
        if rows and rows[0] == json.loads(head):
            # A line that a kill cut short is written again.
            partial.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
            return len(rows) - 1
    partial.write_text(head + "\n", encoding="utf-8")
    return 0


def _read(path: Path) -> list[dict]:
    rows = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def summary(frame: pd.DataFrame, shown: int = 10) -> str:
    """A table for the terminal: the mean of each score with its 95 % interval, and the first captions."""
    good = frame[frame["error"].isna()]
    lines = []
    for name in SCORES:
        mean, error = good[name].mean(), good[name].sem()
        spread = f" [{mean - 1.96 * error:.4f}, {mean + 1.96 * error:.4f}]" if len(good) > 1 else ""
        lines.append(f"{name:>4}  {mean:.4f}{spread}")
    head = good.head(shown)[["image_id", *SCORES, "caption"]].copy()
    head["caption"] = head["caption"].str.slice(0, 60)
    table = head.to_string(index=False, float_format=lambda v: f"{v:.3f}", justify="left")
    rest = f"\n... and {len(good) - shown} more" if len(good) > shown else ""
    return f"{len(good)} captions\n" + "\n".join(lines) + f"\n\n{table}{rest}"
