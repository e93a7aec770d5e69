"""Notebooks run by hand, the widgets of explore.ipynb without a browser, and the site."""

import json
import shutil
from itertools import permutations
from pathlib import Path
from types import ModuleType

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
import yaml
from IPython.core.interactiveshell import InteractiveShell
from IPython.display import display
from IPython.utils.capture import capture_output
from matplotlib_inline.backend_inline import configure_inline_support
from traitlets.config import Config

from cim.data.annotators import written_captions
from cim.errors import CimError
from cim.gallery.density import image_similarities
from cim.pipeline import site
from cim.report.explore import Explorer
from cim.train import grpo
from conftest import ROOT
from test_judgements import expert_files


@pytest.fixture
def run_by_hand(workspace, monkeypatch):
    """A function that runs a notebook in notebooks/, with other values in its parameters cell, and captures its outputs.

    It runs in an IPython shell of this process; test_pipeline.py and test_browser.py start kernels.
    """
    shell = InteractiveShell.instance(
        user_module=ModuleType("by_hand"), config=Config(HistoryManager={"enabled": False})
    )
    inline = "module://matplotlib_inline.backend_inline"
    plt.close("all")  # the inline backend would show what other tests left open
    plt.switch_backend(inline)
    plt.ion()
    configure_inline_support(shell, inline)
    (workspace / "notebooks").mkdir()
    monkeypatch.chdir(workspace / "notebooks")

    def run(name, **parameters):
        notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
        cell = next(c for c in notebook.cells if c.metadata.get("tags") == ["parameters"])
        cell.source += "".join(f"\n{name} = {value!r}" for name, value in parameters.items())
        with capture_output() as captured:
            for cell in notebook.cells:
                if cell.cell_type == "code":
                    result = shell.run_cell(cell.source)
                    result.raise_error()
                    display(result.result)
        return captured

    yield run
    plt.switch_backend("agg")
    plt.ioff()
    configure_inline_support.current_backend = None  # else the next shell would get no figure format
    InteractiveShell.clear_instance()


def shown(captured, kind):
    """The outputs of a MIME type."""
    return [output.data[kind] for output in captured.outputs if kind in output.data]


@pytest.mark.slow
def test_the_training_notebook_trains_with_its_own_parameters(run_by_hand, workspace, monkeypatch, capsys):
    """Not with those of params.yaml, which has 4 steps; and the weights are kept where nothing changes."""
    params = yaml.safe_load((workspace / "params.yaml").read_text())
    train = params["train"] | {"steps": 3}
    captured = run_by_hand("train", train=train, encoders=params["encoders"])
    metrics = json.loads((workspace / "results/train/cim-0.json").read_text())
    assert metrics["steps"] == 3
    curve = pd.read_csv(workspace / "results/train/cim-0.csv")
    assert curve["step"].tolist() == [1, 2, 3]
    assert curve["grc"].iloc[:1].mean() == pytest.approx(metrics["grc_first_10"], abs=1e-4)
    steps = [line.split("  ")[0] for line in captured.stdout.splitlines() if line.startswith("step")]
    assert steps == ["step 1/3", "step 2/3", "step 3/3"]
    assert "4 images x 5 captions = 20 captions" in captured.stdout
    samples = (workspace / "artifacts/train/cim-0/samples.jsonl").read_text().splitlines()
    assert [len(json.loads(sample)) for sample in samples] == [4] * 10
    found = f"Captions went from {metrics['words_first_10']:.2f} to {metrics['words_last_10']:.2f} words."
    assert found in shown(captured, "text/markdown")[-1].replace("\n", " ")
    assert len(shown(captured, "image/png")) == 2  # curves, and captions with their images
    monkeypatch.chdir(workspace)
    grpo.train("cim-0", params | {"train": train}, Path("artifacts"))
    assert "kept: artifacts/train/cim-0 was trained from the same inputs" in capsys.readouterr().out


def write_captions(folder, test, runs):
    """Captions of the test images by runs, given how likely each run mentions a fact."""
    folder.mkdir(parents=True)
    for run, chance in runs.items():
        chances = dict.fromkeys(("object", "name", "colour", "size", "relation", "background"), chance)
        said = written_captions(test, chances, 0.0, seed=0)
        (folder / f"{run}.json").write_text(json.dumps(dict(zip(test.frame["image_id"], said, strict=True))))


