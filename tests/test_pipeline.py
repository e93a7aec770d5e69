"""The whole pipeline on the smoke profile, run as a user runs it, in a folder of its own."""

import json
import os
import subprocess
import sys
from contextlib import chdir
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from cim.pipeline import stages
from cim.runs import all_runs
from cim.pipeline.workspace import compose, prepare
from conftest import ROOT

ENV = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}


def dvc(folder, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "dvc", *arguments], cwd=folder, env=ENV, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The smoke profile reproduced from nothing."""
    folder = tmp_path_factory.mktemp("smoke") / "repository"
    with chdir(ROOT):
        prepare(folder, compose(["profile=smoke"]), cache=folder / ".dvc" / "cache")
    subprocess.run([sys.executable, "-m", "cim.cli", "data"], cwd=folder, check=True, capture_output=True)
    done = dvc(folder, "repro")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


@pytest.mark.timeout(900)
def test_every_notebook_ran_to_its_end(smoke):
    params = yaml.safe_load((smoke / "params.yaml").read_text())
    runs = all_runs(params["runs"])
    reports = {*(set(stages.NOTEBOOKS) - {"train"}), *(f"train-{run}" for run in runs)}
    assert {p.stem for p in (smoke / "reports").glob("*.ipynb")} == reports
    for report in reports:
        cells = json.loads((smoke / "reports" / f"{report}.ipynb").read_text())["cells"]
        assert all(c["execution_count"] for c in cells if c["cell_type"] == "code")
        outputs = [o for c in cells for o in c.get("outputs", [])]
        assert not [o for o in outputs if o["output_type"] == "error"]
        assert [o for o in outputs if "image/png" in o.get("data", {})], f"{report} shows no picture"


def test_results_are_complete_and_finite(smoke):
    metrics = json.loads((smoke / "results/evaluate/metrics.json").read_text())
    assert set(metrics["methods"]) == {"base", "cim", "cim_on_sft", "sft", "sft_perfect", "empty"}
    for method, result in metrics["methods"].items():
        for name, cell in result["metrics"].items():
            if method == "empty":
                continue
            assert cell["value"] is None or (0 <= cell["value"] <= 1 or name == "words")
    assert metrics["methods"]["empty"]["metrics"]["qa_accuracy"]["value"] == 0
    assert metrics["always_yes"]["qa_balanced"] == 0.5
    captions = {path.stem: json.loads(path.read_text()) for path in (smoke / "results/captions/test").glob("*.json")}
    assert set(captions) == {"base-0", "cim-0", "sft-0", "sft_perfect-0", "cim_on_sft-0"}
    assert all(len(said) == metrics["images"] for said in captions.values())
    judged = json.loads((smoke / "results/evaluate/capture.json").read_text())["test"]
    assert set(judged["methods"]) == {"base", "cim", "cim_on_sft", "sft", "sft_perfect"}
    assert {"correlations", "relations", "comparisons", "questions"} <= set(judged)
    claims = json.loads((smoke / "results/report/claims.json").read_text())["claims"]
    assert all({"claim", "measured", "held"} <= set(c) for c in claims)


def test_figures_show_something(smoke):
    pictures = list((smoke / "results").rglob("*.png"))
    assert len(pictures) >= 8
    for path in pictures:
        pixels = np.asarray(Image.open(path).convert("L"))
        assert pixels.std() > 5, path


def test_a_second_repro_runs_nothing(smoke):
    done = dvc(smoke, "repro")
    assert done.returncode == 0
    assert "Running stage" not in done.stdout
    assert "up to date" in dvc(smoke, "status").stdout


def test_a_reward_parameter_reruns_training_evaluation_and_results_only(smoke):
    params = (smoke / "params.yaml").read_text()
    try:
        (smoke / "params.yaml").write_text(params.replace("\nreward:\n  k: 3", "\nreward:\n  k: 2"))
        assert (smoke / "params.yaml").read_text() != params
        done = dvc(smoke, "repro")
        assert done.returncode == 0, done.stderr[-2000:]
        ran = {line.split("'")[1] for line in done.stdout.splitlines() if line.startswith("Running stage")}
        assert ran == {"train@cim-0", "on_sft@0", "captions", "evaluate", "results"}
    finally:
        (smoke / "params.yaml").write_text(params)


def test_a_wrong_parameter_stops_the_pipeline_and_loses_nothing(smoke):
    params = (smoke / "params.yaml").read_text()
    assert dvc(smoke, "repro").returncode == 0
    before = {p: p.stat().st_mtime_ns for p in (smoke / "results/evaluate").iterdir()}
    try:
        (smoke / "params.yaml").write_text(params.replace("\nreward:\n  k: 3", "\nreward:\n  k: 100000"))
        done = dvc(smoke, "repro")
        assert done.returncode != 0
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1
        assert "lower k" in errors[0]
        assert {p: p.stat().st_mtime_ns for p in (smoke / "results/evaluate").iterdir()} == before
    finally:
        (smoke / "params.yaml").write_text(params)
    # With the parameter mended everything is as it was: nothing is computed again.
    done = dvc(smoke, "repro")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Running stage" not in done.stdout


def test_the_results_page_opens_on_results_alone(smoke, tmp_path):
    """As on Binder: notebooks, parameters and results, no data, models or artifacts."""
    for name in ("notebooks", "results", "params.yaml"):
        (tmp_path / name).symlink_to(smoke / name)
    done = subprocess.run(
        [sys.executable, "-m", "cim.cli", "run", "results"], cwd=tmp_path, env=ENV, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
