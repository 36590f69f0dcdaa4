# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.11", "numpy>=2", "tyro>=1,<2", "matplotlib>=3.9", "triton>=3.6; sys_platform == 'linux'"]
# ///
"""Block-sparse attention: softmax attention over chosen blocks, forward and backward, at their share of the cost.

A layout says which blocks of b queries see which blocks of b keys; the rest is neither computed nor stored. On a GPU
fused Triton kernels run, elsewhere plain PyTorch whose cost follows the density as well. It stands in for
BlocksparseTransformer of openai/blocksparse (Gray, Radford and Kingma 2017), with any number of blocks in a row,
layouts by head and batch, grouped heads, lengths, element masks, log-sum-exp and its gradient, and double backward.

For query i and key j, L the pairs that live, and `scale` any number, D^-1/2 by default:

    s_ij = scale q_i . k_j   for (i, j) in L, and -inf elsewhere                                              (1)
    lse_i = log sum_j exp s_ij                                                                                (2)
    o_i = sum_j p_ij v_j                                                                                      (3)
    p_ij = exp(s_ij - lse_i)                                                                                  (4)
    given do and dlse, the gradients of o and lse:
    delta_i = do_i . o_i - dlse_i                                                                             (5)
    ds_ij = p_ij (do_i . v_j - delta_i)                                                                       (6)
    dv_j = sum_i p_ij do_i                                                                                    (7)
    dq_i = scale sum_j ds_ij k_j                                                                              (8)
    dk_j = scale sum_i ds_ij q_i                                                                              (9)

L is the layout, its element masks, j < kv_lens and, where causal, j <= i + Sk - Sq, all at once. A query without any
pair has o = 0, lse = -inf and no gradient. A key that no query selects may hold NaN.

    from blocksparse_attention import BlockLayout, blocksparse_attention, sliding_window

    layout = BlockLayout.from_mask(mask, block_size=64)      # bool [Qb, Kb], [H, Qb, Kb] or [B, H, Qb, Kb]
    layout = sliding_window(4096, 4096, 64, window=512)      # or one of the zoo below
    out = blocksparse_attention(q, k, v, layout)             # [B, H, Sq, D]; k and v may have fewer heads

    python kernels/blocksparse_attention.py                  # check itself, measure, and draw; --help for the shapes

FLOPs are counted as 4 B H Sq Sk D density forward, for two products, and 2.5 times that backward, for five. The kernels
compute seven there, two of them twice, so that no sum depends on the order of programs; the PyTorch path five. The
density is that of the blocks: what causal removes from them counts as done.

Measured so far on a CPU alone: B 1, H 8, S 4096, D 64, float32, block 64, random layouts with the diagonal, 2 threads,
AMD EPYC (Zen 5), the best of 12, in turn with dense SDPA and with FlexAttention, compiled, and each right after a call
of its own; the middle of twelve runs, in the last two lines and with backward of three:

    density      forward    times dense    times Flex      with backward    times dense
       5.0 %      9.5 ms       20.3 x         1.38 x             39 ms         18.0 x
      12.3 %       20 ms        9.9 x         1.53 x             72 ms          9.5 x
      24.6 %       37 ms        5.2 x         1.52 x            148 ms          4.8 x
      89.9 %      114 ms        1.71 x        1.75 x            400 ms          1.75 x
     100   %      108 ms        1.79 x        2.06 x            407 ms          1.72 x

FlexAttention is told which blocks are whole; from run to run it takes 1.2 to 1.5 times as long at 5.0 %, 1.4 to 1.6 at
12.3 and at 24.6 %. Called right after another, without the call that does not count, it takes 1.0, 1.3 and 1.5 times as
long: then our output is often on pages that the system has to give first. There oneDNN multiplies, at twice MKL's rate
(see `onednn_pays`); on another processor, where MKL does at 177 GFLOP/s a thread, an earlier version was 1.19, 1.34 and
1.44 times as fast as FlexAttention, 9.8, 4.9 and 2.7 as dense attention.

The zoo, in one run, is 1.9 to 11 times as fast as dense attention. Against FlexAttention, where no mask cuts a block,
BigBird is 1.56 and block-diagonal 1.77 times as fast; where one does, prefix-LM is 1.34, Longformer 1.20, causal 1.19,
strided 1.10, fixed 0.89 and a sliding window 0.85.

No GPU has been at hand: the kernels are checked in Triton's interpreter, and compile for compute capabilities 8.0, 9.0,
10.0 and 12.0. For the table of your machine, run the file.

What matters beyond the equations:
 1. The layout is in compressed rows and columns: memory linear in the blocks, built without loops in Python.
 2. -inf masks, and never a large number; a maximum of -inf is replaced before it is subtracted.
 3. The kernels put blocks into tiles of 64 or 128, of which 64 bits say which sub-blocks live. They run over whole
    tiles first, with no mask but that of kv_lens, then over those that a mask, the diagonal or an end cuts.
 4. In those, keys that no query sees and queries that see no key are not loaded but 0: 0 NaN is NaN.
 5. In the kernels the scale comes after the product, in float32, and with log2 e in it: exp2 is what the hardware has.
 6. One kernel sums dk and dv over the columns, for all the query heads of a key head, one sums dq over the rows.
 7. The PyTorch path puts rows with equal numbers of blocks together, over all heads, in chunks that suit the cache of
    every thread. There, without a mask, exp is tried without a maximum; its sums, if they leave 1e-12 to 1e12, show
    that it needed one. So values may go from 1e-26 to 1e26. It is an exp2, which took a fifth of MKL's exp above.
 8. It copies q, k and v where their blocks are no view; the kernels take strides as they are if the last one is 1.
 9. It waits for a GPU to know the sizes of its chunks; the kernels never do.
"""

# Shapes: B batch, H query heads, K key heads, G = H / K, Sq queries, Sk keys, D head size; b block, Qb and Kb blocks of
# queries and of keys, E live blocks; R rows of blocks, n blocks in each; T tile of blocks in the kernels, M x N scores.

import functools
import itertools
import math
import os
import statistics
import sys
import time
from collections import namedtuple
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

try:
    import triton
    import triton.language as tl
except ImportError:  # the CPU wheel of torch brings none, and the PyTorch path works without
    triton, tl = None, SimpleNamespace(constexpr=float)
jit = triton.jit if triton else lambda kernel: kernel

INTERPRET = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"  # the kernels run on the CPU, in numpy
BLOCKS = (8, 16, 32, 64, 128)
DTYPES = torch.float16, torch.bfloat16, torch.float32, torch.float64
LOG2_E = math.log2(math.e)
TINY = 1.2e-38  # what float32 may flush to 0
CHUNK = 2**17  # scores that the PyTorch path holds for each thread, by oneDNN more; or those of one row


