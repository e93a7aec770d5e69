"""The stages of dvc.yaml by name: a module with a function `run`, or a notebook."""

from importlib import import_module

from cim.errors import CimError
from cim.params import read_params
from cim.pipeline.notebooks import NOTEBOOKS, notebook_parameters, run_notebook
from cim.pipeline.paths import ARTIFACTS, RESULTS
from cim.runs import BASE, all_runs

MODULES = ("dataset", "encoder", "captioner", "captions", "site")
STAGES = (*MODULES, *NOTEBOOKS)


def run(stage: str, training_run: str | None = None) -> None:
    """Run one stage in the current folder, once all parameters are valid: a later stage's too."""
    from cim.pipeline.groups import check_params  # here, since the command line imports this module for STAGES

    check_params(params := read_params())
    for folder in (ARTIFACTS, RESULTS):  # later stages read them, without trained runs too
        (folder / "train").mkdir(parents=True, exist_ok=True)
    known = [BASE, *all_runs(params["runs"])]
    if stage == "samples" and (others := set(params["samples"]["models"]) - set(known)):
        raise CimError(f"parameters: samples.models: '{min(others)}' is not among the runs, {', '.join(known)}")
    if stage in MODULES:
        import_module(f"cim.pipeline.{stage}").run(params)
        return
    if stage == "train" and training_run is None:
        raise CimError("stage train: name the run with --run METHOD-SEED, as in --run cim-0")
    report = f"{stage}-{training_run}" if training_run else stage
    run_notebook(stage, notebook_parameters(stage, params, training_run), report)
