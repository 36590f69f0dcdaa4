"""kernels/blocksparse_attention.py against dense attention, on both of its paths.

The Triton kernels run on the GPU if there is one. Otherwise they run on the CPU in Triton's
interpreter, which must be switched on before the kernels are defined. A process with a GPU never
does that, so there the last test starts another process for it.
"""

import ast
import copy
import inspect
import itertools
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
import time
import tomllib
from typing import NamedTuple

import pytest
import torch
from common import load_algo
from conftest import ROOT
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
# The CPU time of this process does not count what other processes do.
CLOCK = time.perf_counter if CUDA else time.process_time
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"
FILE = ROOT / "kernels" / "blocksparse_attention.py"
bs = load_algo(FILE)
attention = bs.blocksparse_attention
BlockLayout = bs.BlockLayout
# The most precise dtype that the kernels take here.
EXACT = torch.float32 if CUDA else torch.float64
needs_gpu = pytest.mark.skipif(not CUDA, reason="needs CUDA")
needs_float64_kernels = pytest.mark.skipif(CUDA, reason="only the interpreter takes float64")


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    if request.param == "triton":
        skip_without_triton()
    # On a GPU, index_add_ of the PyTorch path is deterministic only if asked to be.
    torch.use_deterministic_algorithms(CUDA and request.param == "torch")
    yield request.param
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def skip_without_triton():
    if bs.triton is None:
        pytest.skip("Triton is not installed")


class Inputs(NamedTuple):
    """Inputs of attention, and gradients of its results."""

    q: Tensor  # [B, H, Sq, D]
    k: Tensor  # [B, K, Sk, D]
    v: Tensor
    do: Tensor  # [B, H, Sq, D]
    dlse: Tensor  # [B, H, Sq]

    def to(self, *args):
        return Inputs(*(x.to(*args) for x in self))


class Results(NamedTuple):
    """Results of attention, and gradients of its inputs."""

    out: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


def random_inputs(batch, heads, kv_heads, sq, sk, dim, dtype=None, device=None):
    """Inputs drawn in float64, so that they are the same in every dtype but for rounding."""
    shapes = Inputs(
        q=(batch, heads, sq, dim),
        k=(batch, kv_heads, sk, dim),
        v=(batch, kv_heads, sk, dim),
        do=(batch, heads, sq, dim),
        dlse=(batch, heads, sq),
    )
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    return Inputs(*tensors).to(device or DEVICE, dtype or EXACT)


def random_mask(*shape, density):
    return torch.rand(shape) < density


def dense_attention(q, k, v, live, scale=None):
    """Attention over all pairs, of which `live` count: out and lse.

    Queries without live pairs give 0 and -inf.
    """
    group = q.shape[1] // k.shape[1]
    k = k.repeat_interleave(group, 1)
    v = v.repeat_interleave(group, 1)
    scores = torch.einsum("bhid,bhjd->bhij", q, k)
    scores = scores * (q.shape[-1] ** -0.5 if scale is None else scale)
    is_empty = ~live.any(-1, keepdim=True)
    scores = scores.masked_fill(~live, -math.inf).masked_fill(is_empty, 0)
    out = scores.softmax(-1).masked_fill(is_empty, 0) @ v
    return out, scores.logsumexp(-1).masked_fill(is_empty[..., 0], -math.inf)


def live_pairs(mask, block, sq, sk, batch=1, elements=None, causal=False, kv_lens=None):
    """Which pairs live, by the definition: bool [batch, H, sq, sk]."""
    mask = mask[(None,) * (4 - mask.dim())]
    blocks = torch.ones(*mask.shape, block, block, dtype=torch.bool) & mask[..., None, None].cpu()
    if elements is not None:
        blocks[mask.cpu()] = elements.cpu()
    pairs = blocks.transpose(3, 4).flatten(4, 5).flatten(2, 3)[:, :, :sq, :sk]
    pairs = pairs.expand(batch, -1, -1, -1).clone()
    query = torch.arange(sq)[:, None]
    key = torch.arange(sk)
    if causal:
        pairs &= key <= query + sk - sq
    if kv_lens is not None:
        pairs &= key < kv_lens.cpu()[:, None, None, None]
    return pairs.to(mask.device)


def attention_over(layout, backend, **options):
    """A function of q, k and v that returns out and lse."""

    def attend(q, k, v):
        return attention(q, k, v, layout, return_lse=True, backend=backend, **options)

    return attend


def dense_over(live, scale=None):
    """The same for dense attention."""

    def attend(q, k, v):
        return dense_attention(q, k, v, live, scale)

    return attend


def results(attend, inputs):
    """Results and gradients of a function of q, k and v."""
    qkv = [x.detach().requires_grad_() for x in inputs[:3]]
    out, lse = attend(*qkv)
    gradients = torch.autograd.grad((out, lse), qkv, (inputs.do, inputs.dlse))
    return Results(out.detach(), lse.detach(), *gradients)


def assert_equal_results(ours, expected):
    """Equal to the last bit."""
    for name, x, y in zip(Results._fields, ours, expected, strict=True):
        assert x.equal(y), name


def assert_close(ours, exact, tolerance=None):
    """Errors are at most `tolerance` times the largest magnitude, or times 1 if that is smaller."""
    if tolerance is None:
        tolerance = 2e-5 if EXACT == torch.float32 else 1e-9
    for name, x, y in zip(Results._fields, ours, exact, strict=True):
        error, magnitude = finite_errors(name, x, y)
        if len(error):
            assert error.max() <= tolerance * max(1, magnitude.max()), name


def assert_close_within(bounds, ours, exact):
    """Errors are at most `bounds`, element by element."""
    for name, x, y, bound in zip(Results._fields, ours, exact, bounds, strict=True):
        error, _ = finite_errors(name, x, y)
        assert (error <= bound[y.isfinite()]).all(), name


def finite_errors(name, x, y):
    """Errors and magnitudes where the exact result is finite; elsewhere, x must be equal to y."""
    assert x.shape == y.shape, name
    assert x.is_contiguous(), name
    finite = y.isfinite()
    assert x.isfinite().equal(finite), name
    assert (x[~finite] == y[~finite]).all(), name
    return (x.double() - y)[finite].abs(), y[finite].abs()


def assert_matches_dense(backend, layout, live, inputs, tolerance=None, **options):
    """Compare with dense attention in float64; return our results."""
    ours = results(attention_over(layout, backend, **options), inputs)
    exact = results(dense_over(live, options.get("scale")), inputs.to(torch.float64))
    assert_close(ours, exact, tolerance)
    return ours


def rounding_bounds(inputs, live, scale):
    """How far arithmetic in the dtype of the inputs may be from exact: a Results of error bounds.

    One rounding changes a number by at most u = eps / 2 of it. The n roundings in a sum or product
    are independent and about uniform, with a standard deviation of u / sqrt(3) each, so together
    they stay within 5 sqrt(n / 3) u, which is about 3 sqrt(n) u, of the sum of magnitudes.

    A weight is exp2(s log2 e - lse log2 e). An exponent of magnitude |s| that is wrong by u |s|
    makes the weight wrong by the factor 1 + u |s|. Base 2 changes nothing, because log2 e and ln 2
    cancel. The D sums of a score are rounded in the forward pass and again in the backward pass;
    the products together, scale, log2 e, maximum, log2, ln 2 and differences take 10 more. That
    makes 2 D + 10 roundings of |s|, which is at most the sum of |scale q k| over D. For D = 16
    and logits of 120 in float32, weights are wrong by a factor of at most 1 + 1.4e-4. The other
    bounds follow from the equations by the rules for products and sums.
    """
    dtype = inputs.q.dtype
    q, k, v, do, dlse = inputs.to(torch.float64)
    dim = q.shape[-1]
    keys = live.sum(-1).max().item()
    queries = live.sum(-2).max().item()
    unit = (torch.finfo(dtype).eps + torch.finfo(torch.float64).eps) / 2  # ours and the reference's
    # The PyTorch path accepts sums of weights from 1e-12 on, so it may lose weights below this.
    smallest_weight = torch.finfo(dtype).tiny / 1e-12

    def rounding(n):
        return 3 * math.sqrt(n) * unit

    scores = (q @ k.mT * scale).masked_fill(~live, -math.inf)
    lse = scores.logsumexp(-1, keepdim=True)
    p = (scores - lse).exp()
    logit = (q.abs() @ k.abs().mT * abs(scale)).masked_fill(~live, 0).amax(-1, keepdim=True)
    lse_error = rounding(dim + 7) * (logit + 1) + rounding(keys)
    p_error = (rounding(2 * dim + 10) * (logit + 1) + rounding(keys)) * p + smallest_weight * live
    out = p @ v
    out_error = p_error @ v.abs() + rounding(keys) * (p @ v.abs())
    delta = (do * out).sum(-1, keepdim=True) - dlse[..., None]
    delta_error = do.abs() * (out_error + rounding(dim) * out.abs())
    delta_error = delta_error.sum(-1, keepdim=True) + unit * dlse[..., None].abs()
    dp = do @ v.mT
    dp_error = rounding(dim) * (do.abs() @ v.abs().mT)
    ds = p * (dp - delta)
    difference_error = dp_error + delta_error + 2 * unit * (dp.abs() + delta.abs())
    ds_error = p_error * (dp - delta).abs() + p * difference_error
    return Results(
        out=out_error,
        lse=lse_error[..., 0],
        dq=abs(scale) * ((ds_error + rounding(keys) * ds.abs()) @ k.abs()),
        dk=abs(scale) * ((ds_error + rounding(queries) * ds.abs()).mT @ q.abs()),
        dv=(p_error + rounding(queries) * p).mT @ do.abs(),
    )