def cdiv(a, b):
    """a / b, rounded up."""
    return -(-a // b)


def described(x):
    """What was given, in a message."""
    return f"{x.dtype} {list(x.shape)} on {x.device}" if isinstance(x, Tensor) else type(x).__name__


# ==== the layout ======================================================================================================
def entries(live):
    """bool [heads, own, other] -> row [E], heads and own in one number, and column [E], in order."""
    *head, row, col = live.squeeze(0).nonzero().unbind(1)
    return head[0] * live.shape[1] + row if head else row, col


class Index(NamedTuple):
    """The blocks of heads x own x other, row by row; `key`, `sub` and `part` are [0] where there is nothing to say."""

    seg: Tensor  # [2 R + 1]; row r has whole blocks from seg[2 r] on, partial ones from seg[2 r + 1] to seg[2 r + 2]
    idx: Tensor  # [E], columns, ascending in either part of a row
    key: Tensor  # [E], row, part and column in one number, to search in
    sub: Tensor  # [E], which sub-blocks live, in bits
    part: Tensor  # [E], which element mask, or -1
    order: Tensor  # [heads, own], the rows of each head, the longest first


def index(row, col, shape, partial, sub, part, late):
    """The index of blocks, given in order, of heads x own x other = `shape`."""
    heads, own, other = shape
    rows = torch.arange(2 * heads * own + 1, device=row.device)
    if partial is not None:
        key, by_key = ((row * 2 + partial) * other + col).sort()
        sub, part = (x[by_key] if len(x) else x for x in (sub, part))
        col, seg = key % other, torch.searchsorted(key, rows * other)
    else:
        ends = torch.searchsorted(row.contiguous(), rows[: heads * own + 1])
        key, seg = row[:0], ends.repeat_interleave(2)[1:]  # where the whole ones end, the row does
    count = seg[::2].diff().view(heads, own)
    if late:  # of equally long rows the late ones go first: under causal=True they are longer
        order = own - 1 - count.flip(-1).argsort(dim=-1, descending=True, stable=True)
    else:
        order = count.argsort(dim=-1, descending=True, stable=True)
    return Index(seg.int(), col.int(), key, sub, part, order.int())


def both_ways(row, col, shape, partial, sub, part, bits, back=None):
    """The index of the query blocks, that of the key blocks, and the packed element masks: thirteen tensors, as an
    operator takes them."""
    heads, Qb, Kb = shape
    forth = index(row, col, shape, partial, sub, part, late=True)
    back = back or (row // Qb * Kb + col, row % Qb)
    return [*forth, *index(*back, (heads, Kb, Qb), partial, sub, part, late=False), bits]


def split(tensors):
    """The thirteen as two of Index, and the packed element masks."""
    return Index(*tensors[:6]), Index(*tensors[6:12]), tensors[12]


def blocks_of(index):
    """Row [E] and column [E] of every block."""
    count, idx = index.seg[::2].long().diff(), index.idx.long()
    return torch.arange(len(count), device=idx.device).repeat_interleave(count, output_size=len(idx)), idx


def pack(mask):
    """Element masks [E, b, b] -> which are partial [E], and those packed in bits [partial, b, b / 8]."""
    partial = ~mask.flatten(1).all(1)
    octets = mask[partial].unflatten(2, (-1, 8)).byte() << torch.arange(8, device=mask.device, dtype=torch.uint8)
    return partial, octets.sum(-1, dtype=torch.uint8)


def unpack(bits):
    """[..., b / 8] -> bool [..., b]."""
    return (bits[..., None] >> torch.arange(8, device=bits.device, dtype=torch.uint8) & 1).bool().flatten(-2)


def coarsen(tensors, shape, b):
    """Tiles for the kernels, 64 or 128 wide, of which `sub` says which blocks live: their size and thirteen tensors."""
    (heads, Qb, Kb), (forth, _, bits) = shape, split(tensors)
    (row, col), part = blocks_of(forth), forth.part
    head, row = row // Qb, row % Qb

    def tiles(T):
        """The tile that each block is in: head, row and column in one number."""
        f = T // b
        return (head * cdiv(Qb, f) + row // f) * cdiv(Kb, f) + col // f

    T = max(b, 64)
    if 8 < b < 128 and len(row) and 0.9 * len(tiles(128).unique()) * (128 // b) ** 2 <= len(row):
        T = 128  # where the blocks fill them, wide tiles are faster
    f, (tile, of) = T // b, tiles(T).unique(return_inverse=True)  # f x f blocks in a tile, block n in tile[of[n]]
    Qt, Kt = cdiv(Qb, f), cdiv(Kb, f)
    at = row % f * f + col % f  # the place of a block in its tile
    sub, tile_part, partial = part[:0].long(), part, torch.zeros_like(tile, dtype=torch.bool)
    if f > 1:
        sub = torch.zeros_like(tile).index_add_(0, of, torch.ones_like(at) << at)
        partial = sub != (-1 if f == 8 else (1 << f * f) - 1)
    if len(part):  # a tile with an element mask in it has one of its own size
        one = part >= 0
        masked = torch.zeros_like(partial).index_fill_(0, of[one], True)
        tile_part = torch.where(masked, masked.cumsum(0) - 1, -1).int()
        octets = torch.full((int(masked.sum()), f * f, b, b // 8), 255, dtype=torch.uint8, device=row.device)
        octets[tile_part[of[one]].long(), at[one]] = bits[part[one].long()]
        bits = octets.unflatten(1, (f, f)).transpose(2, 3).reshape(-1, T, T // 8)
        partial |= masked
    return T, both_ways(tile // Kt, tile % Kt, (heads, Qt, Kt), partial, sub, tile_part, bits)


class BlockLayout:
    """Which blocks of queries see which blocks of keys, in compressed rows and columns: memory linear in the blocks."""

    def __init__(self, shape, block_size, tensors, rule=None):
        self.shape, self.block_size, self.tensors, self.rule = tuple(shape), block_size, tensors, rule
        self.index, _, self.bits = split(tensors)
        *_, self.lead_b, self.lead_h, self.Qb, self.Kb = 1, 1, *self.shape
        self.tile, self.tiles = block_size, tensors
        if self.device.type == "cuda" or INTERPRET:  # where there are kernels to take them
            self.tile, self.tiles = coarsen(tensors, (self.lead_b * self.lead_h, self.Qb, self.Kb), block_size)

    @classmethod
    def from_mask(cls, mask, block_size, element_mask=None):
        """`mask`, bool [Qb, Kb], [H, Qb, Kb] or [B, H, Qb, Kb], has the live blocks; leading dimensions may be 1.

        `element_mask` has patterns inside of them: bool [E, b, b] in the order of mask.nonzero(), or a function of
        batch, head, query and key (integer tensors that broadcast) that says which pairs live; it is called on live
        blocks only, but on all of each, beyond the last query and key too, and where a leading dimension of `mask` is
        1 or absent, batch or head is always 0. What causal=True, the ends and kv_lens remove needs no element mask.
        """
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.dim() not in (2, 3, 4) or not mask.numel():
            wanted = "bool [Qb, Kb], [H, Qb, Kb] or [B, H, Qb, Kb], not empty"
            raise ValueError(f"mask must be {wanted}; it is {described(mask)}")
        if not isinstance(block_size, int) or block_size not in BLOCKS:
            raise ValueError(f"block_size must be one of {BLOCKS}; it is {block_size}")
        b, (_, H, Qb, Kb) = block_size, (1, 1, *mask.shape)[-4:]
        blocks = mask.reshape(-1, Qb, Kb)
        row, col = entries(blocks)
        if len(row) >= 2**31:
            raise ValueError(f"a layout takes up to 2^31 - 1 blocks; mask has {len(row)}: choose a larger block_size")
        part, bits = row.new_empty(0, dtype=torch.int32), row.new_empty(0, b, b // 8, dtype=torch.uint8)
        partial = None
        given, wanted = isinstance(element_mask, Tensor), [len(row), b, b]
        fits = given and element_mask.dtype == torch.bool and list(element_mask.shape) == wanted
        if not (fits or element_mask is None or callable(element_mask)):
            wanted = f"bool {wanted}, a [b, b] for each block, or a function"
            raise ValueError(f"element_mask must be {wanted}; it is {described(element_mask)}")
        if element_mask is not None and len(row):
            within, packed = torch.arange(b, device=row.device), []
            for some in torch.arange(len(row), device=row.device).split(max(1, 2**22 // b**2)):
                r, c = row[some, None, None], col[some, None, None]
                i, j = r % Qb * b + within[:, None], c * b + within
                live = element_mask[some] if given else element_mask(r // Qb // H, r // Qb % H, i, j)
                try:
                    live = torch.as_tensor(live, device=row.device, dtype=torch.bool).expand(len(some), b, b)
                except (TypeError, RuntimeError) as error:
                    raise ValueError(f"element_mask must give booleans that broadcast: {error}") from error
                packed.append(pack(live))
            partial, bits = (torch.cat(x) for x in zip(*packed))
            if len(bits):
                part = torch.where(partial, partial.cumsum(0) - 1, -1).int()
            else:
                partial = None
        back = entries(blocks.mT) if partial is None else None  # already sorted
        tensors = both_ways(row, col, blocks.shape, partial, part[:0].long(), part, bits, back)
        return cls(mask.shape, b, tensors, element_mask if callable(element_mask) else None)

    @property
    def device(self):
        return self.bits.device

    @property
    def density(self):
        """The share of the blocks that live."""
        return len(self.index.idx) / math.prod(self.shape)

    def to(self, device):
        return BlockLayout(self.shape, self.block_size, [x.to(device) for x in self.tensors], self.rule)

    def __reduce__(self):
        """Tiles are made anew where it is unpickled; the rule, which the benchmark alone uses, may be no function of a
        module and stays behind."""
        return BlockLayout, (self.shape, self.block_size, self.tensors)

    def to_mask(self):
        """The mask of blocks that it was made from."""
        row, col = blocks_of(self.index)
        mask = torch.zeros(math.prod(self.shape), dtype=torch.bool, device=self.device)
        return mask.index_fill_(0, row * self.Kb + col, True).view(self.shape)

    def __repr__(self):
        b, E, masked = self.block_size, len(self.index.idx), len(self.bits)
        return (
            f"BlockLayout({list(self.shape)} of {b} x {b}: {self.Qb * b} queries, {self.Kb * b} keys, {E} blocks, "
            f"density {self.density:.3g}, {masked} with an element mask, on {self.device})"
        )


# ==== the zoo: known patterns =========================================================================================
def grid(sq, sk, block_size, device):
    """Indices of the query blocks [Qb, 1] and of the key blocks [1, Kb]."""
    if min(sq, sk) < 1 or block_size not in BLOCKS:
        raise ValueError(f"needs sq and sk above 0 and a block_size of {BLOCKS}: they are {sq}, {sk}, {block_size}")
    i, j = (torch.arange(cdiv(s, block_size), device=device) for s in (sq, sk))
    return i[:, None], j[None, :]


def at_least(least, **numbers):
    for name, number in numbers.items():
        if number < least:
            raise ValueError(f"{name} must be {least} or more; it is {number}")


def uniform(heads, i, j, seed):
    """Random numbers [heads, Qb, Kb], the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(heads, len(i), j.shape[1], generator=generator, dtype=torch.float32, device="cpu").to(i.device)


def own_keys(i, sq, sk, block_size):
    """The first and the last block that the keys of the queries' own places are in, under causal=True."""
    return i + (sk - sq) // block_size, i - (sq - sk) // block_size


def dense(sq, sk, block_size, device=None):
    """Every block (Vaswani et al. 2017, arXiv 1706.03762)."""
    i, j = grid(sq, sk, block_size, device)
    return BlockLayout.from_mask((i >= 0) & (j >= 0), block_size)


def causal(sq, sk, block_size, device=None):
    """Key blocks up to the diagonal, aligned to the bottom right (Radford et al. 2018); for a call with causal=True."""
    i, j = grid(sq, sk, block_size, device)
    return BlockLayout.from_mask(j * block_size < (i + 1) * block_size + sk - sq, block_size)


def sliding_window(sq, sk, block_size, window, device=None):
    """The `window` keys that end at the query's own (Mistral: Jiang et al. 2023, arXiv 2310.06825)."""
    (i, j), b, shift = grid(sq, sk, block_size, device), block_size, sk - sq
    near = (j * b < (i + 1) * b + shift) & ((j + 1) * b - 1 > i * b + shift - window)
    return BlockLayout.from_mask(near, b, lambda _, h, i, j: (j <= i + shift) & (j > i + shift - window))


def strided(sq, sk, block_size, stride, heads=1, device=None):
    """The last `stride` blocks and every stride-th one before (Child et al. 2019, arXiv 1904.10509); with causal=True.

    The lattice of head h is shifted by h.
    """
    at_least(1, stride=stride, heads=heads)
    i, j = grid(sq, sk, block_size, device)
    h, (first, last) = torch.arange(heads, device=device)[:, None, None], own_keys(i, sq, sk, block_size)
    return BlockLayout.from_mask((j <= last) & ((first - j < stride) | ((last - j - h) % stride == 0)), block_size)


def fixed(sq, sk, block_size, stride, summary=1, heads=1, device=None):
    """Blocks of the query's own stretch of `stride`, and `summary` of every stretch before (Child et al. 2019).

    Head h takes the summary h stretches of `summary` from the end, around; for a call with causal=True.
    """
    at_least(1, stride=stride, summary=summary, heads=heads)
    i, j = grid(sq, sk, block_size, device)
    h, (first, last) = torch.arange(heads, device=device)[:, None, None], own_keys(i, sq, sk, block_size)
    summaries = (stride - 1 - j % stride) // summary == h % max(1, stride // summary)
    return BlockLayout.from_mask((j <= last) & ((first // stride <= j // stride) | summaries), block_size)


def bigbird(sq, sk, block_size, window=3, globals=1, random=3, heads=1, seed=0, device=None):
    """A window, global blocks at the beginning and random ones (Zaheer et al. 2020, arXiv 2007.14062), in blocks."""
    at_least(0, random=random)
    i, j = grid(sq, sk, block_size, device)
    draw = uniform(heads, i, j, seed)
    chosen = torch.zeros_like(draw, dtype=torch.bool).scatter_(-1, draw.topk(min(random, j.shape[1])).indices, True)
    return BlockLayout.from_mask(chosen | ((i - j).abs() <= window // 2) | (i < globals) | (j < globals), block_size)


def longformer(sq, sk, block_size, window, globals=1, device=None):
    """`window` keys around the query's own, and tokens that see and are seen by all (Beltagy et al. 2020)."""
    (i, j), b, half = grid(sq, sk, block_size, device), block_size, window // 2
    near = ((j - i) * b - b < half) & ((i - j) * b - b < half)
    mask = near | (i * b < globals) | (j * b < globals)
    return BlockLayout.from_mask(mask, b, lambda _, h, i, j: ((i - j).abs() <= half) | (i < globals) | (j < globals))


def block_diagonal(lengths, block_size, device=None):
    """Documents of given lengths, packed, that do not see each other (Krell et al. 2021, arXiv 2107.02027)."""
    at_least(0, **{f"lengths[{n}]": length for n, length in enumerate(lengths)})
    b, lengths = block_size, torch.tensor(lengths, device=device, dtype=torch.long)
    owner = torch.arange(len(lengths), device=device).repeat_interleave(lengths)
    grid(len(owner), len(owner), b, device)
    first, last = owner[::b], torch.cat((owner[b - 1 :: b], owner[-1:]))[: cdiv(len(owner), b)]  # of each block
    mask = (first[:, None] <= last) & (first <= last[:, None])

    def at(i):  # the documents of tokens, those behind the last one included
        return owner.to(i.device)[i.clamp(max=len(owner) - 1)]

    return BlockLayout.from_mask(mask, b, lambda _, h, i, j: at(i) == at(j))


def random(sq, sk, block_size, density, heads=1, seed=0, device=None):
    """The diagonal, and others at random up to `density` (Gray, Radford and Kingma 2017)."""
    i, j = grid(sq, sk, block_size, device)
    draw = uniform(heads, i, j, seed)
    diagonal = 1 / max(draw.shape[1:])
    return BlockLayout.from_mask((draw * (1 - diagonal) < density - diagonal) | (i == j), block_size)


def prefix_lm(sq, sk, block_size, prefix, device=None):
    """Keys of the prefix, and those up to the query (Raffel et al. 2020, arXiv 1910.10683; autoregress_at_key)."""
    (i, j), b, shift = grid(sq, sk, block_size, device), block_size, sk - sq
    mask = (j * b < prefix) | (j * b < (i + 1) * b + shift)
    return BlockLayout.from_mask(mask, b, lambda _, h, i, j: (j < prefix) | (j <= i + shift))


# ==== the PyTorch path ================================================================================================
@contextmanager
def onednn():
    """Products of float32 on a CPU by oneDNN, to which torch goes only where it may round them to bfloat16."""
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = "none"


@functools.cache
def onednn_pays():
    """Whether this is an AMD, where it takes half of MKL's time, and it does not round although it may."""
    if "AMD" not in torch.cpu.get_capabilities().get("cpu_name", ""):
        return False
    x = torch.full((2, 64, 64), 1 + 2**-20)  # 1 in bfloat16
    with onednn():
        return torch.equal(torch.bmm(x, torch.eye(64).expand(2, 64, 64)), x)


def capturing(x):
    """Whether a CUDA graph is being captured where x is."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def remembered(function):
    """A function of a layout's tensors and of numbers, whose last two results are kept as long as the layout is; on a
    GPU only those asked for with `keep`."""
    known = WeakTensorKeyDictionary()

    @functools.wraps(function)
    def wrapper(layout, *args, keep=False):
        if any(isinstance(x, Tensor) for x in args) or capturing(layout[0]):
            return function(layout, *args)  # which other calls, or those that are not in the graph, cannot use
        results = known.get(layout[0], {})
        if args in results:
            return results[args]
        with torch.inference_mode(False):  # a later call may want gradients
            result = function(layout, *args)
        if keep or not layout[0].is_cuda:  # an operator on a GPU may be in memory that a graph takes back
            known[layout[0]] = dict([*results.items()][-1:]) | {args: result}
        return result

    return wrapper


@remembered
def chunks(layout, sizes, q_shape, k_shape, kv_lens, causal, by_key, threads):
    """Rows of query blocks, or of key blocks, in groups of equally many blocks, and these in chunks.

    Returns the order of the rows [rows], the most blocks in a chunk, and the groups: their slice of the order, the
    number n of blocks in a row, and a function that goes through the chunks: a slice of R rows of the group, their
    blocks [R n], as numbers of blocks of k or of q, and what is hidden [R, b, t b] in the last t blocks of each row,
    or None where t is 0: only blocks that need a mask are there, or whole ones to fill up.
    """
    (B, H, Sq, _), (K, Sk), (lead_b, lead_h, b, _) = q_shape, k_shape[1:3], sizes
    forth, back, bits = split(layout)
    seg, idx, _, _, part, _ = back if by_key else forth
    Qb, Kb, shift, device = cdiv(Sq, b), cdiv(Sk, b), Sk - Sq, seg.device
    own, arange = Kb if by_key else Qb, torch.arange(b, device=device)

    # Every live block: row, entry of the layout, block of queries i, block of keys j, where the keys end.
    ends = seg[::2].long()
    first, last = (x.view(lead_b, lead_h, own).expand(B, H, own).flatten() for x in (ends[:-1], ends[1:]))
    count = last - first
    row = torch.arange(B * H * own, device=device).repeat_interleave(count)
    entry = torch.arange(len(row), device=device) + (last - count.cumsum(0))[row]
    head, i, j = row // own, row % own, idx[entry].long()
    i, j = (j, i) if by_key else (i, j)
    stop = torch.full_like(row, Sk) if kv_lens is None else kv_lens.clamp(0, Sk).long()[head // H]
    partial = (j + 1) * b > stop
    if len(part):
        partial |= part[entry] >= 0
    if causal:
        partial |= (j + 1) * b > i * b + 1 + shift
    if causal or kv_lens is not None:  # leave out what they hide wholly
        live = j * b < stop
        if causal:
            live &= j * b < ((i + 1) * b).clamp(max=Sq) + shift
        head, entry, i, j, stop, partial = (x[live] for x in (head, entry, i, j, stop, partial))

    # Rows in the order of their number of blocks, of masked ones; the blocks of a row together, whole ones first.
    q_block, k_block = head * Qb + i, (head // H * K + head % H // (H // K)) * Kb + j
    row, block, R = (k_block, q_block, B * K * Kb) if by_key else (q_block, k_block, B * H * Qb)
    count, tail = torch.bincount(row, minlength=R), torch.bincount(row[partial], minlength=R)
    order = (count * (len(row) + 1) + tail).argsort()
    by_row = (order.argsort()[row] * 2 + partial).argsort(stable=True)
    block, entry, i, j, stop = (x[by_row] for x in (block, entry, i, j, stop))
    numbers, groups = (x.tolist() for x in count[order].unique_consecutive(return_counts=True))
    tails = tail[order].tolist()

    def hidden_in(blocks, n, t):
        late = torch.arange(blocks.start, blocks.stop, device=device).view(-1, n)[:, n - t :]
        query, key = i[late][..., None, None] * b + arange[:, None], j[late][..., None, None] * b + arange
        mask = (query < Sq) & (key < stop[late][..., None, None])  # [R, t, b of queries, b of keys]
        if causal:
            mask &= key <= query + shift
        if len(part):
            which = part[entry[late]].long()
            mask &= unpack(bits[which.clamp(min=0)]) | (which < 0)[..., None, None]
        return ~(mask.permute(0, 3, 1, 2) if by_key else mask.transpose(1, 2)).flatten(2)

    def slices(n, R, rows, row, first):
        for begin in range(0, rows, R):
            end = min(begin + R, rows)
            some, t = slice(first + begin * n, first + end * n), tails[row + end - 1]  # tails ascend in a group
            yield slice(begin, end), block[some], hidden_in(some, n, t) if t else None

    spans, most, row, first = [], 0, 0, 0
    by_onednn = torch.backends.mkldnn.matmul.fp32_precision == "bf16"  # whose calls cost more
    fitting = CHUNK * (1 if not by_onednn else 2 if by_key else 4)
    for n, rows in zip(numbers, groups):
        fit = max(1, round(fitting / max(1, n * b * b))) * threads  # bmm gives every thread whole rows
        R = cdiv(rows, cdiv(rows, fit) * threads) * threads  # chunks of about one size
        spans.append((slice(row, row + rows), n, functools.partial(slices, n, R, rows if n else 0, row, first)))
        most, row, first = max(most, min(R, rows) * n), row + rows, first + rows * n
    return order, most, spans


def to_blocks(x, b):
    """[B, H, S, D] -> [B H blocks, b, D], the end padded with zeros; a view where it can be one."""
    short = -x.shape[2] % b
    return (F.pad(x, (0, 0, 0, short)) if short else x).reshape(-1, b, x.shape[3])


def from_blocks(x, shape):
    """The way back: [B H blocks, b, ...] -> [B, H, S, ...]."""
    return x.reshape(*shape[:2], -1, *x.shape[2:])[:, :, : shape[2]].contiguous()


def take(x, rows, out):
    """x[rows] in the beginning of `out`, which is there already, since fresh pages cost as much as arithmetic."""
    out = out[: len(rows)]
    return torch.index_select(x, 0, rows, out=out) if x.dtype == out.dtype else out.copy_(x.index_select(0, rows))


def fill_last(x, dim, where, value=0):
    """Put `value` into the last part of x along `dim`, as long as `where`, where that is true; None is nowhere."""
    if where is not None:
        x.narrow(dim, x.shape[dim] - where.shape[dim], where.shape[dim]).masked_fill_(where, value)


def accurate(x):
    """The type of statistics and sums."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def whole(layout, sizes, q, k, kv_lens, scale, causal):
    """Whether a layout is full, on a CPU, where PyTorch's own attention does the same."""
    square = not causal or (q.shape[2] == k.shape[2] and scale > TINY)  # its kernel multiplies -inf by the scale
    forth, _, bits = split(layout)
    full = len(forth.idx) == math.prod(sizes[:2]) * cdiv(q.shape[2], sizes[2]) * cdiv(k.shape[2], sizes[2])
    plain = not len(bits) and kv_lens is None and q.shape[1] == k.shape[1]
    return full and plain and square and q.device.type == "cpu"


def apart(x):
    """x with rows that PyTorch's own attention takes: one after another, and none that begins within the one before."""
    return x if x.stride(3) == 1 and x.stride(2) >= x.shape[3] else x.contiguous()


def torch_forward(q, k, v, layout, sizes, kv_lens, scale, causal):
    b, D, dtype = sizes[2], q.shape[3], accurate(q)
    if whole(layout, sizes, q, k, kv_lens, scale, causal):
        q, k, v = (apart(x) for x in (q, k, v))
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
        return out.contiguous(), lse.contiguous()
    Q, K, V = (to_blocks(x, b) for x in (q, k, v))
    order, most, groups = chunks(
        layout, tuple(sizes), q.shape, k.shape, kv_lens, causal, False, torch.get_num_threads()
    )
    gathered, scores = (Q.new_empty(shape, dtype=dtype) for shape in ((most, b, D), (most * b * b,)))
    out, m, total = torch.empty_like(Q), *(Q.new_full(Q.shape[:2], x, dtype=dtype) for x in (-math.inf, 1))

    def attend(span, n, slices, large):
        """The outputs of a group of rows. With nothing hidden and no score `large`, exp needs no maximum."""
        rows, M, T = order[span], m[span].zero_(), total[span]
        for at, blocks, hidden in slices():
            x, R = Q.index_select(0, rows[at]).to(dtype).mul_(scale), at.stop - at.start
            y = take(K, blocks, gathered).view(R, n * b, D)
            unseen = None if hidden is None else hidden.all(1)[..., None]
            fill_last(y, 1, unseen)  # no p of 0 may meet the NaN of a key that nobody here sees
            s = torch.bmm(x, y.mT, out=scores[: R * n * b * b].view(R, b, n * b))  # (1)
            fill_last(s, 2, hidden, -math.inf)
            if large or hidden is not None:
                peak = torch.amax(s, -1, out=M[at])
                s.sub_(peak.masked_fill(peak == -math.inf, 0)[..., None])
            torch.sum(s.mul_(LOG2_E).exp2_(), -1, out=T[at])
            if hidden is not None:
                T[at].masked_fill_(peak == -math.inf, 1)  # a query that sees nothing
            take(V, blocks, gathered)  # into y
            fill_last(y, 1, unseen)
            torch.bmm(s, y, out=x).div_(T[at][..., None])  # (3); x gives way to the output
            out.index_copy_(0, rows[at], x.to(q.dtype))

    large = q.is_cuda  # a GPU would have to wait to know
    for span, n, slices in groups:
        if n == 0:
            out.index_fill_(0, order[span], 0)
            continue
        attend(span, n, slices, large)
        if not large:
            low, high = total[span].aminmax()
            large = not (1e-12 < low.item() and high.item() < 1e12)  # from here on
            if large:
                attend(span, n, slices, large)
    lse = torch.empty_like(m).index_copy_(0, order, total.log_().add_(m))  # (2)
    return from_blocks(out, q.shape), from_blocks(lse, q.shape)


def torch_backward(q, k, v, out, lse, do, dlse, layout, sizes, kv_lens, scale, causal):
    b, D, dtype = sizes[2], q.shape[3], accurate(q)
    if whole(layout, sizes, q, k, kv_lens, scale, causal) and not dlse.any():  # which knows no gradient of lse
        q, k, v, do = (apart(x) for x in (q, k, v, do))
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        return tuple(x.contiguous() for x in backward(do, q, k, v, out, lse, 0.0, causal, scale=scale))
    Q, K, V, dO = (to_blocks(x, b) for x in (q, k, v, do))
    empty = lse == -math.inf
    delta = torch.linalg.vecdot(do.to(dtype), out.to(dtype))  # which needs no buffer for the products
    delta = (delta - dlse).masked_fill_(empty, 0)  # (5), and whatever came for an empty row
    less = lse.masked_fill(empty, math.inf) * -LOG2_E  # exp2(s - inf) is 0
    delta, less = (F.pad(x, (0, -x.shape[2] % b), value=z).view(-1, 1, b) for x, z in ((delta, 0), (less, -math.inf)))
    order, most, groups = chunks(layout, tuple(sizes), q.shape, k.shape, kv_lens, causal, True, torch.get_num_threads())
    gathered = [Q.new_empty(most, b, D, dtype=dtype) for _ in range(2)]
    scores = [Q.new_empty(most * b * b, dtype=dtype) for _ in range(2)]
    dq, dk, dv = torch.zeros_like(Q, dtype=dtype), torch.empty_like(K), torch.empty_like(V)
    for span, n, slices in groups:
        rows = order[span]
        if n == 0:
            dk.index_fill_(0, rows, 0)
            dv.index_fill_(0, rows, 0)
            continue
        Y, Z = (x.index_select(0, rows).to(dtype) for x in (K, V))  # which give way to their gradients
        Y.mul_(scale)
        for at, blocks, hidden in slices():
            y, z, R = Y[at], Z[at], at.stop - at.start
            x, g = (take(u, blocks, some).view(R, n * b, D) for u, some in zip((Q, dO), gathered))
            if hidden is not None:  # no 0 may meet the NaN of a query that sees none, or of an unseen key
                blind = hidden.all(1)[..., None]
                fill_last(x, 1, blind)
                fill_last(g, 1, blind)
                if hidden.shape[2] == n * b:
                    unseen = hidden.all(2)[..., None]
                    y.masked_fill_(unseen, 0)
                    z.masked_fill_(unseen, 0)
            p, ds = (u[: R * n * b * b].view(R, b, n * b) for u in scores)  # [R, keys, queries]
            torch.bmm(y, x.mT, out=p)
            torch.add(less[blocks].view(R, 1, n * b), p, alpha=LOG2_E, out=p).exp2_()  # (4)
            fill_last(p, 2, hidden)
            torch.bmm(z, g.mT, out=ds).sub_(delta[blocks].view(R, 1, n * b)).mul_(p)  # (6)
            torch.bmm(p, g, out=z)  # (7)
            dq.index_add_(0, blocks, torch.bmm(ds.mT, y, out=g).view(-1, b, D))  # (8)
            torch.bmm(ds, x, out=y).mul_(scale)  # (9)
        dk.index_copy_(0, rows, Y.to(q.dtype))
        dv.index_copy_(0, rows, Z.to(q.dtype))
    dq, dk, dv = from_blocks(dq, q.shape), from_blocks(dk, k.shape), from_blocks(dv, k.shape)
    return dq.to(q.dtype), dk, dv


def differentiable(q, k, v, layout, sizes, kv_lens, scale, causal):
    """(1) to (3) again for autograd to differentiate twice: it keeps every score."""
    b, D, dtype = sizes[2], q.shape[3], accurate(q)
    Q, K, V = (to_blocks(x, b).to(dtype) for x in (q, k, v))
    out, lse = torch.zeros_like(Q), Q.new_full(Q.shape[:2], -math.inf)
    order, _, groups = chunks(layout, tuple(sizes), q.shape, k.shape, kv_lens, causal, False, torch.get_num_threads())
    for span, n, slices in groups:
        for at, blocks, last in slices():
            rows, R = order[span][at], at.stop - at.start
            hidden = torch.zeros(R, b, n * b, dtype=torch.bool, device=q.device)
            fill_last(hidden, 2, last, True)
            y, z = (x[blocks].view(R, n * b, D).masked_fill(hidden.all(1)[..., None], 0) for x in (K, V))
            x = Q[rows].masked_fill(hidden.all(2)[..., None], 0)
            s = (x @ y.mT * scale).masked_fill(hidden, -math.inf)
            m = s.detach().amax(-1, keepdim=True)
            p = (s - m.masked_fill(m == -math.inf, 0)).exp()
            total = p.sum(-1, keepdim=True)
            some = total.masked_fill(total == 0, 1)
            out = out.index_copy(0, rows, p @ z / some)
            lse = lse.index_copy(0, rows, torch.where(total == 0, -math.inf, m + some.log())[..., 0])
    return from_blocks(out, q.shape).to(q.dtype), from_blocks(lse, q.shape)


# ==== the Triton kernels ==============================================================================================
# What they take, in groups. To a kernel, what is in Constants is known when it is compiled.
Strided = namedtuple("Strided", "data batch head row")  # of [B, H, S, D], the beginning and the strides
Tiles = namedtuple("Tiles", "lens ranges order idx sub part bits")  # kv_lens, `ranges` below, and one way of a layout
Sizes = namedtuple("Sizes", "lay_b lay_h H G Sq Sk scale log2_scale log2_size")  # lay_*: strides in heads, or 0
Constants = namedtuple("Constants", "T b D DP CAUSAL LENS PART SIGN PRECISION ACC")  # DP: D up to a power of two


@jit
def rows_of(x, start, some, stride, N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, MASKED: tl.constexpr):
    """N rows of x [S, D] from `start` on; zeros beyond D, up to DP, and, where MASKED, in all rows but `some` [N]."""
    n, d = tl.arange(0, N)[:, None], tl.arange(0, DP)[None, :]
    at = x + start.to(tl.int64) * stride + n * stride + d
    if MASKED:  # in the load, since a tl.where after it breaks the compiler of Triton 3.9
        return tl.load(at, mask=some[:, None] & (d < D), other=0.0)
    elif D < DP:
        return tl.load(at, mask=d < D, other=0.0)
    else:
        return tl.load(at)


@jit
def put_rows(x, y, start, stop, N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """Write y [N, DP] to x [S, D], contiguous, from `start` to `stop`."""
    n, d = tl.arange(0, N)[:, None], tl.arange(0, DP)[None, :]
    tl.store(x + start.to(tl.int64) * D + n * D + d, y.to(x.dtype.element_ty), mask=(start + n < stop) & (d < D))


@jit
def head_of(x, batch, head):
    return x.data + batch.to(tl.int64) * x.batch + head.to(tl.int64) * x.head


@jit
def program(tiles, size, N: tl.constexpr, C: tl.constexpr, BACK: tl.constexpr):
    """What this program does: batch, head, row of the layout, first of its N queries, or, where BACK, its N keys, and
    where the keys end."""
    G, S = (size.G, size.Sk) if BACK else (1, size.Sq)
    heads, rows, parts = size.H // G, (S + C.T - 1) // C.T, C.T // N
    one, pid = tl.program_id(0) // (rows * parts), tl.program_id(0) % (rows * parts)
    batch, head, stop = one // heads, one % heads, size.Sk
    if C.LENS:
        stop = tl.maximum(tl.minimum(tl.load(tiles.lens + batch), stop), 0).to(tl.int32)
    row = (batch * size.lay_b + head * G * size.lay_h) * rows
    tile = tl.load(tiles.order + row + pid // parts)
    return batch, head, row + tile, tile * C.T + pid % parts * N, stop


@jit
def steps_of(tiles, row, stop, T: tl.constexpr, N: tl.constexpr, MASKED: tl.constexpr, LENS: tl.constexpr):
    """How many steps of N a row has in its whole tiles, where LENS in those with a column before `stop`, or, where
    MASKED, in those that the diagonal or an end cuts, a to a + n, and the partial ones, from c on."""
    at = tiles.ranges + row * 6
    if MASKED:
        a, c, n = tl.load(at + 2), tl.load(at + 4), tl.load(at + 3) - tl.load(at + 2)
        count = n + tl.load(at + 5) - c
    else:
        a, end = tl.load(at), tl.load(at + 1)
        c, n = a, end - a
        if LENS:  # the columns ascend
            low = a
            while low < end:
                middle = (low + end) // 2
                before = tl.load(tiles.idx + middle) * T < stop
                low, end = tl.where(before, middle + 1, low), tl.where(before, end, middle)
            n = low - a
        count = n
    return (a, n, c), count * (T // N)


@jit
def place_of(step, span, tiles, T: tl.constexpr, N: tl.constexpr, MASKED: tl.constexpr):
    """The tile of a step, and its first key, or query, of N."""
    a, n, c = span
    tile = step // (T // N)
    tile = tl.where(tile < n, a + tile, c + tile - n) if MASKED else a + tile
    return tile, tl.load(tiles.idx + tile) * T + step % (T // N) * N


@jit
def elements_of(bits, which, i, start, T: tl.constexpr, N: tl.constexpr, BACK: tl.constexpr):
    """The element mask of queries i [M] and N keys from `start` on: 0 or 1, [M, N], or, where BACK, [N, M].

    Loaded in words of 32 keys: of a load for each score the compiler would keep the mask, and compute the softmax, in
    two layouts, with eleven times the work.
    """
    M: tl.constexpr = i.shape[0]
    W: tl.constexpr = min(N, 32)
    c = start % T + tl.arange(0, N // W) * W
    row = bits + tl.maximum(which, 0).to(tl.int64) * (T * T // 32) + i % T * (T // 32)
    if BACK:
        word = tl.where(which < 0, -1, tl.load(row[None, :] + c[:, None] // 32) >> (c[:, None] % 32))
        return tl.reshape(word[:, None, :] >> tl.arange(0, W)[None, :, None], [N, M]) & 1
    else:
        word = tl.where(which < 0, -1, tl.load(row[:, None] + c[None, :] // 32) >> (c[None, :] % 32))
        return tl.reshape(word[:, :, None] >> tl.arange(0, W)[None, None, :], [M, N]) & 1


@jit
def visible(
    i, start, tile, stop, tiles, size, N: tl.constexpr, C: tl.constexpr, MASKED: tl.constexpr, BACK: tl.constexpr
):
    """Whether queries i [M] see N keys from `start` on, in a tile: [M, N], or, where BACK, [N, M]; where not MASKED the
    ends alone decide."""
    j = start + tl.arange(0, N)
    row, col = (i[None, :], j[:, None]) if BACK else (i[:, None], j[None, :])
    live = (row < size.Sq) & (col < stop)
    if MASKED:
        if C.CAUSAL:
            live = live & (col <= row + (size.Sk - size.Sq))
        if C.b < C.T:
            at = row % C.T // C.b * (C.T // C.b) + col % C.T // C.b
            live = live & (((tl.load(tiles.sub + tile) >> at.to(tl.int64)) & 1) == 1)
        if C.PART:
            live = live & (elements_of(tiles.bits, tl.load(tiles.part + tile), i, start, C.T, N, BACK) == 1)
    return live


@jit
def forward_kernel(q, k, v, out, lse, tiles, size, C: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """Online softmax: M queries of one head against their tiles, m the largest score so far in units of log 2."""
    D: tl.constexpr = C.D
    DP: tl.constexpr = C.DP
    H, Sq = size.H, size.Sq
    batch, head, row, first, stop = program(tiles, size, M, C, False)
    i, where = first + tl.arange(0, M), (batch * H + head).to(tl.int64) * Sq
    x = rows_of(head_of(q, batch, head), first, i < Sq, q.row, M, D, DP, True)
    keys, values = head_of(k, batch, head // size.G), head_of(v, batch, head // size.G)
    acc, total, m = tl.zeros([M, DP], C.ACC), tl.zeros([M], C.ACC), tl.full([M], float("-inf"), C.ACC)
    for MASKED in tl.static_range(2):  # the whole tiles, then those that need a mask
        span, steps = steps_of(tiles, row, stop, C.T, N, MASKED, C.LENS)
        for step in range(0, steps):
            tile, start = place_of(step, span, tiles, C.T, N, MASKED)
            live = visible(i, start, tile, stop, tiles, size, N, C, MASKED, False)
            seen = tl.max(live.to(tl.int32), 0) > 0  # no p of 0 may meet the NaN of a key that nobody here sees
            y = rows_of(keys, start, seen, k.row, N, D, DP, MASKED or C.LENS)
            z = rows_of(values, start, seen, v.row, N, D, DP, MASKED or C.LENS)
            s = tl.dot(x, tl.trans(y), input_precision=C.PRECISION)  # (1)
            if C.SIGN != 1:
                s = s * C.SIGN
            if MASKED or C.LENS:
                s = tl.where(live, s, float("-inf"))
            largest = tl.maximum(m, tl.max(s, 1) * size.log2_size)
            finite = tl.where(largest == float("-inf"), 0.0, largest) if MASKED or C.LENS else largest
            p = tl.exp2(s * size.log2_size - finite[:, None])  # of -inf less -inf it would be NaN
            shrink = tl.exp2(m - finite)
            total = total * shrink + tl.sum(p, 1)
            acc = tl.dot(p.to(z.dtype), z, acc * shrink[:, None], input_precision=C.PRECISION)
            m = largest
    some = tl.where(total == 0.0, 1.0, total)
    put_rows(out + where * D, acc / some[:, None], first, Sq, M, D, DP)  # (3)
    log_sum = tl.where(total == 0.0, float("-inf"), (m + tl.log2(some)) * 0.6931471805599453)  # (2)
    tl.store(lse + where + i, log_sum, mask=i < Sq)


@jit
def delta_kernel(out, do, dlse, delta, H, Sq, D: tl.constexpr, DP: tl.constexpr, M: tl.constexpr, ACC: tl.constexpr):
    """(5) of M queries. Where a query sees nothing it may be NaN: `live` keeps it out of the sums."""
    tiles = (Sq + M - 1) // M
    one, first = tl.program_id(0) // tiles, tl.program_id(0) % tiles * M
    i = first + tl.arange(0, M)
    at = one.to(tl.int64) * Sq + i
    x = rows_of(out + one.to(tl.int64) * Sq * D, first, i < Sq, D, M, D, DP, True)
    g = rows_of(head_of(do, one // H, one % H), first, i < Sq, do.row, M, D, DP, True)
    value = tl.sum(x.to(ACC) * g.to(ACC), 1) - tl.load(dlse + at, mask=i < Sq, other=0.0)
    tl.store(delta + at, value, mask=i < Sq)


@jit
def saved(lse, delta, i, Sq, MASKED: tl.constexpr):
    """lse in units of log 2, and delta; inf, which makes p 0, and 0 where there is no query."""
    if MASKED:
        ends, d = tl.load(lse + i, mask=i < Sq, other=float("inf")), tl.load(delta + i, mask=i < Sq, other=0.0)
    else:
        ends, d = tl.load(lse + i), tl.load(delta + i)
    return ends * 1.4426950408889634, d


@jit
def dq_kernel(q, k, v, do, lse, delta, dq, tiles, size, C: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """The gradient of M queries, over the same tiles as forward."""
    D: tl.constexpr = C.D
    DP: tl.constexpr = C.DP
    H, Sq = size.H, size.Sq
    batch, head, row, first, stop = program(tiles, size, M, C, False)
    i, where = first + tl.arange(0, M), (batch * H + head).to(tl.int64) * Sq
    x = rows_of(head_of(q, batch, head), first, i < Sq, q.row, M, D, DP, True)
    g = rows_of(head_of(do, batch, head), first, i < Sq, do.row, M, D, DP, True)
    ends, d = saved(lse + where, delta + where, i, Sq, True)
    keys, values = head_of(k, batch, head // size.G), head_of(v, batch, head // size.G)
    acc = tl.zeros([M, DP], C.ACC)
    for MASKED in tl.static_range(2):
        span, steps = steps_of(tiles, row, stop, C.T, N, MASKED, C.LENS)
        for step in range(0, steps):
            tile, start = place_of(step, span, tiles, C.T, N, MASKED)
            live = visible(i, start, tile, stop, tiles, size, N, C, MASKED, False)
            seen = tl.max(live.to(tl.int32), 0) > 0
            y = rows_of(keys, start, seen, k.row, N, D, DP, MASKED or C.LENS)
            z = rows_of(values, start, seen, v.row, N, D, DP, MASKED or C.LENS)
            s = tl.dot(x, tl.trans(y), input_precision=C.PRECISION)
            p = tl.exp2(s * size.log2_scale - ends[:, None])  # (4)
            ds = p * (tl.dot(g, tl.trans(z), input_precision=C.PRECISION) - d[:, None])  # (6)
            if MASKED or C.LENS:
                ds = tl.where(live, ds, 0.0)
            acc = tl.dot(ds.to(y.dtype), y, acc, input_precision=C.PRECISION)
    put_rows(dq + where * D, acc * size.scale, first, Sq, M, D, DP)  # (8)


@jit
def dkdv_kernel(
    q, k, v, do, lse, delta, dk, dv, tiles, size,
    C: tl.constexpr, RAGGED: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """The gradients of N keys and values of one key head, over the tiles of all the query heads that it serves."""
    D: tl.constexpr = C.D
    DP: tl.constexpr = C.DP
    H, G, Sq, Sk = size.H, size.G, size.Sq, size.Sk
    batch, head, row, first, stop = program(tiles, size, N, C, True)
    j, where = (first + tl.arange(0, N))[:, None], (batch * (H // G) + head).to(tl.int64) * Sk * D
    some = first + tl.arange(0, N) < stop
    y = rows_of(head_of(k, batch, head), first, some, k.row, N, D, DP, True)
    z = rows_of(head_of(v, batch, head), first, some, v.row, N, D, DP, True)
    acc_k, acc_v = tl.zeros([N, DP], C.ACC), tl.zeros([N, DP], C.ACC)
    for one in range(0, G):
        h = head * G + one
        queries, gradients = head_of(q, batch, h), head_of(do, batch, h)
        of_head = (batch * H + h).to(tl.int64) * Sq
        for MASKED in tl.static_range(2):
            row_of_head = row + one * size.lay_h * ((Sk + C.T - 1) // C.T)
            span, steps = steps_of(tiles, row_of_head, stop, C.T, M, MASKED, False)
            if C.LENS:
                steps = tl.where(first < stop, steps, 0)
            for step in range(0, steps):
                tile, start = place_of(step, span, tiles, C.T, M, MASKED)
                i = start + tl.arange(0, M)
                sees = i < Sq
                if MASKED:
                    live = visible(i, first, tile, stop, tiles, size, N, C, True, True)
                    sees = tl.max(live.to(tl.int32), 0) > 0  # nor the NaN of a query that sees nothing
                x = rows_of(queries, start, sees, q.row, M, D, DP, MASKED or RAGGED)
                g = rows_of(gradients, start, sees, do.row, M, D, DP, MASKED or RAGGED)
                ends, d = saved(lse + of_head, delta + of_head, i, Sq, MASKED or RAGGED)
                s = tl.dot(y, tl.trans(x), input_precision=C.PRECISION)  # [keys, queries]
                p = tl.exp2(s * size.log2_scale - ends[None, :])  # (4)
                ds = p * (tl.dot(z, tl.trans(g), input_precision=C.PRECISION) - d[None, :])  # (6)
                if MASKED:
                    p = tl.where(live, p, 0.0)
                    ds = tl.where(live, ds, 0.0)
                acc_v = tl.dot(p.to(g.dtype), g, acc_v, input_precision=C.PRECISION)
                acc_k = tl.dot(ds.to(x.dtype), x, acc_k, input_precision=C.PRECISION)
    put_rows(dk + where, tl.where(j < stop, acc_k * size.scale, 0.0), first, Sk, N, D, DP)  # (9)
    put_rows(dv + where, tl.where(j < stop, acc_v, 0.0), first, Sk, N, D, DP)  # (7)


def ranges(index, own, other, lo, hi, back):
    """Where the tiles of each row lie among its entries: [R, 6], beginnings and ends of those that need no mask, of
    whole ones that the diagonal or the end of the keys cuts, of partial ones. What causal hides is in none of them.

    `lo` and `hi` [own] bound the cut ones: columns before lo are seen whole, those from hi on not at all; or, in the
    index of the key blocks (`back`), columns from hi on are seen whole, and those before lo not at all.
    """
    (first, middle), last = index.seg[:-1].view(-1, 2).unbind(1), index.seg[2::2]
    row = torch.arange(len(last), device=last.device) * 2 * other
    lo, hi = (x.clamp(0, other).repeat(len(last) // own) for x in (lo, hi))
    wanted = torch.stack((row + lo, row + hi, row + other + (lo if back else hi)))
    cut, after, late = torch.searchsorted(index.key, wanted)
    parts = (after, middle, cut, after, late, last) if back else (first, cut, cut, after, middle, late)
    return torch.stack(parts, -1).int()


@remembered
def ranges_both(layout, T, Sq, Sk, causal):
    (forth, back, bits), Qt, Kt, shift = split(layout), cdiv(Sq, T), cdiv(Sk, T), Sk - Sq
    i, j = (torch.arange(n, device=bits.device) * T for n in (Qt, Kt))
    lo, hi = torch.full_like(i, Sk // T), torch.full_like(i, Kt)
    back_lo, back_hi = torch.zeros_like(j), torch.where(j + T > Sk, Qt, 0)
    if causal:
        lo, hi = torch.minimum(lo, (i + shift + 1) // T), ((i + T).clamp(max=Sq) + shift + T - 1) // T
        back_lo, back_hi = (j - shift) // T, torch.maximum(back_hi, (j + T - 1 - shift + T - 1) // T)
    return ranges(forth, Qt, Kt, lo, hi, False), ranges(back, Kt, Qt, back_lo, back_hi, True)


# M, N, stages and warps by the bytes of a row of D, for tiles of 128; those of 64 take half of the warps where
# nothing spills for it.
FORWARD = {128: (128, 128, 3, 8), 256: (128, 64, 3, 8), 512: (64, 32, 3, 4), 1024: (32, 32, 1, 4)}
DQ = {128: (128, 64, 3, 8), 256: (128, 64, 3, 8), 512: (64, 32, 2, 8), 1024: (32, 32, 1, 4)}
DKDV = {128: (64, 128, 3, 8), 256: (64, 128, 3, 8), 512: (64, 32, 2, 8), 1024: (32, 32, 1, 4)}
IEEE = {128: (32, 32, 2, 8), 256: (32, 32, 2, 8), 512: (32, 32, 2, 8), 1024: (16, 16, 1, 8)}  # larger ones spill
FITS = {}  # what each kernel, with these constants, was found to fit with on a device


def launch(kernel, table, grid, q, *args, C, **constants):
    """Start `kernel` with the tiles of its table, at most C.T; if they do not fit, fewer stages, then smaller."""
    key = kernel, q.dtype, q.device, C, *constants.values()
    size = min(4, q.element_size())
    if size == 4 and C.PRECISION == "ieee" and not INTERPRET:  # without tensor cores
        table = IEEE
    row = max(128, C.DP * size)
    M, N, stages, warps = FITS.get(key) or table[row]
    M, N = min(M, C.T), min(N, C.T)
    if table is FORWARD or (table is DQ and row <= 256) or (table is DKDV and row <= 128):
        warps = min(warps, max(4, max(M, N) // 16))
    while True:
        try:
            options = {"M": M, "N": N, "num_stages": stages, "num_warps": warps, "enable_fp_fusion": True}
            with torch.cuda.device_of(q):
                kernel[grid](*args, C=C, **constants, **options)
            FITS[key] = M, N, stages, warps
            return
        except triton.runtime.errors.OutOfResources:
            if stages == 1 and max(M, N) <= 16:
                raise
            if stages > 1:
                stages -= 1
            elif M >= N:
                M //= 2
            else:
                N //= 2


def triton_setup(q, k, layout, sizes, kv_lens, scale, causal):
    """What all the kernels take: the tiles of either way, sizes and constants."""
    (_, H, Sq, D), (K, Sk), (lead_b, lead_h, b, T) = q.shape, k.shape[1:3], sizes
    *both, bits = split(layout)
    lens = both[0].seg if kv_lens is None else kv_lens.contiguous()  # a pointer at least, which nobody follows
    words = bits.view(torch.int32) if len(bits) else bits  # of 32 keys
    forth, back = (
        Tiles(lens, at, x.order, x.idx, x.sub, x.part, words)
        for at, x in zip(ranges_both(layout, T, Sq, Sk, causal), both)
    )
    # Of a positive factor f, max(s f) = max(s) f: where a maximum is taken, the sign of the scale goes apart from f.
    sign = (scale > TINY) - (scale < -TINY)
    log2_size = (abs(scale) if sign else 1) * LOG2_E
    lay_b, lay_h = lead_h if lead_b > 1 else 0, int(lead_h > 1)
    size = Sizes(lay_b, lay_h, H, H // K, Sq, Sk, scale, sign * log2_size, log2_size)
    DP, acc = max(16, triton.next_power_of_2(D)), tl.float64 if q.dtype == torch.float64 else tl.float32
    tf32 = q.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    precision = "tf32" if tf32 else "ieee"
    return forth, back, size, Constants(T, b, D, DP, causal, kv_lens is not None, len(bits) > 0, sign, precision, acc)


def strided_rows(x):
    """x as the kernels take it: of one row after another, fewer than 2^24 numbers apart, as their offsets are int32."""
    x = x if x.stride(3) == 1 and x.stride(2) < 2**24 else x.contiguous()
    return Strided(x, *x.stride()[:3])


def triton_forward(q, k, v, layout, sizes, kv_lens, scale, causal):
    if INTERPRET and q.dtype == torch.bfloat16:  # of which the interpreter would multiply the raw bits
        out, lse = triton_forward(*(x.float() for x in (q, k, v)), layout, sizes, kv_lens, scale, causal)
        return out.bfloat16(), lse
    (B, H, Sq, _), T = q.shape, sizes[3]
    out, lse = q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=accurate(q))
    forth, _, size, C = triton_setup(q, k, layout, sizes, kv_lens, scale, causal)
    inputs, rows = (strided_rows(x) for x in (q, k, v)), B * H * cdiv(Sq, T)
    launch(forward_kernel, FORWARD, lambda tile: (rows * (T // tile["M"]),), q, *inputs, out, lse, forth, size, C=C)
    return out, lse


def triton_backward(q, k, v, out, lse, do, dlse, layout, sizes, kv_lens, scale, causal):
    if INTERPRET and q.dtype == torch.bfloat16:
        floats = (x.float() for x in (q, k, v, out, lse, do, dlse))
        return tuple(x.bfloat16() for x in triton_backward(*floats, layout, sizes, kv_lens, scale, causal))
    (B, H, Sq, _), (K, Sk), T = q.shape, k.shape[1:3], sizes[3]
    dq, dk, dv, delta = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), torch.empty_like(lse)
    forth, back, size, C = triton_setup(q, k, layout, sizes, kv_lens, scale, causal)
    inputs = *(strided_rows(x) for x in (q, k, v, do)), lse, delta
    options = {"D": C.D, "DP": C.DP, "M": 64, "ACC": C.ACC, "num_stages": 1, "enable_fp_fusion": True}
    with torch.cuda.device_of(q):
        delta_kernel[(B * H * cdiv(Sq, 64),)](out, inputs[3], dlse.contiguous(), delta, H, Sq, **options)
    rows, columns = B * H * cdiv(Sq, T), B * K * cdiv(Sk, T)
    args, options = (*inputs, dk, dv, back, size), {"C": C, "RAGGED": Sq % T > 0}
    launch(dkdv_kernel, DKDV, lambda tile: (columns * (T // tile["N"]),), q, *args, **options)
    launch(dq_kernel, DQ, lambda tile: (rows * (T // tile["M"]),), q, *inputs, dq, forth, size, C=C)
    return dq, dk, dv


# ==== the operator ====================================================================================================
@contextmanager
def settings(x):
    """No autocast, which would round what is between the inputs and the outputs; products by oneDNN where that pays."""
    silent = x.device.type == "cpu" and torch.backends.mkldnn.matmul.fp32_precision == "none"
    with torch.autocast(x.device.type, enabled=False), onednn() if silent and onednn_pays() else nullcontext():
        yield


@torch.library.custom_op("onefile::blocksparse_attention", mutates_args=())
def forward_op(
    q: Tensor, k: Tensor, v: Tensor, layout: list[Tensor], sizes: list[int], kv_lens: Tensor | None, scale: float,
    causal: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`layout` are the thirteen tensors of blocks or of tiles, `sizes` two leading dimensions of it, block and tile."""
    run = torch_forward if backend == "torch" else triton_forward
    with settings(q):
        return run(q, k, v, layout, sizes, kv_lens, scale, causal)


@torch.library.custom_op("onefile::blocksparse_attention_backward", mutates_args=())
def backward_op(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, do: Tensor, dlse: Tensor, layout: list[Tensor],
    sizes: list[int], kv_lens: Tensor | None, scale: float, causal: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    run = torch_backward if backend == "torch" else triton_backward
    with settings(q):
        return run(q, k, v, out, lse, do, dlse, layout, sizes, kv_lens, scale, causal)


@forward_op.register_fake
def _(q, k, v, layout, sizes, kv_lens, scale, causal, backend):
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=accurate(q))


@backward_op.register_fake
def _(q, k, v, *rest):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def keep(ctx, inputs, output):
    """Save the tensors and the numbers of a call of either operator."""
    *tensors, layout, sizes, kv_lens, scale, causal, backend = inputs
    ctx.save_for_backward(*tensors, *(output if len(tensors) == 3 else ()), kv_lens, *layout)
    ctx.numbers = sizes, scale, causal, backend


def backward(ctx, do, dlse):
    q, k, v, out, lse, kv_lens, *layout = ctx.saved_tensors
    sizes, scale, causal, backend = ctx.numbers
    gradients = backward_op(q, k, v, out, lse, do, dlse, layout, sizes, kv_lens, scale, causal, backend)
    return *gradients, [None] * len(layout), None, None, None, None, None


def double_backward(ctx, *gradients):
    """Of dq, dk and dv, as functions of q, k, v, do and dlse: autograd over `differentiable`, in PyTorch alone. Where
    these are to be differentiated in turn, they stay in the graph."""
    q, k, v, _, _, do, dlse, kv_lens, *layout = ctx.saved_tensors
    sizes, scale, causal, backend = ctx.numbers
    if backend != "torch":
        raise RuntimeError("blocksparse_attention: double backward needs the PyTorch path: pass backend='torch'")
    again = torch.is_grad_enabled()
    with torch.enable_grad(), settings(q):
        inputs = q, k, v, do, dlse = [
            x.view_as(x) if again and x.requires_grad else x.detach().requires_grad_() for x in (q, k, v, do, dlse)
        ]
        outputs = differentiable(q, k, v, layout, sizes, kv_lens, scale, causal)
        if outputs[0].requires_grad:
            first = torch.autograd.grad(outputs, (q, k, v), (do, dlse), create_graph=True)
            options = {"materialize_grads": True, "create_graph": again}
            dq, dk, dv, ddo, ddlse = torch.autograd.grad(first, inputs, gradients, **options)
        else:  # not a block lives
            dq, dk, dv, ddo, ddlse = (torch.zeros_like(x) for x in inputs)
    return dq, dk, dv, None, None, ddo, ddlse, [None] * len(layout), None, None, None, None, None


forward_op.register_autograd(backward, setup_context=keep)
backward_op.register_autograd(double_backward, setup_context=keep)


def blocksparse_attention(q, k, v, layout, *, causal=False, scale=None, kv_lens=None, return_lse=False, backend="auto"):
    """Attention of q [B, H, Sq, D] over k and v [B, K, Sk, D] in the blocks of `layout`; H is a multiple of K.

    causal: query i sees key j only where j <= i + Sk - Sq, so the last query sees the last key. scale: of q . k, any
    number, D^-1/2 by default. kv_lens [B]: keys from there on are seen by none. return_lse: also return the logarithm
    of the sum of exp(scores), [B, H, Sq], differentiable. backend: torch, triton, or auto: triton on CUDA where it can.
    A query that sees nothing gives 0, lse -inf and gradients 0. With the PyTorch path derivatives of any order work;
    forward mode, as in torch.func.jvp, is refused.
    """
    backend = check(q, k, v, layout, kv_lens, scale, backend)
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    tensors, tile = (layout.tensors, layout.block_size) if backend == "torch" else (layout.tiles, layout.tile)
    sizes = [layout.lead_b, layout.lead_h, layout.block_size, tile]
    if backend == "triton" and not (torch.compiler.is_compiling() or capturing(q)):
        ranges_both(tensors, tile, q.shape[2], k.shape[2], bool(causal), keep=True)
    out, lse = forward_op(q, k, v, tensors, sizes, kv_lens, scale, causal, backend)
    return (out, lse) if return_lse else out


def check(q, k, v, layout, kv_lens, scale, backend):
    """Refuse bad input before any kernel starts; returns the backend that auto stands for."""

    def require(holds, message, show=None, error=ValueError):
        if not holds:  # only then is a message made of sizes: torch.compile cannot make one of those that vary
            message = message if isinstance(message, str) else message()
            given = ", ".join(f"{name} {show(x)}" for name, x in zip("qkv", (q, k, v))) if show else ""
            raise error(f"blocksparse_attention: {message}{given}")

    def shape(x):
        return list(x.shape)

    require(all(isinstance(x, Tensor) for x in (q, k, v)), "q, k and v must be tensors: ", lambda x: type(x).__name__)
    require(q.dim() == k.dim() == v.dim() == 4, "q, k and v must be [batch, heads, length, size]: ", shape)
    (B, H, Sq, D), (_, K, Sk, _) = q.shape, k.shape
    require(k.shape == v.shape, "k and v must have one shape: ", shape)
    require(q.numel() and k.numel(), "no dimension may be 0: ", shape)
    require(k.shape[0] == B and k.shape[3] == D, "q and k must have one batch and one head size: ", shape)
    require(H % K == 0, lambda: f"the {H} heads of q must be a multiple of the {K} of k: ", shape)
    require(q.dtype == k.dtype == v.dtype, "q, k and v must have one dtype: ", lambda x: x.dtype)
    require(q.dtype in DTYPES, "q, k and v must be float16, bfloat16, float32 or float64: ", lambda x: x.dtype)
    require(isinstance(layout, BlockLayout), lambda: f"layout must be a BlockLayout: it is {type(layout).__name__}")
    one = q.device == k.device == v.device == layout.device
    require(one, lambda: f"layout {layout.device}, q, k and v must be on one device: ", lambda x: x.device)
    b, Qb, Kb, lead = layout.block_size, layout.Qb, layout.Kb, (layout.lead_b, layout.lead_h)
    require(
        Qb == cdiv(Sq, b) and Kb == cdiv(Sk, b),
        lambda: (
            f"layout covers {Qb} x {Kb} blocks of {b}, up to {Qb * b} queries and {Kb * b} keys, "
            f"but q has {Sq} and k has {Sk}"
        ),
    )
    require(
        lead[0] in (1, B) and lead[1] in (1, H),
        lambda: f"layout has batch and heads {lead[0]} and {lead[1]}, each must be 1 or that of q: ",
        shape,
    )
    if kv_lens is not None:
        integer = isinstance(kv_lens, Tensor) and kv_lens.dtype in (torch.int32, torch.int64)
        require(
            integer and kv_lens.shape == (B,) and kv_lens.device == q.device,
            lambda: f"kv_lens must be int32 or int64 [{B}] on {q.device}: it is {described(kv_lens)}",
        )
    require(scale is None or math.isfinite(scale), lambda: f"scale must be finite: it is {scale}")
    tangents = (torch.autograd.forward_ad.unpack_dual(x).tangent for x in (q, k, v))
    forward = "there is no forward mode: use torch.autograd.functional.jvp"  # of which zeros would come back
    require(all(tangent is None for tangent in tangents), forward, error=RuntimeError)
    require(backend in ("auto", "torch", "triton"), lambda: f"backend must be auto, torch or triton: it is {backend!r}")
    fits = D <= 256 and (q.dtype != torch.float64 or INTERPRET)
    if backend == "auto":
        return "triton" if triton and q.is_cuda and fits else "torch"
    if backend == "triton":
        where = "needs a GPU, or TRITON_INTERPRET=1 from the start of the process"
        require(triton, "backend='triton' needs Triton: pip install triton", error=RuntimeError)
        require(q.is_cuda or INTERPRET, lambda: f"backend='triton' {where}: q is on {q.device}", error=RuntimeError)
        takes = "backend='triton' takes head sizes up to 256, and no float64: "
        require(fits, takes, lambda x: f"{list(x.shape)} {x.dtype}")
    return backend


# ==== self-check, benchmark and command line ==========================================================================
@dataclass
class Args:
    """Check block-sparse attention against dense attention, then time it over layouts and densities."""

    batch: int = 1  # B; 4 suits a large GPU
    heads: int = 8  # H, of queries
    kv_heads: int | None = None  # of keys and values, a divisor of --heads; None is --heads
    seq: int = 4096  # Sq and Sk
    dim: int = 64  # D
    block: Literal[8, 16, 32, 64, 128] = 64  # block size
    densities: tuple[float, ...] = (0.05, 0.125, 0.25, 0.5, 0.9)  # of the random layouts, and of the figure
    zoo: bool = True  # time the known patterns as well
    dtype: Literal["auto", "float16", "bfloat16", "float32", "float64"] = "auto"  # bfloat16 on CUDA, else float32
    device: str = "auto"  # cpu, cuda or cuda:N; auto is cuda where there is one
    backend: Literal["auto", "torch", "triton"] = "auto"  # which path; auto is triton on CUDA where it can
    backward: bool = True  # time forward with backward too
    flex: bool = True  # time FlexAttention beside it, where that runs: on a CPU forward alone
    check: bool = True  # compare with dense attention first
    repeats: int = 5  # the best of so many, every contender in turn
    threads: int | None = None  # of the CPU; None leaves them as they are
    seed: int = 0  # of inputs and random layouts
    output: str | None = "blocksparse_attention.png"  # the figure; None for none


def dense_attention(q, k, v, live, scale):
    """(1) to (3) over all pairs, of which `live` [B, H, Sq, Sk] count: output, lse. What the self-check believes."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    some = live.any(-1, keepdim=True)
    s = (q @ k.mT * scale).masked_fill(~live, -math.inf).masked_fill(~some, 0)
    return s.softmax(-1).masked_fill(~some, 0) @ v, s.logsumexp(-1).masked_fill(~some[..., 0], -math.inf)


def self_check(backend, device, dtype):
    """Output, lse and gradients of small cases against dense attention in float64; returns the largest error over the
    tolerance, which for 16 bits is twice the error of dense attention in the same type."""
    errors = []

    def rule(batch, head, i, j):  # every second block of keys is whole
        return (j // 64 % 2 > 0) | ((i + 3 * j + head) % 5 > 0)

    for b, heads, kv_heads, sq, sk, dim, is_causal, elements, lens, scale in (
        (32, 2, 1, 120, 100, 64, True, None, None, None),
        (64, 2, 2, 140, 300, 80, False, None, None, 0.2),
        (64, 2, 1, 150, 330, 64, True, rule, [110, 150], -0.1),
    ):
        mask = random(sq, sk, b, 0.6, heads, device=device).to_mask()
        layout = BlockLayout.from_mask(mask, b, elements)
        h, i, j = torch.meshgrid(*(torch.arange(n, device=device) for n in (heads, sq, sk)), indexing="ij")
        live = mask[h, i // b, j // b].expand(2, -1, -1, -1)
        if is_causal:
            live = live & (j <= i + sk - sq)
        if elements:
            live = live & elements(0, h, i, j)
        if lens:
            lens = torch.tensor(lens, device=device)
            live = live & (j < lens[:, None, None, None])
        shapes = [(2, heads, sq, dim), (2, kv_heads, sk, dim), (2, kv_heads, sk, dim), (2, heads, sq, dim)]
        q, k, v, do = (torch.randn(s, device=device).to(dtype) for s in shapes)

        def values(function, kind, *given, **options):
            x = [y.detach().to(kind).requires_grad_() for y in (q, k, v)]
            out, lse = function(*x, *given, **options)
            lse = lse.masked_fill(lse == -math.inf, 0)
            total = (out * do.to(kind)).sum() + lse.sum()
            return [y.double() for y in (out, lse, *torch.autograd.grad(total, x))]

        options = {"causal": is_causal, "kv_lens": lens, "scale": scale, "backend": backend, "return_lse": True}
        ours = values(blocksparse_attention, dtype, layout, **options)
        naive, exact = (values(dense_attention, kind, live, scale or dim**-0.5) for kind in (dtype, torch.float64))
        for o, n, e in zip(ours, naive, exact):
            slack = 1e-10 if dtype == torch.float64 else 2e-5 if dtype == torch.float32 else 1e-3
            allowed = 2 * (n - e).abs().max() * (dtype.itemsize == 2) + slack * e.abs().max()
            errors.append((o - e).abs().max() / allowed)
    return torch.stack(errors).max().item()  # NaN if one of them is


def seconds(contenders, repeats, device):
    """The least time of each function, all of them in turn, right after a call of its own that counts for nothing: what
    the one before has left in caches and heap is not its doing."""
    synchronize = getattr(torch, device.type).synchronize  # that of torch.cpu does nothing
    calls = 10 if device.type == "cuda" else 1  # queued, so that a GPU need not wait for Python

    def timed(contender):
        contender()
        synchronize(device)
        begin = time.perf_counter()
        for _ in range(calls):
            contender()
        synchronize(device)
        return (time.perf_counter() - begin) / calls

    times = [[timed(contender) for contender in contenders] for _ in range(repeats)]
    return [min(own) for own in zip(*times)]


def peak(function, device):
    """Bytes of tensors at the peak of a call, above what there was before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would write into the table
    with torch.profiler.profile(profile_memory=True) as run:
        function()
    moves = [(e.start_ns(), e.nbytes()) for e in run.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate(size for _, size in sorted(moves)), default=0)


def flex_mask(layout, seq, is_causal):
    """The same layout for FlexAttention: whole blocks apart from those that the diagonal or an element mask cuts."""
    from torch.nn.attention.flex_attention import BlockMask

    b, live = layout.block_size, layout.to_mask()[(None,) * (4 - len(layout.shape))]
    i, j = (torch.arange(live.shape[n], device=live.device) * b for n in (2, 3))
    cut = torch.zeros_like(live)
    if len(layout.bits):
        row, col = blocks_of(layout.index)
        cut = cut.view(-1).index_fill_(0, (row * layout.Kb + col)[layout.index.part >= 0], True).view_as(live)
    if is_causal:
        live, cut = live & (j < i[:, None] + b), cut | (j + b > i[:, None] + 1)
    alive, f = live[0], max(1, 128 // b) if live.is_cuda else 1  # on a GPU it takes no blocks below 128
    if f > 1:
        short = (0, -live.shape[3] % f, 0, -live.shape[2] % f)
        some, full = (F.pad(x, short).unflatten(3, (-1, f)).unflatten(2, (-1, f)) for x in (live, live & ~cut))
        live, cut = some.any(5).any(3), ~full.all(5).all(3)

    def pack_blocks(blocks):
        order = blocks.byte().argsort(dim=-1, descending=True, stable=True)
        return blocks.sum(-1, dtype=torch.int32), order.int()

    def rule(batch, head, query, key):
        allowed = key <= query if is_causal else key >= 0
        allowed = allowed & alive[head % len(alive), query // b, key // b] if f > 1 else allowed
        return allowed & layout.rule(batch, head, query, key) if layout.rule else allowed

    return BlockMask.from_kv_blocks(
        *pack_blocks(live & cut), *pack_blocks(live & ~cut), BLOCK_SIZE=b * f, mask_mod=rule, seq_lengths=(seq, seq)
    )


def main(args):
    device = torch.device(args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and not torch.cuda.is_available()):
        sys.exit(f"error: --device {args.device}: it must be cpu, or cuda where there is one")
    dtype = getattr(torch, args.dtype if args.dtype != "auto" else "bfloat16" if device.type == "cuda" else "float32")
    B, H, K, S, D, b = args.batch, args.heads, args.kv_heads, args.seq, args.dim, args.block
    K = H if K is None else K
    threads = torch.get_num_threads() if args.threads is None else args.threads
    counts = B, H, K, S, D, args.repeats, threads
    if not all(0 < x < 2**31 for x in counts) or not all(0 < density <= 1 for density in args.densities):
        sys.exit(f"error: all sizes must be above 0 and below 2^31, densities up to 1: {counts}, {args.densities}")
    if H % K:
        sys.exit(f"error: --heads {H} must be a multiple of --kv-heads {K}")
    path = Path(args.output or "none.png").absolute()
    if path.suffix != ".png" or path.is_dir() or not os.access(path.parent, os.W_OK):
        sys.exit(f"error: --output {args.output} must be a .png in a folder that can be written to")
    torch.set_num_threads(threads)
    torch.manual_seed(args.seed)
    checks = [("torch", kind) for kind in DTYPES] if args.check else []
    if args.check and triton and (device.type == "cuda" or INTERPRET):
        checks += [("triton", kind) for kind in DTYPES if INTERPRET or kind != torch.float64]
    for backend, kind in checks:
        worst = self_check(backend, device, kind)
        print(f"check: {backend}, {str(kind)[6:]}: largest error {worst:.2f} of what is allowed")
        if not worst <= 1:
            sys.exit("error: block-sparse attention differs from dense attention")

    q, do = (torch.randn(B, H, S, D, device=device, dtype=dtype) for _ in range(2))
    k, v = (torch.randn(B, K, S, D, device=device, dtype=dtype) for _ in range(2))
    with torch.device(device):
        layouts = [(f"random {d:.3g}", random(S, S, b, d, H, args.seed), False) for d in args.densities]
        layouts += [("dense", dense(S, S, b), False)]
        if args.zoo:
            layouts += [
                ("causal", causal(S, S, b), True),
                ("sliding window", sliding_window(S, S, b, S // 8), False),
                ("strided", strided(S, S, b, 8, H), True),
                ("fixed", fixed(S, S, b, 8, 1, H), True),
                ("bigbird", bigbird(S, S, b, heads=H), False),
                ("longformer", longformer(S, S, b, S // 8, b), False),
                ("block-diagonal", block_diagonal([S // 8, S // 4, S // 8, S - S // 2], b), False),
                ("prefix-lm", prefix_lm(S, S, b, S // 4), False),
            ]
    x = [y.requires_grad_() for y in (q, k, v)]
    for_flex = x if device.type == "cuda" else [y.detach() for y in x]  # it has no gradients on a CPU
    sdpa = functools.partial(F.scaled_dot_product_attention, *x, enable_gqa=H != K)

    def trained(forward):
        return lambda: torch.autograd.grad(forward(), x, do)

    flex, points, ratios = None, [], ([], [])
    if args.flex:
        from torch.nn.attention.flex_attention import flex_attention

        torch._dynamo.config.recompile_limit = 64  # a layout, a compilation
        flex = torch.compile(flex_attention, dynamic=False)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    title = f"{name}, torch {torch.__version__}: B{B} H{H} K{K} S{S} D{D} {str(dtype)[6:]}, block {b}"
    print(f"\n{title}, best of {args.repeats}")
    print(f"{'':31}forward {'':29}{'with backward' if args.backward else ''}")
    head = f"{'ms':>9}{'TFLOP/s':>9}{'x dense':>9}{'x flex':>8}"
    print(f"{'layout':<16}{'density':>8} " + head + (head + f"{'peak MB':>9}" if args.backward else ""))
    for label, layout, is_causal in layouts:
        density = layout.density
        flops, line = 4 * B * H * S * S * D * density, f"{label:<16}{density:>8.3f} "
        ours = functools.partial(blocksparse_attention, *x, layout, causal=is_causal, backend=args.backend)
        contenders = [ours, sdpa]
        if flex:
            try:
                mask = flex_mask(layout, S, is_causal)
                flexed = functools.partial(flex, *for_flex, block_mask=mask, enable_gqa=H != K)
                (trained(flexed) if args.backward and device.type == "cuda" else flexed)()
                contenders.append(flexed)
            except Exception as error:  # whatever it cannot compile
                reason = (str(error) or repr(error)).splitlines()[0][:80]
                print(f"FlexAttention does not run {label}: {reason}", file=sys.stderr)
        for backward in [False, True][: 1 + args.backward]:
            run = [trained(c) for c in contenders[: 2 if device.type == "cpu" else 3]] if backward else contenders
            with torch.set_grad_enabled(backward):
                t, against, *other = seconds(run, args.repeats, device)
            line += f"{t * 1e3:>9.2f}{flops * (3.5 if backward else 1) / t / 1e12:>9.3f}{against / t:>9.2f}"
            line += f"{other[0] / t:>8.2f}" if other else f"{'-':>8}"
            ratios[backward].extend(against / t for against in other)
            points.append((backward, label.startswith("random"), density, t, against))
        print(line + (f"{peak(trained(ours), device) / 2**20:>9.0f}" if args.backward else ""), flush=True)
    for label, some in zip(("forward", "with backward"), ratios):
        if some:
            print(f"against FlexAttention, {label}: geometric mean {statistics.geometric_mean(some):.2f}")
    if args.output:
        draw(points, args.output, title)
        print(f"\nwrote {args.output}")


def draw(points, path, title):
    """Time against density, with the line of a cost proportional to it from dense attention down."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kinds = sorted({backward for backward, *_ in points})
    figure, axes = plt.subplots(1, len(kinds), figsize=(6 * len(kinds), 4.5), squeeze=False)
    for ax, backward in zip(axes[0], kinds):
        mine = [p[1:] for p in points if p[0] == backward]
        full = min(p[3] for p in mine) * 1e3
        ax.plot([0, 1], [0, full], "--", color="grey", label="proportional to density")
        ax.axhline(full, color="black", linewidth=1, label="dense SDPA")
        for drawn, label, style in ((True, "random", "o-"), (False, "other layouts", "x")):
            some = sorted((d, t * 1e3) for r, d, t, _ in mine if r == drawn)
            if some:
                ax.plot(*zip(*some), style, label=label)
        ax.set(xlabel="density", ylabel="ms", xlim=(0, 1.02), title="forward + backward" if backward else "forward")
        ax.set_ylim(bottom=0)
        ax.legend(frameon=False)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    import tyro

    try:
        main(tyro.cli(Args))
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f"error: {error}")
