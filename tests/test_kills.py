"""kill -9 in stages that captions and figures come from, and what a killed command leaves running."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import psutil
import pytest
from matplotlib.figure import Figure

from cim import files
from cim.pipeline import stages
from conftest import ROOT, change, run_cells

pytestmark = pytest.mark.slow
SMALL = {
    "correlation": {"images": 4, "resamples": 100, "fractions": [0.5, 1.0], "ks": [2, 3]},
    "captions": {"max_new_tokens": 12, "batch": 4},
    "evaluate": {"resamples": 100},
    "runs": {"grpo": ["cim-0"], "sft": [], "on_sft": []},
}


def run(stage: str, moment: int | None) -> None:
    """A stage, killed at this write of a result: before it, or while a figure is written."""
    plt.switch_backend("agg")
    left = [moment]

    def die_in(call):
        def written(*args, **kwargs):
            if left[0] == 0:
                if call is savefig:
                    Path(args[1]).write_bytes(b"half a figure")
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] = left[0] and left[0] - 1
            return call(*args, **kwargs)

        return written

    savefig = Figure.savefig
    Figure.savefig, files.os.replace = die_in(savefig), die_in(os.replace)
    stages.run_notebook = run_cells
    stages.run(stage)


def finish(server, stage: str, moment: int | None = None) -> int:
    process = server.Process(target=run, args=(stage, moment), daemon=True)
    process.start()
    process.join(120)
    return process.exitcode


def results(stage: str) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(Path("results", stage).rglob("*")) if path.is_file()}


@pytest.fixture
def studied(workspace, trained):
    """A workspace with a trained run, and few images and resamples."""
    (workspace / "artifacts" / "train").symlink_to(trained / "artifacts" / "train")
    for name in ("notebooks", "conf"):
        (workspace / name).symlink_to(ROOT / name)
    for name, values in SMALL.items():
        change(**{name: values})
    return workspace


@pytest.mark.parametrize(("stage", "moments"), [("captions", (1, 2)), ("correlation", (1, 3)), ("evaluate", (0, 2))])
def test_a_stage_killed_twice_ends_as_if_unbroken(studied, forkserver, stage, moments):
    """While it writes; and nothing that was there before is lost."""
    if stage == "evaluate":
        assert finish(forkserver, "captions") == 0
    assert finish(forkserver, stage) == 0
    whole = results(stage)
    assert len(whole) >= 3
    others = results("captions") if stage == "evaluate" else {}
    shutil.rmtree(Path("results", stage))
    for moment in moments:
        assert finish(forkserver, stage, moment) == -signal.SIGKILL
        assert set(results(stage)) != set(whole) or results(stage) != whole
    assert finish(forkserver, stage) == 0
    assert results(stage) == whole
    assert not others or results("captions") == others


def test_a_killed_stage_leaves_no_process(workspace):
    """Neither its kernel nor the training: the same command, run again, would train beside them."""
    for name in ("notebooks", "conf"):
        (workspace / name).symlink_to(ROOT / name)
    change(train={"steps": 1000})
    command = [sys.executable, "-m", "cim.cli", "run", "train", "--run", "cim-1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as started:
        assert any("step 1/1000" in line for line in started.stdout)
        children = psutil.Process(started.pid).children(recursive=True)
        started.kill()
    assert len(children) >= 2  # kernel and training
    assert not psutil.wait_procs(children, timeout=120)[1]
