"""The project's own files against each other."""

import io
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pandas as pd
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from cim.captioners.settings import ModelSettings
from cim.evaluation.statistics import with_interval
from cim.params import group
from cim.pipeline.compose import compose, dump
from cim.pipeline.groups import GROUPS, NULLABLE
from cim.pipeline.notebooks import NOTEBOOKS as NOTEBOOK_STAGES
from cim.pipeline.notebooks import notebook_parameters
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
    for key in tiny:
        # A group is null where a stage trains nothing.
        if isinstance(tiny[key], dict) and not (other[key] is None and key in NULLABLE):
            assert set(other[key]) == set(tiny[key]), key


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_are_committed_clean_and_open_with_a_story(path):
    notebook = json.loads(path.read_text())
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook["cells"])
    assert notebook["cells"][0]["source"][0].startswith("# ")
    assert [c["metadata"].get("tags") for c in notebook["cells"]].count(["parameters"]) == 1


@pytest.mark.parametrize("stage", NOTEBOOK_STAGES)
def test_a_notebooks_parameters_are_those_it_is_given(stage):
    notebook = json.loads((ROOT / "notebooks" / f"{stage}.ipynb").read_text())
    cell = next(c for c in notebook["cells"] if c["metadata"].get("tags") == ["parameters"])
    declared: dict = {}
    exec("".join(cell["source"]), declared)
    declared.pop("__builtins__")
    given = notebook_parameters(stage, yaml.safe_load((ROOT / "params.yaml").read_text()), "cim-0")
    assert set(declared) == set(given)
    # Opened by hand, a notebook does what the pipeline does.
    assert declared == given


def test_what_git_holds_is_small():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    large = [f for f in files if f and (ROOT / f).is_file() and (ROOT / f).stat().st_size > 2 * 2**20]
    assert not large
    # Photos of others are never committed: pictures come from the pipeline alone.
    pictures = [f for f in files if Path(f).suffix in {".png", ".jpg", ".jpeg"}]
    assert all(f.startswith("results/") for f in pictures)