@pytest.mark.slow
def test_the_ablation_notebook_compares_variants_with_cim(run_by_hand, workspace, world):
    """A variant that says more is above CIM, one that says the same is not distinguishable from it."""
    runs = {"base-0": 0.3, "cim-0": 0.8, "more-0": 1.0, "more-1": 1.0, "same-0": 0.8, "less-0": 0.5}
    folder = workspace / "results/captions/test"
    write_captions(folder, world.split("test"), runs)
    stuck = dict.fromkeys(world.split("test").frame["image_id"], "an owl. an owl. an owl.")
    (folder / "less-1.json").write_text(json.dumps(stuck))
    captured = run_by_hand("ablation", of=["test"], variants={"more": {"reward": {"k": 10}}}, resamples=200)
    metrics = json.loads((workspace / "results/ablation/metrics.json").read_text())
    assert {method: cell["verdict"] for method, cell in metrics["methods"].items()} == {
        "base": "below", "cim": "not distinguishable", "less": "below", "more": "above", "same": "not distinguishable",
    }  # fmt: skip
    found = shown(captured, "text/markdown")[-1]
    assert "below: base and less; above: more; not distinguishable: same." in found
    assert "repeat themselves most is less-1: 60% of their word pairs" in found
    table = pd.read_csv(workspace / "results/ablation/ablation.csv")
    assert set(table["metric"]) == {"all_f1", "all_precision", "all_recall"}
    assert (workspace / "results/ablation/ablation.png").is_file()
    with pytest.raises(CimError, match=r"ablation\.of: name a split"):
        run_by_hand("ablation")
    (folder / "cim-0.json").unlink()
    with pytest.raises(CimError, match="no captions of method cim"):
        run_by_hand("ablation", of=["test"])


@pytest.mark.slow
def test_the_judgements_notebook_chooses_on_one_half(run_by_hand, workspace, world, wordnet):
    """By a grid with two numbers K beyond the gallery, which are one."""
    test, folder = world.split("test"), workspace / "judged"
    (folder / "Images").mkdir(parents=True)
    names = [f"{1000 + i}_abc.jpg" for i in range(len(test))]
    for name, path in zip(names, test.image_paths, strict=True):
        (folder / "Images" / name).write_bytes(path.read_bytes())
    expert_files(folder, names, test.captions)
    crowd = [f"{a}\t{b}#0\t{(i % 4) / 3}\t{i % 4}\t{3 - i % 4}" for i, (a, b) in enumerate(permutations(names, 2))]
    (folder / "CrowdFlowerAnnotations.txt").write_text("\n".join(crowd) + "\n")
    grid = {"ks": [1, 3, 200, 100_000], "decays": [0.5, 1.0], "temperatures": [0.1], "whitens": [0.0, 0.5]}
    less = {"settings": {"centred": {"center": True}}, "sizes": [50, 1000], "resamples": 20}
    encoders = yaml.safe_load((workspace / "params.yaml").read_text())["encoders"]
    captured = run_by_hand("judgements", of=["flickr8k"], folder=str(folder), encoders=encoders, **less, **grid)
    gallery = len(world.split("pretrain", "train"))
    out = workspace / "results/judgements"
    table = pd.read_csv(out / "grid.csv")
    # K beyond the gallery is all of it, once.
    assert table.groupby("whiten").size().tolist() == [9, 9]
    best = table.loc[table["mean"].idxmax()]
    metrics = json.loads((out / "metrics.json").read_text())
    assert (metrics["chosen"]["k"], metrics["chosen"]["whiten"]) == (best["k"], best["whiten"])
    assert metrics["gallery_images"] == gallery
    assert pd.read_csv(out / "size.csv")["gallery images"].unique().tolist() == [50, gallery]
    assert {path.stem for path in out.glob("*.png")} == {"k", "temperature", "beta", "size", "agreement"}
    assert set(metrics["annotators"]) == {"objects", "facts", "contradictions"}
    assert "on Expert" in shown(captured, "text/markdown")[-1]
    (out / "temperature.png").unlink()
    run_by_hand(
        "judgements", of=["flickr8k"], folder=str(folder), encoders=encoders, resamples=20, **grid | {"ks": [3]}
    )
    assert not (out / "temperature.png").exists()
    with pytest.raises(CimError, match=r"judgements\.of: empty"):
        run_by_hand("judgements")


