"""The command line, `cim`: the pipeline's stages, galleries, scores and evaluation of user captions."""

import argparse
import gc

from cim.cli import download, evaluate, gallery, pipeline, score
from cim.errors import one_line_errors


def main(argv: list[str] | None = None) -> None:
    """Run the command that the arguments name."""
    # Imports make a million objects: by default Python looks for cycles among them for a fifth of the time they take.
    gc.set_threshold(100_000)
    parser = argparse.ArgumentParser(prog="cim", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for module in (pipeline, gallery, score, evaluate, download):
        module.add_commands(commands)
    arguments = parser.parse_args(argv)
    with one_line_errors():
        arguments.handle(arguments)


if __name__ == "__main__":
    main()
