"""Where the pipeline's files are, relative to the repository's root."""

from __future__ import annotations

from pathlib import Path

ARTIFACTS, RESULTS, REPORTS = Path("artifacts"), Path("results"), Path("reports")
MANIFEST = ARTIFACTS / "dataset" / "manifest.parquet"
