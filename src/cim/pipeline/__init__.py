"""The stages that dvc.yaml calls, a module each, and composing parameters for them."""
