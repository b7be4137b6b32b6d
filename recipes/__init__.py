"""Functions that return fully specified runs: one module per table of a paper, and the demo."""
