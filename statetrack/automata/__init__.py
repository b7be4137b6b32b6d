"""Finite automata as data, and the groups whose word problems they are."""

from statetrack.automata.automaton import Automaton
from statetrack.automata.groups import Group, parse_group, permutation_group

__all__ = ["Automaton", "Group", "parse_group", "permutation_group"]
