"""Starting a run with accelerate, on all devices of this machine or as a configuration file says."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import yaml

from cim.errors import CimError

SHOWN = ("step", "WARNING", "resuming", "error", "kept", "a rollout", "an update")


def command(run: str, accelerate: str | None, devices: int) -> list[str]:
    """The command line of a run.

    Args:
        accelerate: a configuration file of accelerate (conf/accelerate has some); None for all devices of this machine.
        devices: GPUs of this machine; 0 for the CPU.

    Raises:
        CimError: where the file is not there.
    """
    launch = [sys.executable, "-m", "accelerate.commands.launch"]
    if accelerate is not None:
        configuration(accelerate)
        launch += ["--config_file", accelerate]
    else:
        launch += ["--num_processes", str(max(1, devices)), "--num_machines", "1"]
        launch += ["--mixed_precision", "no", "--dynamo_backend", "no"]
        launch += [] if devices else ["--cpu"]
        launch += ["--multi_gpu"] if devices > 1 else []
    return [*launch, "-m", "cim.train", "--run", run]


def configuration(accelerate: str | None) -> dict:
    """What a configuration file of accelerate says; nothing for None.

    Raises:
        CimError: where it is not there or not YAML.
    """
    if accelerate is None:
        return {}
    try:
        return yaml.safe_load(Path(accelerate).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise CimError(f"parameters: compute.accelerate: {accelerate}: {' '.join(str(error).split())[:150]}") from None


def processes(accelerate: str | None) -> int:
    """How many processes a run would have."""
    return configuration(accelerate).get("num_processes") or max(1, torch.cuda.device_count())


def train(run: str, accelerate: str | None) -> Iterator[str]:
    """Start a run and yield the lines of its log that matter.

    Raises:
        CimError: with the run's own error, where it fails.
    """
    lines: list[str] = []
    with subprocess.Popen(
        command(run, accelerate, torch.cuda.device_count()),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        bufsize=1,
    ) as process:
        for line in process.stdout:
            lines = [*lines[-200:], line]
            if line.startswith(SHOWN):
                yield line.rstrip("\n")
    if process.returncode:
        errors = [line.removeprefix("error: ").strip() for line in lines if line.startswith("error: ")]
        if not errors:
            yield from (line.rstrip("\n") for line in lines[-30:])
        raise CimError(
            errors[-1] if errors else f"training of {run} failed with status {process.returncode}; see the log above"
        )
