"""The DVC graph has no hidden inputs: each stage depends on all the code that it runs, on its parameters, and on nothing else."""

import shutil
import stat
import subprocess
import sys
from contextlib import chdir

import pytest
import yaml

import graph
from cim.train.settings import SHARED
from conftest import ROOT

PIPELINE = yaml.safe_load((ROOT / "dvc.yaml").read_text())
STAGES = {name: stage.get("do", stage) for name, stage in PIPELINE["stages"].items()}
CODE = ("src/", "notebooks/")

# Stands for `cim` in a repository of its own: makes what dvc.yaml says that the stage makes, in no time: a digest of its
# parameters and of the files that it depends on.
STUB = """#!{python}
import hashlib, sys, yaml
from pathlib import Path
params = yaml.safe_load(open("params.yaml"))
stages = yaml.safe_load(open("dvc.yaml"))["stages"]
run = sys.argv[sys.argv.index("--run") + 1] if "--run" in sys.argv else ""
for name, stage in stages.items():
    body = stage.get("do", stage)
    wanted = body["cmd"].replace("cim_on_sft-${{item}}", run).replace("${{item}}", run).split()[1:]
    if wanted == sys.argv[1:]:
        made = hashlib.sha256(" ".join(wanted).encode())
        for key in body["params"]:
            value = params
            for part in key.split("."):
                value = value[part]
            made.update(repr(value).encode())
        for dep in (Path(d.replace("${{item}}", run.split("-")[-1])) for d in body["deps"]):
            for file in sorted(dep.rglob("*")) if dep.is_dir() else [dep] if dep.is_file() else []:
                made.update(file.read_bytes() if file.is_file() else b"")
        for out in body["outs"] + body.get("metrics", []):
            path = out if isinstance(out, str) else next(iter(out))
            path = Path(path.replace("cim_on_sft-${{item}}", run).replace("${{item}}", run))
            (path.parent if path.suffix else path).mkdir(parents=True, exist_ok=True)
            (path if path.suffix else path / "manifest.parquet").write_text(made.hexdigest())
"""


def test_dvc_names_the_stages_that_the_package_has():
    assert set(STAGES) == set(graph.stages())


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_the_code_that_it_runs_and_no_other(stage):
    named = sorted(dep for dep in STAGES[stage]["deps"] if dep.startswith(CODE))
    assert named == graph.cover(graph.closure(stage)), "python tests/graph.py writes what dvc.yaml should name"


@pytest.mark.parametrize("stage", graph.TRAINERS)
def test_a_training_stage_depends_on_all_that_its_process_imports(stage):
    """Besides the other trainer and what that alone imports."""
    other = set(graph.TRAINERS.values()) - {graph.TRAINERS[stage]}
    process = set(graph.code.closure("cim.train.__main__").values()) - set(graph.code.closure(*other).values())
    assert process <= graph.closure(stage)


def test_the_documentation_lists_what_a_change_reruns():
    assert graph.reruns() in (ROOT / "docs" / "code.md").read_text(), "python tests/graph.py writes the table"


def test_fine_tuning_depends_on_what_it_reads_of_the_train_group():
    named = {p.removeprefix("train.") for p in STAGES["sft"]["params"] if p.startswith("train.")}
    assert named == set(SHARED)


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """The pipeline with all its stages up to date, made by the stub."""
    folder = tmp_path_factory.mktemp("graph")
    for name in (
        "src",
        "notebooks",
        "conf",
        "results/study",
        "results/labels-study",
        "results/ablation-study",
        "results/weak-study",
        "results/flickr8k",
        "results/flickr8k-judgements",
    ):
        shutil.copytree(
            ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info", ".ipynb_*")
        )
    for name in ("dvc.yaml", ".dvcignore"):
        shutil.copy(ROOT / name, folder)
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["runs"]["on_sft"], params["judgements"]["of"] = [0], ["flickr8k"]
    params["labels"]["of"] = params["ablation"]["of"] = ["test"]
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    (folder / "data").mkdir()
    (folder / "data" / "raw").write_text("raw")
    (folder / "bin").mkdir()
    (folder / "bin" / "cim").write_text(STUB.format(python=sys.executable))
    (folder / "bin" / "cim").chmod(stat.S_IRWXU)
    subprocess.run([sys.executable, "-m", "dvc", "init", "-q", "--no-scm"], cwd=folder, check=True)
    reproduce(folder)
    return folder


