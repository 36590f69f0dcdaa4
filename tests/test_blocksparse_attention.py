"""kernels/blocksparse_attention.py against dense attention written out here, along both of its paths.

The kernels run on the GPU where there is one, else on the CPU in Triton's interpreter, which has to be switched on
before they are defined. A process with a GPU never does that: there the last test starts another one for it.
"""

import ast
import copy
import inspect
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, load
from torch.nn.functional import scaled_dot_product_attention as sdpa

CUDA = torch.cuda.is_available()
CLOCK = time.perf_counter if CUDA else time.process_time  # other processes take no CPU time of this one
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"
FILE = ROOT / "kernels" / "blocksparse_attention.py"
bs = load(FILE)
attention, BlockLayout = bs.blocksparse_attention, bs.BlockLayout
EXACT = torch.float32 if CUDA else torch.float64  # the best type that the kernels take here
DEVICE = "cuda" if CUDA else "cpu"
OLD_INTERPRETER = bs.triton is not None and tuple(map(int, bs.triton.__version__.split(".")[:2])) < (3, 9)
gpu = pytest.mark.skipif(not CUDA, reason="needs CUDA")


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    if request.param == "triton" and bs.triton is None:
        pytest.skip("Triton is not installed")
    torch.use_deterministic_algorithms(CUDA and request.param == "torch")  # index_add_ is not by itself
    yield request.param
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def dense(q, k, v, live, scale=None):
    """Attention over all pairs, of which `live` count; rows without any give 0 and -inf. H is a multiple of K."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = torch.einsum("bhid,bhjd->bhij", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    some = live.any(-1, keepdim=True)
    scores = scores.masked_fill(~live, -math.inf).masked_fill(~some, 0)
    return scores.softmax(-1).masked_fill(~some, 0) @ v, scores.logsumexp(-1).masked_fill(~some[..., 0], -math.inf)


def pairs(layout_mask, b, sq, sk, batch=1, elements=None, causal=False, kv_lens=None):
    """[B, H, Sq, Sk]: which pairs live, by the definition."""
    mask = layout_mask[(None,) * (4 - layout_mask.dim())]
    wide = torch.ones(*mask.shape, b, b, dtype=torch.bool) & mask[..., None, None].cpu()
    if elements is not None:
        wide[mask.cpu()] = elements.cpu()
    live = wide.transpose(3, 4).flatten(4, 5).flatten(2, 3)[:, :, :sq, :sk].expand(batch, -1, -1, -1).clone()
    i, j = torch.arange(sq)[:, None], torch.arange(sk)
    if causal:
        live &= j <= i + sk - sq
    if kv_lens is not None:
        live &= j < kv_lens.cpu()[:, None, None, None]
    return live.to(mask.device)


def inputs(b, h, k, sq, sk, d, dtype=None, device=None):
    shapes = (b, h, sq, d), (b, k, sk, d), (b, k, sk, d), (b, h, sq, d), (b, h, sq)
    return [torch.randn(s, dtype=torch.float64).to(device or DEVICE, dtype or EXACT) for s in shapes]


def values(function, q, k, v, do, dlse):
    """Output, lse and the gradients of q, k and v."""
    x = [y.detach().requires_grad_() for y in (q, k, v)]
    out, lse = function(*x)
    return [out.detach(), lse.detach(), *torch.autograd.grad((out, lse), x, (do, dlse))]


def close(ours, exact, tolerance=None):
    tolerance = tolerance or (2e-5 if EXACT == torch.float32 else 1e-9)
    assert len(ours) == len(exact) > 0
    for name, x, y in zip(("out", "lse", "dq", "dk", "dv"), ours, exact):
        assert x.shape == y.shape and x.is_contiguous(), name
        finite = y.isfinite()
        assert (x.isfinite() == finite).all() and (x[~finite] == y[~finite]).all(), name
        error, scale = (x.double() - y)[finite].abs(), y[finite].abs()
        assert not len(error) or error.max() <= tolerance * max(1, scale.max()), (name, error.max(), scale.max())


def compare(backend, layout, live, x, tolerance=None, **options):
    """Ours in the type of the inputs against dense attention in float64."""
    ours = values(lambda *y: attention(*y, layout, return_lse=True, backend=backend, **options), *x)
    exact = [y.double() for y in x]
    close(ours, values(lambda *y: dense(*y, live, options.get("scale")), *exact), tolerance)
    return ours


# b, B, H, K, Sq, Sk, D, leading dimensions of the mask, and what else
CASES = {
    "block 8": (8, 1, 2, 2, 40, 40, 16, (2,), {}),
    "block 16, grouped heads": (16, 1, 4, 2, 70, 50, 16, (4,), {}),
    "block 32, one mask for all": (32, 2, 2, 1, 70, 70, 16, (), {}),
    "block 64, a mask for each batch": (64, 2, 1, 1, 100, 130, 16, (2, 1), {}),
    "block 128": (128, 1, 1, 1, 130, 130, 16, (), {}),
    "full": (32, 1, 2, 2, 70, 70, 16, (), {"full": True}),
    "full, with element masks": (32, 1, 2, 2, 70, 70, 16, (), {"full": True, "elements": True}),
    "full, causal, one key more": (64, 1, 1, 1, 64, 65, 16, (), {"full": True, "causal": True}),
    "full, causal, two queries": (64, 1, 1, 1, 2, 64, 16, (), {"full": True, "causal": True}),
    "full, causal, twice the keys": (64, 1, 1, 1, 65, 130, 16, (), {"full": True, "causal": True}),
    "full, causal, tiles more": (64, 1, 1, 1, 130, 256, 16, (), {"full": True, "causal": True}),
    "full, not square": (32, 1, 2, 2, 40, 70, 16, (), {"full": True, "causal": True}),
    "causal": (16, 1, 2, 2, 70, 70, 16, (2,), {"causal": True}),
    "causal, more keys": (32, 1, 2, 1, 40, 110, 16, (2,), {"causal": True}),
    "causal, more queries": (32, 1, 1, 1, 110, 40, 16, (), {"causal": True}),
    "element mask": (16, 1, 2, 2, 40, 50, 16, (2,), {"elements": True}),
    "element mask, 64": (64, 1, 1, 1, 70, 70, 16, (), {"elements": True, "causal": True}),
    "kv_lens": (32, 3, 2, 1, 40, 70, 16, (2,), {"kv_lens": [0, 33, 99], "causal": True}),
    "kv_lens, whole blocks": (64, 2, 1, 1, 64, 128, 16, (), {"kv_lens": [20, 100], "full": True}),
    "full, causal, scale below 0": (32, 1, 2, 2, 70, 70, 16, (), {"full": True, "causal": True, "scale": -0.5}),
    "full, causal, scale 0": (32, 1, 2, 2, 70, 70, 16, (), {"full": True, "causal": True, "scale": 0.0}),
    "scale 0": (32, 1, 1, 1, 40, 40, 16, (), {"scale": 0.0}),
    "scale below 0": (32, 1, 2, 1, 40, 40, 16, (2,), {"scale": -0.7, "causal": True}),
    "everything": (
        (8, 2, 4, 2, 50, 70, 24, (2, 4), {"elements": True, "causal": True, "kv_lens": [70, 40], "scale": 0.5})
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_dense(case, backend):
    """Output, lse and gradients, that of lse among what comes back, against dense attention."""
    b, B, H, K, sq, sk, d, lead, options = CASES[case]
    options = dict(options)
    mask = torch.rand(*lead, -(-sq // b), -(-sk // b)) < 0.6
    mask |= torch.tensor(options.pop("full", False))
    elements = torch.rand(int(mask.sum()), b, b) < 0.5 if options.pop("elements", False) else None
    if elements is not None:
        elements[::3] = True
    if "kv_lens" in options:
        options["kv_lens"] = torch.tensor(options["kv_lens"], dtype=torch.int32).to(DEVICE)
    layout = BlockLayout.from_mask(mask.to(DEVICE), b, None if elements is None else elements.to(DEVICE))
    x = inputs(B, H, K, sq, sk, d)
    live = pairs(mask, b, sq, sk, B, elements, options.get("causal"), options.get("kv_lens")).to(DEVICE)
    compare(backend, layout, live, x, **options)


@pytest.mark.parametrize("case", ["block 16, grouped heads", "causal, more keys", "kv_lens", "everything"])
@pytest.mark.parametrize("scores", [1, 2**11])
def test_chunks(case, scores, monkeypatch):
    """Chunks of the PyTorch path of a row for each thread, and of a few: groups are of many chunks, the last short."""
    monkeypatch.setattr(bs, "CHUNK", scores)
    test_dense(case, "torch")


@pytest.mark.parametrize("d", [16, 24, 32, 64, 80, 96, 128, 256])
def test_head_sizes(d, backend):
    mask = torch.tensor([[1, 0, 1], [0, 1, 1], [1, 1, 0]]).bool().to(DEVICE)
    compare(backend, BlockLayout.from_mask(mask, 16), pairs(mask, 16, 40, 40), inputs(1, 1, 1, 40, 40, d))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("causal", [False, True])
def test_types(dtype, causal, backend):
    """float32 within 2e-5 of float64; 16 bits within twice the error of naive attention in the same type."""
    mask = (torch.rand(2, 4, 4) < 0.7).to(DEVICE)
    x, live = inputs(1, 2, 1, 100, 100, 64, dtype), pairs(mask, 32, 100, 100, causal=causal)
    x[4][~live.any(-1)] = 0
    layout = BlockLayout.from_mask(mask, 32)
    ours = values(
        lambda *y: attention(*y, layout, causal=causal, return_lse=True, backend=backend), *x[:4], x[4].float()
    )
    exact = values(lambda *y: dense(*y, live), *(y.double() for y in x))
    if dtype == torch.float32:
        return close(ours, exact, 2e-5)
    naive = values(lambda *y: dense(*y, live), *x)
    assert ours[1].dtype == torch.float32
    for o, n, e in zip(ours, naive, exact):
        some = e.isfinite()
        error, allowed = (o - e)[some].abs().max(), 2 * (n - e)[some].abs().max() + 1e-3 * e[some].abs().max()
        assert error <= allowed


def test_large_logits(backend):
    x, mask = inputs(1, 1, 1, 40, 40, 16), torch.ones(2, 2, dtype=torch.bool).to(DEVICE).tril()
    x[0] *= 100 / (x[0] @ x[1].mT).abs().max()
    compare(backend, BlockLayout.from_mask(mask, 32), pairs(mask, 32, 40, 40), x, scale=1.0)


@pytest.mark.parametrize("scale", [1e-50, -1e-50])
def test_a_scale_that_float32_rounds_to_0(scale, backend):
    layout, x = bs.dense(70, 70, 32, device=DEVICE), inputs(1, 2, 2, 70, 70, 16, torch.float32)
    live = pairs(layout.to_mask(), 32, 70, 70, causal=True)
    compare(backend, layout, live, x, 2e-5, causal=True, scale=scale)


@pytest.mark.parametrize(
    "shifts, size", [((0, 110, -110), 1), ((-110, 0, 110), 1), ((-100, 0, 0), 1), ((0, 50, -50), 1e20)]
)
def test_logits_that_leave_the_range_of_exp(shifts, size, backend):
    """Whole blocks in float32, where exp(110) is inf, exp(-110) 0, exp(-100) has few bits left, and exp(50) is too much
    for values of 1e20: heads with more blocks come later."""
    mask = torch.tensor([[[1, 0, 0]] * 3, [[1, 1, 0]] * 3, [[1, 1, 1]] * 3]).bool().to(DEVICE)
    x = inputs(1, 3, 3, 48, 48, 16, torch.float32)
    x[0][..., 0] = 1
    x[1][..., 0] = torch.tensor(shifts)[:, None].to(x[1])
    x[2] *= size
    ours = values(
        lambda *y: attention(*y, BlockLayout.from_mask(mask, 16), scale=1.0, return_lse=True, backend=backend), *x
    )
    exact = values(lambda *y: dense(*y, pairs(mask, 16, 48, 48), 1.0), *(y.double() for y in x))
    close(ours, exact, 2e-5)


@pytest.mark.parametrize("row", [5, 21, 37, 60])
def test_one_query_alone_that_leaves_the_range_of_exp(row, backend):
    """In any block and any place of a group of whole rows."""
    mask = ~torch.eye(4, dtype=torch.bool).to(DEVICE)
    x = inputs(1, 1, 1, 64, 64, 16, torch.float32)
    x[1][..., 0], x[0][..., row, 0] = 1, 110
    compare(backend, BlockLayout.from_mask(mask, 16), pairs(mask, 16, 64, 64), x, 2e-5, scale=1.0)


@pytest.mark.parametrize("logit", [-1000, 1000])
def test_logits_far_from_those_of_what_is_not_there(logit, backend):
    """A key beyond the lengths or the end has a score of 0 before it is masked, and exp(0 + 1000) is inf."""
    layout, lens = bs.dense(100, 150, 32, device=DEVICE), torch.tensor([20, 70]).to(DEVICE)
    x = inputs(2, 1, 1, 100, 150, 16)
    x[0][..., 0], x[1][..., 0] = 1, logit
    for options in ({}, {"kv_lens": lens}):
        live = pairs(layout.to_mask(), 32, 100, 150, 2, **options)
        rounded = 2e-4 if EXACT == torch.float32 else None  # from 1000 to the next one is 6e-5
        compare(backend, layout, live, x, rounded, scale=1.0, **options)


def test_a_layout_used_again_for_something_else(backend):
    """What is known of a layout is of these lengths, this direction and no lengths of keys."""
    layout = bs.random(128, 128, 32, 0.5, 2, device=DEVICE)
    for sq, causal, lens in (
        (100, 0, None),
        (128, 1, None),
        (100, 1, None),
        (100, 0, [30]),
        (100, 0, [90]),
        (100, 0, None),
    ):
        options = {"causal": bool(causal), "kv_lens": None if lens is None else torch.tensor(lens).to(DEVICE)}
        live = pairs(layout.to_mask(), 32, sq, 128, 1, **options)
        compare(backend, layout, live, inputs(1, 2, 2, sq, 128, 16), **options)


def test_a_layout_used_without_gradients_before():
    layout, x = bs.random(64, 64, 32, 0.5, device=DEVICE), inputs(1, 1, 1, 64, 64, 16)
    options = {"layout": layout, "return_lse": True, "backend": "torch"}
    with torch.inference_mode():
        attention(*x[:3], **options)
    q, k, v = (y.requires_grad_() for y in x[:3])
    first = torch.autograd.grad(attention(q, k, v, **options), (q, k, v), x[3:], create_graph=True)
    second = torch.autograd.grad(first, (q, k, v), x[:3])
    assert all(y.isfinite().all() for y in second)


# ---- what must not leak ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("b", [8, 16, 64])
def test_nan_in_keys_that_no_query_of_their_head_selects(b, backend):
    n = 6 if b < 64 else 2
    mask = torch.rand(2, n, n) < 0.5
    mask[0, :, 1], mask[1, :, 0], mask[:, 0, :] = False, False, False
    layout, x = BlockLayout.from_mask(mask.to(DEVICE), b), inputs(1, 2, 2, n * b, n * b, 16)
    run = [lambda *y: attention(*y, layout, return_lse=True, backend=backend), *x]
    clean = values(*run)
    unseen = ~pairs(mask, b, n * b, n * b).any(2).to(DEVICE)  # [1, H, Sk]
    for key in (run[2], run[3]):
        key[unseen] = math.nan
    for name, y, z in zip(("out", "lse", "dq", "dk", "dv"), clean, values(*run)):
        assert y.equal(z), name
    run[1][:, :, :b], run[4][:, :, :b], run[5][:, :, :b] = math.nan, math.nan, math.nan  # queries that see nothing
    for name, y, z in zip(("out", "lse", "dq", "dk", "dv"), clean, values(*run)):
        assert y.equal(z), name


@pytest.mark.parametrize("how", ["kv_lens", "causal", "elements", "elements beyond the last query"])
def test_nan_in_keys_that_are_hidden_inside_of_blocks(how, backend):
    b, sq, sk, options, elements = 32, 50, 50, {}, None
    mask = torch.tensor([[1, 1], [0, 1]]).bool()
    if how == "kv_lens":
        options = {"kv_lens": torch.tensor([37]).to(DEVICE)}
    elif how == "causal":  # block (0, 1) lives, and the diagonal hides all of it; nobody else selects it
        mask, options = torch.tensor([[1, 1], [1, 0]]).bool(), {"causal": True}
    else:
        elements = torch.rand(3, b, b) < 0.5
        elements[:, :, 5] = False
        if how != "elements":
            elements[2, 20:, 5] = True  # of queries from 52 on
    layout = BlockLayout.from_mask(mask.to(DEVICE), b, None if elements is None else elements.to(DEVICE))
    x = inputs(1, 1, 1, sq, sk, 16)
    unseen = ~pairs(mask, b, sq, sk, 1, elements, **options).any(2).to(DEVICE)
    run = [lambda *y: attention(*y, layout, return_lse=True, backend=backend, **options), *x]
    clean = values(*run)
    assert unseen.any()
    for key in (run[2], run[3]):
        key[unseen] = math.nan
    for name, y, z in zip(("out", "lse", "dq", "dk", "dv"), clean, values(*run)):
        assert y.equal(z), name


@pytest.mark.parametrize("causal", [False, True])
def test_rows_that_see_nothing(causal, backend):
    """An empty row of blocks, an empty column, an empty head; under causal=True, queries before the first key, some of
    them beside others in a block. Gradients stay 0 whatever comes back for their lse."""
    mask = torch.ones(3, 3, 3 - causal, dtype=torch.bool)
    mask[0, 1], mask[1, :, 1], mask[2] = False, False, False
    layout, x = BlockLayout.from_mask(mask.to(DEVICE), 16), inputs(1, 3, 3, 40, 40 - 19 * causal, 16)
    live = pairs(mask, 16, 40, 40 - 19 * causal, causal=causal).to(DEVICE)
    empty = ~live.any(-1)
    assert empty[0, 1, :19].all() == causal and not empty[0, 1, 19:].any()
    ours = compare(backend, layout, live, x, causal=causal)
    assert (ours[0][empty] == 0).all() and (ours[1][empty] == -math.inf).all() and (ours[2][empty] == 0).all()
    x[4][empty] = math.nan
    x[0][empty], x[3][empty] = math.nan, math.nan  # nor does what they hold go anywhere
    again = values(lambda *y: attention(*y, layout, causal=causal, return_lse=True, backend=backend), *x)
    assert all(y.equal(z) for y, z in zip(ours, again))


def test_empty_layout(backend):
    layout, x = BlockLayout.from_mask(torch.zeros(2, 3, dtype=torch.bool).to(DEVICE), 16), inputs(1, 2, 1, 30, 40, 16)
    out, lse, *gradients = values(lambda *y: attention(*y, layout, return_lse=True, backend=backend), *x)
    assert not out.any() and (lse == -math.inf).all() and not any(g.any() for g in gradients)


# ---- strides ---------------------------------------------------------------------------------------------------------
def test_strides(backend):
    """Transposed heads, keys expanded over the batch, a last stride that is not 1, a gradient of stride 0."""
    q, k, v, do, dlse = inputs(2, 2, 2, 40, 40, 16)
    mask = torch.tensor([[1, 0, 1], [1, 1, 0], [0, 1, 1]]).bool().to(DEVICE)
    layout, live = BlockLayout.from_mask(mask, 16), pairs(mask, 16, 40, 40, 2)
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    k, v = k[:1].expand(2, -1, -1, -1), v.mT.contiguous().mT
    compare(backend, layout, live, (q, k, v, do.transpose(0, 1).contiguous().transpose(0, 1), dlse))
    x = [y.detach().requires_grad_() for y in (q, k, v)]
    ours = torch.autograd.grad(attention(*x, layout, backend=backend).sum(), x)
    x = [y.detach().double().requires_grad_() for y in (q, k, v)]
    close(ours, torch.autograd.grad(dense(*x, live)[0].sum(), x))


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("kind", {EXACT, torch.float32})  # oneDNN, where it multiplies, takes float32 alone
def test_rows_that_overlap(full, kind, backend):
    """Windows of a sequence as features, and others with their dimensions exchanged."""
    windows = torch.randn(1, 1, 79).to(DEVICE, kind).unfold(2, 16, 1)
    across = torch.randn(1, 1, 96).to(DEVICE, kind).unfold(2, 64, 2)[:, :, :16].mT
    mask = torch.ones(4, 4, dtype=torch.bool).to(DEVICE)
    mask = mask if full else mask.tril()
    for x in (windows, across):
        dlse = inputs(1, 1, 1, 64, 64, 16, kind)[4]
        compare(backend, BlockLayout.from_mask(mask, 16), pairs(mask, 16, 64, 64), (x, x, x, x, dlse), 2e-5)


# ---- against what PyTorch has ----------------------------------------------------------------------------------------
def test_rows_far_apart():
    """128 rows that are 2^24 numbers and more apart: the last is beyond 2^31."""
    if bs.triton is None:
        pytest.skip("Triton is not installed")
    far = torch.empty(128, 2**24 + 2**18, dtype=torch.float16, device=DEVICE)[None, None, :, :16]  # pages never written
    near = far.copy_(torch.randn(1, 1, 128, 16)).contiguous()
    layout = bs.dense(128, 128, 128, device=DEVICE)
    assert attention(far, far, far, layout, backend="triton").equal(
        attention(near, near, near, layout, backend="triton")
    )


@pytest.mark.parametrize("causal", [False, True])
def test_full_and_causal_layouts_are_sdpa(causal, backend):
    q, k, v, *_ = inputs(1, 2, 2, 70, 70, 16)
    layout = (bs.causal if causal else bs.dense)(70, 70, 32, device=DEVICE)
    torch.testing.assert_close(
        attention(q, k, v, layout, causal=causal, backend=backend), sdpa(q, k, v, is_causal=causal), atol=2e-5, rtol=0
    )


def test_documents_are_a_batch(backend):
    q, k, v, *_ = inputs(1, 2, 2, 75, 75, 16)
    layout = bs.block_diagonal([25, 25, 25], 16, device=DEVICE)
    apart = [y.unflatten(2, (3, 25)).transpose(1, 2).flatten(0, 1) for y in (q, k, v)]
    together = sdpa(*apart).unflatten(0, (1, 3)).transpose(1, 2).flatten(2, 3)
    torch.testing.assert_close(attention(q, k, v, layout, backend=backend), together, atol=2e-5, rtol=0)


# ---- the operator ----------------------------------------------------------------------------------------------------
def small(backend, d=16, dtype=None, elements=True):
    mask = torch.tensor([[1, 0, 1], [1, 1, 0]]).bool()
    rule = (lambda b, h, i, j: (i + j) % 3 > 0) if elements else None
    return BlockLayout.from_mask(mask.to(DEVICE), 8, rule), inputs(1, 2, 1, 12, 20, d, dtype)


def test_opcheck(backend):
    layout, (q, k, v, do, dlse) = small(backend)
    tensors, tile = (layout.tensors, 8) if backend == "torch" else (layout.tiles, layout.tile)
    rest = (tensors, [1, 1, 8, tile], torch.tensor([15]).to(DEVICE), 0.3, True, backend)
    torch.library.opcheck(bs.forward_op, tuple(y.clone().requires_grad_() for y in (q, k, v)) + rest)
    out, lse = bs.forward_op(q, k, v, *rest)
    torch.library.opcheck(bs.backward_op, (q, k, v, out, lse, do, dlse, *rest))


def test_compile(backend):
    """One graph, with the layout an argument; new numbers cost a compilation and give what is right."""

    def loss(q, k, v, layout, lens):
        out, lse = attention(q * 2, k, v, layout, causal=True, kv_lens=lens, return_lse=True, backend=backend)
        return out.square().sum() + lse.masked_fill(lse == -math.inf, 0).sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    lens = torch.tensor([19]).to(DEVICE)
    other = bs.dense(20, 30, 8, device=DEVICE), inputs(1, 2, 1, 20, 30, 24)  # sizes that vary from here on
    last = bs.dense(25, 20, 8, device=DEVICE), inputs(1, 2, 1, 25, 20, 16)
    for layout, x in (small(backend), (bs.dense(12, 20, 8, device=DEVICE), small(backend)[1]), other, last):
        x = [y.requires_grad_() for y in x[:3]]
        for ours, eager in zip(*(torch.autograd.grad(f(*x, layout, lens), x) for f in (compiled, loss))):
            torch.testing.assert_close(ours, eager)


@pytest.mark.slow
def test_compile_with_inductor(backend):
    layout, (q, k, v, *_) = small(backend)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *y: attention(*y, layout, backend=backend) * 2, fullgraph=True)
    torch.testing.assert_close(compiled(q, k, v), attention(q, k, v, layout, backend=backend) * 2)


def function(layout, backend, **options):
    return lambda q, k, v: attention(q, k, v, layout, return_lse=True, backend=backend, **options)


@pytest.mark.skipif(CUDA, reason="float64 goes through the kernels in the interpreter alone")
@pytest.mark.parametrize("options", [{}, {"causal": True, "scale": -0.4}], ids=str)
def test_gradcheck(options, backend):
    layout, x = small(backend)
    x = [y.requires_grad_() for y in x[:3]]
    assert torch.autograd.gradcheck(function(layout, backend, **options), x, fast_mode=True)


@pytest.mark.slow
@pytest.mark.skipif(CUDA, reason="float64 goes through the kernels in the interpreter alone")
def test_gradcheck_of_every_element(backend):
    layout = BlockLayout.from_mask(torch.tensor([[1, 0], [1, 1]]).bool(), 8)
    x = [torch.randn(1, 1, n, 4, dtype=torch.float64, requires_grad=True) for n in (10, 12, 12)]  # 136 elements
    assert torch.autograd.gradcheck(function(layout, backend), x)


@pytest.mark.parametrize(
    "options", [{}, {"causal": True, "kv_lens": torch.tensor([17]), "scale": -0.4}], ids=["plain", "hidden"]
)
def test_gradgradcheck(options):
    x = [y.cpu().double().requires_grad_() for y in small("torch", 4)[1][:3]]
    layout = small("torch")[0].to("cpu")
    assert torch.autograd.gradgradcheck(function(layout, "torch", **options), x, fast_mode=True)


@pytest.mark.parametrize("options", [{}, {"causal": True, "kv_lens": torch.tensor([17])}], ids=["plain", "hidden"])
def test_third_derivatives(options):
    layout, x = small("torch", 4, elements=True)
    layout, x = layout.to("cpu"), [y.cpu().double() for y in x[:3]]
    elements = pairs(layout.to_mask(), 8, 12, 20, **options)
    i, j = torch.arange(12)[:, None], torch.arange(20)
    live = elements & ((i + j) % 3 > 0)

    def third(function):
        inputs = terms = [y.clone().requires_grad_() for y in x]
        for order in range(3):
            outputs = function(*inputs) if order == 0 else terms
            outputs = outputs if isinstance(outputs, tuple | list) else [outputs]
            terms = torch.autograd.grad(sum(y.sin().sum() for y in outputs), inputs, create_graph=True)
        return terms

    ours, want = (
        third(lambda *y: attention(*y, layout, backend="torch", **options)),
        third(lambda *y: dense(*y, live)[0]),
    )
    for a, b in zip(ours, want):
        assert b.abs().max() > 1e-3
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    functions = (
        (lambda q: attention(q, *x[1:], layout, **options).sin().sum()),
        lambda q: dense(q, *x[1:], live)[0].sin().sum(),
    )
    (_, ours), (_, want) = (torch.autograd.functional.hvp(f, x[0], torch.ones_like(x[0])) for f in functions)
    torch.testing.assert_close(ours, want, rtol=1e-9, atol=1e-12)


def test_forward_mode_is_refused_and_gives_no_zeros(backend):
    layout, x = small(backend)
    with pytest.raises(RuntimeError, match="there is no forward mode: use torch.autograd.functional.jvp"):
        torch.func.jvp(lambda q: attention(q, *x[1:3], layout, backend=backend), (x[0],), (x[0],))


@pytest.mark.parametrize("lens", [-3, -(2**33) + 5, 2**40])
def test_lengths_out_of_bounds_are_none_or_all(lens, backend):
    layout, x = small(backend)
    ours, want = (
        attention(*x[:3], layout, kv_lens=torch.tensor([n]).to(DEVICE), backend=backend)
        for n in (lens, max(0, min(lens, 20)))
    )
    assert ours.equal(want) and ours.any() == (lens > 0)


@pytest.mark.parametrize("options", [{}, {"kv_lens": torch.tensor([0])}], ids=["no block", "no key"])
def test_double_backward_where_nothing_is_seen(options):
    layout = BlockLayout.from_mask(torch.full((2, 2), len(options) > 0), 16)
    x = [y.requires_grad_() for y in inputs(1, 1, 1, 20, 20, 16, torch.float64, "cpu")[:4]]
    first = torch.autograd.grad(attention(*x[:3], layout, backend="torch", **options), x[:3], x[3], create_graph=True)
    second = torch.autograd.grad(sum(y.square().sum() for y in first), x, materialize_grads=True)
    assert not any(y.any() for y in (*first, *second))


def test_double_backward_keeps_the_nan_of_a_query_that_sees_nothing_out():
    layout = BlockLayout.from_mask(torch.ones(2, 1, dtype=torch.bool), 16)

    def second(blind):
        torch.manual_seed(0)
        x = [y.requires_grad_() for y in inputs(1, 1, 1, 32, 10, 16, torch.float64, "cpu")[:4]]
        with torch.no_grad():
            x[0][:, :, :22] = blind  # under causal=True, of queries that come before all keys
        out = attention(*x[:3], layout, causal=True, backend="torch")
        first = torch.autograd.grad(out, x[:3], x[3], create_graph=True)
        return torch.autograd.grad(sum(y[:, :, -10:].square().sum() for y in first), x)

    for clean, y in zip(second(0.0), second(math.nan)):
        assert y.isfinite().all() and y.equal(clean)


def test_backward_in_autocast(backend):
    """float32 in, float32 all through."""
    layout, x = small(backend, dtype=torch.float32)
    x = [y.requires_grad_() for y in x[:3]]
    want = torch.autograd.grad(attention(*x, layout, backend=backend).square().sum(), x)
    with torch.autocast(DEVICE, torch.bfloat16):
        got = torch.autograd.grad(attention(*x, layout, backend=backend).square().sum(), x)
    assert all(a.equal(b) for a, b in zip(got, want))


@pytest.mark.parametrize("asked, inside", [("none", "bf16"), ("ieee", "ieee"), ("bf16", "bf16")])
def test_products_by_onednn(asked, inside, monkeypatch):
    """On an AMD, while an operator runs, and where nobody has said how to multiply; what was said stays."""
    matmul, seen = torch.backends.mkldnn.matmul, {}
    bs.onednn_pays()  # tried once

    def spied(name, run):
        return lambda *args: (seen.setdefault(name, matmul.fp32_precision), run(*args))[1]

    for name in ("torch_forward", "torch_backward", "differentiable"):
        monkeypatch.setattr(bs, name, spied(name, getattr(bs, name)))
    x, layout = [y.cpu().requires_grad_() for y in inputs(1, 1, 1, 64, 64, 16)[:3]], bs.causal(64, 64, 16)
    matmul.fp32_precision = asked
    try:
        first = torch.autograd.grad(attention(*x, layout).square().sum(), x, create_graph=True)
        torch.autograd.grad(sum(y.square().sum() for y in first), x)
        monkeypatch.setattr(bs, "torch_forward", spied("failing", lambda *args: torch.ones(2) @ torch.ones(3)))
        with pytest.raises(RuntimeError):
            attention(*x, layout)
        assert [*seen.values()] == [inside if bs.onednn_pays() else asked] * 4 and matmul.fp32_precision == asked
    finally:
        matmul.fp32_precision = "none"


def test_products_by_onednn_are_exact():
    """Of what an operator multiplies, in shapes that suit oneDNN: to the rounding of float32."""
    if not bs.onednn_pays():
        pytest.skip("there MKL multiplies")
    for n in (1, 3, 8):
        x, y = torch.randn(8, 64, 64), torch.randn(8, 64 * n, 64)
        with bs.onednn():
            assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
            ours = torch.bmm(x, y.mT)
        assert (ours - x.double() @ y.double().mT).abs().max() < 1e-6 * ours.abs().max()


def test_tf32_by_the_newer_setting():
    """After which PyTorch refuses to read the older one."""
    if bs.triton is None:
        pytest.skip("Triton is not installed")
    layout, x = small("triton", dtype=torch.float32)
    want = attention(*x[:3], layout, backend="triton")
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        torch.testing.assert_close(attention(*x[:3], layout, backend="triton"), want, rtol=1e-2, atol=1e-2)
    finally:
        torch.backends.cuda.matmul.fp32_precision = "ieee"


def test_double_backward_through_triton_says_where_it_works():
    if bs.triton is None:
        pytest.skip("Triton is not installed")
    layout, x = small("triton")
    q = x[0].requires_grad_()
    (first,) = torch.autograd.grad(attention(q, x[1], x[2], layout, backend="triton").sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="backend='torch'"):
        first.sum().backward()


def test_deterministic(backend):
    mask = torch.rand(2, 12, 12) < 0.7
    layout, x = BlockLayout.from_mask(mask.to(DEVICE), 8), inputs(1, 2, 1, 96, 96, 16, torch.float32)
    if backend == "torch" and CUDA:
        torch.use_deterministic_algorithms(True)
    try:
        run = [values(lambda *y: attention(*y, layout, return_lse=True, backend=backend), *x) for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(y.equal(z) for y, z in zip(*run))


# ---- the layout ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("lead", [(), (3,), (1,), (2, 3), (2, 1), (1, 3)])
def test_a_layout_gives_its_mask_back(lead):
    mask = torch.rand(*lead, 5, 7) < 0.4
    layout = BlockLayout.from_mask(mask, 8)
    assert layout.to_mask().equal(mask) and layout.to("cpu").to_mask().equal(mask)
    assert layout.density == pytest.approx(mask.float().mean().item())
    assert "40 queries, 56 keys" in repr(layout) and str(int(mask.sum())) + " blocks" in repr(layout)
    seg, idx, back_seg, back_idx = (layout.tensors[n] for n in (0, 1, 6, 7))
    flat = mask.reshape(-1, 5, 7)
    assert idx.tolist() == flat.nonzero()[:, 2].tolist() and back_idx.tolist() == flat.mT.nonzero()[:, 2].tolist()
    assert seg[::2].diff().tolist() == flat.sum(2).flatten().tolist()
    assert back_seg[::2].diff().tolist() == flat.sum(1).flatten().tolist()


def test_a_layout_is_pickled_without_tiles(monkeypatch):
    """One that was made where there are no kernels gets its tiles where there are; a rule stays behind."""
    layout, (q, k, v, *_) = small("torch")
    with monkeypatch.context() as context:
        context.setattr(bs, "INTERPRET", False)
        text = pickle.dumps(small("torch")[0].to("cpu"))
    again = pickle.loads(text).to(DEVICE)
    assert again.tile == layout.tile and all(a.equal(b) for a, b in zip(again.tiles, layout.tiles))
    assert all(a.equal(b) for a, b in zip(again.tensors, layout.tensors))
    assert copy.deepcopy(layout).to_mask().equal(layout.to_mask())


def test_element_masks_are_packed_and_whole_blocks_keep_none():
    mask = torch.rand(2, 3, 4) < 0.7
    seen = []

    def rule(b, h, i, j):
        seen.append(torch.broadcast_to(h, i.shape[:1] + (8, 8)).shape)
        return (i + 2 * j + h) % 9 < torch.where(i < 8, 9, 4)

    layout = BlockLayout.from_mask(mask, 8, rule)
    assert sum(s[0] for s in seen) == mask.sum()  # called on live blocks alone
    assert layout.rule is layout.to(DEVICE).rule is rule
    bits = layout.bits
    assert bits.dtype == torch.uint8 and bits.shape == (mask[:, 1:].sum(), 8, 1)
    h, i, j = (x[:, None, None] for x in mask.nonzero().unbind(1))
    i, j = i * 8 + torch.arange(8)[:, None], j * 8 + torch.arange(8)
    elements = (i + 2 * j + h) % 9 < torch.where(i < 8, 9, 4)
    for x, y in zip(layout.tensors, BlockLayout.from_mask(mask, 8, elements).tensors):
        assert x.equal(y)


def test_a_large_layout_is_fast_and_small():
    mask = torch.rand(1024, 1024) < 0.1
    best = math.inf
    for _ in range(5):
        begin = CLOCK()
        layout = BlockLayout(mask.shape, 64, BlockLayout.from_mask(mask, 64).tensors) if CUDA else None
        tensors = layout.tensors if CUDA else forged(mask)
        best = min(best, CLOCK() - begin)
    assert sum(x.nbytes for x in tensors) < 16 * mask.sum() + 64 * 1024
    assert best < 0.2  # half of that and less on a quiet machine


def forged(mask):
    """The thirteen tensors without the tiles that the interpreter wants."""
    blocks = mask[None]
    row, col = bs.entries(blocks)
    none = row.new_empty(0)
    return bs.both_ways(row, col, blocks.shape, None, none, none.int(), none, bs.entries(blocks.mT))


ZOO = {
    "dense": (lambda: bs.dense(70, 70, 16), False, lambda h, i, j: True),
    "causal": (lambda: bs.causal(50, 70, 16), True, lambda h, i, j: j <= i + 20),
    "sliding_window": (lambda: bs.sliding_window(70, 70, 16, 21), False, lambda h, i, j: 0 <= i - j < 21),
    "strided": (
        lambda: bs.strided(80, 80, 8, 3, heads=2),
        True,
        lambda h, i, j: j <= i and (i // 8 - j // 8 < 3 or (i // 8 - j // 8 - h) % 3 == 0),
    ),
    "fixed": (
        lambda: bs.fixed(80, 80, 8, 4, heads=2),
        True,
        lambda h, i, j: j <= i and (i // 32 == j // 32 or j // 8 % 4 == 3 - h),
    ),
    "sliding_window, more keys": (
        lambda: bs.sliding_window(50, 70, 16, 21),
        False,
        lambda h, i, j: 0 <= i + 20 - j < 21,
    ),
    "fixed, two summaries": (
        lambda: bs.fixed(80, 80, 8, 4, summary=2, heads=2),
        True,
        lambda h, i, j: j <= i and (i // 32 == j // 32 or (3 - j // 8 % 4) // 2 == h),
    ),
    "prefix_lm, more keys": (lambda: bs.prefix_lm(50, 70, 16, 19), False, lambda h, i, j: j < 19 or j <= i + 20),
    "longformer": (
        lambda: bs.longformer(90, 90, 16, 20, 3),
        False,
        lambda h, i, j: abs(i - j) <= 10 or i < 3 or j < 3,
    ),
    "block_diagonal": (
        lambda: bs.block_diagonal([20, 1, 49, 5], 16),
        False,
        lambda h, i, j: (i >= 20, i >= 21, i >= 70) == (j >= 20, j >= 21, j >= 70),
    ),
    "prefix_lm": (lambda: bs.prefix_lm(70, 70, 16, 19), False, lambda h, i, j: j < 19 or j <= i),
}


@pytest.mark.parametrize("name", ZOO)
def test_zoo(name):
    """Attention over the layout is attention over the pairs that its source says."""
    build, causal, rule = ZOO[name]
    layout = build()
    sizes = {"causal": (50, 70), "strided": (80, 80), "fixed": (80, 80), "longformer": (90, 90)}
    sizes["block_diagonal"] = 75, 75
    sq, sk = (50, 70) if "more keys" in name else sizes.get(name.split(",")[0], (70, 70))
    x = inputs(1, 2, 2, sq, sk, 16, torch.float64, "cpu")
    live = torch.tensor([[[rule(h, i, j) for j in range(sk)] for i in range(sq)] for h in range(2)])[None]
    compare("torch", layout, live, x, 1e-9, causal=causal)


@pytest.mark.parametrize("build", [bs.strided, bs.fixed])
@pytest.mark.parametrize("sq, sk", [(100, 130), (10, 130), (130, 100), (128, 200), (64, 96)])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_zoo_with_other_keys_than_queries(build, sq, sk, stride):
    """Under causal=True every query sees the key of its own place, and the last query the last key."""
    live = pairs(build(sq, sk, 64, stride).to_mask(), 64, sq, sk, causal=True)[0, 0]
    i = torch.arange(max(0, sq - sk), sq)
    assert live[i, i + sk - sq].all()


def test_zoo_random():
    layout = bs.bigbird(16 * 40, 16 * 40, 16, heads=2)
    mask = layout.to_mask()
    i, j = torch.arange(40)[:, None], torch.arange(40)
    assert mask[:, (i - j).abs() <= 1].all() and mask[:, 0].all() and mask[:, :, 0].all()
    extra = (mask & ((i - j).abs() > 1) & (i > 0) & (j > 0)).sum(-1)
    assert extra.max() <= 3 and extra.float().mean() > 2 and not mask[0].equal(mask[1])
    assert not bs.bigbird(16 * 40, 16 * 40, 16, heads=2, seed=1).to_mask().equal(mask)
    assert bs.bigbird(16 * 40, 16 * 40, 16, window=7).to_mask()[:, (i - j).abs() <= 3].all()
    assert not bs.random(6400, 6400, 16, 0.1, seed=1).to_mask().equal(bs.random(6400, 6400, 16, 0.1).to_mask())
    for sq, sk in ((64, 64), (64, 128), (128, 64)):  # also where the diagonal is much of it
        assert bs.random(sq, sk, 16, 0.5, heads=2000).density == pytest.approx(0.5, abs=0.02)
    mask = bs.random(6400, 6400, 16, 0.1, heads=3).to_mask()
    assert mask.diagonal(dim1=1, dim2=2).all() and abs(mask.float().mean() - 0.1) < 0.01
    torch.set_default_dtype(torch.float64)
    try:
        assert bs.random(6400, 6400, 16, 0.1, heads=3).to_mask().equal(mask)
    finally:
        torch.set_default_dtype(torch.float32)


# ---- bad input -------------------------------------------------------------------------------------------------------
def bad(**changes):
    x = {"q": torch.zeros(2, 4, 40, 16), "k": torch.zeros(2, 2, 40, 16), "v": torch.zeros(2, 2, 40, 16)}
    x["layout"] = BlockLayout.from_mask(torch.ones(3, 3, dtype=torch.bool), 16)
    x |= changes
    return attention(x.pop("q"), x.pop("k"), x.pop("v"), x.pop("layout"), **x)


BAD = {
    "must be tensors: q ndarray, k Tensor": {"q": torch.zeros(2, 4, 40, 16).numpy()},
    "scale must be finite: it is nan": {"scale": math.nan},
    "must be [batch, heads, length, size]: q [4, 40, 16]": {"q": torch.zeros(4, 40, 16)},
    "4 heads of q must be a multiple of the 3": {"k": torch.zeros(2, 3, 40, 16), "v": torch.zeros(2, 3, 40, 16)},
    "k and v must have one shape": {"v": torch.zeros(2, 2, 41, 16)},
    "one head size": {"q": torch.zeros(2, 4, 40, 8)},
    "one batch": {"q": torch.zeros(1, 4, 40, 16)},
    "one dtype: q torch.float64, k torch.float32": {"q": torch.zeros(2, 4, 40, 16, dtype=torch.float64)},
    "must be float16, bfloat16, float32 or float64": {n: torch.zeros(2, 4, 40, 16).int() for n in "qkv"},
    "one device: q meta": {"q": torch.zeros(2, 4, 40, 16, device="meta")},
    "layout cpu": {n: torch.zeros(2, 4, 40, 16, device="meta") for n in "qkv"},
    "up to 48 queries and 48 keys, but q has 49 and k has 40": {"q": torch.zeros(2, 4, 49, 16)},
    "but q has 32": {"q": torch.zeros(2, 4, 32, 16)},
    "must be a BlockLayout: it is Tensor": {"layout": torch.ones(3, 3).bool()},
    "batch and heads 1 and 3": {"layout": BlockLayout.from_mask(torch.ones(3, 3, 3, dtype=torch.bool), 16)},
    "kv_lens must be int32 or int64 [2]": {"kv_lens": torch.zeros(3, dtype=torch.int32)},
    "kv_lens must be int32 or int64": {"kv_lens": torch.zeros(2)},
    "backend must be auto, torch or triton: it is 'cuda'": {"backend": "cuda"},
    "kv_lens must be int32 or int64 [2] on cpu: it is list": {"kv_lens": [3, 3]},
    "no dimension may be 0": {"q": torch.zeros(2, 4, 0, 16)},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    with pytest.raises(ValueError, match=re.escape(message)):
        bad(**BAD[message])


@pytest.mark.parametrize(
    "mask, size, elements, message",
    [
        (torch.ones(3, 3), 16, None, "mask must be bool .* it is torch.float32"),
        (torch.ones(3, dtype=torch.bool), 16, None, "mask must be bool"),
        ([[True]], 16, None, "it is list"),
        (torch.ones(3, 3, dtype=torch.bool), 48, None, "block_size must be one of .* it is 48"),
        (torch.ones(3, 3, dtype=torch.bool), 16.0, None, "block_size must be one of .* it is 16.0"),
        (torch.ones(3, 3, dtype=torch.bool), 8, [[True]], r"bool \[9, 8, 8\], .* or a function; it is list"),
        (torch.ones(3, 3, dtype=torch.bool), 8, lambda *_: None, "element_mask must give booleans that broadcast: "),
        (torch.ones(3, 3, dtype=torch.bool), 8, lambda *_: torch.ones(3, 3), r"that broadcast: .* \[3, 3\]"),
        (torch.ones(3, 3, dtype=torch.bool), 8, torch.ones(9, 8, 4, dtype=torch.bool), r"bool \[9, 8, 8\]"),
    ],
)
def test_bad_layout(mask, size, elements, message):
    with pytest.raises(ValueError, match=message):
        BlockLayout.from_mask(mask, size, elements)


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: bs.dense(64, 64, 0), "block_size of .* they are 64, 64, 0"),
        (lambda: bs.sliding_window(0, 64, 16, 8), "they are 0, 64, 16"),
        (lambda: bs.block_diagonal([], 16), "they are 0, 0, 16"),
        (lambda: bs.strided(64, 64, 16, 0), "stride must be 1 or more; it is 0"),
        (lambda: bs.fixed(64, 64, 16, 2, summary=0), "summary must be 1 or more; it is 0"),
        (lambda: bs.bigbird(64, 64, 16, random=-1), "random must be 0 or more; it is -1"),
        (lambda: bs.block_diagonal([3, -1], 16), r"lengths\[1\] must be 0 or more; it is -1"),
        (lambda: bs.fixed(64, 64, 16, 0), "stride must be 1 or more; it is 0"),
    ],
)
def test_bad_zoo(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    "setting, message", [("", "needs Triton"), ("import triton", "needs a GPU, or TRITON_INTERPRET=1")]
)
def test_triton_without_triton_or_gpu(setting, message):
    code = f"""
