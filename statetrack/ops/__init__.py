"""The recurrences: pure functions on tensors."""

from statetrack.ops.delta_rule import delta_rule as delta_rule
from statetrack.ops.dplr import dplr as dplr
from statetrack.ops.gated_linear_attention import gated_linear_attention as gated_linear_attention
from statetrack.ops.selective_scan import selective_scan as selective_scan
