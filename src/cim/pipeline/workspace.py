"""The pipeline with other parameters, in a folder of its own beside the default one.

`cim pipeline runs/smoke -S profile=smoke` copies what git tracks to runs/smoke, writes the composed parameters there
and runs `dvc repro`, on the same DVC cache. What the default run has computed from the same inputs, up to the base
model, is taken from it; the default workspace is left alone.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml

from cim.errors import CimError
from cim.files import refuse_foreign, write_text
from cim.params import read_params
from cim.pipeline.compose import compose, dump

MARK = ".cim-workspace"  # in every workspace made here
RESULTS = Path("results")
LOCK = Path("dvc.lock")
DVC = (sys.executable, "-m", "dvc")
BASE = ("dataset", "encoder", "gallery", "captioner")  # stages that most studies share with the default run


def run_pipeline(folder: Path, overrides: list[str], stages: list[str], publish_to: Path | None = None) -> None:
    """Run the pipeline in a workspace of its own; what is already computed there is kept.

    Args:
        stages: run these and what they depend on; none for all.
        publish_to: copy the results here at the end; see publish.

    Raises:
        CimError: where a stage fails, or a folder holds something else.
    """
    params = compose(overrides)
    if publish_to is not None:
        refuse_foreign(publish_to, "params.yaml", "folder of published results")
    prepare(folder, params, cache=Path(".dvc/cache"))
    if params["dataset"]["source"] == "world":
        _check([sys.executable, "-m", "cim.cli", "data"], folder)
    _check([*DVC, "repro", *stages], folder)
    if publish_to is not None:
        publish(folder, publish_to)
        print(f"published: {publish_to}")


def prepare(folder: Path, params: dict, cache: Path) -> None:
    """Make `folder` a copy of what git tracks here, with these parameters, results of its own and this DVC cache.

    Raises:
        CimError: where the folder holds something else, or this is not a git checkout.
    """
    refuse_foreign(folder, MARK, "workspace of cim pipeline")
    listed = subprocess.run(["git", "ls-files", "-z"], capture_output=True, text=True, check=False)
    if not listed.stdout:
        why = " ".join(listed.stderr.split()) or "git tracks no file here"
        raise CimError(f"cim pipeline needs a git checkout ({why}); clone the repository instead of copying its files")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).touch()
    for name in filter(Path.is_file, map(Path, filter(None, listed.stdout.split("\0")))):
        # Results and the lock of the default run are not this run's; published results are inputs of stage results.
        own = name.parts[0] == RESULTS.name and not (Path(*name.parts[:2]) / "params.yaml").is_file()
        if not own and name != LOCK:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(name, folder / name)
    write_text(folder / "params.yaml", dump(params))
    if not (folder / ".git").exists():
        subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    _check([*DVC, "cache", "dir", "-q", "--local", str(cache.resolve())], folder)
    if LOCK.is_file() and not (folder / LOCK).is_file():
        _start_with_base(folder, params)


def _start_with_base(folder: Path, params: dict) -> None:
    """Give a new workspace the default run's first stages, if it has their parameters; DVC compares the other inputs.

    DVC's own cache of runs leaves out stages with outputs that lie in git.
    """
    default, lock = read_params(), yaml.safe_load(LOCK.read_text(encoding="utf-8"))
    if any(params[group] != default.get(group) for group in (*BASE, "encoders", "model")):
        return
    lock["stages"] = {stage: lock["stages"][stage] for stage in BASE if stage in lock["stages"]}
    for stage in filter(lambda stage: (RESULTS / stage).is_dir(), lock["stages"]):
        shutil.copytree(RESULTS / stage, folder / RESULTS / stage, dirs_exist_ok=True)
    write_text(folder / LOCK, yaml.safe_dump(lock, sort_keys=False))
    _check([*DVC, "checkout", "-q", "--allow-missing", *lock["stages"]], folder)


def publish(workspace: Path, folder: Path) -> None:
    """Copy a workspace's results to `folder`, with the params.yaml and dvc.lock that they came from.

    They replace what was published there once all of them are copied.

    Raises:
        CimError: where the folder holds something else.
    """
    refuse_foreign(folder, "params.yaml", "folder of published results")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as aside:
        new, old = Path(aside, "new"), Path(aside, "old")
        new.mkdir()
        for path in sorted((workspace / RESULTS).iterdir()):
            if path.is_dir() and not (path / "params.yaml").is_file():
                shutil.copytree(path, new / path.name)
        for name in ("params.yaml", "dvc.lock"):
            shutil.copy2(workspace / name, new / name)
        if folder.exists():
            folder.rename(old)
        new.rename(folder)


def draw_raw_inputs(folder: Path) -> str:
    """Draw the small world's raw inputs, which FOLDER.dvc pins; returns their hash."""
    from cim.world.raw import make_raw_data

    return make_raw_data(folder, folder.with_suffix(".dvc"))


def _check(command: list[str], folder: Path) -> None:
    # dvc.yaml calls `cim`, which lies beside this interpreter whether or not its environment is activated.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    if subprocess.run(command, cwd=folder, env={**os.environ, "PATH": path}, check=False).returncode != 0:
        raise CimError(
            f"{folder}: '{' '.join(command[2:])}' failed; fix what it reports above and rerun the same command"
        )