def assert_matches_dense_to_rounding(backend, layout, live, inputs, scale, **options):
    """Compare with dense attention in float64, to `rounding_bounds`. K must be H."""
    live = live.expand(*inputs.q.shape[:2], -1, -1)
    ours = results(attention_over(layout, backend, scale=scale, **options), inputs)
    exact = results(dense_over(live, scale), inputs.to(torch.float64))
    assert_close_within(rounding_bounds(inputs, live, scale), ours, exact)


def environment_without_interpreter(**changes):
    """Environment variables for a process that does not interpret the kernels."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return env | changes


# ---- Results and gradients -----------------------------------------------------------------------
class Case(NamedTuple):
    """A problem, and how its layout is made."""

    block: int
    batch: int
    heads: int
    kv_heads: int
    sq: int
    sk: int
    dim: int = 16
    mask_lead: tuple = ()  # leading dimensions of the mask
    full: bool = False  # every block is live
    elements: bool = False  # with element masks
    causal: bool = False
    kv_lens: list | None = None
    scale: float | None = None


CASES = {
    "block 8": Case(8, 1, 2, 2, 40, 40, mask_lead=(2,)),
    "block 16, grouped heads": Case(16, 1, 4, 2, 70, 50, mask_lead=(4,)),
    "block 32, one mask for all": Case(32, 2, 2, 1, 70, 70),
    "block 64, a mask for each batch": Case(64, 2, 1, 1, 100, 130, mask_lead=(2, 1)),
    "block 128": Case(128, 1, 1, 1, 130, 130),
    "full": Case(32, 1, 2, 2, 70, 70, full=True),
    "full, with element masks": Case(32, 1, 2, 2, 70, 70, full=True, elements=True),
    "full, causal, one key more": Case(64, 1, 1, 1, 64, 65, full=True, causal=True),
    "full, causal, two queries": Case(64, 1, 1, 1, 2, 64, full=True, causal=True),
    "full, causal, twice the keys": Case(64, 1, 1, 1, 65, 130, full=True, causal=True),
    "full, causal, more tiles of keys": Case(64, 1, 1, 1, 130, 256, full=True, causal=True),
    "full, causal, not square": Case(32, 1, 2, 2, 40, 70, full=True, causal=True),
    "causal": Case(16, 1, 2, 2, 70, 70, mask_lead=(2,), causal=True),
    "causal, more keys": Case(32, 1, 2, 1, 40, 110, mask_lead=(2,), causal=True),
    "causal, more queries": Case(32, 1, 1, 1, 110, 40, causal=True),
    "element mask": Case(16, 1, 2, 2, 40, 50, mask_lead=(2,), elements=True),
    "element mask, block 64": Case(64, 1, 1, 1, 70, 70, elements=True, causal=True),
    "kv_lens": Case(32, 3, 2, 1, 40, 70, mask_lead=(2,), kv_lens=[0, 33, 99], causal=True),
    "kv_lens, whole blocks": Case(64, 2, 1, 1, 64, 128, kv_lens=[20, 100], full=True),
    "full, causal, negative scale": Case(32, 1, 2, 2, 70, 70, full=True, causal=True, scale=-0.5),
    "full, causal, scale 0": Case(32, 1, 2, 2, 70, 70, full=True, causal=True, scale=0.0),
    "scale 0": Case(32, 1, 1, 1, 40, 40, scale=0.0),
    "negative scale": Case(32, 1, 2, 1, 40, 40, mask_lead=(2,), scale=-0.7, causal=True),
    "everything": Case(
        8, 2, 4, 2, 50, 70, 24, (2, 4), elements=True, causal=True, kv_lens=[70, 40], scale=0.5
    ),
}


def assert_case_matches_dense(case, backend):
    shape = (*case.mask_lead, -(-case.sq // case.block), -(-case.sk // case.block))
    mask = random_mask(*shape, density=0.6)
    if case.full:
        mask = torch.ones_like(mask)
    elements = None
    device_elements = None
    if case.elements:
        elements = random_mask(int(mask.sum()), case.block, case.block, density=0.5)
        elements[::3] = True
        device_elements = elements.to(DEVICE)
    kv_lens = None
    if case.kv_lens is not None:
        kv_lens = torch.tensor(case.kv_lens, dtype=torch.int32).to(DEVICE)
    layout = BlockLayout.from_mask(mask.to(DEVICE), case.block, device_elements)
    inputs = random_inputs(case.batch, case.heads, case.kv_heads, case.sq, case.sk, case.dim)
    live = live_pairs(
        mask, case.block, case.sq, case.sk, case.batch, elements, case.causal, kv_lens
    )
    assert_matches_dense(
        backend,
        layout,
        live.to(DEVICE),
        inputs,
        causal=case.causal,
        kv_lens=kv_lens,
        scale=case.scale,
    )


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_results_and_gradients_match_dense_attention(case, backend):
    """The gradient that comes back for lse counts as well."""
    assert_case_matches_dense(case, backend)


@pytest.mark.parametrize(
    "name", ["block 16, grouped heads", "causal, more keys", "kv_lens", "everything"]
)
@pytest.mark.parametrize("scores", [1, 2**11])
def test_small_chunks_match_dense_attention(name, scores, monkeypatch):
    """Chunks of one or a few rows for each thread. Groups have many, and a shorter last one."""
    monkeypatch.setattr(bs, "CHUNK_SCORES", scores)
    assert_case_matches_dense(CASES[name], "torch")


@pytest.mark.parametrize("dim", [16, 24, 32, 64, 80, 96, 128, 256])
def test_head_sizes_match_dense_attention(dim, backend):
    mask = torch.tensor([[1, 0, 1], [0, 1, 1], [1, 1, 0]]).bool().to(DEVICE)
    inputs = random_inputs(1, 1, 1, 40, 40, dim)
    layout = BlockLayout.from_mask(mask, 16)
    assert_matches_dense(backend, layout, live_pairs(mask, 16, 40, 40), inputs)


def assert_as_precise_as_dense(ours, naive, exact):
    """At most twice the error of dense attention in the same dtype, and 1e-3 of the result."""
    for name, x, x_naive, x_exact in zip(Results._fields, ours, naive, exact, strict=True):
        finite = x_exact.isfinite()
        error = (x - x_exact)[finite].abs().max()
        naive_error = (x_naive - x_exact)[finite].abs().max()
        assert error <= 2 * naive_error + 1e-3 * x_exact[finite].abs().max(), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("causal", [False, True])
def test_dtypes_match_dense_attention(dtype, causal, backend):
    """float32 within 2e-5 of float64; 16 bits as precisely as dense attention in the same dtype."""
    mask = random_mask(2, 4, 4, density=0.7).to(DEVICE)
    inputs = random_inputs(1, 2, 1, 100, 100, 64, dtype)
    live = live_pairs(mask, 32, 100, 100, causal=causal)
    inputs.dlse[~live.any(-1)] = 0
    layout = BlockLayout.from_mask(mask, 32)
    attend = attention_over(layout, backend, causal=causal)
    ours = results(attend, inputs._replace(dlse=inputs.dlse.float()))
    exact = results(dense_over(live), inputs.to(torch.float64))
    if dtype == torch.float32:
        assert_close(ours, exact, 2e-5)
    else:
        assert ours.lse.dtype == torch.float32
        assert_as_precise_as_dense(ours, results(dense_over(live), inputs), exact)


# ---- Large logits and extreme scales -------------------------------------------------------------
def test_large_logits_match_dense_attention(backend):
    inputs = random_inputs(1, 1, 1, 40, 40, 16)
    mask = torch.ones(2, 2, dtype=torch.bool).to(DEVICE).tril()
    inputs.q.mul_(100 / (inputs.q @ inputs.k.mT).abs().max())
    layout = BlockLayout.from_mask(mask, 32)
    live = live_pairs(mask, 32, 40, 40)
    assert_matches_dense_to_rounding(backend, layout, live, inputs, scale=1.0)


@pytest.mark.parametrize("scale", [1e-50, -1e-50])
def test_a_scale_that_float32_rounds_to_0_matches_dense_attention(scale, backend):
    layout = bs.dense(70, 70, 32, device=DEVICE)
    inputs = random_inputs(1, 2, 2, 70, 70, 16, torch.float32)
    live = live_pairs(layout.to_mask(), 32, 70, 70, causal=True)
    assert_matches_dense(backend, layout, live, inputs, 2e-5, causal=True, scale=scale)


@pytest.mark.parametrize(
    "shifts, value_size",
    [((0, 110, -110), 1), ((-110, 0, 110), 1), ((-100, 0, 0), 1), ((0, 50, -50), 1e20)],
)
def test_heads_whose_logits_leave_the_range_of_exp(shifts, value_size, backend):
    """In float32, exp(110) is inf, exp(-110) is 0 and exp(-100) has few bits left.

    exp(50) overflows with values of 1e20. No block has a mask, so the PyTorch path first tries exp
    without a maximum. Heads with more blocks come later in its order.
    """
    mask = torch.tensor([[[1, 0, 0]] * 3, [[1, 1, 0]] * 3, [[1, 1, 1]] * 3]).bool().to(DEVICE)
    inputs = random_inputs(1, 3, 3, 48, 48, 16, torch.float32)
    inputs.q[..., 0] = 1
    inputs.k[..., 0] = torch.tensor(shifts)[:, None].to(inputs.k)
    inputs.v.mul_(value_size)
    layout = BlockLayout.from_mask(mask, 16)
    live = live_pairs(mask, 16, 48, 48)
    assert_matches_dense_to_rounding(backend, layout, live, inputs, scale=1.0)


@pytest.mark.parametrize("row", [5, 21, 37, 60])
def test_one_query_alone_that_leaves_the_range_of_exp(row, backend):
    """The query stands in any block, and at any place of a group of whole rows."""
    mask = ~torch.eye(4, dtype=torch.bool).to(DEVICE)
    inputs = random_inputs(1, 1, 1, 64, 64, 16, torch.float32)
    inputs.k[..., 0] = 1
    inputs.q[..., row, 0] = 110
    layout = BlockLayout.from_mask(mask, 16)
    live = live_pairs(mask, 16, 64, 64)
    assert_matches_dense_to_rounding(backend, layout, live, inputs, scale=1.0)


@pytest.mark.parametrize("logit", [-1000, 1000])
@pytest.mark.parametrize("with_lens", [False, True])
def test_padding_with_a_logit_of_0_is_masked_among_large_logits(logit, with_lens, backend):
    """Keys beyond the end or kv_lens score 0 before the mask, and exp(0 + 1000) is inf."""
    layout = bs.dense(100, 150, 32, device=DEVICE)
    kv_lens = torch.tensor([20, 70]).to(DEVICE) if with_lens else None
    inputs = random_inputs(2, 1, 1, 100, 150, 16)
    inputs.q[..., 0] = 1
    inputs.k[..., 0] = logit
    live = live_pairs(layout.to_mask(), 32, 100, 150, 2, kv_lens=kv_lens)
    assert_matches_dense_to_rounding(backend, layout, live, inputs, scale=1.0, kv_lens=kv_lens)


# ---- Reuse of a layout ---------------------------------------------------------------------------
def test_a_layout_is_reused_with_other_lengths_and_masks(backend):
    """What is remembered for a layout is used only for the same lengths and the same direction."""
    layout = bs.random(128, 128, 32, 0.5, 2, device=DEVICE)
    for sq, causal, lens in (
        (100, False, None),
        (128, True, None),
        (100, True, None),
        (100, False, [30]),
        (100, False, [90]),
        (100, False, None),
    ):
        kv_lens = None if lens is None else torch.tensor(lens).to(DEVICE)
        options = {"causal": causal, "kv_lens": kv_lens}
        live = live_pairs(layout.to_mask(), 32, sq, 128, 1, **options)
        inputs = random_inputs(1, 2, 2, sq, 128, 16)
        assert_matches_dense(backend, layout, live, inputs, **options)


def test_a_layout_used_in_inference_mode_can_be_differentiated_later():
    layout = bs.random(64, 64, 32, 0.5, device=DEVICE)
    inputs = random_inputs(1, 1, 1, 64, 64, 16)
    attend = attention_over(layout, "torch")
    with torch.inference_mode():
        attend(*inputs[:3])
    qkv = [x.requires_grad_() for x in inputs[:3]]
    first = torch.autograd.grad(attend(*qkv), qkv, inputs[3:], create_graph=True)
    second = torch.autograd.grad(first, qkv, inputs[:3])
    for gradient in second:
        assert gradient.isfinite().all()


# ---- What must not leak --------------------------------------------------------------------------
@pytest.mark.parametrize("block", [8, 16, 64])
def test_nan_in_keys_and_queries_that_no_block_selects_does_not_leak(block, backend):
    n = 6 if block < 64 else 2
    mask = random_mask(2, n, n, density=0.5)
    mask[0, :, 1] = False
    mask[1, :, 0] = False
    mask[:, 0, :] = False
    attend = attention_over(BlockLayout.from_mask(mask.to(DEVICE), block), backend)
    inputs = random_inputs(1, 2, 2, n * block, n * block, 16)
    clean = results(attend, inputs)
    unseen = ~live_pairs(mask, block, n * block, n * block).any(2).to(DEVICE)  # [1, H, Sk]
    inputs.k[unseen] = math.nan
    inputs.v[unseen] = math.nan
    assert_equal_results(results(attend, inputs), clean)
    inputs.q[:, :, :block] = math.nan  # queries that attend to nothing
    inputs.do[:, :, :block] = math.nan
    inputs.dlse[:, :, :block] = math.nan
    assert_equal_results(results(attend, inputs), clean)


@pytest.mark.parametrize("how", ["kv_lens", "causal", "elements", "elements beyond the last query"])
def test_nan_in_keys_that_are_hidden_inside_blocks_does_not_leak(how, backend):
    block = 32
    mask = torch.tensor([[1, 1], [0, 1]]).bool()
    options = {}
    elements = None
    if how == "kv_lens":
        options = {"kv_lens": torch.tensor([37]).to(DEVICE)}
    elif how == "causal":
        # Block (0, 1) is live, the diagonal hides all of it, and no other row selects its keys.
        mask = torch.tensor([[1, 1], [1, 0]]).bool()
        options = {"causal": True}
    else:
        elements = random_mask(3, block, block, density=0.5)
        elements[:, :, 5] = False
        if how == "elements beyond the last query":
            elements[2, 20:, 5] = True  # queries from 52 on
    device_elements = None if elements is None else elements.to(DEVICE)
    layout = BlockLayout.from_mask(mask.to(DEVICE), block, device_elements)
    attend = attention_over(layout, backend, **options)
    inputs = random_inputs(1, 1, 1, 50, 50, 16)
    unseen = ~live_pairs(mask, block, 50, 50, 1, elements, **options).any(2).to(DEVICE)
    clean = results(attend, inputs)
    assert unseen.any()
    inputs.k[unseen] = math.nan
    inputs.v[unseen] = math.nan
    assert_equal_results(results(attend, inputs), clean)


@pytest.mark.parametrize("causal", [False, True])
def test_queries_without_live_pairs_give_0_and_pass_nothing_on(causal, backend):
    """An empty row of blocks, an empty column, an empty head, and queries before the first key.

    The latter, with causal=True, share a block with others. Gradients stay 0 whatever comes back.
    """
    sk = 21 if causal else 40
    mask = torch.ones(3, 3, 2 if causal else 3, dtype=torch.bool)
    mask[0, 1] = False
    mask[1, :, 1] = False
    mask[2] = False
    layout = BlockLayout.from_mask(mask.to(DEVICE), 16)
    inputs = random_inputs(1, 3, 3, 40, sk, 16)
    live = live_pairs(mask, 16, 40, sk, causal=causal).to(DEVICE)
    is_empty = ~live.any(-1)
    assert is_empty[0, 1, :19].all() == causal
    assert not is_empty[0, 1, 19:].any()
    ours = assert_matches_dense(backend, layout, live, inputs, causal=causal)
    assert (ours.out[is_empty] == 0).all()
    assert (ours.lse[is_empty] == -math.inf).all()
    assert (ours.dq[is_empty] == 0).all()
    inputs.q[is_empty] = math.nan
    inputs.do[is_empty] = math.nan
    inputs.dlse[is_empty] = math.nan
    again = results(attention_over(layout, backend, causal=causal), inputs)
    assert_equal_results(again, ours)


def test_an_empty_layout_gives_0(backend):
    layout = BlockLayout.from_mask(torch.zeros(2, 3, dtype=torch.bool).to(DEVICE), 16)
    ours = results(attention_over(layout, backend), random_inputs(1, 2, 1, 30, 40, 16))
    assert (ours.lse == -math.inf).all()
    for x in (ours.out, ours.dq, ours.dk, ours.dv):
        assert not x.any()


# ---- Strides -------------------------------------------------------------------------------------
def test_inputs_and_gradients_may_have_any_strides(backend):
    """Transposed heads, keys expanded over the batch, last strides other than 1.

    The gradient of a sum has stride 0.
    """
    q, k, v, do, dlse = random_inputs(2, 2, 2, 40, 40, 16)
    mask = torch.tensor([[1, 0, 1], [1, 1, 0], [0, 1, 1]]).bool().to(DEVICE)
    layout = BlockLayout.from_mask(mask, 16)
    live = live_pairs(mask, 16, 40, 40, 2)
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    k = k[:1].expand(2, -1, -1, -1)
    v = v.mT.contiguous().mT
    do = do.transpose(0, 1).contiguous().transpose(0, 1)
    assert_matches_dense(backend, layout, live, Inputs(q, k, v, do, dlse))

    qkv = [x.detach().requires_grad_() for x in (q, k, v)]
    ours = torch.autograd.grad(attention(*qkv, layout, backend=backend).sum(), qkv)
    qkv = [x.detach().double().requires_grad_() for x in (q, k, v)]
    exact = torch.autograd.grad(dense_attention(*qkv, live)[0].sum(), qkv)
    tolerance = 2e-5 if EXACT == torch.float32 else 1e-9
    for name, x, y in zip(("dq", "dk", "dv"), ours, exact, strict=True):
        error, magnitude = finite_errors(name, x, y)
        assert error.max() <= tolerance * max(1, magnitude.max()), name


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("dtype", {EXACT, torch.float32})  # oneDNN takes float32 only
def test_rows_may_overlap_in_memory(full, dtype, backend):
    """Windows of a sequence as features, and others with their dimensions exchanged."""
    windows = torch.randn(1, 1, 79).to(DEVICE, dtype).unfold(2, 16, 1)
    across = torch.randn(1, 1, 96).to(DEVICE, dtype).unfold(2, 64, 2)[:, :, :16].mT
    mask = torch.ones(4, 4, dtype=torch.bool).to(DEVICE)
    if not full:
        mask = mask.tril()
    layout = BlockLayout.from_mask(mask, 16)
    live = live_pairs(mask, 16, 64, 64)
    for x in (windows, across):
        dlse = random_inputs(1, 1, 1, 64, 64, 16, dtype).dlse
        assert_matches_dense(backend, layout, live, Inputs(x, x, x, x, dlse), 2e-5)


def test_rows_may_be_more_than_two_to_the_24_numbers_apart():
    """The last of 128 rows lies beyond 2^31 numbers."""
    skip_without_triton()
    # Most pages of this tensor are never written, so it takes little memory.
    memory = torch.empty(128, 2**24 + 2**18, dtype=torch.float16, device=DEVICE)
    far = memory[None, None, :, :16]
    near = far.copy_(torch.randn(1, 1, 128, 16)).contiguous()
    layout = bs.dense(128, 128, 128, device=DEVICE)
    out = attention(far, far, far, layout, backend="triton")
    assert out.equal(attention(near, near, near, layout, backend="triton"))


# ---- Against PyTorch's own attention -------------------------------------------------------------
@pytest.mark.parametrize("causal", [False, True])
def test_full_and_causal_layouts_match_sdpa(causal, backend):
    inputs = random_inputs(1, 2, 2, 70, 70, 16)
    make_layout = bs.causal if causal else bs.dense
    layout = make_layout(70, 70, 32, device=DEVICE)
    ours = attention(*inputs[:3], layout, causal=causal, backend=backend)
    expected = sdpa(*inputs[:3], is_causal=causal)
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=0)


def test_packed_documents_match_a_batch_of_documents(backend):
    inputs = random_inputs(1, 2, 2, 75, 75, 16)
    layout = bs.block_diagonal([25, 25, 25], 16, device=DEVICE)
    documents = [x.unflatten(2, (3, 25)).transpose(1, 2).flatten(0, 1) for x in inputs[:3]]
    expected = sdpa(*documents).unflatten(0, (1, 3)).transpose(1, 2).flatten(2, 3)
    ours = attention(*inputs[:3], layout, backend=backend)
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=0)


# ---- The operator --------------------------------------------------------------------------------
def small_layout(elements=True):
    """12 queries and 20 keys in blocks of 8, four of six live."""
    mask = torch.tensor([[1, 0, 1], [1, 1, 0]]).bool().to(DEVICE)
    return BlockLayout.from_mask(mask, 8, two_of_three if elements else None)


def two_of_three(batch, head, query, key):
    """The element mask of the small layout."""
    return (query + key) % 3 > 0


def small_inputs(dim=16, dtype=None):
    return random_inputs(1, 2, 1, 12, 20, dim, dtype)


def leaf_copies(tensors):
    return [x.clone().requires_grad_() for x in tensors]


def sum_of_squares(tensors):
    return sum(x.square().sum() for x in tensors)


def test_opcheck_accepts_both_operators(backend):
    layout = small_layout()
    q, k, v, do, dlse = small_inputs()
    if backend == "torch":
        tensors = layout.tensors
        tile_size = 8
    else:
        tensors = layout.tiles
        tile_size = layout.tile_size
    kv_lens = torch.tensor([15]).to(DEVICE)
    flat = bs.flatten_layout(tensors)
    options = (flat, [1, 1, 8, tile_size], kv_lens, 0.3, True, backend)
    torch.library.opcheck(bs.forward_op, (*leaf_copies((q, k, v)), *options))
    out, lse = bs.forward_op(q, k, v, *options)
    torch.library.opcheck(bs.backward_op, (q, k, v, out, lse, do, dlse, *options))


def test_torch_compile_makes_one_graph(backend):
    """The layout is an argument; new sizes cost a compilation and give the right results."""

    def loss(q, k, v, layout, kv_lens):
        attend = attention_over(layout, backend, causal=True, kv_lens=kv_lens)
        out, lse = attend(q * 2, k, v)
        return out.square().sum() + lse.masked_fill(lse == -math.inf, 0).sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    kv_lens = torch.tensor([19]).to(DEVICE)
    for layout, inputs in (
        (small_layout(), small_inputs()),
        (bs.dense(12, 20, 8, device=DEVICE), small_inputs()),
        # From here on, sizes are symbolic.
        (bs.dense(20, 30, 8, device=DEVICE), random_inputs(1, 2, 1, 20, 30, 24)),
        (bs.dense(25, 20, 8, device=DEVICE), random_inputs(1, 2, 1, 25, 20, 16)),
    ):
        qkv = [x.requires_grad_() for x in inputs[:3]]
        ours = torch.autograd.grad(compiled(*qkv, layout, kv_lens), qkv)
        eager = torch.autograd.grad(loss(*qkv, layout, kv_lens), qkv)
        for x, y in zip(ours, eager, strict=True):
            torch.testing.assert_close(x, y)


@pytest.mark.slow
def test_torch_compile_with_inductor(backend):
    layout = small_layout()
    qkv = small_inputs()[:3]

    def twice(q, k, v):
        return attention(q, k, v, layout, backend=backend) * 2

    torch._dynamo.reset()
    compiled = torch.compile(twice, fullgraph=True)
    torch.testing.assert_close(compiled(*qkv), twice(*qkv))


@needs_float64_kernels
@pytest.mark.parametrize("options", [{}, {"causal": True, "scale": -0.4}], ids=str)
def test_gradcheck_in_random_directions(options, backend):
    qkv = [x.requires_grad_() for x in small_inputs()[:3]]
    attend = attention_over(small_layout(), backend, **options)
    assert torch.autograd.gradcheck(attend, qkv, fast_mode=True)


@pytest.mark.slow
@needs_float64_kernels
def test_gradcheck_of_every_element(backend):
    layout = BlockLayout.from_mask(torch.tensor([[1, 0], [1, 1]]).bool(), 8)
    qkv = []
    for length in (10, 12, 12):
        qkv.append(torch.randn(1, 1, length, 4, dtype=torch.float64, requires_grad=True))
    assert torch.autograd.gradcheck(attention_over(layout, backend), qkv)


@pytest.mark.parametrize(
    "options",
    [{}, {"causal": True, "kv_lens": torch.tensor([17]), "scale": -0.4}],
    ids=["plain", "hidden"],
)
def test_gradgradcheck(options):
    qkv = [x.cpu().double().requires_grad_() for x in small_inputs(4)[:3]]
    attend = attention_over(small_layout().to("cpu"), "torch", **options)
    assert torch.autograd.gradgradcheck(attend, qkv, fast_mode=True)


def third_derivatives(function, tensors):
    """The third of a chain of gradients, each of the sum of sines of the one before."""
    leaves = leaf_copies(tensors)
    terms = [function(*leaves)]
    for _ in range(3):
        total = sum(x.sin().sum() for x in terms)
        terms = torch.autograd.grad(total, leaves, create_graph=True)
    return terms


@pytest.mark.parametrize(
    "options", [{}, {"causal": True, "kv_lens": torch.tensor([17])}], ids=["plain", "hidden"]
)
def test_third_derivatives_match_dense_attention(options):
    layout = small_layout().to("cpu")
    q, k, v = (x.cpu().double() for x in small_inputs(4)[:3])
    query = torch.arange(12)[:, None]
    key = torch.arange(20)
    live = live_pairs(layout.to_mask(), 8, 12, 20, **options) & two_of_three(0, 0, query, key)

    def ours(q, k, v):
        return attention(q, k, v, layout, backend="torch", **options)

    def expected(q, k, v):
        return dense_attention(q, k, v, live)[0]

    for x, y in zip(
        third_derivatives(ours, (q, k, v)), third_derivatives(expected, (q, k, v)), strict=True
    ):
        assert y.abs().max() > 1e-3
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)

    def hessian_times_ones(function):
        def loss(q):
            return function(q, k, v).sin().sum()

        _, product = torch.autograd.functional.hvp(loss, q, torch.ones_like(q))
        return product

    torch.testing.assert_close(
        hessian_times_ones(ours), hessian_times_ones(expected), rtol=1e-9, atol=1e-12
    )


def test_forward_mode_raises_and_does_not_return_zeros(backend):
    layout = small_layout()
    q, k, v = small_inputs()[:3]

    def attend(q):
        return attention(q, k, v, layout, backend=backend)

    message = "there is no forward mode: use torch.autograd.functional.jvp"
    with pytest.raises(RuntimeError, match=message):
        torch.func.jvp(attend, (q,), (q,))


@pytest.mark.parametrize(
    "length, clamped", [(-3, 0), (-(2**33) + 5, 0), (2**40, 20)], ids=["-3", "-2^33+5", "2^40"]
)
def test_lengths_out_of_bounds_are_clamped(length, clamped, backend):
    layout = small_layout()
    q, k, v = small_inputs()[:3]
    ours = attention(q, k, v, layout, kv_lens=torch.tensor([length]).to(DEVICE), backend=backend)
    lens = torch.tensor([clamped]).to(DEVICE)
    assert ours.equal(attention(q, k, v, layout, kv_lens=lens, backend=backend))
    assert ours.any() == (clamped > 0)


@pytest.mark.parametrize("reason", ["no block", "no key"])
def test_double_backward_is_0_where_nothing_is_seen(reason):
    layout = BlockLayout.from_mask(torch.full((2, 2), reason == "no key"), 16)
    kv_lens = torch.tensor([0]) if reason == "no key" else None
    inputs = random_inputs(1, 1, 1, 20, 20, 16, torch.float64, "cpu")
    tensors = [x.requires_grad_() for x in inputs[:4]]
    q, k, v, do = tensors
    out = attention(q, k, v, layout, backend="torch", kv_lens=kv_lens)
    first = torch.autograd.grad(out, (q, k, v), do, create_graph=True)
    second = torch.autograd.grad(sum_of_squares(first), tensors, materialize_grads=True)
    for gradient in (*first, *second):
        assert not gradient.any()


def test_double_backward_ignores_the_nan_of_a_query_that_sees_nothing():
    layout = BlockLayout.from_mask(torch.ones(2, 1, dtype=torch.bool), 16)

    def second_derivatives(blind_query):
        torch.manual_seed(0)
        inputs = random_inputs(1, 1, 1, 32, 10, 16, torch.float64, "cpu")
        inputs.q[:, :, :22] = blind_query  # with causal=True, these queries come before all keys
        tensors = [x.requires_grad_() for x in inputs[:4]]
        q, k, v, do = tensors
        out = attention(q, k, v, layout, causal=True, backend="torch")
        first = torch.autograd.grad(out, (q, k, v), do, create_graph=True)
        return torch.autograd.grad(sum_of_squares(x[:, :, -10:] for x in first), tensors)

    for clean, x in zip(second_derivatives(0.0), second_derivatives(math.nan), strict=True):
        assert x.isfinite().all()
        assert x.equal(clean)


def test_autocast_leaves_float32_inputs_in_float32(backend):
    layout = small_layout()
    qkv = [x.requires_grad_() for x in small_inputs(dtype=torch.float32)[:3]]

    def gradients():
        out = attention(*qkv, layout, backend=backend)
        return torch.autograd.grad(out.square().sum(), qkv)

    expected = gradients()
    with torch.autocast(DEVICE, torch.bfloat16):
        ours = gradients()
    for x, y in zip(ours, expected, strict=True):
        assert x.equal(y)


@pytest.mark.parametrize(
    "chosen, during_the_operator", [("none", "bf16"), ("ieee", "ieee"), ("bf16", "bf16")]
)
def test_onednn_multiplies_only_where_the_user_has_not_chosen(
    chosen, during_the_operator, monkeypatch
):
    """It does so on AMD processors, while an operator runs; then the setting is as before."""
    matmul = torch.backends.mkldnn.matmul
    settings = {}
    pays = bs.onednn_pays()  # tries it once, which changes the setting for a moment

    def record_setting(name, run):
        def recorded(*args):
            settings.setdefault(name, matmul.fp32_precision)
            return run(*args)

        monkeypatch.setattr(bs, name, recorded)

    def fail(*args):
        settings["failing"] = matmul.fp32_precision
        return torch.ones(2) @ torch.ones(3)

    for name in ("torch_forward", "torch_backward", "differentiable_forward"):
        record_setting(name, getattr(bs, name))
    qkv = [x.cpu().requires_grad_() for x in random_inputs(1, 1, 1, 64, 64, 16)[:3]]
    layout = bs.causal(64, 64, 16)
    matmul.fp32_precision = chosen
    try:
        out = attention(*qkv, layout)
        first = torch.autograd.grad(out.square().sum(), qkv, create_graph=True)
        torch.autograd.grad(sum_of_squares(first), qkv)
        monkeypatch.setattr(bs, "torch_forward", fail)
        with pytest.raises(RuntimeError):
            attention(*qkv, layout)
        assert list(settings.values()) == [during_the_operator if pays else chosen] * 4
        assert matmul.fp32_precision == chosen
    finally:
        matmul.fp32_precision = "none"


def test_products_by_onednn_are_exact():
    """In shapes that an operator multiplies and that suit oneDNN: to the rounding of float32."""
    if not bs.onednn_pays():
        pytest.skip("MKL multiplies on this processor")
    for n in (1, 3, 8):
        x = torch.randn(8, 64, 64)
        y = torch.randn(8, 64 * n, 64)
        with bs.onednn():
            assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
            ours = torch.bmm(x, y.mT)
        assert (ours - x.double() @ y.double().mT).abs().max() < 1e-6 * ours.abs().max()


def test_tf32_is_read_from_the_newer_setting():
    """After the newer setting is written, PyTorch refuses to read the older one."""
    skip_without_triton()
    layout = small_layout()
    qkv = small_inputs(dtype=torch.float32)[:3]
    expected = attention(*qkv, layout, backend="triton")
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        ours = attention(*qkv, layout, backend="triton")
        torch.testing.assert_close(ours, expected, rtol=1e-2, atol=1e-2)
    finally:
        torch.backends.cuda.matmul.fp32_precision = "ieee"


def test_double_backward_through_triton_names_the_path_that_works():
    skip_without_triton()
    q, k, v = small_inputs()[:3]
    q.requires_grad_()
    out = attention(q, k, v, small_layout(), backend="triton")
    (first,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="backend='torch'"):
        first.sum().backward()


def test_two_calls_give_equal_bits(backend):
    mask = random_mask(2, 12, 12, density=0.7)
    attend = attention_over(BlockLayout.from_mask(mask.to(DEVICE), 8), backend)
    inputs = random_inputs(1, 2, 1, 96, 96, 16, torch.float32)
    assert_equal_results(results(attend, inputs), results(attend, inputs))


# ---- The layout ----------------------------------------------------------------------------------
@pytest.mark.parametrize("mask_lead", [(), (3,), (1,), (2, 3), (2, 1), (1, 3)])
def test_a_layout_gives_its_mask_back(mask_lead):
    mask = random_mask(*mask_lead, 5, 7, density=0.4)
    layout = BlockLayout.from_mask(mask, 8)
    assert layout.to_mask().equal(mask)
    assert layout.to("cpu").to_mask().equal(mask)
    assert layout.density == pytest.approx(mask.float().mean().item())
    assert "40 queries, 56 keys" in repr(layout)
    assert f"{mask.sum()} blocks" in repr(layout)


@pytest.mark.parametrize("mask_lead", [(), (3,), (1,), (2, 3), (2, 1), (1, 3)])
def test_a_layout_holds_compressed_rows_and_columns(mask_lead):
    mask = random_mask(*mask_lead, 5, 7, density=0.4)
    tensors = BlockLayout.from_mask(mask, 8).tensors
    blocks = mask.reshape(-1, 5, 7)
    assert tensors.by_query.column.tolist() == blocks.nonzero()[:, 2].tolist()
    assert tensors.by_key.column.tolist() == blocks.mT.nonzero()[:, 2].tolist()
    assert row_lengths(tensors.by_query) == blocks.sum(2).flatten().tolist()
    assert row_lengths(tensors.by_key) == blocks.sum(1).flatten().tolist()


def row_lengths(index):
    return index.row_start[::2].diff().tolist()


def assert_equal_tensors(ours, expected):
    """Of two LayoutTensors."""
    for x, y in zip(bs.flatten_layout(ours), bs.flatten_layout(expected), strict=True):
        assert x.equal(y)


def test_a_layout_pickles_without_tiles_and_makes_them_again(monkeypatch):
    """A layout from a process without kernels gets its tiles where there are kernels."""
    layout = small_layout()
    with monkeypatch.context() as context:
        context.setattr(bs, "INTERPRET", False)
        text = pickle.dumps(small_layout().to("cpu"))
    loaded = pickle.loads(text).to(DEVICE)
    assert loaded.tile_size == layout.tile_size
    assert_equal_tensors(loaded.tiles, layout.tiles)
    assert_equal_tensors(loaded.tensors, layout.tensors)
    assert copy.deepcopy(layout).to_mask().equal(layout.to_mask())


def test_element_masks_are_packed_and_whole_blocks_keep_none():
    mask = random_mask(2, 3, 4, density=0.7)
    shapes = []

    def rule(batch, head, query, key):
        shapes.append(torch.broadcast_to(head, query.shape[:1] + (8, 8)).shape)
        # All pairs of the first row of blocks are live.
        return (query + 2 * key + head) % 9 < torch.where(query < 8, 9, 4)

    layout = BlockLayout.from_mask(mask, 8, rule)
    assert sum(shape[0] for shape in shapes) == mask.sum()  # called on live blocks only
    assert layout.rule is rule
    assert layout.to(DEVICE).rule is rule
    bits = layout.tensors.mask_bits
    assert bits.dtype == torch.uint8
    assert bits.shape == (mask[:, 1:].sum(), 8, 1)
    head, row, column = (x[:, None, None] for x in mask.nonzero().unbind(1))
    query = row * 8 + torch.arange(8)[:, None]
    key = column * 8 + torch.arange(8)
    elements = (query + 2 * key + head) % 9 < torch.where(query < 8, 9, 4)
    assert_equal_tensors(BlockLayout.from_mask(mask, 8, elements).tensors, layout.tensors)


def test_a_large_layout_is_fast_and_small(monkeypatch):
    monkeypatch.setattr(bs, "INTERPRET", False)  # without the tiles for the interpreter
    mask = random_mask(1024, 1024, density=0.1)
    seconds = []
    for _ in range(5):
        begin = CLOCK()
        layout = BlockLayout.from_mask(mask, 64)
        seconds.append(CLOCK() - begin)
    size = sum(x.nbytes for x in bs.flatten_layout(layout.tensors))
    assert size < 16 * mask.sum() + 64 * 1024
    assert min(seconds) < 0.2  # at most half of that on a quiet machine


# ---- The zoo -------------------------------------------------------------------------------------
class Pattern(NamedTuple):
    """A pattern of the zoo, and which pairs it must leave live."""

    layout: BlockLayout
    sq: int
    sk: int
    is_live: object  # a function of head, query and key
    causal: bool = False


def is_strided(head, query, key):
    """Stride 3, blocks of 8; the lattice of head h is shifted by h."""
    distance = query // 8 - key // 8
    return key <= query and (distance < 3 or (distance - head) % 3 == 0)


def is_fixed(head, query, key):
    """Segments of 4 blocks of 8. Head 0 takes the last block of each, head 1 the one before."""
    return key <= query and (query // 32 == key // 32 or key // 8 % 4 == 3 - head)


def is_fixed_with_two_summaries(head, query, key):
    return key <= query and (query // 32 == key // 32 or (3 - key // 8 % 4) // 2 == head)


def same_document(head, query, key):
    """Documents of 20, 1, 49 and 5 tokens."""
    ends = (20, 21, 70)
    return [query >= end for end in ends] == [key >= end for end in ends]


ZOO = {
    "dense": Pattern(bs.dense(70, 70, 16), 70, 70, lambda h, i, j: True),
    "causal": Pattern(bs.causal(50, 70, 16), 50, 70, lambda h, i, j: j <= i + 20, causal=True),
    "sliding_window": Pattern(
        bs.sliding_window(70, 70, 16, 21), 70, 70, lambda h, i, j: 0 <= i - j < 21
    ),
    "sliding_window, more keys": Pattern(
        bs.sliding_window(50, 70, 16, 21), 50, 70, lambda h, i, j: 0 <= i + 20 - j < 21
    ),
    "strided": Pattern(bs.strided(80, 80, 8, 3, heads=2), 80, 80, is_strided, causal=True),
    "fixed": Pattern(bs.fixed(80, 80, 8, 4, heads=2), 80, 80, is_fixed, causal=True),
    "fixed, two summaries": Pattern(
        bs.fixed(80, 80, 8, 4, summary=2, heads=2),
        80,
        80,
        is_fixed_with_two_summaries,
        causal=True,
    ),
    "longformer": Pattern(
        bs.longformer(90, 90, 16, 20, 3),
        90,
        90,
        lambda h, i, j: abs(i - j) <= 10 or i < 3 or j < 3,
    ),
    "block_diagonal": Pattern(bs.block_diagonal([20, 1, 49, 5], 16), 75, 75, same_document),
    "prefix_lm": Pattern(bs.prefix_lm(70, 70, 16, 19), 70, 70, lambda h, i, j: j < 19 or j <= i),
    "prefix_lm, more keys": Pattern(
        bs.prefix_lm(50, 70, 16, 19), 50, 70, lambda h, i, j: j < 19 or j <= i + 20
    ),
}


@pytest.mark.parametrize("pattern", ZOO.values(), ids=ZOO.keys())
def test_a_pattern_of_the_zoo_has_the_pairs_of_its_paper(pattern):
    inputs = random_inputs(1, 2, 2, pattern.sq, pattern.sk, 16, torch.float64, "cpu")
    live = torch.zeros(1, 2, pattern.sq, pattern.sk, dtype=torch.bool)
    for head, query, key in itertools.product(range(2), range(pattern.sq), range(pattern.sk)):
        live[0, head, query, key] = pattern.is_live(head, query, key)
    assert_matches_dense("torch", pattern.layout, live, inputs, 1e-9, causal=pattern.causal)


@pytest.mark.parametrize("build", [bs.strided, bs.fixed])
@pytest.mark.parametrize("sq, sk", [(100, 130), (10, 130), (130, 100), (128, 200), (64, 96)])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_every_query_sees_the_key_of_its_own_place(build, sq, sk, stride):
    """The last query sees the last key, also where there are more keys or more queries."""
    mask = build(sq, sk, 64, stride).to_mask()
    live = live_pairs(mask, 64, sq, sk, causal=True)[0, 0]
    query = torch.arange(max(0, sq - sk), sq)
    assert live[query, query + sk - sq].all()


def test_bigbird_has_a_window_global_blocks_and_random_blocks():
    mask = bs.bigbird(640, 640, 16, heads=2).to_mask()
    i = torch.arange(40)[:, None]
    j = torch.arange(40)
    distance = (i - j).abs()
    assert mask[:, distance <= 1].all()
    assert mask[:, 0].all()
    assert mask[:, :, 0].all()
    extra = (mask & (distance > 1) & (i > 0) & (j > 0)).sum(-1)
    assert extra.max() <= 3
    assert extra.float().mean() > 2
    assert not mask[0].equal(mask[1])
    assert not bs.bigbird(640, 640, 16, heads=2, seed=1).to_mask().equal(mask)
    assert bs.bigbird(640, 640, 16, window=7).to_mask()[:, distance <= 3].all()


def test_random_has_the_diagonal_and_its_density():
    mask = bs.random(6400, 6400, 16, 0.1, heads=3).to_mask()
    assert mask.diagonal(dim1=1, dim2=2).all()
    assert abs(mask.float().mean() - 0.1) < 0.01
    for sq, sk in ((64, 64), (64, 128), (128, 64)):  # the diagonal is much of these
        layout = bs.random(sq, sk, 16, 0.5, heads=2000)
        assert layout.density == pytest.approx(0.5, abs=0.02)


def test_random_depends_on_the_seed_and_not_on_the_default_dtype():
    mask = bs.random(6400, 6400, 16, 0.1, heads=3).to_mask()
    assert not bs.random(6400, 6400, 16, 0.1, heads=3, seed=1).to_mask().equal(mask)
    torch.set_default_dtype(torch.float64)
    try:
        assert bs.random(6400, 6400, 16, 0.1, heads=3).to_mask().equal(mask)
    finally:
        torch.set_default_dtype(torch.float32)


# ---- Bad input -----------------------------------------------------------------------------------
def q_like(*shape, **options):
    return torch.zeros(shape or (2, 4, 40, 16), **options)


def layout_of_ones(*shape):
    return BlockLayout.from_mask(torch.ones(shape, dtype=torch.bool), 16)


# Expected message -> the arguments that differ from good ones.
BAD_ARGUMENTS = {
    "must be tensors: q ndarray, k Tensor": {"q": q_like().numpy()},
    "scale must be finite: it is nan": {"scale": math.nan},
    "must be [batch, heads, length, size]: q [4, 40, 16]": {"q": q_like(4, 40, 16)},
    "4 heads of q must be a multiple of the 3": {
        "k": q_like(2, 3, 40, 16),
        "v": q_like(2, 3, 40, 16),
    },
    "k and v must have one shape": {"v": q_like(2, 2, 41, 16)},
    "one head size": {"q": q_like(2, 4, 40, 8)},
    "one batch": {"q": q_like(1, 4, 40, 16)},
    "one dtype: q torch.float64, k torch.float32": {"q": q_like(dtype=torch.float64)},
    "must be float16, bfloat16, float32 or float64": {name: q_like().int() for name in "qkv"},
    "one device: q meta": {"q": q_like(device="meta")},
    "layout cpu": {name: q_like(device="meta") for name in "qkv"},
    "up to 48 queries and 48 keys, but q has 49 and k has 40": {"q": q_like(2, 4, 49, 16)},
    "but q has 32": {"q": q_like(2, 4, 32, 16)},
    "must be a BlockLayout: it is Tensor": {"layout": torch.ones(3, 3).bool()},
    "batch and heads 1 and 3": {"layout": layout_of_ones(3, 3, 3)},
    "kv_lens must be int32 or int64 [2]": {"kv_lens": torch.zeros(3, dtype=torch.int32)},
    "kv_lens must be int32 or int64": {"kv_lens": torch.zeros(2)},
    "kv_lens must be int32 or int64 [2] on cpu: it is list": {"kv_lens": [3, 3]},
    "backend must be auto, torch or triton: it is 'cuda'": {"backend": "cuda"},
    "no dimension may be 0": {"q": q_like(2, 4, 0, 16)},
}


@pytest.mark.parametrize("message", BAD_ARGUMENTS)
def test_bad_arguments_raise(message):
    arguments = {
        "q": q_like(),
        "k": q_like(2, 2, 40, 16),
        "v": q_like(2, 2, 40, 16),
        "layout": layout_of_ones(3, 3),
    }
    with pytest.raises(ValueError, match=re.escape(message)):
        attention(**arguments | BAD_ARGUMENTS[message])


def element_mask_without_value(batch, head, query, key):
    return None


def element_mask_of_the_wrong_shape(batch, head, query, key):
    return torch.ones(3, 3)


MASK = torch.ones(3, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    "mask, block_size, elements, message",
    [
        (MASK.float(), 16, None, "mask must be bool .* it is torch.float32"),
        (MASK[0], 16, None, "mask must be bool"),
        ([[True]], 16, None, "it is list"),
        (MASK, 48, None, "block_size must be one of .* it is 48"),
        (MASK, 16.0, None, "block_size must be one of .* it is 16.0"),
        (MASK, 8, [[True]], r"bool \[9, 8, 8\], .* or a function; it is list"),
        (MASK, 8, element_mask_without_value, "element_mask must give booleans that broadcast: "),
        (MASK, 8, element_mask_of_the_wrong_shape, r"that broadcast: .* \[3, 3\]"),
        (MASK, 8, torch.ones(9, 8, 4, dtype=torch.bool), r"bool \[9, 8, 8\]"),
    ],
)
def test_bad_layouts_raise(mask, block_size, elements, message):
    with pytest.raises(ValueError, match=message):
        BlockLayout.from_mask(mask, block_size, elements)


@pytest.mark.parametrize(
    "build, arguments, message",
    [
        (bs.dense, (64, 64, 0), "block_size of .* they are 64, 64, 0"),
        (bs.sliding_window, (0, 64, 16, 8), "they are 0, 64, 16"),
        (bs.block_diagonal, ([], 16), "they are 0, 0, 16"),
        (bs.strided, (64, 64, 16, 0), "stride must be 1 or more; it is 0"),
        (bs.fixed, (64, 64, 16, 2, 0), "summary must be 1 or more; it is 0"),
        (bs.bigbird, (64, 64, 16, 3, 1, -1), "random must be 0 or more; it is -1"),
        (bs.block_diagonal, ([3, -1], 16), r"lengths\[1\] must be 0 or more; it is -1"),
        (bs.fixed, (64, 64, 16, 0), "stride must be 1 or more; it is 0"),
    ],
)
def test_bad_arguments_of_the_zoo_raise(build, arguments, message):
    with pytest.raises(ValueError, match=message):
        build(*arguments)


WITHOUT_KERNELS = """
import sys
sys.path.insert(0, {folder!r})
{first_line}
import torch
import blocksparse_attention as bs
x = torch.randn(1, 1, 20, 16)
layout = bs.dense(20, 20, 16)
print(bs.blocksparse_attention(x, x, x, layout).shape)
bs.blocksparse_attention(x, x, x, layout, backend="triton")
"""


@pytest.mark.parametrize(
    "first_line, message",
    [
        ("sys.modules['triton'] = None", "needs Triton"),
        ("import triton", "needs a GPU, or TRITON_INTERPRET=1"),
    ],
    ids=["without Triton", "without GPU"],
)
def test_the_triton_backend_says_what_it_needs(first_line, message):
    code = WITHOUT_KERNELS.format(folder=str(FILE.parent), first_line=first_line)
    env = environment_without_interpreter()
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert "torch.Size" in done.stdout
    last_line = done.stderr.splitlines()[-1]
    assert last_line.startswith("RuntimeError")
    assert message in last_line


@pytest.mark.skipif(not bs.INTERPRET, reason="only the interpreter takes tensors of a CPU")
def test_the_triton_backend_refuses_large_heads_and_auto_avoids_it():
    x = torch.zeros(1, 1, 40, 257)
    layout = bs.dense(40, 40, 16)
    with pytest.raises(
        ValueError, match=r"head sizes up to 256, and no float64: q \[1, 1, 40, 257\]"
    ):
        attention(x, x, x, layout, backend="triton")
    assert attention(x, x, x, layout).shape == x.shape


# ---- Cost ----------------------------------------------------------------------------------------
MEMORY = """
import resource, sys
sys.path.insert(0, {folder!r})
import torch
import blocksparse_attention as bs
torch.set_num_threads(1)

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

