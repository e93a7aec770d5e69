"""`cim data`, `cim run`, `cim params`, `cim pipeline` and `cim train`."""

import argparse
from pathlib import Path

from cim.errors import CimError
from cim.pipeline.compose import add_overrides, compose, dump


def add_commands(commands) -> None:
    """Add them to argparse's subparsers; each sets `handle`, which takes the arguments."""
    from cim.pipeline.stages import STAGES

    data = commands.add_parser("data", help="draw the raw inputs of the small world into data/")
    data.add_argument("--folder", type=Path, default=Path("data"))
    run = commands.add_parser("run", help="run one stage of the pipeline on params.yaml")
    run.add_argument("stage", choices=STAGES)
    run.add_argument("--run", help="for stage train: METHOD-SEED, as in cim-0")
    params = commands.add_parser("params", help="print the parameters that conf/ composes")
    pipeline = commands.add_parser("pipeline", help="run the pipeline with other parameters in a folder of its own")
    pipeline.add_argument("folder", type=Path, help="a new folder, or one of an earlier run")
    pipeline.add_argument("stages", nargs="*", help="run these and what they depend on (default: all)")
    pipeline.add_argument("--publish", type=Path, help="copy the results with their params.yaml and dvc.lock here")
    for command in (params, pipeline):
        add_overrides(command)
    train = commands.add_parser("train", help="one training run of params.yaml; --plan: what it would take")
    train.add_argument("--run", required=True, help="METHOD-SEED, as in cim-0")
    train.add_argument("--plan", action="store_true", help="print model, data, batches and memory, and stop")
    add_overrides(train, "with --plan: as in -S profile=paper")
    train.add_argument("--processes", type=int, help="for --plan: how many devices (default: this machine's)")
    for command, handle in ((data, _data), (run, _run), (params, _params), (pipeline, _pipeline), (train, _train)):
        command.set_defaults(handle=handle)


def _data(arguments: argparse.Namespace) -> None:
    from cim.pipeline.workspace import draw_raw_inputs

    print(f"{arguments.folder}: {draw_raw_inputs(arguments.folder)}")


def _run(arguments: argparse.Namespace) -> None:
    from cim.pipeline.stages import run

    run(arguments.stage, arguments.run)


def _params(arguments: argparse.Namespace) -> None:
    print(dump(compose(arguments.overrides)), end="")


def _pipeline(arguments: argparse.Namespace) -> None:
    from cim.pipeline.workspace import run_pipeline

    run_pipeline(arguments.folder, arguments.overrides, arguments.stages, arguments.publish)


def _train(arguments: argparse.Namespace) -> None:
    from cim.params import read_params
    from cim.pipeline.groups import check_params
    from cim.pipeline.paths import ARTIFACTS
    from cim.train import launch, preflight

    if arguments.overrides and not arguments.plan:
        raise CimError("-S is for --plan; to train with other parameters use 'dvc exp run' or 'cim pipeline FOLDER'")
    check_params(params := compose(arguments.overrides) if arguments.overrides else read_params())
    run = arguments.run
    lines = preflight.plan(run, params, ARTIFACTS, arguments.processes) if arguments.plan else launch.train(run, params)
    for line in lines:
        print(line, flush=True)
