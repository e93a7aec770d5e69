"""`cim download`: published data into a folder; prints licences and sizes, then asks."""

import argparse
import sys
from pathlib import Path

from cim.errors import CimError


def add_commands(commands) -> None:
    """Add the command to argparse's subparsers; its `handle` takes the arguments."""
    command = commands.add_parser("download", help="download published data; prints licence and size first")
    names = "sc-captioner, coco-train, coco-val, docci, densefusion, oxford-pet, flickr8k"
    command.add_argument("names", nargs="+", help=names)
    command.add_argument("--to", type=Path, default=Path("datasets"), help="parent of one folder per data set")
    command.add_argument("--yes", action="store_true", help="do not ask")
    command.set_defaults(handle=_download)


def _download(arguments: argparse.Namespace) -> None:
    from cim.data.downloads import describe, download

    print("\n".join(map(describe, arguments.names)), flush=True)
    if not arguments.yes and (not sys.stdin.isatty() or input("Download? [y/N] ").strip().lower() not in ("y", "yes")):
        raise CimError("nothing was downloaded; confirm with y, or pass --yes where there is no terminal")
    for name in arguments.names:
        print(f"{name}: in {download(name, arguments.to / name)}", flush=True)
