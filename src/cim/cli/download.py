"""`cim download`: published data into a folder."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from cim.errors import CimError


def add_command(commands) -> None:
    """Add it to argparse's subparsers; it sets `handle`, which takes the arguments."""
    command = commands.add_parser("download", help="published data: licence and size are told first")
    command.add_argument("names", nargs="+", help="sc-captioner, coco-train, coco-val, docci, densefusion, oxford-pet")
    command.add_argument("--to", type=Path, default=Path("datasets"), help="each goes to a folder of its name in this")
    command.add_argument("--yes", action="store_true", help="do not ask")
    command.set_defaults(handle=_download)


def _download(arguments: argparse.Namespace) -> None:
    from cim.data.downloads import describe, download

    for name in arguments.names:
        print(describe(name), flush=True)
    if not arguments.yes:
        if not sys.stdin.isatty():
            raise CimError("nothing was fetched; say --yes where nobody can be asked")
        if input("Fetch? [y/N] ").strip().lower() not in ("y", "yes"):
            raise CimError("nothing was fetched")
    for name in arguments.names:
        download(name, arguments.to / name)
        print(f"{name}: in {arguments.to / name}", flush=True)
