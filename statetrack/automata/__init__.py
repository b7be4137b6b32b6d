"""Finite automata as data, and the groups whose word problems they are."""

from statetrack.automata.automaton import Automaton
from statetrack.automata.groups import Group, parse_group, permutation_group
from statetrack.automata.regex import regex
from statetrack.automata.sources import from_function

__all__ = ["Automaton", "Group", "from_function", "parse_group", "permutation_group", "regex"]
