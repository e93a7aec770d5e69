"""`cim rerank`: of several captions of each image, the one that the reward prefers."""

import argparse
from pathlib import Path

from cim.cli.reward import add_reward_options, reward_settings


def add_commands(commands) -> None:
    """Add it to argparse's subparsers; it sets `handle`, which takes the arguments."""
    command = commands.add_parser("rerank", help="keep the best of several captions of each image (best of N)")
    command.add_argument(
        "sources", type=Path, nargs="+", help="as of `cim score`; rows of one image are its candidates"
    )
    command.add_argument("--gallery", type=Path, required=True)
    command.add_argument("--image-root", type=Path, help="what image paths are relative to (default: their file)")
    command.add_argument("--by", choices=("cim", "grc", "qir"), default="cim", help="the score that chooses")
    command.add_argument(
        "--out", type=Path, default=Path("best.jsonl"), help="NAME.jsonl or .parquet; NAME-all: all rows"
    )
    add_reward_options(command)
    command.set_defaults(handle=_rerank)


def _rerank(arguments: argparse.Namespace) -> None:
    from cim.score_files import best_captions, check_outputs, score_files, summary, write_scores
    from cim.scorer import load_scorer

    out, settings = arguments.out, reward_settings(arguments)
    every = out.with_stem(f"{out.stem}-all")
    for path in (out, every):
        check_outputs(arguments.sources, arguments.gallery, path)
    scores = score_files(load_scorer(arguments.gallery, settings), arguments.sources, every, arguments.image_root)
    best = best_captions(scores, arguments.by)
    write_scores(best, out)
    print(f"{len(scores)} candidates; the best of each image:\n{summary(best)}\n\nwritten: {out}, {every}")
