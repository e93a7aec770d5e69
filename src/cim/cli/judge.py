"""`cim judge`: agreement of the rewards with human judgements of captions."""

import argparse
from pathlib import Path

from cim.cli.reward import add_reward_options, reward_settings


def add_commands(commands) -> None:
    """Add it to argparse's subparsers; it sets `handle`, which takes the arguments."""
    command = commands.add_parser("judge", help="agreement of GRC, QIR and CIM with human judgements of captions")
    command.add_argument("--benchmark", required=True, help="flickr8k-expert, flickr8k-cf, composite or pascal50s")
    command.add_argument("--data", type=Path, required=True, help="folder of the benchmark's own files and images")
    command.add_argument("--gallery", type=Path, required=True)
    add_reward_options(command)
    command.add_argument("--out", type=Path, default=Path("judgements.json"))
    command.add_argument("--resamples", type=int, default=1000)
    command.add_argument("--seed", type=int, default=0)
    command.set_defaults(handle=_judge)


def _judge(arguments: argparse.Namespace) -> None:
    from cim.evaluation.judgements import agreement_with_people, load_judgements
    from cim.evaluation.settings import JudgeSettings
    from cim.evaluation.statistics import with_interval
    from cim.files import refuse_folder, write_metrics
    from cim.params import group
    from cim.scorer import load_scorer

    refuse_folder(arguments.out)
    bootstrap = group(JudgeSettings, {"seed": arguments.seed, "resamples": arguments.resamples}, "judge")
    reward = reward_settings(arguments)
    judgements = load_judgements(arguments.benchmark, arguments.data)
    print(f"{arguments.benchmark}: {judgements.summary}", flush=True)
    scorer = load_scorer(arguments.gallery, reward)
    metrics = agreement_with_people(judgements, scorer, bootstrap.seed, bootstrap.resamples)
    for score, cells in metrics["scores"].items():
        print(f"{score}: " + ", ".join(f"{name} {with_interval(cell)}" for name, cell in cells.items()))
    write_metrics(arguments.out, metrics)
    print(f"written: {arguments.out}")
