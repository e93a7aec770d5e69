"""The whole pipeline on the smoke profile, run as a user runs it, in a folder of its own."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import chdir
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image

from cim.cli.__main__ import main
from cim.pipeline import stages
from cim.pipeline.compose import compose
from cim.pipeline.notebooks import NOTEBOOKS
from cim.pipeline.workspace import prepare, publish
from cim.runs import all_runs
from conftest import ROOT, dvc_repository, run_cells

pytestmark = pytest.mark.slow
ENV = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
FIGURES = {
    "correlation": {"levels", "correlations", "density"},
    "evaluate": {"capture", "length", "examples", "facts", "questions"},
    "gallery": {"density"},
    "report": {"methods", "length"},
    "train": {"cim-0", "sft-0", "cim_on_sft-0"},
}


def dvc(folder, *arguments, env=ENV):
    return subprocess.run(
        [sys.executable, "-m", "dvc", *arguments], cwd=folder, env=env, capture_output=True, text=True
    )


def status(folder, *targets) -> dict:
    """What `dvc status` says, in this process."""
    with dvc_repository(folder) as repo:
        return repo.status([*targets] or None)


def stages_run(done) -> set[str]:
    return {line.split("'")[1] for line in done.stdout.splitlines() if line.startswith("Running stage")}


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The smoke profile reproduced from nothing."""
    folder = tmp_path_factory.mktemp("smoke") / "repository"
    with chdir(ROOT):
        prepare(folder, compose(["profile=smoke"]), cache=folder / ".dvc" / "cache")
    with chdir(folder):
        main(["data"])
    done = dvc(folder, "repro")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


def test_every_notebook_ran_to_its_end(smoke):
    params = yaml.safe_load((smoke / "params.yaml").read_text())
    reports = {
        *(set(NOTEBOOKS) - {"train", "judgements", "labels", "ablation"}),
        *(f"train-{run}" for run in all_runs(params["runs"])),
    }
    assert {p.stem for p in (smoke / "reports").glob("*.ipynb")} == reports
    for report in reports:
        cells = json.loads((smoke / "reports" / f"{report}.ipynb").read_text())["cells"]
        assert all(c["execution_count"] for c in cells if c["cell_type"] == "code")
        outputs = [o for c in cells for o in c.get("outputs", [])]
        assert not [o for o in outputs if o["output_type"] == "error"]
        assert [o for o in outputs if "image/png" in o.get("data", {})], f"{report} shows no picture"
        assert "What we found" in "".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown"), report


def test_results_are_complete_and_finite(smoke):
    metrics = json.loads((smoke / "results/evaluate/metrics.json").read_text())
    assert set(metrics["methods"]) == {"base", "cim", "cim_on_sft", "sft", "empty"}
    for method in ("base", "cim", "cim_on_sft", "sft"):
        cells = metrics["methods"][method]["metrics"]
        # A hardly trained model may state no fact of a kind, which has no precision; recall is always defined.
        for name in (name for name in cells if name.endswith(("_recall", "_f1", "words")) or name.startswith("qa_")):
            low, high = cells[name]["interval"]
            assert low <= cells[name]["value"] <= high, (method, name)
            assert low >= 0, (method, name)
            assert name == "words" or high <= 1, (method, name)
    assert metrics["methods"]["empty"]["metrics"]["qa_accuracy"]["value"] == 0
    assert metrics["always_yes"]["qa_balanced"] == 0.5
    captions = {path.stem: json.loads(path.read_text()) for path in (smoke / "results/captions/test").glob("*.json")}
    assert set(captions) == {"base-0", "cim-0", "sft-0", "cim_on_sft-0"}
    assert all(len(said) == metrics["images"] for said in captions.values())
    judged = json.loads((smoke / "results/evaluate/capture.json").read_text())["test"]
    assert set(judged["methods"]) == {"base", "cim", "cim_on_sft", "sft"}
    assert {"correlations", "relations", "comparisons", "questions"} <= set(judged)
    claims = json.loads((smoke / "results/report/claims.json").read_text())["claims"]
    assert all({"claim", "measured", "verdict"} <= set(c) for c in claims)
    curve = pd.read_csv(smoke / "results/train/cim-0.csv")
    assert curve["step"].tolist() == list(range(1, 7))
    assert curve[["reward", "grc", "qir", "words"]].notna().all(axis=None)


def test_every_figure_is_drawn(smoke):
    for folder, names in FIGURES.items():
        assert names <= {path.stem for path in (smoke / "results" / folder).glob("*.png")}, folder
    for path in (smoke / "results").rglob("*.png"):
        with Image.open(path) as image:
            # Axes, marks and text: a blank figure has one colour. Colours as one number each, which are faster to sort.
            colours = np.asarray(image.convert("RGB").reduce(4), np.int32) @ (1 << 16, 1 << 8, 1)
            assert len(np.unique(colours)) > 20, path