def run(s):
    q, k, v = (torch.randn(1, 8, s, 64, requires_grad=True) for _ in range(3))
    layout = bs.random(s, s, 64, {density}, heads=8)
    do = torch.randn_like(q)
    before = peak()
    bs.blocksparse_attention(q, k, v, layout).backward(do)
    return peak() - before, q.nbytes

run(512)
print(*run(16384))
"""


@pytest.mark.slow
@pytest.mark.parametrize("density", [0.05, 0.25])
def test_memory_does_not_depend_on_density(density):
    """A training step takes at most seven times the memory of q, and 64 MiB."""
    code = MEMORY.format(folder=str(FILE.parent), density=density)
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment_without_interpreter(),
        capture_output=True,
        text=True,
        check=True,
    )
    peak, size = map(int, done.stdout.split())
    assert 2 * size < peak <= 7 * size + 64 * 2**20


def best_times(contenders, repeats=5):
    """The least time of each function, all of them in turn."""
    best = [math.inf] * len(contenders)
    for _ in range(repeats + 1):
        for n, contender in enumerate(contenders):
            wait_for_gpu()
            begin = CLOCK()
            contender()
            wait_for_gpu()
            best[n] = min(best[n], CLOCK() - begin)
    return best


def wait_for_gpu():
    if CUDA:
        torch.cuda.synchronize()


@pytest.mark.slow
@pytest.mark.parametrize("density, forward, backward", [(0.05, 5.5, 6), (0.25, 1.7, 1.7)])
def test_the_pytorch_path_is_faster_than_dense_attention(density, forward, backward):
    """By these factors on one thread: about two thirds of what a quiet machine gives."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        qkv = [torch.randn(1, 2, 4096, 64, requires_grad=True) for _ in range(3)]
        do = torch.randn(1, 2, 4096, 64)
        mask = random_mask(2, 64, 64, density=density - 1 / 64) | torch.eye(64, dtype=torch.bool)
        layout = BlockLayout.from_mask(mask, 64)

        def sparse_forward():
            return attention(*qkv, layout, backend="torch")

        def dense_forward():
            return sdpa(*qkv)

        def sparse_step():
            return torch.autograd.grad(sparse_forward(), qkv, do)

        def dense_step():
            return torch.autograd.grad(dense_forward(), qkv, do)

        with torch.no_grad():
            sparse, dense = best_times([sparse_forward, dense_forward])
        assert dense / sparse > forward
        sparse, dense = best_times([sparse_step, dense_step])
        assert dense / sparse > backward
    finally:
        torch.set_num_threads(threads)


