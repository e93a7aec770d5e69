"""`cim score`: GRC, QIR and CIM of user captions."""

import argparse
from pathlib import Path

from cim.cli.reward import add_reward_options, reward_settings
from cim.errors import CimError


def add_commands(commands) -> None:
    """Add the command to argparse's subparsers; it sets `handle`, which takes the arguments."""
    score = commands.add_parser("score", help="GRC, QIR and CIM of captions of images")
    score.add_argument("sources", type=Path, nargs="+", help='.jsonl of {"image": path, "caption": text}, or Parquet')
    score.add_argument("--gallery", type=Path, required=True)
    score.add_argument("--image-root", type=Path, help="what image paths are relative to (default: their file)")
    score.add_argument("--out", type=Path, default=Path("scores.jsonl"), help=".jsonl or .parquet")
    score.add_argument("--html", type=Path, help="also write a page with thumbnails of what was retrieved")
    add_reward_options(score)
    score.set_defaults(handle=_score)


def _score(arguments: argparse.Namespace) -> None:
    from cim.report.pages import score_page
    from cim.score_files import check_outputs, score_files, summary
    from cim.scorer import load_scorer

    out, html = arguments.out, arguments.html
    check_outputs(arguments.sources, arguments.gallery, out, html)
    scorer = load_scorer(arguments.gallery, reward_settings(arguments))
    frame = score_files(scorer, arguments.sources, out, arguments.image_root)
    print(f"{summary(frame)}\n\nwritten: {out}")
    if html:
        score_page(frame, html)
        print(f"written: {html}")
    if len(bad := frame[frame["error"].notna()]):
        raise CimError(f"{len(bad)} rows have no score, see their 'error' in {out}; {bad['error'].iloc[0]}")
