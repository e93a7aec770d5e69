"""The stages of dvc.yaml: each reads its group of params.yaml and either calls a module or runs a notebook."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path

from cim.errors import CimError
from cim.settings import group, read_params

ARTIFACTS, RESULTS, REPORTS = Path("artifacts"), Path("results"), Path("reports")
MANIFEST = ARTIFACTS / "dataset" / "manifest.parquet"

# Notebook stage -> the groups of params.yaml it is given: its own unpacked, the others whole.
NOTEBOOKS = {
    "gallery": ("encoders",),
    "correlation": ("encoders", "model"),
    "train": ("model", "reward", "sft"),
    "evaluate": (),
    "results": (),
}


def run(stage: str, training_run: str | None = None) -> None:
    """Run one stage in the current folder."""
    params = read_params()
    if stage in _SCRIPTS:
        _SCRIPTS[stage](params)
        return
    if stage == "train" and training_run is None:
        raise CimError("stage train: say which with --run METHOD-SEED, as in --run cim-0")
    run_notebook(
        stage, notebook_parameters(stage, params, training_run), f"{stage}-{training_run}" if training_run else stage
    )


def notebook_parameters(stage: str, params: dict, training_run: str | None = None) -> dict:
    """What Papermill sets in the notebook's cell tagged "parameters"."""
    missing = [name for name in (stage, *NOTEBOOKS[stage]) if name not in params]
    if missing:
        raise CimError(f"params.yaml: group '{missing[0]}' is missing; stage {stage} needs it")
    own = dict(params[stage] or {}) if stage != "train" else {"run": training_run, "train": params["train"]}
    return own | {name: params[name] for name in NOTEBOOKS[stage]}


def run_notebook(stage: str, parameters: dict, report: str) -> None:
    """Execute notebooks/<stage>.ipynb into reports/<report>.ipynb.

    Where a cell fails, what ran is kept as reports/<report>.failed.ipynb and the last good report stays.

    Raises:
        CimError: with the failing cell's error in one line.
    """
    import papermill
    from papermill.exceptions import PapermillExecutionError

    # Without this a backend that the terminal's environment names would leave the report without its figures.
    os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"
    REPORTS.mkdir(exist_ok=True)
    target, failed = REPORTS / f"{report}.ipynb", REPORTS / f"{report}.failed.ipynb"
    try:
        papermill.execute_notebook(
            f"notebooks/{stage}.ipynb",
            str(failed),
            parameters=parameters,
            kernel_name="python3",
            progress_bar=False,
            # Progress goes to the terminal as it comes, not only into the report.
            stdout_file=sys.stdout,
            stderr_file=sys.stderr,
        )
    except PapermillExecutionError as error:
        what = error.evalue if error.ename == "CimError" else f"{error.ename}: {error.evalue}"
        raise CimError(f"{' '.join(what.split())[:500]} (see {failed})") from None
    failed.replace(target)


def write_metrics(path: Path, metrics: dict) -> None:
    """Write a metrics file of results/, rounded to what is meaningful, so that diffs are readable."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_rounded(metrics), indent=1) + "\n")


def _rounded(value):
    if isinstance(value, dict):
        return {str(k): _rounded(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(v) for v in value]
    if isinstance(value, (int, str)) or not hasattr(value, "__float__"):
        return value
    # JSON has no NaN: what is not defined (the precision of silence) is null.
    return None if math.isnan(value) else round(float(value), 5)


def _dataset(params: dict) -> None:
    from cim.dataset import DatasetSettings, make_dataset

    make_dataset(group(DatasetSettings, params.get("dataset"), "dataset"), ARTIFACTS / "dataset")


def _encoder(params: dict) -> None:
    if _not_trained_here(params, "encoder", {"image": params["encoders"]["image"]}):
        return
    from cim.encoder_training import EncoderTrainingSettings, train_encoder
    from cim.manifest import read_manifest

    settings = group(EncoderTrainingSettings, params.get("encoder"), "encoder")
    metrics = train_encoder(read_manifest(MANIFEST).split("pretrain"), settings, ARTIFACTS / "encoder")
    write_metrics(RESULTS / "encoder" / "metrics.json", metrics)
    print(metrics)


def _captioner(params: dict) -> None:
    if _not_trained_here(params, "captioner", {"model": params["model"]["name"]}):
        return
    from cim.captioner import CaptionerSettings, train_captioner
    from cim.manifest import read_manifest

    settings = group(CaptionerSettings, params.get("captioner"), "captioner")
    curve = train_captioner(
        read_manifest(MANIFEST).split("pretrain"), ARTIFACTS / "encoder", settings, ARTIFACTS / "captioner"
    )
    write_metrics(RESULTS / "captioner" / "loss.json", {"curve": curve})


def _not_trained_here(params: dict, stage: str, instead: dict) -> bool:
    """Where a profile sets a stage's group to null, what it would train is named elsewhere; leave a note of that."""
    if params.get(stage) is not None:
        return False
    for folder in (ARTIFACTS / stage, RESULTS / stage):
        folder.mkdir(parents=True, exist_ok=True)
    write_metrics(ARTIFACTS / stage / "not_trained_here.json", instead)
    write_metrics(RESULTS / stage / {"encoder": "metrics.json", "captioner": "loss.json"}[stage], instead)
    print(f"{stage}: not trained here; used instead: {', '.join(instead.values())}")
    return True


def _captions(params: dict) -> None:
    from cim.generation import CaptionSettings, caption_runs
    from cim.models import ModelSettings
    from cim.runs import all_runs

    settings = group(CaptionSettings, params.get("captions"), "captions")
    model = group(ModelSettings, params.get("model"), "model")
    caption_runs(model, settings, all_runs(params["runs"]), ARTIFACTS, RESULTS / "captions")


_SCRIPTS = {"dataset": _dataset, "encoder": _encoder, "captioner": _captioner, "captions": _captions}
STAGES = (*_SCRIPTS, *NOTEBOOKS)