COMPILE = """
import sys
sys.path.insert(0, {folder!r})
import torch
import triton
from triton.backends.compiler import GPUTarget
import blocksparse_attention as bs

class Driver:
    def get_current_target(self):
        return GPUTarget("cuda", {capability}, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

def compile_only(self, *args, warmup, run=triton.JITFunction.run, **options):
    kernel = run(self, *args, warmup=True, **options)
    print(self.__name__, len(kernel.asm["cubin"]), kernel.asm["ptx"].count("ex2.approx"))

triton.runtime.driver.set_active(Driver())
triton.JITFunction.run = compile_only
torch.set_float32_matmul_precision({precision!r})
bs.INTERPRET = True  # gives a layout on the CPU its tiles
mask = torch.ones(4, 4, dtype=torch.bool).tril()
layout = bs.BlockLayout.from_mask(mask, {block}, lambda b, h, i, j: (i + j) % 3 > 0)
bs.INTERPRET = False
q, do = torch.randn(2, 1, 2, 4 * {block}, {dim}).to(torch.{dtype})
lse = torch.zeros(1, 2, 4 * {block})
kv_lens = torch.tensor([50])
sizes = bs.LayoutSizes(layout.batch, layout.heads, layout.block_size, layout.tile_size)
options = (layout.tiles, sizes, kv_lens, 0.1, True)
bs.triton_forward(q, q, q, *options)
bs.triton_backward(q, q, q, q, lse, do, lse, *options)
"""


