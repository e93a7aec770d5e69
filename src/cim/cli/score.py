"""`cim score`: GRC, QIR and CIM of user captions."""

import argparse
from pathlib import Path

from cim.errors import CimError


def add_commands(commands) -> None:
    """Add the command to argparse's subparsers; it sets `handle`, which takes the arguments."""
    score = commands.add_parser("score", help="GRC, QIR and CIM of captions of images")
    score.add_argument("sources", type=Path, nargs="+", help='.jsonl of {"image": path, "caption": text}, or Parquet')
    score.add_argument("--gallery", type=Path, required=True)
    score.add_argument("--image-root", type=Path, help="what image paths are relative to (default: their file)")
    score.add_argument("--out", type=Path, default=Path("scores.jsonl"), help=".jsonl or .parquet")
    score.add_argument("--html", type=Path, help="also write a page with thumbnails of what was retrieved")
    score.add_argument("-k", type=int, default=3)
    score.add_argument("--beta", type=float, default=1.0)
    score.add_argument("--decay", type=float, default=0.5)
    score.add_argument("--include-source", action="store_true", help="let a caption retrieve its own image")
    score.set_defaults(handle=_score)


def _score(arguments: argparse.Namespace) -> None:
    from cim.params import group
    from cim.report.pages import score_page
    from cim.score_files import check_outputs, score_files, summary
    from cim.scorer import RewardSettings, load_scorer

    out, html = arguments.out, arguments.html
    check_outputs(arguments.sources, arguments.gallery, out, html)
    values = {name: getattr(arguments, name) for name in ("k", "beta", "decay")}
    settings = group(RewardSettings, {**values, "exclude_source": not arguments.include_source}, "reward")
    frame = score_files(load_scorer(arguments.gallery, settings), arguments.sources, out, arguments.image_root)
    print(f"{summary(frame)}\n\nwritten: {out}")
    if html:
        score_page(frame, html)
        print(f"written: {html}")
    if len(bad := frame[frame["error"].notna()]):
        raise CimError(f"{len(bad)} rows have no score, see their 'error' in {out}; {bad['error'].iloc[0]}")
