"""The command line, `cim`: the pipeline's stages, galleries, scores and evaluation of anybody's captions."""

from __future__ import annotations

import argparse
from pathlib import Path

from cim.errors import one_line_errors
from cim.pipeline.workspace import add_overrides, compose, dump, run_pipeline


def main(argv: list[str] | None = None) -> None:
    from cim.cli import download as cli_download
    from cim.cli import evaluate as cli_evaluate
    from cim.cli import gallery as cli_gallery
    from cim.cli import train as cli_train
    from cim.pipeline import stages

    parser = argparse.ArgumentParser(prog="cim", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    data = commands.add_parser("data", help="draw the raw inputs of the tiny profile into data/")
    data.add_argument("--folder", type=Path, default=Path("data"))
    run = commands.add_parser("run", help="run one stage of the pipeline on params.yaml")
    run.add_argument("stage", choices=stages.STAGES)
    run.add_argument("--run", help="for stage train: METHOD-SEED, as in cim-0")
    params = commands.add_parser("params", help="print the parameters that conf/ composes")
    pipeline = commands.add_parser("pipeline", help="run the pipeline with other parameters in a folder of its own")
    pipeline.add_argument("folder", type=Path, help="where; made anew or gone on with")
    pipeline.add_argument("--stages", nargs="*", default=[], help="run these stages one by one instead of 'dvc repro'")
    pipeline.add_argument("--jobs", type=int, default=1, help="training runs at once")
    for command in (params, pipeline):
        add_overrides(command)
    cli_gallery.add_commands(commands)
    cli_evaluate.add_command(commands)
    cli_train.add_command(commands)
    cli_download.add_command(commands)
    arguments = parser.parse_args(argv)

    with one_line_errors():
        if "handle" in arguments:
            arguments.handle(arguments)
        elif arguments.command == "data":
            from cim.data.dataset import make_raw_data

            print(f"{arguments.folder}: {make_raw_data(arguments.folder, arguments.folder.with_suffix('.dvc'))}")
        elif arguments.command == "run":
            stages.run(arguments.stage, arguments.run)
        elif arguments.command == "params":
            print(dump(compose(arguments.overrides)), end="")
        else:
            run_pipeline(arguments.folder, arguments.overrides, arguments.stages, arguments.jobs)


if __name__ == "__main__":
    main()
