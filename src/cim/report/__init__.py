"""Tables, figures and pages of what the pipeline measured; imports no model, so it runs without PyTorch."""
