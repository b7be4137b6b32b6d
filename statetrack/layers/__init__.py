"""Token mixers, one per file."""
