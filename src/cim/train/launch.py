"""Starting a run in a process of its own, or in several by accelerate: one a GPU, or as a configuration file says."""

import sys
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from subprocess import PIPE, STDOUT, Popen
from tempfile import TemporaryDirectory

import torch
import yaml

from cim.errors import CimError
from cim.files import explained
from cim.params import group
from cim.train.settings import ComputeSettings

PLAN = ("model:", "data:", "gallery:", "a rollout", "an update", "memory")
SHOWN = (*PLAN, "step", "WARNING", "note", "resuming", "error", "kept")


def train(run: str, params: dict) -> Iterator[str]:
    """Start a run with these groups of parameters and yield the lines of its log that matter.

    Where the run fails, its own error is raised as CimError.
    """
    compute = group(ComputeSettings, params.get("compute"), "compute")
    lines: deque[str] = deque(maxlen=200)
    with TemporaryDirectory() as folder:
        file = Path(folder) / "params.yaml"
        file.write_text(yaml.safe_dump(params), encoding="utf-8")
        started = [*command(compute.accelerate, torch.cuda.device_count()), "--run", run, "--params", str(file)]
        if configuration(compute.accelerate).get("num_machines", 1) == 1:  # others start processes without this input
            started.append("--attached")
        # This end of the pipe to standard input closes when this process ends, even by kill -9.
        with Popen(started, stdin=PIPE, stdout=PIPE, stderr=STDOUT, text=True) as process:
            for line in map(str.rstrip, process.stdout):
                lines.append(line)
                if line.startswith(SHOWN):
                    yield line
    if process.returncode:
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        if not errors:
            yield from list(lines)[-30:]
            errors = [f"training of {run} failed with status {process.returncode}; see the log above"]
        raise CimError(errors[-1])


def command(accelerate: str | None, devices: int) -> list[str]:
    """The command that starts `cim.train`, without its arguments.

    Args:
        accelerate: a configuration file of accelerate (conf/accelerate has some); None for all `devices`, which are
            this machine's GPUs, or its CPU where there are 0.
    """
    if configuration(accelerate):
        options = ["--config_file", accelerate]
    elif devices > 1:
        options = ["--multi_gpu", "--num_machines", "1", "--num_processes", str(devices)]
        options += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    else:  # one process needs no launcher
        return [sys.executable, "-m", "cim.train"]
    return [sys.executable, "-m", "accelerate.commands.launch", *options, "-m", "cim.train"]


def configuration(accelerate: str | None) -> dict:
    """The content of a configuration file of accelerate, empty for None; CimError where it cannot be read."""
    fix = "name one of conf/accelerate, or null"
    with explained(f"parameters: compute.accelerate: {accelerate}: cannot be read", fix, OSError, yaml.YAMLError):
        content = yaml.safe_load(Path(accelerate).read_text(encoding="utf-8")) if accelerate else {}
        if not isinstance(content, dict):
            raise OSError("no mapping of options")
        return content


def processes(accelerate: str | None) -> int:
    """The number of processes of a run."""
    return configuration(accelerate).get("num_processes") or max(1, torch.cuda.device_count())
