"""From an automaton to weights."""