@pytest.mark.slow
@pytest.mark.skipif(CUDA or bs.triton is None, reason="needs Triton; with a GPU, others compile")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    "dtype, dim, block, precision",
    [("bfloat16", 64, 16, "highest"), ("float32", 256, 64, "high")],
)
def test_kernels_compile_without_a_gpu(capability, dtype, dim, block, precision, tmp_path):
    """The compiler refuses some of what the interpreter accepts."""
    code = COMPILE.format(
        folder=str(FILE.parent),
        capability=capability,
        dtype=dtype,
        dim=dim,
        block=block,
        precision=precision,
    )
    env = environment_without_interpreter(TRITON_CACHE_DIR=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:500]
    lines = [line.split() for line in done.stdout.splitlines()]
    exponentials = {name: int(count) for name, _, count in lines}
    assert list(exponentials) == ["forward_kernel", "delta_kernel", "dkdv_kernel", "dq_kernel"]
    # Both compute equally many scores per thread. More exponentials in the forward kernel would
    # mean that the softmax is computed twice, in two layouts.
    assert exponentials["forward_kernel"] <= exponentials["dkdv_kernel"] + 8


# ---- The file ------------------------------------------------------------------------------------
def test_best_seconds_are_those_of_the_calls_that_count():
    """Contenders run in turn, each right after an untimed call of its own."""
    calls = []

    def contender(name, *lengths):
        def call():
            calls.append(name)
            time.sleep(lengths[calls.count(name) - 1])

        return call

    first = contender("first", 0, 0.02, 0, 0.4)
    second = contender("second", 0.4, 0.01, 0.4, 0.4)
    best_first, best_second = bs.best_seconds([first, second], 2, torch.device("cpu"))
    assert calls == ["first", "first", "second", "second"] * 2
    assert 0.02 <= best_first < 0.3
    assert 0.01 <= best_second < 0.3