@pytest.mark.slow
def test_the_labels_notebook_compares_annotators_with_cim(run_by_hand, workspace, world):
    """Base, CIM and SFT are captions written with more or fewer facts; SFT on few images is worse than CIM."""
    thorough = {"base-0": 0.3, "cim-0": 0.8, "sft-0": 1.0, "sft-1": 1.0, "few-0": 0.4, "slip-0": 0.9, "k10-0": 0.8}
    write_captions(workspace / "results/captions/test", world.split("test"), thorough)
    variants = {"few": {"sft": {"images": 8}}, "slip": {"sft": {"slip_rate": 0.5}}, "k10": {"reward": {"k": 10}}}
    captured = run_by_hand("labels", of=["test"], variants=variants, resamples=100)
    metrics = json.loads((workspace / "results/labels/metrics.json").read_text())
    assert {m: (c["images"], c["slip_rate"]) for m, c in metrics["methods"].items() if "images" in c} == {
        "few": (8, 0.03), "sft": (16, 0.03), "slip": (16, 0.5),
    }  # fmt: skip
    verdicts = {method: cell["verdict"] for method, cell in metrics["methods"].items()}
    assert (verdicts["base"], verdicts["few"], verdicts["sft"]) == ("below", "below", "above")
    assert set(metrics["annotators"]) == {"usual, slip rate 0.03", "usual, slip rate 0.5"}
    found = shown(captured, "text/markdown")[-1]
    assert "With `usual` annotators SFT overtakes CIM with 16 labelled images (below at 8; above at 16)." in found
    assert len(shown(captured, "image/png")) == 3
    assert {path.stem for path in (workspace / "results/labels").glob("*.png")} == {"images", "slips", "annotators"}
    with pytest.raises(CimError, match=r"labels\.of: name a split"):
        run_by_hand("labels")


def test_density_tells_a_dense_gallery_from_a_sparse_one(gallery):
    nearest, random = image_similarities(gallery, np.random.default_rng(0), images=20, others=7)
    vectors = gallery.image_vectors(np.arange(len(gallery)))
    similarity = vectors @ vectors.T
    np.fill_diagonal(similarity, -1)
    # Each is the similarity of some image to its nearest one; the sampled images differ.
    assert np.isclose(nearest[:, None], similarity.max(axis=1), atol=1e-5).any(axis=1).all()
    assert nearest.shape == (20,)
    assert random.shape == (140,)
    assert nearest.mean() > random.mean()


@pytest.fixture(scope="module")
def explorer(world, gallery, tmp_path_factory):
    captions = tmp_path_factory.mktemp("captions")
    ids = world.split("test").frame["image_id"]
    for run, caption in (("base-0", "a red dog"), ("cim-0", "a small red dog is left of a cat")):
        (captions / f"{run}.json").write_text(json.dumps(dict.fromkeys(ids[:-1], caption)))
    return Explorer(str(gallery.folder), world.name, "test", str(captions))


def widgets_of(panel):
    """The panel's widgets by name."""
    (image, other), (k, beta), origins, captions = (row.children for row in panel.children[:-1])
    return image, other, k, beta, origins, captions, panel.children[-1]


def test_two_captions_of_an_image_are_compared(explorer):
    name = explorer.sources.index[0]
    assert list(explorer.captions(name)) == ["reference", "base-0", "cim-0"]
    table = explorer.compare(name, [explorer.captions(name)["reference"], " "], k=4, beta=0.5)
    assert table["cim"].tolist() == pytest.approx((table["grc"] + 0.5 * table["qir"]).tolist())
    assert [len(retrieved) for retrieved in table["retrieved"]] == [4, 0]
    rows = explorer.gallery.rows_of([item["image_id"] for item in table["retrieved"][0]])
    assert rows[:3].tolist() == explorer.scorer.retrieve([table["caption"][0]])[0][0].tolist()


