"""Cross-modal Identity Mapping (CIM): captions rewarded by what they retrieve (arXiv 2603.01696)."""
