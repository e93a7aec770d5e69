"""Stage `site`: the executed notebooks as web pages that open from the disk and load nothing from the network."""

import shutil
from pathlib import Path

import nbformat
from jinja2 import PackageLoader
from markupsafe import Markup
from nbconvert import HTMLExporter
from nbconvert.filters import markdown2html

from cim.errors import CimError
from cim.files import refuse_foreign, write_text
from cim.pipeline.notebooks import NOTEBOOKS
from cim.pipeline.paths import REPORTS, RESULTS
from cim.report.findings import FIGURES
from cim.report.pages import render
from cim.runs import all_runs

SITE = Path("site")
HEADLINE = ("correlation/levels", "evaluate/capture", "evaluate/facts", "evaluate/relations", "evaluate/length")
WIDGET = "application/vnd.jupyter.widget-view+json"


def run(params: dict) -> None:
    """Write site/: index.html, a page for each executed notebook in pipeline order, and the main figures.

    Raises:
        CimError: where no notebook has been executed, or site/ holds something else.
    """
    runs = [f"train-{name}" for name in all_runs(params["runs"])]
    names = [name for stage in NOTEBOOKS for name in (runs if stage == "train" else [stage])]
    reports = [path for name in names if (path := REPORTS / f"{name}.ipynb").is_file()]
    if not reports:
        raise CimError(f"{REPORTS}: no executed notebooks; run 'make repro' first")
    refuse_foreign(SITE, "index.html", "site of executed notebooks")
    shutil.rmtree(SITE, ignore_errors=True)
    write_text(SITE / "index.html", "")  # marks the folder as ours, should a page fail
    pages = [_page(path) for path in reports]
    figures = {f"{name}.png": FIGURES[name] for name in HEADLINE}
    figures = {name: caption for name, caption in figures.items() if (RESULTS / name).is_file()}
    for name in figures:
        (SITE / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(RESULTS / name, SITE / name)
    profile = params["results"]["profile"]
    write_text(SITE / "index.html", render("site.html", pages=pages, figures=figures, profile=profile))


def _page(report: Path) -> dict:
    """Write the page of an executed notebook; return its file, title and first paragraph for the index."""
    notebook = nbformat.read(report, as_version=4)
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:  # progress bars: they need a kernel and JavaScript from the network
        cell["outputs"] = [out for out in cell.get("outputs", []) if WIDGET not in out.get("data", {})]
    title, _, text = notebook.cells[0].source.removeprefix("# ").partition("\n")
    title += f" ({report.stem.removeprefix('train-')})" if report.stem.startswith("train-") else ""
    notebook.metadata["title"] = title
    notebook.cells[0].source = f"# {title}\n{text}"
    exporter = HTMLExporter(
        template_file="notebook.html",
        extra_loaders=[PackageLoader("cim.report")],
        exclude_input_prompt=True,
        exclude_output_prompt=True,
    )
    write_text(SITE / f"{report.stem}.html", exporter.from_notebook_node(notebook)[0])
    return {"file": f"{report.stem}.html", "title": title, "summary": Markup(markdown2html(text.split("\n\n")[0]))}
