"""The DVC graph has no hidden inputs: each stage depends on all the code that it runs, on its parameters, and on nothing else."""

import shutil
import stat
import sys
from pathlib import Path

import pytest
import yaml

import graph
from cim.train.settings import SHARED
from conftest import ROOT, dvc_repository

PIPELINE = yaml.safe_load((ROOT / "dvc.yaml").read_text())
STAGES = {name: stage.get("do", stage) for name, stage in PIPELINE["stages"].items()}
CODE = ("src/", "notebooks/")

# Stands for `cim` in a repository of its own: makes what dvc.yaml says that the stage makes, in no time: a digest of its
# parameters and of the files that it depends on.
STUB = """#!{python}
import hashlib, sys, yaml
from pathlib import Path
params, pipeline = (yaml.load(open(name), yaml.CSafeLoader) for name in ("params.yaml", "dvc.yaml"))
stages = pipeline["stages"]
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


@pytest.mark.parametrize("stage", STAGES)
def test_the_folders_that_a_stage_names_hold_no_other_code(stage):
    """`cover`, undone without it: every file of the named folders, one by one."""
    named = [ROOT / dep for dep in STAGES[stage]["deps"] if dep.startswith(CODE)]
    held = {file for path in named for file in (path.rglob("*.py") if path.is_dir() else [path])}
    run = graph.closure(stage)
    assert {path for path in held ^ run if path.suffix != ".py" or graph.code._code(path).body} == set()


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
    from dvc.repo import Repo

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
    Repo.init(str(folder), no_scm=True).close()
    reproduce(folder)
    return folder


def reproduce(folder) -> set[str]:
    """The stages that `dvc repro` runs, without the items of a foreach."""
    with pytest.MonkeyPatch.context() as patch, dvc_repository(folder) as repo:
        patch.setenv("PATH", f"{folder / 'bin'}:/usr/bin:/bin")
        return {name_of(stage.addressing) for stage in repo.reproduce()}


def name_of(address: str) -> str:
    return address.split("@")[0].split(":")[-1]


def changed(folder) -> dict[str, set[str]]:
    """What `dvc status` names as changed of each stage's own inputs: paths, and keys of params.yaml."""
    with dvc_repository(folder) as repo:
        status = repo.status()
    found: dict[str, set[str]] = {}
    for name, (entry,) in status.items():
        names = found.setdefault(name_of(name), set())
        for path, what in entry.pop("changed deps").items():
            names.update([path] if isinstance(what, str) else what)
        assert not entry, name
    return found


def test_what_is_up_to_date_is_not_marked(repository):
    assert changed(repository) == {}


ROOMS = {
    path.relative_to(graph.SOURCE).parts[0]: path
    for path in sorted(graph.SOURCE.rglob("*.py"))
    if graph.code._code(path).body
}
FILES = [*ROOMS.values(), *sorted((ROOT / "notebooks").glob("*.ipynb"))]
INPUTS = {
    "data/raw": {"dataset", "judgements"},
    "conf/none/README": {"gallery"},
    "results/flickr8k/params.yaml": {"results"},
    "results/study/params.yaml": {"results"},
}
PARAMETERS = [
    ("train", "kl", 0.5, {"train", "on_sft", "results"}),
    ("train", "lora_rank", 8, {"train", "on_sft", "sft", "results"}),
    ("compute", "log_to", ["tensorboard"], set()),
    ("compute", "per_device", 1, set()),
    ("reward", "beta", 2.0, {"train", "on_sft", "samples", "evaluate", "judgements", "results"}),
    ("sft", "lr", 1.0, {"sft", "labels", "results"}),
    ("variants", "few", {"sft": {"images": 48}}, {"train", "on_sft", "sft", "labels", "ablation"}),
    ("gallery", "recall", 0.5, {"gallery", "results"}),
    (
        "encoders",
        "text",
        "other",
        {"gallery", "correlation", "train", "on_sft", "samples", "evaluate", "judgements", "results"},
    ),
    ("model", "prompt", "what?", {"correlation", "train", "on_sft", "sft", "captions", "samples", "results"}),
    ("samples", "seed", 1, {"samples"}),
    ("judgements", "seed", 1, {"judgements"}),
    ("labels", "seed", 1, {"labels"}),
    ("ablation", "seed", 1, {"ablation"}),
    ("correlation", "seed", 1, {"correlation"}),
    ("evaluate", "seed", 1, {"evaluate"}),
    ("captions", "batch", 1, {"captions"}),
]


@pytest.fixture(scope="module")
def marks(repository):
    """What `dvc status` names where everything below is changed: it says of each stage by which of its inputs."""
    params = yaml.safe_load((repository / "params.yaml").read_text())
    for group, key, value, _ in PARAMETERS:
        params[group][key] = value
    copies = [repository / name for name in (*(path.relative_to(ROOT) for path in FILES), *INPUTS)]
    before = {path: path.read_bytes() for path in (*copies, repository / "params.yaml")}
    try:
        for path in copies:
            path.write_bytes(before[path] + b"\n")
        (repository / "params.yaml").write_text(yaml.safe_dump(params))
        return changed(repository)
    finally:
        for path, content in before.items():
            path.write_bytes(content)


def marked_by(marks, path) -> set[str]:
    """The stages that a change of this file marks."""
    return {stage for stage, names in marks.items() if any(path.is_relative_to(name) for name in names)}


@pytest.mark.parametrize("path", [path.relative_to(ROOT) for path in FILES], ids=str)
def test_a_change_of_code_marks_the_stages_that_run_it(marks, path):
    assert marked_by(marks, path) == {stage for stage in STAGES if ROOT / path in graph.closure(stage)}


@pytest.mark.parametrize(("group", "key", "stages"), [(group, key, stages) for group, key, _, stages in PARAMETERS])
def test_a_change_of_a_parameter_marks_the_stages_that_read_it(marks, group, key, stages):
    assert {stage for stage, names in marks.items() if names & {group, f"{group}.{key}"}} == stages


@pytest.mark.parametrize("name", INPUTS)
def test_a_change_of_an_input_file_marks_the_stage_that_reads_it(marks, name):
    assert marked_by(marks, Path(name)) == INPUTS[name]


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
