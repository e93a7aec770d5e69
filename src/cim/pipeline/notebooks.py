"""Running a stage's notebook with Papermill."""

import os
import sys

from cim.errors import CimError
from cim.pipeline.paths import REPORTS

# Notebook stage -> the groups of params.yaml it is given: its own unpacked, the others whole.
NOTEBOOKS = {
    "gallery": ("encoders",),
    "judgements": ("encoders", "reward"),
    "correlation": ("encoders", "model"),
    "train": ("compute", "encoders", "model", "reward", "sft", "variants"),
    "samples": ("encoders", "model", "reward"),
    "labels": ("sft", "variants"),
    "ablation": ("variants",),
    "evaluate": ("encoders", "reward"),
    "results": (),
}

KERNEL = {
    # Other users of a machine can listen to a kernel's sockets.
    "KernelManager": {"transport_encryption": "auto"},
    "NotebookClient": {
        # What its cells wrote is complete, and Python would take seconds to clean up.
        "shutdown_kernel": "immediate",
        # As the command line does.
        "extra_arguments": ["--IPKernelApp.exec_lines=import gc; gc.set_threshold(100_000)"],
    },
}


def notebook_parameters(stage: str, params: dict, training_run: str | None = None) -> dict:
    """What Papermill sets in the notebook's cell tagged "parameters"."""
    own = dict(params[stage]) if stage != "train" else {"run": training_run, "train": params["train"]}
    return own | {name: params[name] for name in NOTEBOOKS[stage]}


def run_notebook(stage: str, parameters: dict, report: str) -> None:
    """Execute notebooks/<stage>.ipynb into reports/<report>.ipynb.

    Where a cell fails, what ran is kept as reports/<report>.failed.ipynb and the last good report stays.

    Raises:
        CimError: with the failing cell's error in one line.
    """
    import papermill
    from papermill.exceptions import PapermillExecutionError
    from traitlets.config import Config

    # Without this a backend that the terminal's environment names would leave the report without its figures.
    os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"
    REPORTS.mkdir(exist_ok=True)
    target, failed = REPORTS / f"{report}.ipynb", REPORTS / f"{report}.failed.ipynb"
    try:
        papermill.execute_notebook(
            f"notebooks/{stage}.ipynb", str(failed), parameters=parameters, kernel_name="python3", progress_bar=False,
            config=Config(KERNEL),
            stdout_file=sys.stdout, stderr_file=sys.stderr,  # progress also goes to the terminal, as it comes
        )  # fmt: skip
    except PapermillExecutionError as error:
        what = error.evalue if error.ename == "CimError" else f"{error.ename}: {error.evalue}"
        raise CimError(f"{' '.join(what.split())[:500]} (see {failed})") from None
    failed.replace(target)
