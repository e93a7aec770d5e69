"""Parameters checked before any stage runs, captions kept, workspaces of `cim pipeline`, publishing their results."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from cim.cli.__main__ import main
from cim.data.manifest import write_manifest
from cim.errors import CimError
from cim.pipeline import captions, stages
from cim.pipeline.compose import compose
from cim.pipeline.groups import GROUPS, check_params
from cim.pipeline.workspace import publish
from conftest import ROOT, change

PARAMS = (ROOT / "params.yaml").read_text()


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.steps=abc", "'train.steps' should be a valid integer, not 'abc'"),
        ("+train.stepz=1", "'train.stepz' is unknown; 'train' takes split, "),
        ("correlation.reward.k=0", r"'correlation.reward.k' should be greater than 0"),
        ("+correlation.reward.x=1", r"'correlation.reward.x' is unknown; 'correlation.reward' takes k, beta"),
        ("+captioner.lazy.x=1", r"'captioner.lazy.x' is unknown; 'captioner.lazy' takes object, "),
        ("captions.splits=[]", "'captions.splits' List should have at least 1 item"),
        ("runs.grpo=[cmi-0]", "method 'cmi' is unknown"),
        ("runs.sft=[sft]", "run 'sft' should be METHOD-SEED"),
        ("runs.on_sft=[a]", r"'runs.on_sft.0' should be a valid integer"),
        ("+variants.a.reward.k=0", r"'variants.a.reward.k' should be greater than 0"),
        (
            "+variants.a.model.name=x",
            r"'variants.a.model' is unknown; 'variants.a' takes of, reward, train, encoders, sft",
        ),
        ("+variants.a.of=bleu", r"'variants.a.of' should be 'cim', 'grc', 'qir', 'self_retrieval' or 'clipscore'"),
        ("+variants.a.sft.images=0", r"'variants.a.sft.images' should be greater than 0"),
        (
            "+variants.a={sft: {lr: 0.1}, train: {lr: 0.1}}",
            "variants.a needs .* either groups reward, train and encoders .* not both",
        ),
        ("samples.count=4", "samples: best_of cannot be more than count"),
        ("runs.grpo=[cim-0, sft-1]", r"run 'sft-1' belongs in runs.sft"),
        ("runs.sft=[cim-1]", r"run 'cim-1' belongs in runs.grpo"),
        ("runs.grpo=[cim_on_sft-0]", r"run 'cim_on_sft-0' belongs in runs.on_sft, by its seed alone"),
        ("runs.on_sft=[7]", r"seed 7 of runs.on_sft starts from run 'sft-7'; add that to runs.sft"),
        ("samples.images=1", r"samples: images should be 0"),
        ("correlation.ks=[]", r"'correlation.ks' List should have"),
        (
            "+samples.rewards.mine={depth: 3}",
            r"'samples.rewards.mine.depth' is unknown; 'samples.rewards.mine' takes k, beta",
        ),
        ("+variants.a=3", r"group 'variants.a' is missing or not a mapping"),
        ("compute=null", "group 'compute' is missing or not a mapping"),
        ("~evaluate", "group 'evaluate' is missing or not a mapping"),
    ],
)
def test_an_invalid_parameter_of_any_stage_does_not_compose(override, says):
    with pytest.raises(CimError, match=f"^(parameters: )?{says}"):
        compose([override], ROOT / "conf")


@pytest.mark.parametrize("name", GROUPS)
def test_a_missing_group_is_named(name):
    params = yaml.safe_load(PARAMS)
    del params[name]
    with pytest.raises(CimError, match=f"group '{name}' is missing"):
        check_params(params)


def test_an_invalid_parameter_of_a_later_stage_stops_the_first_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text(PARAMS.replace("  steps: 70\n", "  steps: abc\n"))
    with pytest.raises(CimError, match=r"'train.steps' should be a valid integer, not 'abc'"):
        stages.run("dataset")
    assert [path.name for path in tmp_path.iterdir()] == ["params.yaml"]


@pytest.mark.slow
def test_checking_parameters_imports_no_heavy_library():
    heavy = "{'torch', 'transformers', 'faiss', 'open_clip', 'sentence_transformers'}"
    check = f"import sys, cim.pipeline.groups; sys.exit(str({heavy} & set(sys.modules) or ''))"
    assert subprocess.run([sys.executable, "-c", check], capture_output=True, text=True).stderr.strip() == ""


def test_captions_are_kept_until_what_they_are_made_of_changes(workspace, world, monkeypatch, capsys):
    """Settings, code, one weight or one image; captions of other runs and splits are removed."""
    change(runs={"grpo": [], "sft": [], "on_sft": []})
    captioner, dataset = Path("artifacts/captioner"), Path("artifacts/dataset")

    def kept(**settings) -> bool:
        captions.run(change(captions=settings))
        return "test, base-0: kept" in capsys.readouterr().out

    assert not kept(max_new_tokens=4)
    assert kept()
    assert not kept(max_new_tokens=5)
    monkeypatch.setattr(captions.code, "digest", lambda *modules: "other code")
    assert not kept()
    assert kept()
    stale = [Path("results/captions", name) for name in ("test/gone-0.json", "train/base-0.json")]
    for path in stale:
        path.parent.mkdir(exist_ok=True)
        path.write_text("{}")
    trained = captioner.resolve()
    captioner.unlink()
    shutil.copytree(trained, captioner)
    weights = load_file(captioner / "model.safetensors")
    next(tensor for tensor in weights.values() if tensor.is_floating_point()).view(-1)[0] += 1
    save_file(weights, captioner / "model.safetensors", {"format": "pt"})
    assert not kept()
    assert not any(path.exists() for path in stale)
    dataset.unlink()
    frame = world.frame.copy()
    frame.loc[frame["split"].eq("test").idxmax(), "digest"] = "of another image"
    write_manifest(frame, dataset / "manifest.parquet", world.image_root)
    assert not kept()
    assert kept()


@pytest.fixture
def workspace_of_results(tmp_path):
    """What publish reads of a workspace."""
    for name in ("params.yaml", "dvc.lock", "results/evaluate/metrics.json", "results/train/cim-0.json"):
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_text(f"new {name}")
    (tmp_path / "run/results/study").mkdir()
    (tmp_path / "run/results/study/params.yaml").write_text("published before")
    return tmp_path / "run"


def contents(folder) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_results_are_published_with_what_they_came_from(workspace_of_results, tmp_path):
    for _ in range(2):  # the second time over what was published before
        publish(workspace_of_results, tmp_path / "out/published")
        assert contents(tmp_path / "out/published") == {
            name.removeprefix("results/"): text
            for name, text in contents(workspace_of_results).items()
            if "study" not in name
        }
        (tmp_path / "out/published/old.json").write_text("of an older version")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_publishing_that_fails_loses_nothing(workspace_of_results, tmp_path, monkeypatch, error):
    (tmp_path / "out/published").mkdir(parents=True)
    (tmp_path / "out/published/params.yaml").write_text("old")

    def fail(source, target):
        raise error

    monkeypatch.setattr(shutil, "copy2", fail)
    with pytest.raises(type(error)):
        publish(workspace_of_results, tmp_path / "out/published")
    assert contents(tmp_path / "out") == {"published/params.yaml": "old"}


def test_publishing_never_replaces_something_else(workspace_of_results, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("text")
    with pytest.raises(CimError, match="not empty"):
        publish(workspace_of_results, tmp_path / "mine")
    assert contents(tmp_path / "mine") == {"thesis.tex": "text"}


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("file", "file: is a file; choose another name"),
        ("folder", "folder: is not empty and not a workspace of cim pipeline"),
        ("new", "cim pipeline needs a git checkout"),
    ],
)
def test_a_pipeline_that_cannot_start_is_one_line_and_changes_nothing(tmp_path, monkeypatch, capsys, target, says):
    """In a copy of the repository's files, as a downloaded archive holds them."""
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "README.md").write_text("mine")
    before = contents(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["pipeline", target])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {says}")
    assert contents(tmp_path) == before
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("target", ["file/inside", "/proc/workspace"])
def test_a_workspace_that_cannot_be_written_is_one_line(tmp_path, monkeypatch, capsys, target):
    (tmp_path / "file").write_text("mine")
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stopped:
        main(["pipeline", str(tmp_path / target)])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / target}: ")