def reproduce(folder) -> set[str]:
    """The stages that `dvc repro` runs, without the items of a foreach."""
    env = {"PATH": f"{folder / 'bin'}:/usr/bin:/bin", "HOME": str(folder), "DVC_NO_ANALYTICS": "1"}
    dvc = [sys.executable, "-m", "dvc", "repro"]
    done = subprocess.run(dvc, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("Running stage")]
    return {line.split("'")[1].split("@")[0].split(":")[-1] for line in lines}


def marked(folder) -> set[str]:
    """The stages that `dvc status` would rerun for a change of their own inputs."""
    from dvc.repo import Repo

    with chdir(folder), Repo() as repo:
        return {name.split("@")[0].split(":")[-1] for name in repo.status()}


def test_what_is_up_to_date_is_not_marked(repository):
    assert marked(repository) == set()


ROOMS = {
    path.relative_to(graph.SOURCE).parts[0]: path
    for path in sorted(graph.SOURCE.rglob("*.py"))
    if graph.code._code(path).body
}
FILES = [*ROOMS.values(), *sorted((ROOT / "notebooks").glob("*.ipynb"))]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_change_of_code_marks_the_stages_that_run_it(repository, path):
    copy = repository / path.relative_to(ROOT)
    before = copy.read_text()
    try:
        copy.write_text(before + "\n")
        assert marked(repository) == {stage for stage in STAGES if path in graph.closure(stage)}
    finally:
        copy.write_text(before)


@pytest.mark.parametrize(
    ("group", "key", "value", "stages"),
    [
        ("train", "kl", 0.5, {"train", "on_sft"}),
        ("train", "lora_rank", 8, {"train", "on_sft", "sft"}),
        ("compute", "log_to", ["tensorboard"], set()),
        ("compute", "per_device", 1, set()),
        ("reward", "beta", 2.0, {"train", "on_sft", "samples", "evaluate", "judgements"}),
        ("sft", "lr", 1.0, {"sft", "labels"}),
        ("variants", "few", {"sft": {"images": 48}}, {"train", "on_sft", "sft", "labels", "ablation"}),
        ("gallery", "recall", 0.5, {"gallery"}),
        (
            "encoders",
            "text",
            "other",
            {"gallery", "correlation", "train", "on_sft", "samples", "evaluate", "judgements"},
        ),
        ("model", "prompt", "what?", {"correlation", "train", "on_sft", "sft", "captions", "samples"}),
        ("samples", "seed", 1, {"samples"}),
        ("judgements", "seed", 1, {"judgements"}),
        ("labels", "seed", 1, {"labels"}),
        ("ablation", "seed", 1, {"ablation"}),
        ("correlation", "seed", 1, {"correlation"}),
        ("evaluate", "seed", 1, {"evaluate"}),
        ("captions", "batch", 1, {"captions"}),
    ],
)
def test_a_change_of_a_parameter_marks_the_stages_that_read_it(repository, group, key, value, stages):
    path = repository / "params.yaml"
    before = path.read_text()
    params = yaml.safe_load(before)
    params[group][key] = value
    try:
        path.write_text(yaml.safe_dump(params))
        assert marked(repository) == stages
    finally:
        path.write_text(before)


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("data/raw", {"dataset", "judgements"}),
        ("conf/none/README", {"gallery"}),
        ("results/flickr8k/params.yaml", {"results"}),
        ("results/study/params.yaml", {"results"}),
    ],
)
def test_a_change_of_an_input_file_marks_the_stage_that_reads_it(repository, name, stages):
    path = repository / name
    before = path.read_bytes()
    try:
        path.write_bytes(before + b"\n")
        assert marked(repository) == stages
    finally:
        path.write_bytes(before)


def test_a_reward_parameter_reruns_training_and_what_follows_only(repository, tmp_path):
    """Where each stage's outputs change; real ones may come out the same, which spares what follows."""
    copy = tmp_path / "copy"
    shutil.copytree(repository, copy, symlinks=True)
    params = yaml.safe_load((copy / "params.yaml").read_text())
    params["reward"]["k"] = 2
    (copy / "params.yaml").write_text(yaml.safe_dump(params))
    trained, compared = {"judgements", "train", "on_sft", "samples"}, {"labels", "ablation", "evaluate"}
    assert reproduce(copy) == {*trained, "captions", *compared, "results", "site"}
    assert reproduce(copy) == set()