def test_the_uv_header_agrees_with_the_requirements():
    header = FILE.read_text().split("# ///")[1].split("\n", 1)[1]
    lines = [line.removeprefix("#").strip() for line in header.splitlines()]
    dependencies = tomllib.loads("\n".join(lines))["dependencies"]
    requirements = ""
    for file in ("requirements.txt", "requirements-dev.txt"):
        if (ROOT / file).exists():
            requirements += (ROOT / file).read_text()
    assert dependencies
    for dependency in dependencies:
        # requirements.txt pins torch; the header gives its lowest version.
        assert dependency.startswith("torch") or dependency.replace("'", '"') in requirements


def test_every_equation_of_the_docstring_is_found_in_the_code():
    text = FILE.read_text()
    numbers = set(re.findall(r"\((\d+)\)$", ast.get_docstring(ast.parse(text)), re.M))
    assert numbers
    assert numbers <= set(re.findall(r"\((\d+)\)", text.split('"""', 2)[2]))


def test_every_flag_is_explained():
    for line in inspect.getsource(bs.Args).splitlines():
        if re.match(r"    \w+:", line):
            assert "  # " in line


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags, message",
    [
        ("--seq 0", "--seq 0: it must be above 0 and below 2^31"),
        ("--threads 0", "--threads 0: it must be above 0"),
        ("--batch 1000000000000000000000", "must be above 0 and below 2^31"),
        ("--densities 0.1 1.5", "--densities 1.5: they must be above 0 and at most 1"),
        ("--kv-heads 3", "--heads 8 must be a multiple of --kv-heads 3"),
        ("--device mps", "--device mps: it must be cpu, or cuda where there is one"),
        ("--device nonsense", "--device nonsense: it must be cpu, or cuda where there is one"),
        ("--output nowhere/x.png", "a .png in a writable folder"),
    ],
)
def test_a_bad_flag_is_one_sentence_and_exit_status_2(flags, message):
    command = [sys.executable, FILE, *flags.split()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def spoil_dense_attention(monkeypatch, factor):
    """Multiply what the self-check compares with by a factor."""
    exact = bs.dense_attention

    def spoiled(*args):
        out, lse = exact(*args)
        return out * factor, lse * factor

    monkeypatch.setattr(bs, "dense_attention", spoiled)


def test_the_self_check_passes():
    assert bs.self_check("torch", torch.device(DEVICE), torch.float32) < 0.5


def test_the_self_check_fails_if_results_are_a_thousandth_off(monkeypatch):
    spoil_dense_attention(monkeypatch, 1.001)
    assert bs.self_check("torch", torch.device(DEVICE), torch.float32) > 20


def test_the_self_check_is_nan_if_results_are(monkeypatch):
    spoil_dense_attention(monkeypatch, math.nan)
    assert math.isnan(bs.self_check("torch", torch.device(DEVICE), torch.float32))


@pytest.mark.parametrize("error", [1.5, math.nan])
def test_a_failed_self_check_is_an_error(error, monkeypatch):
    monkeypatch.setattr(bs, "self_check", lambda *args: error)
    with pytest.raises(RuntimeError, match="differs from dense attention"):
        bs.run_self_checks(torch.device("cpu"))


@pytest.mark.slow
def test_the_file_runs_alone(tmp_path):
    shutil.copy(FILE, tmp_path)
    flags = "--seq 256 --heads 2 --dim 16 --block 16 --densities 0.2 0.8 --repeats 1"
    flags += " --no-flex --threads 1"
    env = environment_without_interpreter()
    env.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, "-I", FILE.name, *flags.split()],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "check: torch, float32" in done.stdout
    assert "prefix-lm" in done.stdout
    assert (tmp_path / "blocksparse_attention.png").stat().st_size > 10_000


