"""Finite automata as data."""
