"""The project's own files against each other."""

import json
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from cim import stages
from cim.workspace import compose, dump
from conftest import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def lock() -> dict[str, str]:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pins.items()}


def test_the_lock_holds_names_and_versions_only():
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        assert re.fullmatch(r"#.*|[A-Za-z0-9._-]+==[A-Za-z0-9.+!_]+", line), line


def test_the_lock_satisfies_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = lock()
    for text in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), text


def test_the_conda_environment_installs_the_same_pins():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    pip = next(d["pip"] for d in environment["dependencies"] if isinstance(d, dict))
    assert pip == ["-r requirements.lock", "-e ."]
    python = next(d for d in environment["dependencies"] if str(d).startswith("python="))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert Requirement(f"python{project['requires-python']}").specifier.contains(python.removeprefix("python=") + ".0")


def test_what_the_user_asked_for_is_there():
    names = ["notebooks", "src", "data.dvc", "dvc.yaml", "params.yaml", "environment.yml", "tests", "README.md"]
    assert all((ROOT / name).exists() for name in names)
    wanted = [
        "jupyterlab",
        "papermill",
        "torch",
        "transformers",
        "trl",
        "peft",
        "open-clip-torch",
        "faiss-cpu",
        "seaborn",
        "dvc",
    ]
    assert set(wanted) <= set(lock())


def test_no_address_in_any_lock_or_environment():
    for name in ("requirements.lock", "environment.yml", "pyproject.toml", ".dvc/config"):
        assert "://" not in (ROOT / name).read_text()


def test_params_are_the_tiny_profile():
    assert (ROOT / "params.yaml").read_text() == dump(compose([], ROOT / "conf"))


@pytest.mark.parametrize("profile", ["smoke", "study", "photos"])
def test_profiles_differ_in_parameters_only(profile):
    tiny = compose([], ROOT / "conf")
    other = compose([f"profile={profile}", "dataset.folder=x"], ROOT / "conf")
    assert set(other) == set(tiny)
    for group in tiny:
        if isinstance(tiny[group], dict):
            assert set(other[group]) == set(tiny[group]), group


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_are_committed_clean_and_open_with_a_story(path):
    notebook = json.loads(path.read_text())
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook["cells"])
    assert notebook["cells"][0]["source"][0].startswith("# ")
    assert [c["metadata"].get("tags") for c in notebook["cells"]].count(["parameters"]) == 1


@pytest.mark.parametrize("stage", stages.NOTEBOOKS)
def test_a_notebooks_parameters_are_those_it_is_given(stage):
    notebook = json.loads((ROOT / "notebooks" / f"{stage}.ipynb").read_text())
    cell = next(c for c in notebook["cells"] if c["metadata"].get("tags") == ["parameters"])
    declared: dict = {}
    exec("".join(cell["source"]), declared)
    declared.pop("__builtins__")
    given = stages.notebook_parameters(stage, yaml.safe_load((ROOT / "params.yaml").read_text()), "cim-0")
    assert set(declared) == set(given)
    if stage != "train":
        # Opened by hand a notebook does what the pipeline does.
        assert declared == given


def test_every_stage_of_the_pipeline_exists():
    pipeline = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    for name, stage in pipeline.items():
        body = stage.get("do", stage)
        assert body["cmd"].split()[2] in stages.STAGES
        assert {"on_sft": "train"}.get(name, name) in body["params"]
        assert all(group in params for group in body["params"])
        for dep in body["deps"]:
            assert dep.startswith(("artifacts/", "results/", "${")) or (ROOT / dep).exists(), dep


def test_what_git_holds_is_small():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    large = [f for f in files if f and (ROOT / f).is_file() and (ROOT / f).stat().st_size > 2 * 2**20]
    assert not large
    # Photos of others are never committed: pictures come from the pipeline alone.
    pictures = [f for f in files if Path(f).suffix in {".png", ".jpg", ".jpeg"}]
    assert all(f.startswith("results/") for f in pictures)


def test_the_readmes_figures_are_those_of_the_committed_results(tmp_path):
    from cim.report import readme_table

    def committed(name: str) -> str:
        return subprocess.run(
            ["git", "show", f"HEAD:{name}"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout

    # The committed files, since a user's own run may have written others since.
    names = subprocess.run(
        ["git", "ls-tree", "-r", "--name-only", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    study = "results/study/evaluate/metrics.json"
    source = study if study in names.stdout.splitlines() else "results/evaluate/metrics.json"
    (tmp_path / "metrics.json").write_text(committed(source))
    assert readme_table(tmp_path / "metrics.json") in committed("README.md")


def test_the_readmes_table_of_scale_is_that_of_the_committed_benchmark():
    import runpy

    scale_table = runpy.run_path(str(ROOT / "benchmarks" / "readme.py"))["scale_table"]
    assert scale_table(ROOT / "results/benchmarks/reward-1000000.json") in (ROOT / "README.md").read_text()
