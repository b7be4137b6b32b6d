"""Finite automata as data: from regular expressions, tables, functions, groups; `automaton_of` takes them all."""

from statetrack.automata.automaton import Automaton
from statetrack.automata.groups import Group, parse_group, permutation_group
from statetrack.automata.presentations import from_presentation
from statetrack.automata.regex import regex
from statetrack.automata.sources import from_automata_lib, from_function, from_permutations
from statetrack.automata.specs import SPECS, automaton_of
from statetrack.automata.wrappers import contains, lines

__all__ = [
    "SPECS",
    "Automaton",
    "Group",
    "automaton_of",
    "contains",
    "from_automata_lib",
    "from_function",
    "from_permutations",
    "from_presentation",
    "lines",
    "parse_group",
    "permutation_group",
    "regex",
]