def committed(name: str) -> str:
    """A committed file: a user's own run may have written others since."""
    return subprocess.run(["git", "show", f"HEAD:{name}"], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_the_readmes_table_is_that_of_the_committed_study(tmp_path):
    from cim.report.tables import readme_table

    (tmp_path / "metrics.json").write_text(committed("results/study/evaluate/metrics.json"))
    assert readme_table(tmp_path / "metrics.json") in (ROOT / "README.md").read_text()


def test_the_sentences_of_readme_and_findings_have_the_studys_figures():
    """Each phrase with figures is made from the committed results here, and must stand in the text."""
    methods = json.loads(committed("results/study/evaluate/metrics.json"))["methods"]
    judged = next(iter(json.loads(committed("results/study/evaluate/capture.json")).values()))
    photos = json.loads(committed("results/flickr8k-judgements/correlation/metrics.json"))["spearman"]
    world = json.loads(committed("results/correlation/metrics.json"))["spearman"]

    def percent(method: str, metric: str) -> str:
        return f"{100 * methods[method]['metrics'][metric]['value']:.1f}"

    def strict(method: str) -> str:
        cell = judged["methods"][method]["strict"]["capture"]
        return f"{100 * cell['value']:.1f} [{100 * cell['interval'][0]:.1f}, {100 * cell['interval'][1]:.1f}]"

    def steps(spearman: dict, ladder: str, score: str) -> str:
        return f"{spearman[ladder][score]['up']} of {spearman[ladder][score]['steps']}"

    people = json.loads(committed("results/flickr8k-judgements/judgements/metrics.json"))["agreement"]

    def agreement(score: str) -> str:
        cells = [people[score][benchmark]["tau"] for benchmark in ("flickr8k-expert", "flickr8k-cf")]
        return " | ".join(with_interval(cell) for cell in cells)

    def f1(study: str, stage: str, method: str) -> str:
        found = json.loads(committed(f"results/{study}/{stage}/metrics.json"))["methods"]
        return f"{100 * found[method]['value']:.1f}"

    terse, unlabelled = (f1("labels-study", "labels", method) for method in ("terse_1200", "cim"))
    few, some = (
        [f1("ablation-study", "ablation", f"{rival}_{count}") for rival in ("clipscore", "self_retrieval")]
        for count in (30, 500)
    )
    recall = f"relation recall from {percent('base', 'relation_recall')} % to {percent('cim', 'relation_recall')} %"
    answers = f"from {percent('base', 'qa_accuracy')} % to {percent('cim', 'qa_accuracy')} %"
    phrases = {
        "README.md": [
            recall,
            answers,
            f"F1 of all facts {percent('sft', 'all_f1')} against {percent('cim', 'all_f1')}",
            f"({percent('self_retrieval', 'all_f1')}) and CLIPScore ({percent('clipscore', 'all_f1')})",
            f"(F1 {terse} against {unlabelled})",
            f"(F1 {few[0]} and {few[1]}); with 500 they reach {some[0]} and {some[1]}",
            *map(agreement, ("published", "this pipeline's", "CIDEr-D to references")),
        ],
        "docs/findings.md": [
            recall,
            answers,
            f"the base model has {strict('base')}, CIM {strict('cim')}, SFT {strict('sft')}",
            f"GRC {steps(world, 'fineness', 'grc')} by fineness and {steps(world, 'accuracy', 'grc')} by accuracy",
            f"QIR {steps(world, 'fineness', 'qir')} and {steps(world, 'accuracy', 'qir')}",
            f"GRC rises over {steps(photos, 'fineness', 'grc')} steps by fineness and {steps(photos, 'accuracy', 'grc')} by accuracy",
            f"QIR over {steps(photos, 'fineness', 'qir')} and {steps(photos, 'accuracy', 'qir')}",
        ],
    }
    for name, wanted in phrases.items():
        text = " ".join((ROOT / name).read_text().split())
        for phrase in wanted:
            assert phrase in text, f"{name}: {phrase}"


def test_the_tables_of_the_ablation_and_weak_studies_are_those_of_their_files():
    """Rows of tables and sentences of docs/findings.md, made from the committed CSV files."""

    def read(name: str) -> pd.DataFrame:
        return pd.read_csv(io.StringIO(committed(f"results/{name}.csv")))

    def points(study: pd.DataFrame, method: str, metric: str = "all_f1") -> tuple[str, str, str]:
        """Value and difference to CIM with their intervals, and the verdict."""
        row = study[study["metric"] == metric].set_index("method").loc[method]
        gain = {"value": row["difference"], "interval": row[["difference_low", "difference_high"]]}
        value = with_interval({"value": row["value"], "interval": row[["low", "high"]]})
        return value, f"{'+' if row['difference'] > 0 else ''}{with_interval(gain)}", row["verdict"]

    ablation, weak, repeated = map(read, ("ablation-study/ablation/ablation", "weak-study/ablation/ablation",
                                          "weak-study/ablation/collapse"))  # fmt: skip
    wanted = []
    for scenes, suffix in (("30", "_30"), ("100", "_100"), ("500", "_500"), ("5,700", "")):
        rivals = (points(ablation, f"{rival}{suffix}") for rival in ("clipscore", "self_retrieval"))
        wanted.append(f"| {scenes} | {' | '.join(f'{value}, {verdict}' for value, _, verdict in rivals)} |")
    samples = read("ablation-study/samples/samples").query("metric == 'tau'")
    stage = samples["model"].str.rsplit("-").str[0]
    tau = samples.pivot_table("value", "score", stage)[["base", "cim_half", "cim"]]
    names = {
        "CIM": "cim",
        "GRC": "grc",
        "CIM where the gallery is searched by exact facts": "cim, exact facts",
        "K = 20, equal weights, half-whitened": "K = 20, uniform, half-whitened",
        "all gallery images, softmax weights, half-whitened": "all, softmax weights, half-whitened",
        "CLIPScore": "clipscore",
        "self-retrieval": "self_retrieval",
        "likelihood": "likelihood",
        "words": "words",
    }
    wanted += [f"| {name} | {' | '.join(f'{v:.2f}' for v in tau.loc[score])} |" for name, score in names.items()]
    whole = [points(ablation, "whole", f"all_{metric}")[1] for metric in ("f1", "recall", "precision")]
    wanted += [
        f"against CIM's {points(ablation, 'cim')[0]}:",
        f"({whole[0]}; recall {whole[1].partition(' ')[0]}, precision {whole[2]})",
        f"half-whitened images ({points(ablation, 'whitened')[1]})",
        f"by batch ({points(ablation, 'batch_scaled')[1]})",
        f"K = 10 with decay 0.9 ({points(ablation, 'k10')[1]})",
        f"centred images ({points(ablation, 'centred')[1]})",
        f"8 images of 10 captions ({points(ablation, 'group_10')[1]})",
        f"authors' code: {points(ablation, 'source_in')[1]}",
        f"(35 steps) gives {points(ablation, 'cim_half')[0]}",
        f"(F1 {points(weak, 'base')[0]})",
        f"({points(weak, 'cim')[0]})",
        f"together F1 is {points(weak, 'guarded')[0]} ({points(weak, 'guarded')[1]})",
        f"penalty alone {points(weak, 'repetition')[0]}, with KL alone {points(weak, 'kl_10')[0]}",
    ]
    share = repeated[repeated["method"] == "cim"]["repetition"]
    others = repeated[~repeated["method"].isin(["base", "cim"])]["repetition"]
    rest = sorted([*others, *share.sort_values()[:-1]])
    wanted.append(
        f"({100 * share.max():.0f} % of its word pairs, against {100 * rest[0]:.0f} to {100 * rest[-1]:.0f} %)"
    )
    copied = read("ablation-study/samples/attacks").query("attack == 'copied'").set_index("score")["share"]
    wanted.append(f"nearest gallery image's in {100 * copied['all, softmax weights, half-whitened']:.0f} %")
    assert {points(weak, method)[2] for method in ("guarded", "repetition", "kl_10")} == {"not distinguishable"}
    text = " ".join((ROOT / "docs/findings.md").read_text().split())
    assert [phrase for phrase in wanted if phrase not in text] == []


def test_the_sentences_on_stage_samples_are_those_of_its_files():
    def read(name: str) -> pd.DataFrame:
        return pd.read_csv(io.StringIO(committed(f"results/samples/{name}.csv")))

    rows = read("samples").set_index(["model", "score", "metric"])

    def cell(score: str, model: str = "base-0", metric: str = "tau", interval: bool = True) -> str:
        text = with_interval(rows.loc[(model, score, metric)], 1, 2)
        return text if interval else text.split()[0]

    base = [cell(score, interval=False) for score in ("clipscore", "words", "likelihood")]
    attacks = read("attacks").pivot(index="score", columns="attack", values="share")
    worst = attacks.drop(columns="honest").max(axis=1).drop("words")
    assert (attacks.loc["cim", ["vague", "stuffed", "fragment"]] == 0).all()
    assert worst.idxmin() == "clipscore"
    gains = [cell(score, model, "gain_8", False) for score in ("cim", "quality") for model in ("base-0", "cim-0")]
    wanted = [
        f"tau {cell('cim')} within an image, as CLIPScore ({base[0]}) and caption length ({base[1]}) do",
        f"likelihood has {base[2]}, and K = 20 with equal weights and half-whitened embeddings "
        f"{cell('K = 20, uniform, half-whitened')}.",
        f"its own reward says little ({cell('cim', 'cim-0')}) and likelihood most ({cell('likelihood', 'cim-0')})",
        f"CIM gains {gains[0]} in F1 before training and {cell('cim', 'cim-0', 'gain_8')} after it; "
        f"the truth would gain {gains[2]} and {gains[3]}.",
        f"to the true one in {100 * attacks.loc['cim', 'copied']:.0f} % of the images, a caption said three times in "
        f"{100 * attacks.loc['cim', 'repeated']:.0f} %",
        f"hardest to fool ({100 * worst.min():.0f} %)",
    ]
    text = " ".join((ROOT / "docs/findings.md").read_text().split())
    assert [phrase for phrase in wanted if phrase not in text] == []


def test_the_readmes_table_of_scale_is_that_of_the_committed_benchmark():
    import runpy

    scale_table = runpy.run_path(str(ROOT / "benchmarks" / "readme.py"))["scale_table"]
    assert scale_table(ROOT / "results/benchmarks/reward-1000000.json") in (ROOT / "docs/scale.md").read_text()


LIGHT = """
import sys
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

pending, light = [line.partition("==")[0] for line in open("requirements.txt")], set()
while pending:
    name = canonicalize_name(pending.pop())
    if name not in light:
        light.add(name)
        try:
            needed = map(Requirement, requires(name) or [])
        except PackageNotFoundError:
            continue
        pending += [other.name for other in needed if other.marker is None or other.marker.evaluate({"extra": ""})]
owners = {module: set(map(canonicalize_name, names)) for module, names in packages_distributions().items()}
assert owners["torch"] == {"torch"} and not owners["torch"] & light

class Nothing:
    def find_spec(self, name, path=None, target=None):
        owner = owners.get(name.partition(".")[0], light)
        if not owner & light and name.partition(".")[0] != "cim":
            raise ModuleNotFoundError(f"{name} is not in the light environment")

sys.meta_path.insert(0, Nothing())
import json
from IPython.display import display
cells = json.load(open("notebooks/results.ipynb"))["cells"]
exec("\\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"))
"""


def test_the_page_of_results_runs_in_binders_light_environment(tmp_path):
    """On committed results, without PyTorch or anything else that binder/requirements.txt leaves out."""
    for name in ("notebooks", "params.yaml"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "results", tmp_path / "results")
    shutil.copy(ROOT / "binder" / "requirements.txt", tmp_path)
    done = subprocess.run([sys.executable, "-c", LIGHT], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    light = (ROOT / "binder" / "requirements.txt").read_text().splitlines()[1:]
    lock = (ROOT / "requirements.lock").read_text().splitlines()
    assert set(light) <= set(lock)


def test_the_colab_notebooks_first_cell_installs_on_colab_only(tmp_path, monkeypatch):
    cells = json.loads((ROOT / "notebooks" / "colab.ipynb").read_text())["cells"]
    first, second, *_ = ("".join(c["source"]) for c in cells if c["cell_type"] == "code")
    asked = []
    monkeypatch.setattr(subprocess, "run", lambda command, check: asked.append(command))
    monkeypatch.chdir(ROOT)
    exec(f"{first}\n{second}", {})
    assert asked == []
    (tmp_path / "cim").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "google.colab", object())
    with pytest.raises(SystemExit, match="Set `repository`"):
        exec(f"{first}\n{second}", {})
    first = first.replace('repository = ""', 'repository = "somewhere"')
    exec(f"{first}\n{second}", {})
    assert [command[:2] for command in asked] == [("git", "clone"), (sys.executable, "-m")]
    assert Path.cwd() == tmp_path / "cim"


@pytest.mark.parametrize("path", sorted((ROOT / "conf" / "model").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_model_composes_with_the_papers_profile(path):
    if path.stem == "hub":
        pytest.skip("what the others share")
    params = compose(["profile=paper", f"model={path.stem}"], ROOT / "conf")
    settings = group(ModelSettings, params["model"], "model")
    assert not settings.trust_remote_code
    assert settings.prompt.startswith("Caption this image as accurately" if path.stem != "local" else "describe")


@pytest.mark.parametrize("path", sorted((ROOT / "conf" / "profile").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_profile_has_valid_settings_for_all_groups(path):
    assert set(compose([f"profile={path.stem}"], ROOT / "conf")) == set(GROUPS)