# ---- With a GPU ----------------------------------------------------------------------------------
@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dim", [16, 32, 64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("block", [8, 64, 128])
def test_gpu_dtypes_and_head_sizes_match_dense_attention(dim, dtype, block):
    mask = random_mask(4, -(-400 // block), -(-500 // block), density=0.5).cuda()
    layout = BlockLayout.from_mask(mask, block)
    live = live_pairs(mask, block, 400, 500, 2, causal=True)
    inputs = random_inputs(2, 4, 2, 400, 500, dim, dtype)
    inputs.dlse[~live.any(-1).expand(2, 4, 400)] = 0
    attend = attention_over(layout, "auto", causal=True)
    ours = results(attend, inputs._replace(dlse=inputs.dlse.float()))
    exact = results(dense_over(live), inputs.to(torch.float64))
    if dtype == torch.float32:
        for name, x, y in zip(Results._fields, ours, exact, strict=True):
            error, magnitude = finite_errors(name, x, y)
            assert error.max() <= 2e-5 * magnitude.max(), name
    else:
        assert_as_precise_as_dense(ours, results(dense_over(live), inputs), exact)


@pytest.mark.gpu
@needs_gpu
def test_gpu_tensors_of_more_than_two_to_the_31_numbers():
    q = torch.randn(1, 1, 1024, 64, dtype=torch.bfloat16, device="cuda")
    q = q.expand(33, 1024, -1, -1).contiguous()
    assert q.numel() > 2**31
    layout = bs.random(1024, 1024, 64, 0.1, device="cuda")
    with torch.no_grad():
        out = attention(q, q, q, layout)
    assert out[-1, -1].equal(out[0, 0])


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("block, most", [(128, 0.25), (64, 0.3)])
def test_gpu_time_follows_density(block, most):
    q = torch.randn(4, 16, 8192, 64, dtype=torch.bfloat16, device="cuda")
    sparse_layout = bs.random(8192, 8192, block, 0.1, 16, device="cuda")
    full_layout = bs.dense(8192, 8192, block, device="cuda")

    def over_sparse():
        return attention(q, q, q, sparse_layout)

    def over_full():
        return attention(q, q, q, full_layout)

    with torch.no_grad():
        sparse, full = best_times([over_sparse, over_full])
    assert sparse / full < most


@pytest.mark.gpu
@needs_gpu
def test_gpu_calls_do_not_synchronise():
    q = torch.randn(2, 2, 256, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    layout = bs.causal(256, 256, 64, device="cuda")
    kv_lens = torch.tensor([200, 100]).cuda()

    def step():
        attention(q, q, q, layout, causal=True, kv_lens=kv_lens).sum().backward()

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def interpreter_fails_with_numpy():
    """Triton's interpreter up to 3.8 fails with numpy 2.4."""
    if bs.triton is None:
        return False
    major, minor = bs.triton.__version__.split(".")[:2]
    return (int(major), int(minor)) < (3, 9)


@pytest.mark.gpu
@pytest.mark.slow
@needs_gpu
@pytest.mark.skipif(
    interpreter_fails_with_numpy(), reason="the interpreter of this Triton fails with numpy 2.4"
)
def test_gpu_the_suite_passes_in_a_process_without_a_gpu():
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", __file__]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