def test_moving_a_slider_or_typing_a_caption_changes_the_scores(explorer):
    image, other, k, beta, origins, captions, shown = widgets_of(explorer.panel("base-0", "cim-0"))
    assert [origin.label for origin in origins] == ["base-0", "cim-0"]
    assert [caption.value for caption in captions] == ["a red dog", "a small red dog is left of a cat"]
    assert shown.value.count("<figure") == 6
    pages = {shown.value}
    for widget, value in (
        (k, 5), (beta, 2.0), (captions[1], "a boat & a cat"), (image, explorer.sources.index[1]), (captions[0], ""),
    ):  # fmt: skip
        widget.value = value
        assert shown.value not in pages
        pages.add(shown.value)
    origins[0].label = "reference"
    assert captions[0].value == explorer.sources["caption"].iloc[1]
    image.value = explorer.sources.index[-1]  # the runs have no captions of it
    assert origins[1].label == "reference"
    other.value = "no such <image>"
    assert "no such &lt;image&gt;: image not found" in shown.value


def test_any_gallery_and_any_image_file_can_be_explored(explorer, world, gallery):
    alone = Explorer(str(gallery.folder))
    image, other, *_, captions, shown = widgets_of(alone.panel())
    row = gallery.rows.iloc[0]
    assert (image.value, captions[0].value) == (row["image_id"], row["caption"])
    assert f"1. {row['caption']}<" not in shown.value  # the image itself is excluded
    other.value = str(world.split("test").image_paths[0])
    assert captions[0].value == ""
    captions[0].value = "a red dog"
    assert shown.value.count("<figure") == 3
    with pytest.raises(CimError, match="no gallery"):
        Explorer("nowhere")
    with pytest.raises(CimError, match="manifest not found"):
        Explorer(str(gallery.folder), "nowhere.parquet")


def test_the_explore_notebook_runs_without_a_browser(run_by_hand):
    assert shown(run_by_hand("explore"), "application/vnd.jupyter.widget-view+json")


@pytest.fixture
def reports(tmp_path, monkeypatch):
    """Two executed notebooks of a pipeline, one with a progress bar, and a figure."""
    monkeypatch.chdir(tmp_path)
    bar = {"application/vnd.jupyter.widget-view+json": {"model_id": "1"}, "text/plain": "a progress bar"}
    code = nbformat.v4.new_code_cell(
        "print(1)",
        outputs=[nbformat.v4.new_output("display_data", bar), nbformat.v4.new_output("stream", text="one\n")],
    )
    (tmp_path / "reports").mkdir()
    for name in ("results", "train-cim-0", "train-old-1"):
        title = nbformat.v4.new_markdown_cell(f"# Title of {name}\nWhat it **asks**.\n\nMore.")
        nbformat.write(nbformat.v4.new_notebook(cells=[title, code]), tmp_path / "reports" / f"{name}.ipynb")
    (tmp_path / "results/correlation").mkdir(parents=True)
    shutil.copy(ROOT / "results/correlation/levels.png", tmp_path / "results/correlation")
    return {"runs": {"grpo": ["cim-0"], "sft": ["sft-0"], "on_sft": []}, "results": {"profile": "tiny"}}


def test_the_site_shows_the_executed_notebooks_in_order(reports, tmp_path):
    site.run(reports)
    files = {str(p.relative_to(tmp_path / "site")): p.read_bytes() for p in tmp_path.glob("site/**/*.*")}
    assert set(files) == {"index.html", "results.html", "train-cim-0.html", "correlation/levels.png"}
    index = files["index.html"].decode()
    assert index.index("Title of train-cim-0 (cim-0)") < index.index("Title of results")
    assert "What it <strong>asks</strong>." in index
    assert "More." not in index
    assert "explore.ipynb" in index
    page = files["results.html"].decode()
    assert "one" in page
    assert "a progress bar" not in page
    assert "<script" not in page
    assert "<details>" in page
    site.run(reports)
    assert all((tmp_path / "site" / name).read_bytes() == content for name, content in files.items())


def test_the_site_replaces_nothing_else(reports, tmp_path):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "thesis.tex").touch()
    with pytest.raises(CimError, match="not a site"):
        site.run(reports)
    shutil.rmtree(tmp_path / "reports")
    with pytest.raises(CimError, match="run 'make repro' first"):
        site.run(reports)
