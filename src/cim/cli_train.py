"""`cim train`: one training run, or what it would take."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_command(commands) -> None:
    """Add it to argparse's subparsers; it sets `handle`, which takes the arguments."""
    command = commands.add_parser("train", help="one training run of params.yaml; --plan: what it would take")
    command.add_argument("--run", required=True, help="METHOD-SEED, as in cim-0")
    command.add_argument("--plan", action="store_true", help="print models, data, batches, memory and hours, and stop")
    command.add_argument("--processes", type=int, help="for --plan: how many devices (default: this machine's)")
    command.set_defaults(handle=_train)


def _train(arguments: argparse.Namespace) -> None:
    import torch

    from cim import stages
    from cim.settings import read_params

    params = read_params(Path("params.yaml"))
    devices = torch.cuda.device_count()
    if arguments.plan:
        from cim.train.launch import configuration
        from cim.train.plan import plan

        told = configuration(params["train"].get("accelerate")).get("num_processes")
        processes = arguments.processes or told or max(1, devices)
        print("\n".join(plan(arguments.run, params, stages.ARTIFACTS, processes)))
        return
    from cim.train.launch import train

    for line in train(arguments.run, params["train"].get("accelerate"), devices):
        print(line, flush=True)
