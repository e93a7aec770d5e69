"""What each stage of dvc.yaml should depend on in src/ and notebooks/, from the imports of its code.

`python tests/graph.py` writes it to dvc.yaml, and the table of docs/code.md.
"""

import json
import re
from pathlib import Path

from cim import code
from cim.pipeline.notebooks import NOTEBOOKS
from cim.pipeline.stages import MODULES

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "cim"
# The notebook starts these in a process of their own.
TRAINERS = {"train": "cim.train.grpo", "on_sft": "cim.train.grpo", "sft": "cim.train.sft"}


def closure(stage: str) -> set[Path]:
    """The files whose code a stage runs: its module or notebook, and all that these import."""
    if stage in MODULES:
        return set(code.closure(f"cim.pipeline.{stage}").values())
    notebook = ROOT / "notebooks" / ("train" if stage in TRAINERS else stage)
    notebook = notebook.with_suffix(".ipynb")
    cells = json.loads(notebook.read_text())["cells"]
    source = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
    modules = {*code.imported(source), "cim.pipeline.notebooks"}
    files = {notebook}
    if stage in TRAINERS:
        main = SOURCE / "train" / "__main__.py"  # it starts either trainer: only the one that runs counts
        modules |= code.imports(main) - set(TRAINERS.values()) | {TRAINERS[stage]}
        files.add(main)
    return files | set(code.closure(*modules).values())


def stages() -> tuple[str, ...]:
    return (*MODULES, *NOTEBOOKS, *(name for name in TRAINERS if name not in NOTEBOOKS))


def cover(files: set[Path], folder: Path = SOURCE) -> list[str]:
    """The shortest list of folders and files that holds these files and no other code."""
    out = [str(f.relative_to(ROOT)) for f in files if folder == SOURCE and not f.is_relative_to(SOURCE)]
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            inside = {f for f in path.rglob("*.py") if code._code(f).body}
            if inside and inside <= files:
                out.append(str(path.relative_to(ROOT)))
            elif inside & files:
                out += cover(files, path)
        elif path in files:
            out.append(str(path.relative_to(ROOT)))
    if SOURCE / "report" / "pages.py" in files and folder == SOURCE / "report":
        out.append(str((folder / "templates").relative_to(ROOT)))
    return sorted(out)


def reruns() -> str:
    """The table of docs/code.md: the modules of the package by the stages that a change of their code reruns."""
    closures = {stage: closure(stage) for stage in stages()}
    groups: dict[str, list[str]] = {}
    for path in sorted(SOURCE.rglob("*.py")):
        names = [stage for stage in closures if path in closures[stage]]
        text = "all" if len(names) == len(closures) else ", ".join(names) or "none (command line only)"
        if code._code(path).body:
            groups.setdefault(text, []).append(str(path.relative_to(SOURCE).with_suffix("")))
    rows = [
        f"| {', '.join(modules)} | {text} |" for text, modules in sorted(groups.items(), key=lambda item: item[1][0])
    ]
    return "\n".join(["| modules of src/cim | stages that run them |", "| --- | --- |", *rows])


def written(text: str) -> str:
    """The text of dvc.yaml with each stage's dependencies on code as they should be; the others stay."""
    for name in stages():
        found = re.search(rf"^  {name}:\n(?:    .*\n|\n)*?( +)deps:\n((?:\1  .*\n)+)", text, re.MULTILINE)
        given = [line for line in found[2].splitlines() if not re.match(r" *- (src|notebooks)/", line)]
        own = [f"{found[1]}  - {path}" for path in cover(closure(name))]
        text = text[: found.start(2)] + "\n".join([*given, *own, ""]) + text[found.end(2) :]
    return text


if __name__ == "__main__":
    pipeline, page = ROOT / "dvc.yaml", ROOT / "docs" / "code.md"
    pipeline.write_text(written(pipeline.read_text()))
    page.write_text(re.sub(r"\| modules of src/cim.*\n(\|.*\n)+", lambda _: reruns() + "\n", page.read_text()))
