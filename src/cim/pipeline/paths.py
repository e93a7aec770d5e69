"""Where the pipeline's files are, relative to the repository's root."""

import os
from pathlib import Path

ARTIFACTS, RESULTS, REPORTS = Path("artifacts"), Path("results"), Path("reports")
MANIFEST = ARTIFACTS / "dataset" / "manifest.parquet"


def at_root() -> None:
    """Make the repository's root the current folder: Jupyter starts in notebooks/, Papermill at the root."""
    if not Path("params.yaml").exists():
        os.chdir("..")