import sys
sys.path.insert(0, {str(FILE.parent)!r})
{setting or "sys.modules['triton'] = None"}
import torch
import blocksparse_attention as bs
x = torch.randn(1, 1, 20, 16)
layout = bs.dense(20, 20, 16)
print(bs.blocksparse_attention(x, x, x, layout).shape)
bs.blocksparse_attention(x, x, x, layout, backend="triton")
"""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 1 and "torch.Size" in done.stdout
    assert done.stderr.splitlines()[-1].startswith("RuntimeError") and message in done.stderr


# ---- cost ------------------------------------------------------------------------------------------------------------
MEMORY = """
import resource, sys
sys.path.insert(0, {folder!r})
import torch
import blocksparse_attention as bs
torch.set_num_threads(1)

def run(s):
    q, k, v = (torch.randn(1, 8, s, 64, requires_grad=True) for _ in range(3))
    layout, do = bs.random(s, s, 64, {density}, heads=8), torch.randn_like(q)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    bs.blocksparse_attention(q, k, v, layout).backward(do)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before, q.nbytes

run(512)
print(*run(16384))
"""


@pytest.mark.slow
@pytest.mark.parametrize("density", [0.05, 0.25])
def test_memory(density):
    code = MEMORY.format(folder=str(FILE.parent), density=density)
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    peak, size = map(int, done.stdout.split())
    assert 2 * size < peak <= 7 * size + 64 * 2**20


def times(contenders, repeats=5):
    best = [math.inf] * len(contenders)
    for _ in range(repeats + 1):
        for n, contender in enumerate(contenders):
            CUDA and torch.cuda.synchronize()
            begin = CLOCK()
            contender()
            CUDA and torch.cuda.synchronize()
            best[n] = min(best[n], CLOCK() - begin)
    return best


@pytest.mark.slow
@pytest.mark.parametrize("density, forward, backward", [(0.05, 5.5, 6), (0.25, 1.7, 1.7)])
def test_speed_on_a_cpu(density, forward, backward):
    """Times faster than dense attention on one thread: about two thirds of what a quiet machine gives."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        q, k, v, do = (torch.randn(1, 2, 4096, 64, requires_grad=n < 3) for n in range(4))
        mask = (torch.rand(2, 64, 64) < density - 1 / 64) | torch.eye(64, dtype=torch.bool)
        layout = BlockLayout.from_mask(mask, 64)
        calls = [lambda: attention(q, k, v, layout, backend="torch"), lambda: sdpa(q, k, v)]
        with torch.no_grad():
            ours, other = times(calls)
        assert other / ours > forward
        ours, other = times([lambda f=f: torch.autograd.grad(f(), (q, k, v), do) for f in calls])
        assert other / ours > backward
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

