"""`cim train`: one training run, or what it would take."""

import argparse

from cim.errors import CimError
from cim.pipeline.compose import add_overrides, compose


def add_commands(commands) -> None:
    """Add it to argparse's subparsers; it sets `handle`, which takes the arguments."""
    command = commands.add_parser("train", help="one training run of params.yaml; --plan: what it would take")
    command.add_argument("--run", required=True, help="METHOD-SEED, as in cim-0")
    command.add_argument("--plan", action="store_true", help="print model, data, batches, memory and hours, and stop")
    add_overrides(command, "with --plan: as in -S profile=paper")
    command.add_argument("--processes", type=int, help="for --plan: how many devices (default: this machine's)")
    command.set_defaults(handle=_train)


def _train(arguments: argparse.Namespace) -> None:
    from cim.params import read_params
    from cim.pipeline.paths import ARTIFACTS
    from cim.train import launch, preflight

    if arguments.overrides and not arguments.plan:
        raise CimError("-S is for --plan; to train with other parameters use 'dvc exp run' or 'cim pipeline FOLDER'")
    params = compose(arguments.overrides) if arguments.overrides else read_params()
    if arguments.plan:
        print(*preflight.plan(arguments.run, params, ARTIFACTS, arguments.processes), sep="\n")
    else:
        for line in launch.train(arguments.run, params):
            print(line, flush=True)
