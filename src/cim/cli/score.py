"""`cim score`, `cim rerank` and `cim judge`: the rewards of captions."""

import argparse
from pathlib import Path

from cim.errors import CimError
from cim.files import refuse_folder


def add_commands(commands) -> None:
    """Add them to argparse's subparsers; each sets `handle`, which takes the arguments."""
    score = commands.add_parser("score", help="GRC, QIR and CIM of captions of images")
    score.add_argument("sources", type=Path, nargs="+", help='.jsonl of {"image": path, "caption": text}, or Parquet')
    score.add_argument("--out", type=Path, default=Path("scores.jsonl"), help=".jsonl or .parquet")
    score.add_argument("--html", type=Path, help="also write a page with thumbnails of what was retrieved")
    rerank = commands.add_parser("rerank", help="keep the best of several captions of each image (best of N)")
    rerank.add_argument("sources", type=Path, nargs="+", help="as of `cim score`; an image's rows are its candidates")
    rerank.add_argument("--out", type=Path, default=Path("best.jsonl"), help=".jsonl or .parquet; NAME-all: all rows")
    rerank.add_argument("--by", choices=("cim", "grc", "qir"), default="cim", help="the score that chooses")
    judge = commands.add_parser("judge", help="agreement of GRC, QIR and CIM with human judgements of captions")
    judge.add_argument("--benchmark", required=True, help="flickr8k-expert, flickr8k-cf, composite or pascal50s")
    judge.add_argument("--data", type=Path, required=True, help="folder of the benchmark's own files and images")
    judge.add_argument("--out", type=Path, default=Path("judgements.json"))
    judge.add_argument("--resamples", type=int, default=1000)
    judge.add_argument("--seed", type=int, default=0)
    for command in (score, rerank):
        command.add_argument("--image-root", type=Path, help="what image paths are relative to (default: their file)")
    for command, handle in ((score, _score), (rerank, _rerank), (judge, _judge)):
        command.add_argument("--gallery", type=Path, required=True)
        add_reward_options(command)
        command.set_defaults(handle=handle)


def add_reward_options(command: argparse.ArgumentParser) -> None:
    """Add the parameters of the reward to a command's parser; what is not given keeps the published value."""
    command.add_argument("--reward", type=Path, help="YAML of the parameters, such as conf/reward/calibrated.yaml")
    command.add_argument("-k", type=int, help="images retrieved (default: 3)")
    command.add_argument("--beta", type=float, help="weight of QIR (default: 1)")
    command.add_argument("--decay", type=float, help="ratio of the weights of successive ranks (default: 0.5)")
    command.add_argument("--include-source", action="store_true", help="let a caption retrieve its own image")


def scorer_of(arguments: argparse.Namespace):
    """The Scorer on the gallery, at the parameters of the reward that these options give; CimError for invalid ones."""
    from cim.params import group, read_params
    from cim.rewards import RewardSettings
    from cim.scorer import load_scorer

    values = read_params(arguments.reward) if arguments.reward else {}
    values |= {name: value for name in ("k", "beta", "decay") if (value := getattr(arguments, name)) is not None}
    values |= {"exclude_source": False} if arguments.include_source else {}
    return load_scorer(arguments.gallery, group(RewardSettings, values, "reward"))


def _score(arguments: argparse.Namespace) -> None:
    from cim.report.pages import score_page
    from cim.score_files import check_outputs, score_files, summary

    out, html = arguments.out, arguments.html
    check_outputs(arguments.sources, arguments.gallery, out, html)
    frame = score_files(scorer_of(arguments), arguments.sources, out, arguments.image_root)
    print(f"{summary(frame)}\n\nwritten: {out}")
    if html:
        score_page(frame, html)
        print(f"written: {html}")
    _refuse_unscored(frame, out)


def _rerank(arguments: argparse.Namespace) -> None:
    from cim.score_files import best_captions, check_outputs, score_files, summary, write_scores

    refuse_folder(out := arguments.out)
    every = out.with_stem(f"{out.stem}-all")
    check_outputs(arguments.sources, arguments.gallery, out)
    scores = score_files(scorer_of(arguments), arguments.sources, every, arguments.image_root)
    best = best_captions(scores, arguments.by)
    write_scores(best, out)
    print(f"{len(scores)} candidates; the best of each image:\n{summary(best)}\n\nwritten: {out}, {every}")
    _refuse_unscored(scores, every)


def _refuse_unscored(frame, out: Path) -> None:
    """An error at the end of a command, where rows could not be scored; what could is written."""
    if len(bad := frame[frame["error"].notna()]):
        raise CimError(f"{len(bad)} rows have no score, see their 'error' in {out}; {bad['error'].iloc[0]}")


def _judge(arguments: argparse.Namespace) -> None:
    from cim.evaluation.judgements import agreement_with_people, load_judgements
    from cim.evaluation.settings import BootstrapSettings
    from cim.evaluation.statistics import with_interval
    from cim.files import write_metrics
    from cim.params import group

    refuse_folder(out := arguments.out)
    if out.suffix != ".json" or arguments.gallery.resolve() in out.resolve().parents:
        raise CimError(f"--out {out}: should end in .json, outside the gallery")
    bootstrap = group(BootstrapSettings, {"seed": arguments.seed, "resamples": arguments.resamples}, "judge")
    scorer = scorer_of(arguments)
    judgements = load_judgements(arguments.benchmark, arguments.data)
    print(f"{arguments.benchmark}: {judgements.summary}", flush=True)
    metrics = agreement_with_people(judgements, scorer, bootstrap.seed, bootstrap.resamples)
    for score, cells in metrics["scores"].items():
        print(f"{score}: " + ", ".join(f"{name} {with_interval(cell)}" for name, cell in cells.items()))
    write_metrics(out, metrics)
    print(f"written: {out}")
