"""Where the pipeline's files are, relative to the repository's root."""

from pathlib import Path

ARTIFACTS, RESULTS, REPORTS = Path("artifacts"), Path("results"), Path("reports")
MANIFEST = ARTIFACTS / "dataset" / "manifest.parquet"
