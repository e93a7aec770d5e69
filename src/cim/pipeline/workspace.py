"""Profiles: composing params.yaml from conf/, and running the pipeline with other parameters beside the default one.

`cim pipeline runs/smoke -S profile=smoke` copies what git tracks to runs/smoke, writes the composed
parameters there and runs `dvc repro`, on the same DVC cache: stages whose inputs are those of a former
run are taken from it, and the default workspace is left alone.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml

from cim.errors import CimError

CONF = Path("conf")
HEADER = "# The active parameters, composed from conf/ by 'cim params'; README.md says how to change them.\n"


def add_overrides(command: argparse.ArgumentParser, told: str = "as in -S profile=smoke -S train.steps=20") -> None:
    """Add -S to a command; what is said with it is `overrides`, which compose takes."""
    command.add_argument("-S", "--set", dest="overrides", action="append", default=[], help=told)


def compose(overrides: list[str], conf: Path = CONF) -> dict:
    """Compose conf/config.yaml with overrides in Hydra's syntax.

    Raises:
        CimError: for an unknown profile or parameter.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if not (conf / "config.yaml").is_file():
        raise CimError(f"{conf}/config.yaml: not found; run from the repository's root")
    try:
        with initialize_config_dir(str(conf.resolve()), version_base=None):
            return OmegaConf.to_container(hydra_compose("config", overrides), resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise CimError(f"parameters: {' '.join(str(error).split())[:300]}") from None


def dump(params: dict) -> str:
    """Parameters as the text of params.yaml."""
    return HEADER + yaml.safe_dump(params, sort_keys=False, width=100)


def run_pipeline(folder: Path, overrides: list[str], stages: list[str], jobs: int) -> None:
    """Run the pipeline, or only some stages, in a workspace of its own.

    Args:
        folder: the workspace; what it already computed is kept.
        stages: run these one after the other without DVC; none for `dvc repro`.
        jobs: training runs at once, each on its share of the cores.

    Raises:
        CimError: where a stage fails.
    """
    params = compose(overrides)
    prepare(folder, params, cache=Path(".dvc/cache"))
    cim = [sys.executable, "-m", "cim.cli"]
    if params["dataset"]["source"] == "world":
        _check([*cim, "data"], folder)
    if stages:
        for stage in stages:
            _check([*cim, "run", stage], folder)
        return
    dvc = [sys.executable, "-m", "dvc", "repro"]
    if jobs > 1:
        _check([*dvc, "gallery", "captioner"], folder)
        runs = [*(f"train@{run}" for run in params["runs"]["grpo"]), *(f"sft@{run}" for run in params["runs"]["sft"])]
        # What starts from one of these is left to the last repro.
        with ThreadPoolExecutor(jobs) as pool:
            for done in [pool.submit(_repro_beside_others, stage, folder, jobs) for stage in runs]:
                done.result()
    _check(dvc, folder)


def _repro_beside_others(stage: str, folder: Path, jobs: int) -> None:
    """Run one training stage while others run, on a share of the cores; its output goes to logs/.

    DVC gives up after seconds where another DVC holds its lock, as it does while it hashes outputs; so try again.
    """
    env = {**_environment(), "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}
    log = folder / "logs" / f"{stage}.log"
    log.parent.mkdir(exist_ok=True)
    print(f"{stage}: running, log in {log}", flush=True)
    for _ in range(60):
        with log.open("w") as out:
            command = [sys.executable, "-m", "dvc", "repro", "--single-item", stage]
            code = subprocess.run(
                command, cwd=folder, env=env, stdout=out, stderr=subprocess.STDOUT, check=False
            ).returncode
        text = log.read_text()
        if code == 0:
            print(f"{stage}: done", flush=True)
            return
        if "acquire lock" not in text and "rwlock" not in text:
            break
        time.sleep(2)
    raise CimError(f"{stage} failed; see {log}, mend what it says and run the same again")


def prepare(folder: Path, params: dict, cache: Path) -> None:
    """Make `folder` a copy of what git tracks here, with these parameters, results of its own and this DVC cache."""
    folder.mkdir(parents=True, exist_ok=True)
    tracked = subprocess.run(["git", "ls-files", "-z"], check=True, capture_output=True, text=True).stdout.split("\0")
    for name in filter(None, tracked):
        # Results and the lock of the default run are not this run's.
        if Path(name).is_file() and not name.startswith("results/") and name != "dvc.lock":
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(name, folder / name)
    (folder / "params.yaml").write_text(dump(params), encoding="utf-8")
    if not (folder / ".git").exists():
        subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    command = [sys.executable, "-m", "dvc", "cache", "dir", "-q", "--local", str(cache.resolve())]
    subprocess.run(command, cwd=folder, check=True)


def _environment() -> dict[str, str]:
    # dvc.yaml calls `cim`, which lies beside this interpreter whether or not its environment is activated.
    return {**os.environ, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])}


def _check(command: list[str], folder: Path) -> None:
    if subprocess.run(command, cwd=folder, env=_environment(), check=False).returncode != 0:
        raise CimError(f"{folder}: '{' '.join(command[2:])}' failed; mend what it says above and run the same again")
