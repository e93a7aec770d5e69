"""Captions compared with references: CAPTURE (arXiv 2405.19092) and SC-Captioner's refinement (arXiv 2508.06125)."""