def compiled(self, *args, warmup, run=triton.JITFunction.run, **options):
    kernel = run(self, *args, warmup=True, **options)
    print(self.__name__, len(kernel.asm["cubin"]), kernel.asm["ptx"].count("ex2.approx"))

triton.runtime.driver.set_active(Driver())
triton.JITFunction.run = compiled
torch.set_float32_matmul_precision({precision!r})
bs.INTERPRET = True  # gives a layout on the CPU its tiles
mask = torch.ones(4, 4, dtype=torch.bool).tril()
layout = bs.BlockLayout.from_mask(mask, {b}, lambda b, h, i, j: (i + j) % 3 > 0)
bs.INTERPRET = False
q, do = torch.randn(2, 1, 2, 4 * {b}, {d}).to(torch.{dtype})
lse, lens = torch.zeros(1, 2, 4 * {b}), torch.tensor([50])
rest = layout.tiles, [layout.lead_b, layout.lead_h, layout.block_size, layout.tile], lens, 0.1, True
bs.triton_forward(q, q, q, *rest)
bs.triton_backward(q, q, q, q, lse, do, lse, *rest)
"""


@pytest.mark.slow
@pytest.mark.skipif(CUDA or bs.triton is None, reason="needs Triton, and no GPU, where the other tests compile")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype, d, b, precision", [("bfloat16", 64, 16, "highest"), ("float32", 256, 64, "high")])
def test_kernels_compile_without_a_gpu(capability, dtype, d, b, precision, tmp_path):
    """To machine code, which the interpreter cannot show: compilers refuse what it takes."""
    code = COMPILE.format(folder=str(FILE.parent), capability=capability, dtype=dtype, d=d, b=b, precision=precision)
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:500]
    names, _, exponentials = zip(*(line.split() for line in done.stdout.splitlines()))
    assert names == ("forward_kernel", "delta_kernel", "dkdv_kernel", "dq_kernel")
    forward, _, backward, _ = map(int, exponentials)  # of as many scores a thread
    assert forward <= backward + 8, "the softmax is computed twice, in two layouts"


# ---- the file --------------------------------------------------------------------------------------------------------
def test_the_least_of_the_times_that_count():
    """In turn, each right after a call of its own that does not count."""
    calls = []

    def contender(name, *lengths):
        def call():
            calls.append(name)
            time.sleep(lengths[calls.count(name) - 1])

        return call

    one, other = contender("one", 0, 0.02, 0, 0.4), contender("other", 0.4, 0.01, 0.4, 0.4)
    a, b = bs.seconds([one, other], 2, torch.device("cpu"))
    assert calls == ["one", "one", "other", "other"] * 2 and 0.02 <= a < 0.3 and 0.01 <= b < 0.3


def test_the_header_agrees_with_requirements():
    header = FILE.read_text().split("# ///")[1]
    for floor in re.findall(r'"([^"]+)"', re.search(r"dependencies = (.*)", header).group(1)):
        assert floor.startswith("torch") or floor.replace("'", '"') in (ROOT / "requirements.txt").read_text()


def test_equations_of_the_docstring_are_found_in_the_code():
    text = FILE.read_text()
    numbers = set(re.findall(r"\((\d+)\)$", ast.get_docstring(ast.parse(text)), re.M))
    assert numbers and numbers <= set(re.findall(r"\((\d+)\)", text.split('"""', 2)[2]))
    assert all("  # " in line for line in inspect.getsource(bs.Args).splitlines() if re.match(r"    \w+:", line))


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags, message",
    [
        ("--seq 0", "all sizes must be above 0"),
        ("--threads 0", "all sizes must be above 0"),
        ("--batch 1000000000000000000000", "all sizes must be above 0 and below 2^31"),
        ("--densities 0.1 1.5", "densities up to 1"),
        ("--kv-heads 3", "--heads 8 must be a multiple of --kv-heads 3"),
        ("--device mps", "it must be cpu, or cuda where there is one"),
        ("--output nowhere/x.png", "a .png in a folder that can be written to"),
    ],
)
def test_a_bad_flag_is_one_sentence(flags, message):
    done = subprocess.run([sys.executable, FILE, *flags.split()], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and message in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.skipif(not bs.INTERPRET, reason="for the interpreter, which takes the tensors of a CPU")
def test_head_sizes_that_the_kernels_do_not_take():
    x, layout = torch.zeros(1, 1, 40, 257), bs.dense(40, 40, 16)
    with pytest.raises(ValueError, match=r"head sizes up to 256, and no float64: q \[1, 1, 40, 257\]"):
        attention(x, x, x, layout, backend="triton")
    assert attention(x, x, x, layout).shape == x.shape


@pytest.mark.parametrize("spoil, worst", [(1.0, 0.5), (1.001, 20), (math.nan, math.nan)])
def test_the_self_check_can_fail(spoil, worst, monkeypatch):
    """Where outputs or what they are compared with are a thousandth off, or not numbers."""
    exact = bs.dense_attention
    monkeypatch.setattr(bs, "dense_attention", lambda *x: tuple(y * spoil for y in exact(*x)))
    error = bs.self_check("torch", torch.device(DEVICE), torch.float32)
    assert error < worst if spoil == 1 else error > worst if spoil > 1 else math.isnan(error)


@pytest.mark.slow
def test_the_file_alone(tmp_path):
    shutil.copy(FILE, tmp_path)
    flags = "--seq 256 --heads 2 --dim 16 --block 16 --densities 0.2 0.8 --repeats 1 --no-flex --threads 1".split()
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTHONPATH")}
    done = subprocess.run(
        [sys.executable, "-I", FILE.name, *flags], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "check: torch, float32" in done.stdout and "prefix-lm" in done.stdout
    assert (tmp_path / "blocksparse_attention.png").stat().st_size > 10_000


# ---- with a GPU ------------------------------------------------------------------------------------------------------
@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("d", [16, 32, 64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("b", [8, 64, 128])
def test_gpu_types_and_head_sizes(d, dtype, b):
    mask = (torch.rand(4, -(-400 // b), -(-500 // b)) < 0.5).cuda()
    layout, live = BlockLayout.from_mask(mask, b), pairs(mask, b, 400, 500, 2, causal=True)
    x = inputs(2, 4, 2, 400, 500, d, dtype)
    x[4][~live.any(-1).expand(2, 4, 400)] = 0
    ours = values(lambda *y: attention(*y, layout, causal=True, return_lse=True), *x[:4], x[4].float())
    exact, naive = (values(lambda *y: dense(*y, live), *(y.to(t) for y in x)) for t in (torch.float64, dtype))
    for o, n, e in zip(ours, naive, exact):
        some = e.isfinite()
        allowed = 2e-5 if dtype == torch.float32 else 1e-3
        allowed = allowed * e[some].abs().max() + (2 * (n - e)[some].abs().max() if dtype.itemsize == 2 else 0)
        assert (o - e)[some].abs().max() <= allowed


@pytest.mark.gpu
@gpu
def test_gpu_beyond_two_to_the_31():
    q = torch.randn(1, 1, 1024, 64, dtype=torch.bfloat16, device="cuda").expand(33, 1024, -1, -1).contiguous()
    assert q.numel() > 2**31
    layout = bs.random(1024, 1024, 64, 0.1, device="cuda")
    with torch.no_grad():
        out = attention(q, q, q, layout)
    assert out[-1, -1].equal(out[0, 0])


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("b, most", [(128, 0.25), (64, 0.3)])
def test_gpu_time_follows_density(b, most):
    q = torch.randn(4, 16, 8192, 64, dtype=torch.bfloat16, device="cuda")
    with torch.no_grad():
        layouts = bs.random(8192, 8192, b, 0.1, 16, device="cuda"), bs.dense(8192, 8192, b, device="cuda")
        sparse, full = times([lambda layout=layout: attention(q, q, q, layout) for layout in layouts])
    assert sparse / full < most


@pytest.mark.gpu
@gpu
def test_gpu_no_host_sync():
    q = torch.randn(2, 2, 256, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    layout, lens = bs.causal(256, 256, 64, device="cuda"), torch.tensor([200, 100]).cuda()
    attention(q, q, q, layout, causal=True, kv_lens=lens).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        attention(q, q, q, layout, causal=True, kv_lens=lens).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.slow
@gpu
@pytest.mark.skipif(OLD_INTERPRETER, reason="the interpreter of Triton 3.6 fails with numpy 2.4")
def test_the_interpreter_in_a_process_without_a_gpu():
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", __file__], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
