"""The GPU kernels of the delta rule against the float64 reference: interpreted without a GPU, compiled with one."""

from __future__ import annotations

import numpy
import pytest
import torch

pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from torch.nn.functional import logsigmoid, normalize  # noqa: E402
from torch.utils.checkpoint import checkpoint  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

from statetrack.errors import UsageError  # noqa: E402
from statetrack.ops.delta_rule import triton as kernels  # noqa: E402
from statetrack.ops.delta_rule.reference import delta_rule_reference  # noqa: E402
from statetrack.ops.delta_rule.triton import delta_rule_step_, delta_rule_triton  # noqa: E402

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
NAMES = ("q", "k", "v", "beta", "log_decay", "initial_state")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
gpu_only = pytest.mark.skipif(not GPU, reason="needs a GPU")


@pytest.fixture(autouse=True, scope="module")
def bf16_products():
    """Let the interpreter multiply bf16 tiles: it keeps them as 16-bit integers and would multiply those."""
    if GPU:
        yield
        return
    plain = interpreter.InterpreterBuilder.create_dot

    def widen(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        return interpreter.TensorHandle((x.data.astype(numpy.uint32) << 16).view(numpy.float32), tl.float32)

    def create_dot(self, a, b, *rest):
        return plain(self, widen(a), widen(b), *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
        yield


def draw(B=1, T=70, N=1, Hk=1, H=1, K=16, V=16, dtype=F32, gate="", lengths=None, unit=True, seed=0):
    """Draw the six tensors (q, k, v in dtype) and the sequence lengths."""
    g = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    q, k, v = normal(B, T, Hk, K), normal(B, T, N, Hk, K), normal(B, T, N, H, V)
    if unit:
        q, k = normalize(q, dim=-1), normalize(k, dim=-1)
    beta = 2 * torch.rand(B, T, N, H, generator=g)
    log_decay = logsigmoid(normal(B, T, H) + 2) if gate else None
    if gate == "resets":
        log_decay[:, ::5] = -torch.inf
        k[:, 1::7] = 0
        beta[:, 2::3] = 0
    state = normal(len(lengths) if lengths else B, H, K, V) / 2
    tensors = [q.to(dtype), k.to(dtype), v.to(dtype), beta, log_decay, state]
    return [None if t is None else t.to(DEVICE) for t in tensors], lengths or [T] * B


def reference(tensors, lengths, scale, d_out, d_state, dtype=torch.float64):
    """Return output, state and gradients of the reference in another dtype."""
    x = [None if t is None else t.detach().to("cpu", dtype).requires_grad_() for t in tensors]
    o, state = delta_rule_reference(*x[:5], scale, x[5], lengths)
    torch.autograd.backward([o, state], [d_out.cpu().to(dtype), d_state.cpu().to(dtype)])
    return {"o": o, "state": state} | {n: t.grad for n, t in zip(NAMES, x, strict=True) if t is not None}


def error(got, expected) -> float:
    """Return the relative error in norm."""
    difference = got.detach().cpu().double() - expected.detach().double()
    return (difference.norm() / expected.double().norm().clamp_min(1e-30)).item()


def check(tensors, lengths, scale=0.3):
    """Compare outputs and all gradients with the float64 reference."""
    x = [None if t is None else t.detach().requires_grad_() for t in tensors]
    o, state = delta_rule_triton(*x[:5], scale, x[5], lengths)
    g = torch.Generator().manual_seed(1)
    d_out = torch.randn(o.shape, generator=g).to(o)
    d_state = torch.randn(state.shape, generator=g).to(state)
    torch.autograd.backward([o, state], [d_out, d_state])
    got = {"o": o, "state": state} | {n: t.grad for n, t in zip(NAMES, x, strict=True) if t is not None}
    exact = reference(tensors, lengths, scale, d_out, d_state)
    single = reference(tensors, lengths, scale, d_out, d_state, torch.float32)
    for name, value in got.items():
        own = torch.finfo(value.dtype if name == "state" else o.dtype).eps
        bound = 4 * own + 4 * (error(single[name], exact[name]) + 4 * torch.finfo(F32).eps)
        if name == "state":
            bound = max(bound, 1e-4 if o.dtype == BF16 else 0.0)  # two bf16 terms in every product
        assert error(value, exact[name]) <= bound, f"{name}: {error(value, exact[name]):.1e} > {bound:.1e}"


SMALL = {
    "float32": {},
    "bfloat16": {"dtype": BF16, "K": 32},
    "float16": {"dtype": F16},
    "gate": {"gate": "decay", "K": 24, "V": 20, "H": 2},
    "resets, zero keys, beta 0": {"gate": "resets", "dtype": BF16},
    "resets in float32": {"gate": "resets", "T": 130},
    "shared heads": {"H": 4, "Hk": 2, "B": 2, "T": 20},
    "2 factors": {"N": 2, "dtype": BF16, "T": 64},
    "3 factors": {"N": 3, "gate": "decay", "T": 45},
    "8 factors": {"N": 8, "T": 20},
    "packed": {"lengths": [70, 0, 1, 66], "T": 137, "gate": "decay"},
    "packed factors": {"lengths": [33, 7], "T": 40, "N": 2, "dtype": BF16},
    "one token": {"T": 1, "N": 2},
    "keys of any length": {"unit": False, "T": 40},
}


@pytest.mark.parametrize("name", SMALL)
def test_small(name):
    check(*draw(**SMALL[name]))


@gpu_only
@pytest.mark.parametrize("dtype", [BF16, F32, F16], ids=str)
@pytest.mark.parametrize("K, V", [(16, 16), (32, 64), (64, 64), (64, 128), (100, 70), (128, 64), (128, 128)])
@pytest.mark.parametrize("gate", ["", "decay"])
def test_every_width(K, V, dtype, gate):
    check(*draw(B=2, T=192, H=2, Hk=2, K=K, V=V, dtype=dtype, gate=gate))
    check(*draw(B=1, T=150, H=2, Hk=1, K=K, V=V, dtype=dtype, gate=gate, lengths=[100, 0, 50]))


@gpu_only
@pytest.mark.parametrize("K, V", [(128, 256), (256, 128), (256, 256)])
@pytest.mark.parametrize("gate", ["", "decay"])
def test_wide(K, V, gate):
    check(*draw(B=1, T=128, H=2, Hk=2, K=K, V=V, dtype=BF16, gate=gate))


@gpu_only
@pytest.mark.parametrize("N", range(2, 9))
@pytest.mark.parametrize("gate", ["", "decay"])
def test_every_number_of_factors(N, gate):
    check(*draw(B=2, T=96, N=N, H=2, Hk=2, K=128, V=128, dtype=BF16, gate=gate))
    check(*draw(B=1, T=50, N=N, H=2, Hk=1, K=64, V=64, dtype=BF16, gate=gate))


@pytest.mark.parametrize("N, dtype, gate", [(1, F32, "decay"), (2, BF16, "resets")])
def test_segments_equal_one_walk(N, dtype, gate, monkeypatch):
    monkeypatch.setattr(kernels, "MIN_SEGMENT", 1)
    tensors, lengths = draw(T=512 // N, N=N, K=16, V=32, dtype=dtype, gate=gate)
    assert kernels.segments(1, 512 // N, 64 // N) == 8
    check(tensors, lengths)


def test_segments_are_chosen_only_where_the_gpu_would_idle():
    assert kernels.segments(128, 32768, 64) == 1
    assert kernels.segments(16, 32768, 64) == 8
    assert kernels.segments(16, 32768 + 1, 64) == 1
    assert kernels.segments(16, 2048, 64) == 1


@pytest.mark.parametrize("B, gate", [(1, ""), (3, "decay")])
def test_step(B, gate):
    tensors, lengths = draw(B=B, T=1, N=3, H=4, Hk=2, K=24, V=40, gate=gate)
    double = [None if t is None else t.double() for t in tensors]
    o64, state64 = delta_rule_reference(*double[:5], 0.3, double[5], lengths)
    before = tensors[5].clone()
    with torch.no_grad():
        o, state = delta_rule_triton(*tensors[:5], 0.3, tensors[5], lengths)
        assert torch.equal(tensors[5], before)
        in_place = delta_rule_step_(*tensors[:5], tensors[5], 0.3)
    for got, exact in ((o, o64), (state, state64), (in_place, o64), (tensors[5], state64)):
        assert error(got, exact.cpu()) < 1e-6


def test_deterministic():
    tensors, lengths = draw(T=100, gate="decay", dtype=BF16)
    grads = []
    for _ in range(2):
        x = [t.detach().requires_grad_() for t in tensors]
        o, state = delta_rule_triton(*x[:5], 0.3, x[5], lengths)
        (o.float().sum() + state.sum()).backward()
        grads.append([t.grad for t in x])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_exact_with_integer_keys():
    """Swaps of 16 items written as e_i - e_j, beta = 2: the state is a permutation, bit for bit, at any length."""
    T, K = 300, 16
    g = torch.Generator().manual_seed(0)
    pairs = torch.stack([torch.randperm(K, generator=g)[:2] for _ in range(T)])
    k = torch.zeros(1, T, 1, 1, K)
    rows = torch.arange(T)
    k[0, rows, 0, 0, pairs[:, 0]], k[0, rows, 0, 0, pairs[:, 1]] = 1.0, -1.0
    expected = torch.eye(K)
    for i, j in pairs.tolist():
        expected[[i, j]] = expected[[j, i]]
    zeros = torch.zeros(1, T, 1, 1, K)
    x = [t.to(DEVICE, BF16) for t in (torch.zeros(1, T, 1, K), k, zeros)]
    beta, state = torch.full((1, T, 1, 1), 2.0, device=DEVICE), torch.eye(K, device=DEVICE)[None, None]
    _, final = delta_rule_triton(*x, beta, None, 1.0, state, [T])
    assert torch.equal(final[0, 0].cpu(), expected)


@pytest.mark.parametrize(
    "change, words",
    [({"dtype": torch.float64}, "float64"), ({"K": 264}, "K = 264"), ({"N": 9}, "9 factors")],
)
def test_refusals(change, words):
    tensors, lengths = draw(T=2, **change)
    with pytest.raises(UsageError, match=words):
        delta_rule_triton(*tensors[:5], 1.0, tensors[5], lengths)
    with pytest.raises(UsageError, match="quick"):
        tensors, lengths = draw(T=2)
        delta_rule_triton(*tensors[:5], 1.0, tensors[5], lengths, precision="quick")


@gpu_only
@pytest.mark.parametrize("dtype, bounds", [(BF16, {4096: 1e-3, 65536: 5e-3})])
def test_tracking(dtype, bounds):
    from benchmarks.delta_rule_gpu import tracking

    row = tracking(list(bounds), False, dtype)[0]
    assert all(row[f"T={n}"] <= bound for n, bound in bounds.items()), row


@gpu_only
def test_compile_graph_checkpoint():
    tensors, lengths = draw(B=2, T=128, H=2, Hk=2, K=64, V=64, dtype=BF16, gate="decay")
    x = [t.detach().requires_grad_() for t in tensors]

    def run(*x):
        o, state = delta_rule_triton(*x[:5], 0.3, x[5], lengths)
        return o.float() * 2, state

    def grads(f):
        for t in x:
            t.grad = None
        o, state = f(*x)
        (o.sum() + state.sum()).backward()
        return [o, state, *(t.grad for t in x)]

    plain = grads(run)
    for other in (torch.compile(run, fullgraph=True), lambda *x: checkpoint(run, *x, use_reentrant=False)):
        assert all(torch.equal(a, b) for a, b in zip(plain, grads(other), strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad():
        with torch.cuda.graph(graph):
            o, state = run(*x)
        graph.replay()
    assert torch.equal(o, plain[0]) and torch.equal(state, plain[1])