def test_the_results_page_and_the_site_show_what_was_made(smoke):
    page = (smoke / "results/README.md").read_text()
    assert "| CIM |" in page
    linked = [part.split(")")[0] for part in page.split("![")[1:] for part in [part.split("](")[1]]]
    assert linked
    assert all((smoke / "results" / path).is_file() for path in linked)
    index = (smoke / "site/index.html").read_text()
    for report in (smoke / "reports").glob("*.ipynb"):
        assert f"{report.stem}.html" in index
        assert (smoke / "site" / f"{report.stem}.html").is_file()


def test_the_table_of_metrics_fits_a_terminal(smoke):
    shown = dvc(smoke, "metrics", "show").stdout.splitlines()
    assert len(shown) == 2
    assert {"capture", "gain", "words"} <= set(shown[0].split())
    assert max(map(len, shown)) <= 80
    assert dvc(smoke, "plots", "show", "--json").returncode == 0


def test_a_second_repro_runs_nothing(smoke):
    with dvc_repository(smoke) as repo:
        assert repo.reproduce() == []
    assert status(smoke) == {}


def test_a_study_starts_with_what_the_default_run_has_computed(smoke, tmp_path):
    """If the parameters of the base model are its own: else DVC would take the files for another study's results."""
    subprocess.run(["git", "add", "--all"], cwd=smoke, check=True)
    for seed, taken in ((0, True), (1, False)):
        folder = tmp_path / str(seed)
        with chdir(smoke):
            prepare(folder, compose(["profile=smoke", f"captioner.seed={seed}"]), cache=smoke / ".dvc" / "cache")
        (folder / "data").symlink_to(smoke / "data")
        assert (status(folder, "dataset", "encoder", "gallery", "captioner") == {}) is taken
        assert (folder / "results" / "encoder").is_dir() is taken
    assert not (folder / "results" / "evaluate").exists()


def test_results_are_published_with_what_they_came_from(smoke, tmp_path):
    """test_workspace.py has what publishing replaces and what it never does."""
    publish(smoke, tmp_path)
    for name in ("params.yaml", "dvc.lock", "evaluate/metrics.json", "train/cim-0.json"):
        source = smoke / name if "/" not in name else smoke / "results" / name
        assert (tmp_path / name).read_bytes() == source.read_bytes()
    assert not (tmp_path / "study").exists()


def test_the_results_page_opens_on_results_alone(smoke, tmp_path, monkeypatch):
    """As on Binder: notebooks, parameters and results, no data, models or artifacts."""
    shutil.copytree(smoke / "results", tmp_path / "results")
    for name in ("notebooks", "params.yaml"):
        (tmp_path / name).symlink_to(smoke / name)
    shutil.rmtree(tmp_path / "results" / "report")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stages, "run_notebook", run_cells)
    stages.run("results")
    assert (tmp_path / "results" / "report" / "claims.json").is_file()


def test_a_wrong_parameter_loses_nothing_and_prose_retrains_nothing(smoke):
    """Training fails, then runs again for a word of its notebook and of a docstring, keeps its weights, and nothing else
    has to follow."""
    environment = {**ENV, "PYTHONPATH": str(smoke / "src")}
    made = [*(smoke / "artifacts/train").rglob("model.safetensors"), *(smoke / "results/evaluate").iterdir()]
    times = {path: path.stat().st_mtime_ns for path in made}
    changed = [smoke / name for name in ("params.yaml", "notebooks/train.ipynb", "src/cim/train/batches.py")]
    before = [path.read_text() for path in changed]
    words = (
        ("\nreward:\n  k: 3", "\nreward:\n  k: 100000"),
        ("# Training", "# Training, in other words"),
        ('"""', '"""In other words: '),
    )
    try:
        for path, text, (old, new) in zip(changed, before, words, strict=True):
            assert old in text
            path.write_text(text.replace(old, new, 1))
        done = dvc(smoke, "repro", "--single-item", "train@cim-0", env=environment)
        assert done.returncode != 0
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1
        assert "lower k" in errors[0]
        changed[0].write_text(before[0])
        done = dvc(smoke, "repro", "--single-item", "train@cim-0", env=environment)
        assert done.returncode == 0, done.stderr[-2000:]
        assert stages_run(done) == {"train@cim-0"}
        assert "kept: artifacts/train/cim-0 was trained from the same inputs" in done.stdout
        assert {path: path.stat().st_mtime_ns for path in made} == times
    finally:
        for path, text in zip(changed, before, strict=True):
            path.write_text(text)
    assert set(status(smoke)) <= {"train@cim-0", "site"}
