"""What the ops' contract does not ask of the compiled CPU kernels: wide heads, threads, their exp, who gets them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from statetrack.errors import UsageError
from statetrack.ops import checks, delta_rule, dplr, gated_linear_attention, numba_common, selective_scan

from .cases import OpCase, attention_inputs, delta_inputs, dplr_inputs, scan_inputs
from .test_ops import EXACT, assert_close, run_with_grads

WIDE = [
    OpCase("delta-65-70", delta_rule, delta_inputs(H=4, Hk=2, K=65, V=70, decay="head"), ()),
    OpCase("delta-7-33", delta_rule, delta_inputs(N=2, K=7, V=33, decay="key"), ()),
    OpCase("delta-32-17", delta_rule, delta_inputs(N=20, K=32, V=17), ()),
    OpCase("scan-130-9", selective_scan, scan_inputs(D=130, M=9), ()),
    OpCase("attention-65-70", gated_linear_attention, attention_inputs(H=4, Hk=2, K=65, V=70), ()),
    OpCase("attention-7-33", gated_linear_attention, attention_inputs(K=7, V=33, decay="key", hard=True), ()),
    OpCase("dplr-65-70", dplr, dplr_inputs(H=4, Hk=2, K=65, V=70), ()),
    OpCase("dplr-32-17", dplr, dplr_inputs(K=32, V=17, hard=True), ()),
]


@pytest.mark.parametrize("case", WIDE, ids=lambda c: c.name)
def test_heads_of_any_width_equal_the_reference(case: OpCase, generator):
    tensors = case.make(generator, 2, 40)
    want = run_with_grads(case, tensors, backend="reference")
    assert_close(run_with_grads(case, tensors, backend="numba"), want, lambda _: EXACT)


@pytest.fixture(params=["openmp", "pool"])
def two_threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """Let the kernels use two threads: PyTorch's, and those taken where they are out of reach."""
    if request.param == "pool":
        monkeypatch.setattr(numba_common, "PARALLEL", None)
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("case", WIDE, ids=lambda c: c.name)
def test_threads_change_no_bit(case: OpCase, generator):
    tensors = {name: x.float() for name, x in case.make(generator, 5, 200).items()}
    got = run_with_grads(case, tensors, backend="numba")
    torch.set_num_threads(1)
    want = run_with_grads(case, tensors, backend="numba")
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.usefixtures("two_threads")
def test_every_item_is_done_once_and_errors_arrive():
    done = []
    numba_common.spread(lambda first, last: done.extend(range(first, last)), 37, 10**9)
    assert sorted(done) == list(range(37))

    def fail(first: int, last: int) -> None:
        raise ValueError(f"items {first} to {last}")

    with pytest.raises(ValueError, match="items"):
        numba_common.spread(fail, 37, 10**9)


def test_exp_is_right_to_one_unit_in_the_last_place_and_at_the_edges():
    from numba import njit

    from statetrack.ops.selective_scan.numba import _exp_of_float32

    @njit
    def of_all(x, out):
        for i in range(len(x)):
            out[i] = _exp_of_float32(x[i])

    def exp(x: np.ndarray) -> np.ndarray:
        out = np.empty_like(x)
        of_all(x, out)
        return out

    x = np.linspace(-87, 88.3, 1_000_003).astype(np.float32)
    assert np.abs(exp(x) / np.exp(x.astype(np.float64)) - 1).max() <= np.finfo(np.float32).eps
    edges = np.array([-np.inf, -200.0, 0.0, -0.0, 200.0, np.inf, np.nan], np.float32)
    np.testing.assert_array_equal(exp(edges), [0, 0, 1, 1, np.inf, np.inf, np.nan])


INPUTS = {
    delta_rule: delta_inputs(),
    selective_scan: scan_inputs(),
    gated_linear_attention: attention_inputs(),
    dplr: dplr_inputs(),
}
every_op = pytest.mark.parametrize("op", INPUTS, ids=lambda op: op.__name__)


@every_op
def test_auto_takes_the_kernels_where_numba_is_installed(op: Any, generator, monkeypatch: pytest.MonkeyPatch):
    x = {name: tensor.float() for name, tensor in INPUTS[op](generator, 1, 50).items()}

    def run(backend: str) -> Tensor:
        return torch.cat([y.flatten() for y in op(**x, backend=backend)])

    assert torch.equal(run("auto"), run("numba")) and not torch.equal(run("chunk"), run("numba"))
    monkeypatch.setattr(checks, "NUMBA_INSTALLED", False)
    assert torch.equal(run("auto"), run("chunk"))
    with pytest.raises(UsageError, match=r"needs Numba, which is not installed \(pip install 'statetrack\[cpu\]'\)"):
        run("numba")


@every_op
def test_tensors_elsewhere_are_refused(op: Any, generator):
    x = {n: t.float().to("meta") for n, t in INPUTS[op](generator, 1, 3).items()}
    with pytest.raises(UsageError, match='needs tensors on the CPU, got meta; use backend="chunk"'):
        op(**x, backend="numba")
