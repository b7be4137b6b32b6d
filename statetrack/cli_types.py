"""Types of arguments that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, TypeVar

import tyro

T = TypeVar("T")
Unset = Annotated[T, tyro.conf.arg(help_behavior_hint="")]  # the help text says the default itself
Execution = Literal["auto", "eager", "compile", "graph", "compile+graph"]
Device = Annotated[str, tyro.conf.arg(metavar="NAME")]
RunPaths = Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN ...", help_behavior_hint="")]
