# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch>=2.11",
#     "numpy>=2",
#     "tyro>=1,<2",
#     "matplotlib>=3.9",
#     "triton>=3.6; sys_platform == 'linux'",
# ]
# ///
"""Block-sparse attention: softmax attention over chosen blocks, forward and backward.

A layout says which blocks of b queries attend to which blocks of b keys. The other blocks are
neither computed nor stored, so time and memory follow the share of blocks that are live. Fused
Triton kernels run on a GPU, plain PyTorch runs everywhere else. The interface succeeds
BlocksparseTransformer of openai/blocksparse (Gray, Radford and Kingma 2017) and adds layouts per
head and batch, grouped heads, key lengths, element masks, log-sum-exp with its gradient, and
double backward.

L is the set of live pairs of query i and key j; `scale` is any number, D^-1/2 by default:

    s_ij = scale q_i . k_j   for (i, j) in L, and -inf elsewhere                             (1)
    lse_i = log sum_j exp s_ij                                                               (2)
    o_i = sum_j p_ij v_j                                                                     (3)
    p_ij = exp(s_ij - lse_i)                                                                 (4)
    given do and dlse, the gradients of o and lse:
    delta_i = do_i . o_i - dlse_i                                                            (5)
    ds_ij = p_ij (do_i . v_j - delta_i)                                                      (6)
    dv_j = sum_i p_ij do_i                                                                   (7)
    dq_i = scale sum_j ds_ij k_j                                                             (8)
    dk_j = scale sum_i ds_ij q_i                                                             (9)

A pair is in L if its block is live, its element mask allows it, j < kv_lens and, with causal=True,
j <= i + Sk - Sq. A query without any live pair has o = 0, lse = -inf and no gradient. A key that no
query attends to may hold NaN.

Usage:
    from blocksparse_attention import BlockLayout, blocksparse_attention, sliding_window

    layout = sliding_window(4096, 4096, 64, window=512)  # or another pattern of the zoo below
    layout = BlockLayout.from_mask(mask, block_size=64)  # mask: bool [Qb, Kb] or [B, H, Qb, Kb]
    out = blocksparse_attention(q, k, v, layout)  # [B, H, Sq, D]; k and v may have fewer heads

    python kernels/blocksparse_attention.py  # self-check, benchmark and figure; see --help

Results: on a CPU (AMD Zen 5, float32), random layouts run 20 times as fast as dense attention at a
density of 5 % and 5.2 times at 25 %. The kernels have not been timed on a GPU.

What matters beyond the equations:
 1. A layout is stored as compressed rows and compressed columns: memory is linear in the number of
    live blocks, and no Python loop runs over blocks.
 2. Masked scores are -inf, never a large negative number. A row maximum of -inf is replaced by 0
    before it is subtracted, because -inf - -inf is NaN.
 3. The kernels merge blocks into tiles of 64 or 128. A 64-bit word for each tile says which of its
    sub-blocks are live. The kernels visit whole tiles first, which need no mask except for kv_lens,
    and then the tiles that a mask, the diagonal or an end cuts.
 4. In the cut tiles, keys that no query attends to and queries that attend to no key are not loaded
    but set to 0, because 0 times NaN is NaN.
 5. The kernels multiply by the scale after the product, in float32, together with log2 e, because
    the hardware computes exp2. The PyTorch path uses exp2 as well: it takes a fifth of the time of
    MKL's exp.
 6. One kernel sums dk and dv over a column, for all query heads that share a key head; another sums
    dq over a row. No sum depends on the order in which programs run.
 7. The PyTorch path groups rows with equal numbers of blocks, over all heads, and works in chunks
    that fit the cache of each thread. Rows without a mask first try exp without subtracting a
    maximum; if a sum leaves 1e-12 to 1e12, they are computed again with it. Values may therefore
    range from 1e-26 to 1e26.
 8. The PyTorch path copies q, k and v where their blocks are not a view. The kernels accept any
    strides as long as the last one is 1.
 9. The PyTorch path synchronises with a GPU to learn the sizes of its chunks; the kernels never do.
"""

# Shapes: B batch, H query heads, K key heads, G = H / K query heads for each key head, Sq queries,
# Sk keys, D head size; b block size, Qb and Kb blocks of queries and of keys, E live blocks; R rows
# of blocks, n blocks in each; T tile size of the kernels, M x N scores in one step of a kernel.

import functools
import itertools
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
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

    jit = triton.jit
except ImportError:  # the CPU wheel of torch comes without Triton; the PyTorch path works
    triton = None
    tl = SimpleNamespace(constexpr=float)

    def jit(kernel):
        return kernel


# In Triton's interpreter, the kernels run on the CPU, in numpy.
INTERPRET = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"
BLOCK_SIZES = (8, 16, 32, 64, 128)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LOG2_E = math.log2(math.e)
SMALLEST_SCALE = 1.2e-38  # float32 may flush a smaller number to 0
CHUNK_SCORES = 2**17  # scores per thread that the PyTorch path holds at a time; at least one row


# ==== Public interface ============================================================================
def blocksparse_attention(
    q, k, v, layout, *, causal=False, scale=None, kv_lens=None, return_lse=False, backend="auto"
):
    """Attend from q [B, H, Sq, D] to k and v [B, K, Sk, D] in the live blocks of `layout`.

    Args:
        layout: a BlockLayout. H must be a multiple of K; query head h uses key head h // (H / K).
        causal: query i attends to key j only if j <= i + Sk - Sq: the last query sees the last key.
        scale: factor of q . k; any finite number, D^-1/2 by default.
        kv_lens: int32 or int64 [B]; keys from there on are ignored.
        return_lse: also return the log-sum-exp of the scores, [B, H, Sq], which is differentiable.
        backend: "torch", "triton", or "auto": Triton on CUDA where the kernels support the input.

    Returns the output [B, H, Sq, D], or output and log-sum-exp. A query that attends to nothing
    gives output 0, log-sum-exp -inf and zero gradients. The PyTorch path has derivatives of any
    order. Forward-mode differentiation, as in torch.func.jvp, raises an error.
    """
    check_tensors(q, k, v)
    check_layout(q, k, v, layout)
    check_options(q, k, v, kv_lens, scale)
    backend = choose_backend(q, k, v, backend)
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    if backend == "torch":
        tensors = layout.tensors
        tile_size = layout.block_size
    else:
        tensors = layout.tiles
        tile_size = layout.tile_size
        if not (torch.compiler.is_compiling() or is_capturing(q)):
            # Compute the ranges here, because memory of an operator may belong to a CUDA graph.
            tile_ranges(tensors, tile_size, q.shape[2], k.shape[2], bool(causal), keep=True)
    sizes = [layout.batch, layout.heads, layout.block_size, tile_size]
    flat = flatten_layout(tensors)
    out, lse = forward_op(q, k, v, flat, sizes, kv_lens, scale, causal, backend)
    if return_lse:
        return out, lse
    return out


def check_tensors(q, k, v):
    """Raise ValueError unless q, k and v fit together."""
    if not all(isinstance(x, Tensor) for x in (q, k, v)):
        types = f"q {type(q).__name__}, k {type(k).__name__}, v {type(v).__name__}"
        raise ValueError(f"blocksparse_attention: q, k and v must be tensors: {types}")
    if not q.dim() == k.dim() == v.dim() == 4:
        raise ValueError(
            "blocksparse_attention: q, k and v must be [batch, heads, length, size]: "
            f"{describe_shapes(q, k, v)}"
        )
    if k.shape != v.shape:
        raise ValueError(
            f"blocksparse_attention: k and v must have one shape: {describe_shapes(q, k, v)}"
        )
    if not (q.numel() and k.numel()):
        raise ValueError(
            f"blocksparse_attention: no dimension may be 0: {describe_shapes(q, k, v)}"
        )
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise ValueError(
            "blocksparse_attention: q and k must have one batch and one head size: "
            f"{describe_shapes(q, k, v)}"
        )
    if q.shape[1] % k.shape[1]:
        raise ValueError(
            f"blocksparse_attention: the {q.shape[1]} heads of q must be a multiple of the "
            f"{k.shape[1]} of k: {describe_shapes(q, k, v)}"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            "blocksparse_attention: q, k and v must have one dtype: "
            f"q {q.dtype}, k {k.dtype}, v {v.dtype}"
        )
    if q.dtype not in DTYPES:
        raise ValueError(
            "blocksparse_attention: q, k and v must be float16, bfloat16, float32 or float64: "
            f"q {q.dtype}, k {k.dtype}, v {v.dtype}"
        )


def check_layout(q, k, v, layout):
    """Raise ValueError unless the layout fits q, k and v."""
    if not isinstance(layout, BlockLayout):
        raise ValueError(
            f"blocksparse_attention: layout must be a BlockLayout: it is {type(layout).__name__}"
        )
    if not q.device == k.device == v.device == layout.device:
        raise ValueError(
            f"blocksparse_attention: layout {layout.device}, q, k and v must be on one device: "
            f"q {q.device}, k {k.device}, v {v.device}"
        )
    b = layout.block_size
    Qb = layout.query_blocks
    Kb = layout.key_blocks
    if Qb != ceil_div(q.shape[2], b) or Kb != ceil_div(k.shape[2], b):
        raise ValueError(
            f"blocksparse_attention: layout covers {Qb} x {Kb} blocks of {b}, "
            f"up to {Qb * b} queries and {Kb * b} keys, "
            f"but q has {q.shape[2]} and k has {k.shape[2]}"
        )
    if layout.batch not in (1, q.shape[0]) or layout.heads not in (1, q.shape[1]):
        raise ValueError(
            f"blocksparse_attention: layout has batch and heads {layout.batch} and {layout.heads}, "
            f"each must be 1 or that of q: {describe_shapes(q, k, v)}"
        )


def check_options(q, k, v, kv_lens, scale):
    """Raise ValueError for bad lengths or a bad scale, RuntimeError for forward-mode inputs."""
    if kv_lens is not None:
        is_integer = isinstance(kv_lens, Tensor) and kv_lens.dtype in (torch.int32, torch.int64)
        if not is_integer or kv_lens.shape != (q.shape[0],) or kv_lens.device != q.device:
            raise ValueError(
                f"blocksparse_attention: kv_lens must be int32 or int64 [{q.shape[0]}] "
                f"on {q.device}: it is {describe(kv_lens)}"
            )
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"blocksparse_attention: scale must be finite: it is {scale}")
    for x in (q, k, v):
        # Without this error, forward mode would silently return zeros.
        if torch.autograd.forward_ad.unpack_dual(x).tangent is not None:
            raise RuntimeError(
                "blocksparse_attention: there is no forward mode: use torch.autograd.functional.jvp"
            )


def choose_backend(q, k, v, backend):
    """Return "torch" or "triton"; raise an error if the kernels cannot run but are asked for."""
    if backend not in ("auto", "torch", "triton"):
        raise ValueError(
            f"blocksparse_attention: backend must be auto, torch or triton: it is {backend!r}"
        )
    supported = q.shape[3] <= 256 and (q.dtype != torch.float64 or INTERPRET)
    if backend == "auto":
        return "triton" if triton is not None and q.is_cuda and supported else "torch"
    if backend == "triton":
        if triton is None:
            raise RuntimeError(
                "blocksparse_attention: backend='triton' needs Triton: pip install triton"
            )
        if not (q.is_cuda or INTERPRET):
            raise RuntimeError(
                "blocksparse_attention: backend='triton' needs a GPU, or TRITON_INTERPRET=1 "
                f"from the start of the process: q is on {q.device}"
            )
        if not supported:
            shapes = ", ".join(
                f"{name} {list(x.shape)} {x.dtype}" for name, x in (("q", q), ("k", k), ("v", v))
            )
            raise ValueError(
                "blocksparse_attention: backend='triton' takes head sizes up to 256, "
                f"and no float64: {shapes}"
            )
    return backend


def describe(x):
    """Describe an argument in an error message."""
    if isinstance(x, Tensor):
        return f"{x.dtype} {list(x.shape)} on {x.device}"
    return type(x).__name__


def describe_shapes(q, k, v):
    return f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"


def ceil_div(a, b):
    """a / b, rounded up."""
    return -(-a // b)


# ==== Layout ======================================================================================
class BlockLayout:
    """Which blocks of queries attend to which blocks of keys.

    Make one with `BlockLayout.from_mask`, or with a function of the zoo such as `sliding_window`.
    """

    def __init__(self, shape, block_size, tensors, rule=None):
        self.shape = tuple(shape)
        self.block_size = block_size
        self.tensors = tensors
        self.rule = rule  # the element mask where it is a function; only the benchmark reads it
        padded_shape = (1, 1, *self.shape)[-4:]
        self.batch = padded_shape[0]  # 1 if all of the batch share the layout
        self.heads = padded_shape[1]  # 1 if all heads share the layout
        self.query_blocks = padded_shape[2]
        self.key_blocks = padded_shape[3]
        self.tile_size = block_size
        self.tiles = tensors
        if self.device.type == "cuda" or INTERPRET:  # the kernels can run here
            flat_shape = (self.batch * self.heads, self.query_blocks, self.key_blocks)
            self.tile_size, self.tiles = merge_into_tiles(tensors, flat_shape, block_size)

    @classmethod
    def from_mask(cls, mask, block_size, element_mask=None):
        """Make a layout from a mask of live blocks.

        Args:
            mask: bool [Qb, Kb], [H, Qb, Kb] or [B, H, Qb, Kb]; leading dimensions may be 1.
            block_size: 8, 16, 32, 64 or 128.
            element_mask: which pairs inside the live blocks are live. Either bool [E, b, b] in the
                order of mask.nonzero(), or a function of batch, head, query and key (integer
                tensors that broadcast). The function is called on live blocks only, but on all
                pairs of them, including those beyond the last query and key. Batch or head is
                always 0 where that dimension of `mask` is 1 or absent. What causal=True, kv_lens
                and the ends of q and k remove needs no element mask.
        """
        check_mask(mask, block_size)
        Qb, Kb = mask.shape[-2:]
        heads = (1, *mask.shape)[-3]
        blocks = mask.reshape(-1, Qb, Kb)
        row, column = live_blocks(blocks)
        if len(row) >= 2**31:
            raise ValueError(
                f"a layout takes up to 2^31 - 1 blocks; mask has {len(row)}: "
                "choose a larger block_size"
            )
        is_tensor = check_element_mask(element_mask, [len(row), block_size, block_size])
        cut = row.new_empty(0, dtype=torch.bool)
        mask_bits = row.new_empty(0, block_size, block_size // 8, dtype=torch.uint8)
        if element_mask is not None and len(row):
            rule = None if is_tensor else element_mask
            values = element_mask if is_tensor else None
            cut, mask_bits = pack_element_masks(row, column, heads, Qb, block_size, values, rule)
        sub_blocks = row.new_empty(0)
        if len(mask_bits):
            mask_id = torch.where(cut, cut.cumsum(0) - 1, -1).int()
            tensors = index_both_ways(
                row, column, blocks.shape, cut, sub_blocks, mask_id, mask_bits
            )
        else:
            mask_id = row.new_empty(0, dtype=torch.int32)
            by_key = live_blocks(blocks.mT)  # sorted already
            tensors = index_both_ways(
                row, column, blocks.shape, None, sub_blocks, mask_id, mask_bits, by_key
            )
        return cls(
            mask.shape, block_size, tensors, element_mask if callable(element_mask) else None
        )

    @property
    def device(self):
        return self.tensors.mask_bits.device

    @property
    def density(self):
        """The share of blocks that are live."""
        return len(self.tensors.by_query.column) / math.prod(self.shape)

    def to(self, device):
        flat = [x.to(device) for x in flatten_layout(self.tensors)]
        return BlockLayout(self.shape, self.block_size, unflatten_layout(flat), self.rule)

    def __reduce__(self):
        """Pickle without the tiles, which are made anew, and the rule, which may not pickle."""
        return BlockLayout, (self.shape, self.block_size, self.tensors)

    def to_mask(self):
        """The mask of live blocks, in the shape given to `from_mask`."""
        row, column = block_positions(self.tensors.by_query)
        mask = torch.zeros(math.prod(self.shape), dtype=torch.bool, device=self.device)
        return mask.index_fill_(0, row * self.key_blocks + column, True).view(self.shape)

    def __repr__(self):
        b = self.block_size
        return (
            f"BlockLayout({list(self.shape)} of {b} x {b}: "
            f"{self.query_blocks * b} queries, {self.key_blocks * b} keys, "
            f"{len(self.tensors.by_query.column)} blocks, density {self.density:.3g}, "
            f"{len(self.tensors.mask_bits)} with an element mask, on {self.device})"
        )


class BlockIndex(NamedTuple):
    """The live blocks, sorted by row: rows are blocks of queries, or blocks of keys.

    In a row, whole blocks come first, then partial ones: those that an element mask cuts and, in an
    index of tiles, those with dead sub-blocks.
    """

    row_start: Tensor  # [2 R + 1]; row r: [2 r] its first block, [2 r + 1] its first partial one
    column: Tensor  # [E]; ascending among the whole and among the partial blocks of a row
    sort_key: Tensor  # [E], (row, is partial, column) in one number; empty if no block is partial
    sub_blocks: Tensor  # [E], bits that say which sub-blocks of a tile are live; empty for blocks
    mask_id: Tensor  # [E], index into mask_bits, or -1; empty if there are no element masks
    row_order: Tensor  # [heads, rows], the rows of each head, longest first


class LayoutTensors(NamedTuple):
    """A layout, indexed by query block and by key block."""

    by_query: BlockIndex
    by_key: BlockIndex
    mask_bits: Tensor  # uint8 [masks, b, b / 8], element masks packed into bits


class LayoutSizes(NamedTuple):
    """The numbers that describe a layout."""

    batch: int  # B, or 1 if all of the batch share the layout
    heads: int  # H, or 1 if all heads share the layout
    block: int  # b
    tile: int  # T; equal to b in the PyTorch path


def flatten_layout(tensors):
    """LayoutTensors -> list of tensors, because an operator takes a flat list."""
    return [*tensors.by_query, *tensors.by_key, tensors.mask_bits]


def unflatten_layout(flat):
    """The inverse of `flatten_layout`."""
    n = len(BlockIndex._fields)
    return LayoutTensors(BlockIndex(*flat[:n]), BlockIndex(*flat[n : 2 * n]), flat[2 * n])


def check_mask(mask, block_size):
    is_bool = isinstance(mask, Tensor) and mask.dtype == torch.bool
    if not is_bool or mask.dim() not in (2, 3, 4) or mask.numel() == 0:
        raise ValueError(
            "mask must be bool [Qb, Kb], [H, Qb, Kb] or [B, H, Qb, Kb], not empty; "
            f"it is {describe(mask)}"
        )
    if not isinstance(block_size, int) or block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size must be one of {BLOCK_SIZES}; it is {block_size}")


def check_element_mask(element_mask, shape):
    """Return whether the element mask is a tensor; raise ValueError if it is of no use."""
    if isinstance(element_mask, Tensor):
        is_valid = element_mask.dtype == torch.bool and list(element_mask.shape) == shape
    else:
        is_valid = element_mask is None or callable(element_mask)
    if not is_valid:
        raise ValueError(
            f"element_mask must be bool {shape}, a [b, b] for each block, or a function; "
            f"it is {describe(element_mask)}"
        )
    return isinstance(element_mask, Tensor)


def live_blocks(mask):
    """bool [heads, rows, columns] -> row [E], counted over all heads, and column [E], in order."""
    head_row_column = mask.nonzero()
    row = head_row_column[:, 0] * mask.shape[1] + head_row_column[:, 1]
    return row, head_row_column[:, 2]


def pack_element_masks(row, column, heads, query_blocks, b, values, rule):
    """Pack the element masks of all live blocks, from `values` bool [E, b, b] or from `rule`.

    Returns cut [E], which blocks lose pairs, and the packed masks of those, uint8 [cut, b, b / 8].
    """
    within = torch.arange(b, device=row.device)
    cut = []
    packed = []
    for part in torch.arange(len(row), device=row.device).split(max(1, 2**22 // b**2)):
        if values is not None:
            mask = values[part]
        else:
            part_row = row[part, None, None]
            head = part_row // query_blocks
            query = part_row % query_blocks * b + within[:, None]
            key = column[part, None, None] * b + within
            mask = rule(head // heads, head % heads, query, key)
        try:
            mask = torch.as_tensor(mask, device=row.device, dtype=torch.bool)
            mask = mask.expand(len(part), b, b)
        except (TypeError, RuntimeError) as error:
            raise ValueError(f"element_mask must give booleans that broadcast: {error}") from error
        is_cut = ~mask.flatten(1).all(1)
        cut.append(is_cut)
        packed.append(pack_bits(mask[is_cut]))
    return torch.cat(cut), torch.cat(packed)


def pack_bits(mask):
    """bool [..., b] -> uint8 [..., b / 8]."""
    shift = torch.arange(8, device=mask.device, dtype=torch.uint8)
    return (mask.unflatten(-1, (-1, 8)).byte() << shift).sum(-1, dtype=torch.uint8)


def unpack_bits(bits):
    """uint8 [..., b / 8] -> bool [..., b]."""
    shift = torch.arange(8, device=bits.device, dtype=torch.uint8)
    return (bits[..., None] >> shift & 1).bool().flatten(-2)


def index_both_ways(
    row, column, shape, is_partial, sub_blocks, mask_id, mask_bits, row_and_column_by_key=None
):
    """Index blocks, given in the order of rows, of heads x query blocks x key blocks = `shape`.

    `is_partial` is None if no block is partial. `row_and_column_by_key` lists the blocks in the
    order of key blocks; without it, they are sorted here.
    """
    heads, Qb, Kb = shape
    by_query = index_rows(row, column, shape, is_partial, sub_blocks, mask_id, late_rows_first=True)
    if row_and_column_by_key is None:
        row_by_key = row // Qb * Kb + column
        column_by_key = row % Qb
    else:
        row_by_key, column_by_key = row_and_column_by_key
    by_key = index_rows(
        row_by_key,
        column_by_key,
        (heads, Kb, Qb),
        is_partial,
        sub_blocks,
        mask_id,
        late_rows_first=False,
    )
    return LayoutTensors(by_query, by_key, mask_bits)


def index_rows(row, column, shape, is_partial, sub_blocks, mask_id, late_rows_first):
    """The BlockIndex of blocks of heads x rows x columns = `shape`."""
    heads, rows, columns = shape
    if is_partial is None:
        starts = torch.arange(heads * rows + 1, device=row.device)
        starts = torch.searchsorted(row.contiguous(), starts)
        # Without partial blocks, the partial part of a row starts where the row ends.
        row_start = starts.repeat_interleave(2)[1:]
        sort_key = row.new_empty(0)
    else:
        sort_key, order = ((row * 2 + is_partial) * columns + column).sort()
        if len(sub_blocks):
            sub_blocks = sub_blocks[order]
        if len(mask_id):
            mask_id = mask_id[order]
        column = sort_key % columns
        starts = torch.arange(2 * heads * rows + 1, device=row.device)
        row_start = torch.searchsorted(sort_key, starts * columns)
    count = row_start[::2].diff().view(heads, rows)
    if late_rows_first:  # with causal=True, late rows of equal count have more work
        row_order = count.flip(-1).argsort(dim=-1, descending=True, stable=True)
        row_order = rows - 1 - row_order
    else:
        row_order = count.argsort(dim=-1, descending=True, stable=True)
    return BlockIndex(row_start.int(), column.int(), sort_key, sub_blocks, mask_id, row_order.int())


def block_positions(index):
    """Row [E] and column [E] of every block of a BlockIndex."""
    count = index.row_start[::2].long().diff()
    column = index.column.long()
    row = torch.arange(len(count), device=column.device)
    return row.repeat_interleave(count, output_size=len(column)), column


def merge_into_tiles(tensors, shape, b):
    """Merge blocks into the kernels' tiles; return the tile size and the tiles' LayoutTensors."""
    heads, Qb, Kb = shape
    row, column = block_positions(tensors.by_query)
    head = row // Qb
    row = row % Qb
    mask_id = tensors.by_query.mask_id

    def tile_of_blocks(tile_size):
        """The tile of each block: head, row and column of tiles in one number."""
        factor = tile_size // b
        tile_row = head * ceil_div(Qb, factor) + row // factor
        return tile_row * ceil_div(Kb, factor) + column // factor

    tile_size = max(b, 64)
    if 8 < b < 128 and len(row):
        wide_tiles = len(tile_of_blocks(128).unique())
        if 0.9 * wide_tiles * (128 // b) ** 2 <= len(row):
            tile_size = 128  # wide tiles are faster where the blocks fill them
    factor = tile_size // b  # a tile has factor x factor blocks
    tile_rows = ceil_div(Qb, factor)
    tile_columns = ceil_div(Kb, factor)
    tile, tile_of_block = tile_of_blocks(tile_size).unique(return_inverse=True)
    place = row % factor * factor + column % factor  # of a block in its tile
    is_partial = torch.zeros_like(tile, dtype=torch.bool)
    sub_blocks = mask_id[:0].long()
    mask_bits = tensors.mask_bits
    if factor > 1:
        sub_blocks = torch.zeros_like(tile)
        sub_blocks.index_add_(0, tile_of_block, torch.ones_like(place) << place)
        all_live = -1 if factor == 8 else (1 << factor * factor) - 1
        is_partial = sub_blocks != all_live
    if len(mask_id):
        masked_blocks = mask_id >= 0
        tile_of_masked = tile_of_block[masked_blocks]
        is_masked = torch.zeros_like(is_partial).index_fill_(0, tile_of_masked, True)
        tile_mask_id = torch.where(is_masked, is_masked.cumsum(0) - 1, -1).int()
        mask_bits = merge_mask_bits(
            mask_bits[mask_id[masked_blocks].long()],
            tile_mask_id[tile_of_masked].long(),
            place[masked_blocks],
            int(is_masked.sum()),
            factor,
        )
        mask_id = tile_mask_id
        is_partial |= is_masked
    tiles = index_both_ways(
        tile // tile_columns,
        tile % tile_columns,
        (heads, tile_rows, tile_columns),
        is_partial,
        sub_blocks,
        mask_id,
        mask_bits,
    )
    return tile_size, tiles


def merge_mask_bits(block_bits, tile_mask, place, tile_masks, factor):
    """Element masks of blocks, uint8 [n, b, b / 8] -> of tiles, uint8 [tile_masks, T, T / 8].

    `tile_mask` [n] and `place` [n] say where each goes. All other blocks are filled with ones.
    """
    b = block_bits.shape[1]
    shape = (tile_masks, factor * factor, b, b // 8)
    bits = torch.full(shape, 255, dtype=torch.uint8, device=block_bits.device)
    bits[tile_mask, place] = block_bits
    bits = bits.unflatten(1, (factor, factor)).transpose(2, 3)
    return bits.reshape(tile_masks, factor * b, factor * b // 8)


# ==== PyTorch path ================================================================================
@contextmanager
def onednn():
    """Multiply float32 matrices with oneDNN; torch asks it only if it may round to bfloat16."""
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = "none"


@functools.cache
def onednn_pays():
    """Whether oneDNN is faster and still exact here.

    On AMD processors it takes half of MKL's time, and it does not round although it may.
    """
    if "AMD" not in torch.cpu.get_capabilities().get("cpu_name", ""):
        return False
    x = torch.full((2, 64, 64), 1 + 2**-20)  # rounds to 1 in bfloat16
    with onednn():
        return torch.equal(torch.bmm(x, torch.eye(64).expand(2, 64, 64)), x)


def is_capturing(x):
    """Whether a CUDA graph is being captured on the device of x."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def remember_per_layout(function):
    """Keep the last two results of function(layout tensors, *numbers) as long as the layout lives.

    On a GPU, only results of calls with keep=True are kept: inside an operator, memory may belong
    to a CUDA graph, which takes it back.
    """
    results_of_layout = WeakTensorKeyDictionary()

    @functools.wraps(function)
    def wrapper(layout, *args, keep=False):
        key = layout.by_query.row_start
        if any(isinstance(x, Tensor) for x in args) or is_capturing(key):
            return function(layout, *args)  # the result is of no use to other calls
        results = results_of_layout.get(key, {})
        if args in results:
            return results[args]
        with torch.inference_mode(False):  # a later call may need gradients
            result = function(layout, *args)
        if keep or not key.is_cuda:
            latest = dict(list(results.items())[-1:])
            latest[args] = result
            results_of_layout[key] = latest
        return result

    return wrapper


class Chunk(NamedTuple):
    """Rows that the PyTorch path computes in one batched product."""

    rows: slice  # R rows of the group
    blocks: Tensor  # [R n], numbers of the other side's blocks: of k for rows of q, and vice versa
    hidden: Tensor | None  # bool [R, b, t b], pairs to mask in the last t blocks of each row


class LiveBlocks(NamedTuple):
    """All live blocks of a call, over batch and heads, one entry each."""

    head: Tensor  # batch * H + query head
    entry: Tensor  # index into the layout's BlockIndex
    query_block: Tensor
    key_block: Tensor
    stop: Tensor  # keys from here on are ignored
    is_cut: Tensor  # bool: an element mask, the diagonal or the end of the keys may hide pairs


class BlockTable(NamedTuple):
    """The live blocks in the order of their groups and rows, with what `hidden_pairs` needs."""

    other: Tensor  # number of the block on the other side, to gather from
    entry: Tensor  # this and the next three as in LiveBlocks
    query_block: Tensor
    key_block: Tensor
    stop: Tensor
    mask_id: Tensor  # of the layout's BlockIndex
    mask_bits: Tensor  # of the layout
    block_size: int
    queries: int  # Sq
    keys: int  # Sk
    causal: bool
    by_key: bool  # rows are key blocks


class RowGroup(NamedTuple):
    """Rows of blocks with equal numbers of blocks."""

    rows: slice  # of RowGroups.order
    n: int  # blocks in each row
    chunk_rows: int  # rows in a chunk
    first_block: int  # of the group in the table
    tails: list[int]  # for each row, ascending: how many of its last blocks are cut
    table: BlockTable

    def chunks(self):
        """Go through the chunks of a group with n > 0."""
        rows = self.rows.stop - self.rows.start
        for begin in range(0, rows, self.chunk_rows):
            end = min(begin + self.chunk_rows, rows)
            first = self.first_block + begin * self.n
            last = self.first_block + end * self.n
            tail = self.tails[end - 1]  # whole blocks fill up the shorter tails
            hidden = hidden_pairs(self.table, first, last, self.n, tail) if tail else None
            yield Chunk(slice(begin, end), self.table.other[first:last], hidden)


class RowGroups(NamedTuple):
    """All rows of blocks, in groups."""

    order: Tensor  # [rows], the rows in the order of the groups
    largest_chunk: int  # the most blocks in a chunk
    groups: list[RowGroup]


@remember_per_layout
def group_rows(layout, sizes, q_shape, k_shape, kv_lens, causal, by_key, threads):
    """Group the rows of query blocks, or of key blocks if `by_key`, by their number of blocks."""
    B, H, Sq, _ = q_shape
    K, Sk = k_shape[1:3]
    b = sizes.block
    Qb = ceil_div(Sq, b)
    Kb = ceil_div(Sk, b)
    index = layout.by_key if by_key else layout.by_query
    live = collect_blocks(index, sizes, q_shape, k_shape, kv_lens, causal, by_key)
    if causal or kv_lens is not None:
        live = drop_hidden_blocks(live, b, Sq, Sk, causal)

    # Sort rows by number of blocks, then by number of cut blocks. A row has its whole blocks first.
    q_number = live.head * Qb + live.query_block
    key_head = live.head // H * K + live.head % H // (H // K)
    k_number = key_head * Kb + live.key_block
    if by_key:
        row = k_number
        other = q_number
        rows = B * K * Kb
    else:
        row = q_number
        other = k_number
        rows = B * H * Qb
    count = torch.bincount(row, minlength=rows)
    cut_count = torch.bincount(row[live.is_cut], minlength=rows)
    order = (count * (len(row) + 1) + cut_count).argsort()
    by_row = (order.argsort()[row] * 2 + live.is_cut).argsort(stable=True)
    table = BlockTable(
        other=other[by_row],
        entry=live.entry[by_row],
        query_block=live.query_block[by_row],
        key_block=live.key_block[by_row],
        stop=live.stop[by_row],
        mask_id=index.mask_id,
        mask_bits=layout.mask_bits,
        block_size=b,
        queries=Sq,
        keys=Sk,
        causal=causal,
        by_key=by_key,
    )
    numbers, group_sizes = count[order].unique_consecutive(return_counts=True)
    return split_groups(
        table, order, cut_count[order].tolist(), numbers.tolist(), group_sizes.tolist(), threads
    )


def collect_blocks(index, sizes, q_shape, k_shape, kv_lens, causal, by_key):
    """The live blocks of a layout's index, repeated over batch and heads."""
    B, H, Sq, _ = q_shape
    Sk = k_shape[2]
    b = sizes.block
    rows = ceil_div(Sk if by_key else Sq, b)
    device = index.row_start.device
    ends = index.row_start[::2].long()
    layout_shape = (sizes.batch, sizes.heads, rows)
    first = ends[:-1].view(layout_shape).expand(B, H, rows).flatten()
    last = ends[1:].view(layout_shape).expand(B, H, rows).flatten()
    count = last - first
    row = torch.arange(B * H * rows, device=device).repeat_interleave(count)
    entry = torch.arange(len(row), device=device) + (last - count.cumsum(0))[row]
    head = row // rows
    query_block = row % rows
    key_block = index.column[entry].long()
    if by_key:
        query_block, key_block = key_block, query_block
    if kv_lens is None:
        stop = torch.full_like(row, Sk)
    else:
        stop = kv_lens.clamp(0, Sk).long()[head // H]
    key_end = (key_block + 1) * b
    is_cut = key_end > stop
    if len(index.mask_id):
        is_cut |= index.mask_id[entry] >= 0
    if causal:
        is_cut |= key_end > query_block * b + 1 + Sk - Sq
    return LiveBlocks(head, entry, query_block, key_block, stop, is_cut)


def drop_hidden_blocks(live, b, Sq, Sk, causal):
    """Drop the blocks that causal or kv_lens hide completely."""
    visible = live.key_block * b < live.stop
    if causal:
        query_end = ((live.query_block + 1) * b).clamp(max=Sq)
        visible &= live.key_block * b < query_end + Sk - Sq
    return LiveBlocks(*(x[visible] for x in live))


def split_groups(table, order, tails, numbers, group_sizes, threads):
    """Split the rows in `order` into groups of equally many blocks, and choose the chunk sizes."""
    b = table.block_size
    scores = CHUNK_SCORES
    if torch.backends.mkldnn.matmul.fp32_precision == "bf16":  # oneDNN: a call costs more
        scores *= 2 if table.by_key else 4
    groups = []
    largest_chunk = 0
    first_row = 0
    first_block = 0
    for n, rows in zip(numbers, group_sizes, strict=True):
        # torch.bmm gives every thread whole rows, so a chunk has a multiple of `threads` rows.
        most_rows = max(1, round(scores / max(1, n * b * b))) * threads
        chunks = ceil_div(rows, most_rows)
        chunk_rows = ceil_div(rows, chunks * threads) * threads  # chunks of about equal size
        span = slice(first_row, first_row + rows)
        groups.append(RowGroup(span, n, chunk_rows, first_block, tails[span], table))
        largest_chunk = max(largest_chunk, min(chunk_rows, rows) * n)
        first_row += rows
        first_block += rows * n
    return RowGroups(order, largest_chunk, groups)


def hidden_pairs(table, first, last, n, t):
    """Which pairs to mask in the last t of the n blocks of each row: bool [R, b, t b]."""
    b = table.block_size
    device = table.other.device
    within = torch.arange(b, device=device)
    late = torch.arange(first, last, device=device).view(-1, n)[:, n - t :]
    query = table.query_block[late][..., None, None] * b + within[:, None]
    key = table.key_block[late][..., None, None] * b + within
    visible = (query < table.queries) & (key < table.stop[late][..., None, None])
    if table.causal:
        visible &= key <= query + table.keys - table.queries
    if len(table.mask_id):
        mask_id = table.mask_id[table.entry[late]].long()
        mask = unpack_bits(table.mask_bits[mask_id.clamp(min=0)])
        visible &= mask | (mask_id < 0)[..., None, None]
    # [R, t, queries, keys] -> [R, rows in a block, t b]
    visible = visible.permute(0, 3, 1, 2) if table.by_key else visible.transpose(1, 2)
    return ~visible.flatten(2)


def to_blocks(x, b):
    """[B, H, S, D] -> [B H blocks, b, D], padded with zeros at the end; a view where possible."""
    missing = -x.shape[2] % b
    if missing:
        x = F.pad(x, (0, 0, 0, missing))
    return x.reshape(-1, b, x.shape[3])


def from_blocks(x, shape):
    """The inverse: [B H blocks, b, ...] -> [B, H, S, ...]."""
    return x.reshape(*shape[:2], -1, *x.shape[2:])[:, :, : shape[2]].contiguous()


def gather(x, rows, out):
    """x[rows], written to the start of `out`: fresh memory costs as much time as the arithmetic."""
    out = out[: len(rows)]
    if x.dtype == out.dtype:
        return torch.index_select(x, 0, rows, out=out)
    return out.copy_(x.index_select(0, rows))


def fill_last(x, dim, mask, value=0):
    """Fill x where `mask` is true, if it is not None.

    Along `dim`, `mask` may be shorter than x: it applies to the last elements.
    """
    if mask is not None:
        size = mask.shape[dim]
        x.narrow(dim, x.shape[dim] - size, size).masked_fill_(mask, value)


def accumulation_dtype(x):
    """The dtype of statistics and sums."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def is_plain_attention(layout, sizes, q, k, kv_lens, scale, causal):
    """Whether PyTorch's own CPU attention computes the same: a full layout and no masks."""
    if q.device.type != "cpu" or kv_lens is not None or q.shape[1] != k.shape[1]:
        return False
    if len(layout.mask_bits):
        return False
    # PyTorch aligns the diagonal to the top left, and multiplies -inf by the scale.
    if causal and not (q.shape[2] == k.shape[2] and scale > SMALLEST_SCALE):
        return False
    blocks = ceil_div(q.shape[2], sizes.block) * ceil_div(k.shape[2], sizes.block)
    return len(layout.by_query.column) == sizes.batch * sizes.heads * blocks


def with_separate_rows(x):
    """x, copied if PyTorch's own attention does not accept its strides: rows must not overlap."""
    if x.stride(3) == 1 and x.stride(2) >= x.shape[3]:
        return x
    return x.contiguous()


def plain_forward(q, k, v, scale, causal):
    """(1) to (3) with PyTorch's own CPU attention."""
    q = with_separate_rows(q)
    k = with_separate_rows(k)
    v = with_separate_rows(v)
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = attention(q, k, v, 0.0, causal, scale=scale)
    return out.contiguous(), lse.contiguous()


def plain_backward(q, k, v, out, lse, do, scale, causal):
    """(5) to (9) with PyTorch's own CPU attention, which has no gradient for lse."""
    q = with_separate_rows(q)
    k = with_separate_rows(k)
    v = with_separate_rows(v)
    do = with_separate_rows(do)
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    dq, dk, dv = backward(do, q, k, v, out, lse, 0.0, causal, scale=scale)
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


def torch_forward(q, k, v, layout, sizes, kv_lens, scale, causal):
    """(1) to (3): output [B, H, Sq, D] and lse [B, H, Sq]."""
    if is_plain_attention(layout, sizes, q, k, kv_lens, scale, causal):
        return plain_forward(q, k, v, scale, causal)
    b = sizes.block
    D = q.shape[3]
    dtype = accumulation_dtype(q)
    threads = torch.get_num_threads()
    row_groups = group_rows(layout, sizes, q.shape, k.shape, kv_lens, causal, False, threads)
    q_blocks = to_blocks(q, b)
    k_blocks = to_blocks(k, b)
    v_blocks = to_blocks(v, b)
    kv_buffer = q_blocks.new_empty(row_groups.largest_chunk, b, D, dtype=dtype)
    score_buffer = q_blocks.new_empty(row_groups.largest_chunk * b * b, dtype=dtype)
    out = torch.empty_like(q_blocks)
    all_max = q_blocks.new_full(q_blocks.shape[:2], -math.inf, dtype=dtype)
    all_sum = q_blocks.new_full(q_blocks.shape[:2], 1, dtype=dtype)

    def attend(group, subtract_max):
        """Compute the outputs of a group of rows."""
        n = group.n
        row_numbers = row_groups.order[group.rows]
        group_max = all_max[group.rows].zero_()
        group_sum = all_sum[group.rows]
        for chunk in group.chunks():
            chunk_rows = row_numbers[chunk.rows]
            R = len(chunk_rows)
            q_tile = q_blocks.index_select(0, chunk_rows).to(dtype).mul_(scale)
            k_tile = gather(k_blocks, chunk.blocks, kv_buffer).view(R, n * b, D)
            unseen = None if chunk.hidden is None else chunk.hidden.all(1)[..., None]
            fill_last(k_tile, 1, unseen)  # a weight of 0 times the NaN of an unseen key is NaN
            s = score_buffer[: R * n * b * b].view(R, b, n * b)
            torch.bmm(q_tile, k_tile.mT, out=s)  # (1)
            fill_last(s, 2, chunk.hidden, -math.inf)
            if subtract_max or chunk.hidden is not None:
                row_max = torch.amax(s, -1, out=group_max[chunk.rows])
                is_empty = row_max == -math.inf
                s.sub_(row_max.masked_fill(is_empty, 0)[..., None])
            row_sum = torch.sum(s.mul_(LOG2_E).exp2_(), -1, out=group_sum[chunk.rows])
            if chunk.hidden is not None:
                row_sum.masked_fill_(is_empty, 1)  # a query that attends to nothing
            v_tile = gather(v_blocks, chunk.blocks, kv_buffer).view(R, n * b, D)  # replaces k_tile
            fill_last(v_tile, 1, unseen)
            out_tile = torch.bmm(s, v_tile, out=q_tile)  # the output replaces the queries
            out_tile.div_(row_sum[..., None])  # (3)
            out.index_copy_(0, chunk_rows, out_tile.to(q.dtype))

    subtract_max = q.is_cuda  # a GPU would have to be waited for to look at the sums
    for group in row_groups.groups:
        if group.n == 0:
            out.index_fill_(0, row_groups.order[group.rows], 0)
            continue
        attend(group, subtract_max)
        if not subtract_max:
            smallest, largest = all_sum[group.rows].aminmax()
            if not (1e-12 < smallest.item() and largest.item() < 1e12):
                subtract_max = True  # from here on
                attend(group, subtract_max)
    lse = torch.empty_like(all_max)
    lse.index_copy_(0, row_groups.order, all_sum.log_().add_(all_max))  # (2)
    return from_blocks(out, q.shape), from_blocks(lse, q.shape)


def torch_backward(q, k, v, out, lse, do, dlse, layout, sizes, kv_lens, scale, causal):
    """(4) to (9): dq [B, H, Sq, D], dk and dv [B, K, Sk, D]."""
    if is_plain_attention(layout, sizes, q, k, kv_lens, scale, causal) and not dlse.any():
        return plain_backward(q, k, v, out, lse, do, scale, causal)
    b = sizes.block
    D = q.shape[3]
    dtype = accumulation_dtype(q)
    threads = torch.get_num_threads()
    row_groups = group_rows(layout, sizes, q.shape, k.shape, kv_lens, causal, True, threads)
    q_blocks = to_blocks(q, b)
    k_blocks = to_blocks(k, b)
    v_blocks = to_blocks(v, b)
    do_blocks = to_blocks(do, b)
    delta, minus_lse = backward_statistics(out, lse, do, dlse, b, dtype)
    q_buffer = q_blocks.new_empty(row_groups.largest_chunk, b, D, dtype=dtype)
    do_buffer = q_blocks.new_empty(row_groups.largest_chunk, b, D, dtype=dtype)
    p_buffer = q_blocks.new_empty(row_groups.largest_chunk * b * b, dtype=dtype)
    ds_buffer = q_blocks.new_empty(row_groups.largest_chunk * b * b, dtype=dtype)
    dq = torch.zeros_like(q_blocks, dtype=dtype)
    dk = torch.empty_like(k_blocks)
    dv = torch.empty_like(v_blocks)
    for group in row_groups.groups:
        n = group.n
        row_numbers = row_groups.order[group.rows]
        if n == 0:
            dk.index_fill_(0, row_numbers, 0)
            dv.index_fill_(0, row_numbers, 0)
            continue
        # Each chunk overwrites its keys with dk, and its values with dv.
        k_group = k_blocks.index_select(0, row_numbers).to(dtype)
        v_group = v_blocks.index_select(0, row_numbers).to(dtype)
        k_group.mul_(scale)
        for chunk in group.chunks():
            blocks = chunk.blocks
            hidden = chunk.hidden
            k_tile = k_group[chunk.rows]
            v_tile = v_group[chunk.rows]
            R = len(k_tile)
            q_tile = gather(q_blocks, blocks, q_buffer).view(R, n * b, D)
            do_tile = gather(do_blocks, blocks, do_buffer).view(R, n * b, D)
            if hidden is not None:
                clear_unused(q_tile, k_tile, v_tile, do_tile, hidden)
            p = p_buffer[: R * n * b * b].view(R, b, n * b)  # [R, keys, queries]
            torch.bmm(k_tile, q_tile.mT, out=p)
            torch.add(minus_lse[blocks].view(R, 1, n * b), p, alpha=LOG2_E, out=p).exp2_()  # (4)
            fill_last(p, 2, hidden)
            ds = ds_buffer[: R * n * b * b].view(R, b, n * b)
            torch.bmm(v_tile, do_tile.mT, out=ds)
            ds.sub_(delta[blocks].view(R, 1, n * b)).mul_(p)  # (6)
            torch.bmm(p, do_tile, out=v_tile)  # (7)
            dq_tile = torch.bmm(ds.mT, k_tile, out=do_tile)  # (8); the scale is in k_tile
            dq.index_add_(0, blocks, dq_tile.view(-1, b, D))
            torch.bmm(ds, q_tile, out=k_tile).mul_(scale)  # (9)
        dk.index_copy_(0, row_numbers, k_group.to(q.dtype))
        dv.index_copy_(0, row_numbers, v_group.to(q.dtype))
    dq = from_blocks(dq, q.shape).to(q.dtype)
    return dq, from_blocks(dk, k.shape), from_blocks(dv, k.shape)


def backward_statistics(out, lse, do, dlse, b, dtype):
    """delta (5) and -lse in units of log 2, both [B H blocks, 1, b].

    A query that attends to nothing has delta 0 whatever its gradients hold, and -lse = -inf, which
    makes its p 0.
    """
    is_empty = lse == -math.inf
    delta = torch.linalg.vecdot(do.to(dtype), out.to(dtype))  # needs no memory for the products
    delta = (delta - dlse).masked_fill_(is_empty, 0)
    minus_lse = lse.masked_fill(is_empty, math.inf) * -LOG2_E
    missing = -lse.shape[2] % b
    delta = F.pad(delta, (0, missing), value=0).view(-1, 1, b)
    minus_lse = F.pad(minus_lse, (0, missing), value=-math.inf).view(-1, 1, b)
    return delta, minus_lse


def clear_unused(q_tile, k_tile, v_tile, do_tile, hidden):
    """Zero queries that attend to nothing and keys that are not attended to, which may hold NaN."""
    empty_queries = hidden.all(1)[..., None]
    fill_last(q_tile, 1, empty_queries)
    fill_last(do_tile, 1, empty_queries)
    if hidden.shape[2] == q_tile.shape[1]:  # every block of the row has a mask
        unseen_keys = hidden.all(2)[..., None]
        k_tile.masked_fill_(unseen_keys, 0)
        v_tile.masked_fill_(unseen_keys, 0)


def differentiable_forward(q, k, v, layout, sizes, kv_lens, scale, causal):
    """(1) to (3) for autograd to differentiate twice: out of place, all scores stay in memory."""
    b = sizes.block
    D = q.shape[3]
    dtype = accumulation_dtype(q)
    threads = torch.get_num_threads()
    row_groups = group_rows(layout, sizes, q.shape, k.shape, kv_lens, causal, False, threads)
    q_blocks = to_blocks(q, b).to(dtype)
    k_blocks = to_blocks(k, b).to(dtype)
    v_blocks = to_blocks(v, b).to(dtype)
    out = torch.zeros_like(q_blocks)
    lse = q_blocks.new_full(q_blocks.shape[:2], -math.inf)
    for group in row_groups.groups:
        if group.n == 0:
            continue
        keys = group.n * b
        for chunk in group.chunks():
            chunk_rows = row_groups.order[group.rows][chunk.rows]
            R = len(chunk_rows)
            hidden = torch.zeros(R, b, keys, dtype=torch.bool, device=q.device)
            fill_last(hidden, 2, chunk.hidden, True)
            unseen_keys = hidden.all(1)[..., None]
            empty_queries = hidden.all(2)[..., None]
            q_tile = q_blocks[chunk_rows].masked_fill(empty_queries, 0)
            k_tile = k_blocks[chunk.blocks].view(R, keys, D).masked_fill(unseen_keys, 0)
            v_tile = v_blocks[chunk.blocks].view(R, keys, D).masked_fill(unseen_keys, 0)
            s = (q_tile @ k_tile.mT * scale).masked_fill(hidden, -math.inf)  # (1)
            row_max = s.detach().amax(-1, keepdim=True)
            p = (s - row_max.masked_fill(row_max == -math.inf, 0)).exp()
            row_sum = p.sum(-1, keepdim=True)
            is_empty = row_sum == 0
            divisor = row_sum.masked_fill(is_empty, 1)
            out = out.index_copy(0, chunk_rows, p @ v_tile / divisor)  # (3)
            chunk_lse = torch.where(is_empty, -math.inf, row_max + divisor.log())  # (2)
            lse = lse.index_copy(0, chunk_rows, chunk_lse[..., 0])
    return from_blocks(out, q.shape).to(q.dtype), from_blocks(lse, q.shape)


# ==== Triton kernels ==============================================================================
# The arguments of the kernels, in groups. A kernel is compiled for each value of Constants.
class Strided(NamedTuple):
    """A [B, H, S, D] tensor: its data and its strides. The stride of D is 1."""

    data: Tensor
    batch: int
    head: int
    row: int


class Tiles(NamedTuple):
    """A layout's tiles, indexed by query tile or by key tile."""

    lens: Tensor  # kv_lens, or any tensor where there are none
    ranges: Tensor  # see `row_ranges`
    row_order: Tensor  # this and the next three as in BlockIndex
    column: Tensor
    sub_blocks: Tensor
    mask_id: Tensor
    mask_words: Tensor  # the element masks in 32-bit words


class Sizes(NamedTuple):
    """Sizes and scales."""

    batch_stride: int  # from one batch of the layout to the next, in heads; 0 if they share it
    head_stride: int  # from one head of the layout to the next, in heads; 0 if they share it
    H: int
    G: int
    Sq: int
    Sk: int
    scale: float
    log2_scale: float  # scale * log2 e
    log2_size: float  # |scale| * log2 e; log2 e for a scale of 0


class Constants(NamedTuple):
    """What a kernel is compiled for."""

    T: int
    b: int
    D: int
    D_PADDED: int  # D rounded up to a power of two
    CAUSAL: bool
    HAS_LENS: bool
    HAS_ELEMENT_MASKS: bool
    SCALE_SIGN: int
    PRECISION: str  # of tl.dot
    ACC_DTYPE: object  # of sums


@jit
def load_rows(
    x,
    first,
    wanted,
    stride,
    N: tl.constexpr,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Load N rows of x [S, D] from `first` on: [N, D_PADDED].

    Columns from D on are 0 and, if MASKED, so are the rows that are not `wanted` [N].
    """
    n = tl.arange(0, N)[:, None]
    d = tl.arange(0, D_PADDED)[None, :]
    pointer = x + first.to(tl.int64) * stride + n * stride + d
    if MASKED:  # masked in the load: a tl.where after it breaks the compiler of Triton 3.9
        rows = tl.load(pointer, mask=wanted[:, None] & (d < D), other=0.0)
    elif D < D_PADDED:
        rows = tl.load(pointer, mask=d < D, other=0.0)
    else:
        rows = tl.load(pointer)
    return rows


@jit
def store_rows(x, tile, first, stop, N: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr):
    """Store a tile [N, D_PADDED] in rows `first` to `stop` of x [S, D], which is contiguous."""
    n = tl.arange(0, N)[:, None]
    d = tl.arange(0, D_PADDED)[None, :]
    pointer = x + first.to(tl.int64) * D + n * D + d
    tl.store(pointer, tile.to(x.dtype.element_ty), mask=(first + n < stop) & (d < D))


@jit
def head_start(x, batch, head):
    """Pointer to the first row of a head of a Strided tensor."""
    return x.data + batch.to(tl.int64) * x.batch + head.to(tl.int64) * x.head


@jit
def program_place(tiles, size, N: tl.constexpr, C: tl.constexpr, BY_KEY: tl.constexpr):
    """The work of a program: batch, head, row of tiles, and the first of its N queries or keys."""
    G = size.G if BY_KEY else 1
    S = size.Sk if BY_KEY else size.Sq
    heads = size.H // G
    rows = (S + C.T - 1) // C.T
    parts = C.T // N
    batch_head = tl.program_id(0) // (rows * parts)
    part = tl.program_id(0) % (rows * parts)
    batch = batch_head // heads
    head = batch_head % heads
    first_row = (batch * size.batch_stride + head * G * size.head_stride) * rows
    tile_row = tl.load(tiles.row_order + first_row + part // parts)
    return batch, head, first_row + tile_row, tile_row * C.T + part % parts * N


@jit
def end_of_keys(tiles, size, batch, C: tl.constexpr):
    """Keys from here on are ignored."""
    stop = size.Sk
    if C.HAS_LENS:
        stop = tl.maximum(tl.minimum(tl.load(tiles.lens + batch), stop), 0).to(tl.int32)
    return stop


@jit
def count_columns_before(column, first, last, stop, T: tl.constexpr):
    """How many of the tiles `first` to `last` of a row begin before `stop`. Columns ascend."""
    low = first
    high = last
    while low < high:
        middle = (low + high) // 2
        is_before = tl.load(column + middle) * T < stop
        low = tl.where(is_before, middle + 1, low)
        high = tl.where(is_before, high, middle)
    return low - first


@jit
def row_steps(
    tiles, row, stop, T: tl.constexpr, N: tl.constexpr, MASKED: tl.constexpr, HAS_LENS: tl.constexpr
):
    """The tiles of a row that need a mask if MASKED, else those that do not, in steps of N.

    Returns (first, count, second), number of steps: the tiles are `count` from `first` on, then all
    others from `second` on. Without MASKED there is no second part, and only tiles before `stop`
    count if HAS_LENS.
    """
    ranges = tiles.ranges + row * 6
    if MASKED:
        first = tl.load(ranges + 2)
        second = tl.load(ranges + 4)
        count = tl.load(ranges + 3) - first
        total = count + tl.load(ranges + 5) - second
    else:
        first = tl.load(ranges)
        second = first
        last = tl.load(ranges + 1)
        if HAS_LENS:
            count = count_columns_before(tiles.column, first, last, stop, T)
        else:
            count = last - first
        total = count
    return (first, count, second), total * (T // N)


@jit
def step_place(step, span, tiles, T: tl.constexpr, N: tl.constexpr, MASKED: tl.constexpr):
    """The tile of a step, and the first of its N keys or queries."""
    first, count, second = span
    n = step // (T // N)
    if MASKED:
        tile = tl.where(n < count, first + n, second + n - count)
    else:
        tile = first + n
    return tile, tl.load(tiles.column + tile) * T + step % (T // N) * N


@jit
def load_element_mask(
    mask_words, mask_id, query, first_key, T: tl.constexpr, N: tl.constexpr, BY_KEY: tl.constexpr
):
    """The element mask, 0 or 1, of queries [M] and N keys: [M, N], or [N, M] if BY_KEY.

    A load covers 32 keys. With a load for each score, the compiler would keep the mask, and compute
    the softmax, in two layouts, with eleven times the work.
    """
    M: tl.constexpr = query.shape[0]
    W: tl.constexpr = min(N, 32)
    key = first_key % T + tl.arange(0, N // W) * W
    row = mask_words + tl.maximum(mask_id, 0).to(tl.int64) * (T * T // 32) + query % T * (T // 32)
    bit = tl.arange(0, W)
    if BY_KEY:
        word = tl.load(row[None, :] + key[:, None] // 32) >> (key[:, None] % 32)
        word = tl.where(mask_id < 0, -1, word)
        mask = tl.reshape(word[:, None, :] >> bit[None, :, None], [N, M]) & 1
    else:
        word = tl.load(row[:, None] + key[None, :] // 32) >> (key[None, :] % 32)
        word = tl.where(mask_id < 0, -1, word)
        mask = tl.reshape(word[:, :, None] >> bit[None, None, :], [M, N]) & 1
    return mask


@jit
def live_pairs(
    query,
    first_key,
    tile,
    stop,
    tiles,
    size,
    N: tl.constexpr,
    C: tl.constexpr,
    MASKED: tl.constexpr,
    BY_KEY: tl.constexpr,
):
    """Which pairs of queries [M] and N keys of a tile are live: [M, N], or [N, M] if BY_KEY.

    Without MASKED, only the ends of queries and keys matter.
    """
    key = first_key + tl.arange(0, N)
    i = query[None, :] if BY_KEY else query[:, None]
    j = key[:, None] if BY_KEY else key[None, :]
    live = (i < size.Sq) & (j < stop)
    if MASKED:
        if C.CAUSAL:
            live = live & (j <= i + (size.Sk - size.Sq))
        if C.b < C.T:
            sub_block = i % C.T // C.b * (C.T // C.b) + j % C.T // C.b
            bits = tl.load(tiles.sub_blocks + tile)
            live = live & (((bits >> sub_block.to(tl.int64)) & 1) == 1)
        if C.HAS_ELEMENT_MASKS:
            mask_id = tl.load(tiles.mask_id + tile)
            mask = load_element_mask(tiles.mask_words, mask_id, query, first_key, C.T, N, BY_KEY)
            live = live & (mask == 1)
    return live


@jit
def forward_kernel(
    q, k, v, out, lse, tiles, size, C: tl.constexpr, M: tl.constexpr, N: tl.constexpr
):
    """Online softmax of M queries of one head over their tiles. `row_max` is in units of log 2."""
    D: tl.constexpr = C.D
    D_PADDED: tl.constexpr = C.D_PADDED
    batch, head, row, first = program_place(tiles, size, M, C, False)
    stop = end_of_keys(tiles, size, batch, C)
    query = first + tl.arange(0, M)
    out_row = (batch * size.H + head).to(tl.int64) * size.Sq
    q_head = head_start(q, batch, head)
    k_head = head_start(k, batch, head // size.G)
    v_head = head_start(v, batch, head // size.G)
    q_tile = load_rows(q_head, first, query < size.Sq, q.row, M, D, D_PADDED, True)
    acc = tl.zeros([M, D_PADDED], C.ACC_DTYPE)
    row_sum = tl.zeros([M], C.ACC_DTYPE)
    row_max = tl.full([M], float("-inf"), C.ACC_DTYPE)
    for MASKED in tl.static_range(2):  # whole tiles first, then those that need a mask
        span, steps = row_steps(tiles, row, stop, C.T, N, MASKED, C.HAS_LENS)
        for step in range(steps):
            tile, start = step_place(step, span, tiles, C.T, N, MASKED)
            live = live_pairs(query, start, tile, stop, tiles, size, N, C, MASKED, False)
            # A weight of 0 times the NaN of an unseen key is NaN, so unseen keys are not loaded.
            seen = tl.max(live.to(tl.int32), 0) > 0
            k_tile = load_rows(k_head, start, seen, k.row, N, D, D_PADDED, MASKED or C.HAS_LENS)
            v_tile = load_rows(v_head, start, seen, v.row, N, D, D_PADDED, MASKED or C.HAS_LENS)
            s = tl.dot(q_tile, tl.trans(k_tile), input_precision=C.PRECISION)  # (1)
            if C.SCALE_SIGN != 1:
                s = s * C.SCALE_SIGN
            if MASKED or C.HAS_LENS:
                s = tl.where(live, s, float("-inf"))
            new_max = tl.maximum(row_max, tl.max(s, 1) * size.log2_size)
            shift = new_max
            if MASKED or C.HAS_LENS:  # -inf - -inf is NaN
                shift = tl.where(new_max == float("-inf"), 0.0, new_max)
            p = tl.exp2(s * size.log2_size - shift[:, None])
            shrink = tl.exp2(row_max - shift)
            row_sum = row_sum * shrink + tl.sum(p, 1)
            acc = acc * shrink[:, None]
            acc = tl.dot(p.to(v_tile.dtype), v_tile, acc, input_precision=C.PRECISION)
            row_max = new_max
    is_empty = row_sum == 0.0
    divisor = tl.where(is_empty, 1.0, row_sum)
    store_rows(out + out_row * D, acc / divisor[:, None], first, size.Sq, M, D, D_PADDED)  # (3)
    log_sum = (row_max + tl.log2(divisor)) * 0.6931471805599453  # log 2
    log_sum = tl.where(is_empty, float("-inf"), log_sum)  # (2)
    tl.store(lse + out_row + query, log_sum, mask=query < size.Sq)


@jit
def delta_kernel(
    out,
    do,
    dlse,
    delta,
    H,
    Sq,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    M: tl.constexpr,
    ACC_DTYPE: tl.constexpr,
):
    """(5) for M queries. It may be NaN for a query without live pairs; `live` masks it later."""
    tile_rows = (Sq + M - 1) // M
    batch_head = tl.program_id(0) // tile_rows
    first = tl.program_id(0) % tile_rows * M
    query = first + tl.arange(0, M)
    row = batch_head.to(tl.int64) * Sq
    out_head = out + row * D
    do_head = head_start(do, batch_head // H, batch_head % H)
    out_tile = load_rows(out_head, first, query < Sq, D, M, D, D_PADDED, True)
    do_tile = load_rows(do_head, first, query < Sq, do.row, M, D, D_PADDED, True)
    product_sum = tl.sum(out_tile.to(ACC_DTYPE) * do_tile.to(ACC_DTYPE), 1)
    dlse_tile = tl.load(dlse + (row + query), mask=query < Sq, other=0.0)
    tl.store(delta + (row + query), product_sum - dlse_tile, mask=query < Sq)


@jit
def load_statistics(lse, delta, query, Sq, MASKED: tl.constexpr):
    """lse in units of log 2, and delta.

    Beyond the last query, lse is inf, which makes p 0, and delta is 0.
    """
    if MASKED:
        lse_tile = tl.load(lse + query, mask=query < Sq, other=float("inf"))
        delta_tile = tl.load(delta + query, mask=query < Sq, other=0.0)
    else:
        lse_tile = tl.load(lse + query)
        delta_tile = tl.load(delta + query)
    return lse_tile * 1.4426950408889634, delta_tile


@jit
def dq_kernel(
    q, k, v, do, lse, delta, dq, tiles, size, C: tl.constexpr, M: tl.constexpr, N: tl.constexpr
):
    """dq of M queries of one head, over the same tiles as the forward kernel."""
    D: tl.constexpr = C.D
    D_PADDED: tl.constexpr = C.D_PADDED
    batch, head, row, first = program_place(tiles, size, M, C, False)
    stop = end_of_keys(tiles, size, batch, C)
    query = first + tl.arange(0, M)
    out_row = (batch * size.H + head).to(tl.int64) * size.Sq
    q_head = head_start(q, batch, head)
    do_head = head_start(do, batch, head)
    k_head = head_start(k, batch, head // size.G)
    v_head = head_start(v, batch, head // size.G)
    q_tile = load_rows(q_head, first, query < size.Sq, q.row, M, D, D_PADDED, True)
    do_tile = load_rows(do_head, first, query < size.Sq, do.row, M, D, D_PADDED, True)
    lse_tile, delta_tile = load_statistics(lse + out_row, delta + out_row, query, size.Sq, True)
    dq_tile = tl.zeros([M, D_PADDED], C.ACC_DTYPE)
    for MASKED in tl.static_range(2):
        span, steps = row_steps(tiles, row, stop, C.T, N, MASKED, C.HAS_LENS)
        for step in range(steps):
            tile, start = step_place(step, span, tiles, C.T, N, MASKED)
            live = live_pairs(query, start, tile, stop, tiles, size, N, C, MASKED, False)
            seen = tl.max(live.to(tl.int32), 0) > 0
            k_tile = load_rows(k_head, start, seen, k.row, N, D, D_PADDED, MASKED or C.HAS_LENS)
            v_tile = load_rows(v_head, start, seen, v.row, N, D, D_PADDED, MASKED or C.HAS_LENS)
            s = tl.dot(q_tile, tl.trans(k_tile), input_precision=C.PRECISION)
            p = tl.exp2(s * size.log2_scale - lse_tile[:, None])  # (4)
            dp = tl.dot(do_tile, tl.trans(v_tile), input_precision=C.PRECISION)
            ds = p * (dp - delta_tile[:, None])  # (6)
            if MASKED or C.HAS_LENS:
                ds = tl.where(live, ds, 0.0)
            dq_tile = tl.dot(ds.to(k_tile.dtype), k_tile, dq_tile, input_precision=C.PRECISION)
    store_rows(dq + out_row * D, dq_tile * size.scale, first, size.Sq, M, D, D_PADDED)  # (8)


@jit
def dkdv_kernel(
    q,
    k,
    v,
    do,
    lse,
    delta,
    dk,
    dv,
    tiles,
    size,
    C: tl.constexpr,
    RAGGED: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    """dk and dv of N keys of one key head, over the tiles of all G query heads that share it.

    RAGGED: the last tile extends beyond the last query.
    """
    D: tl.constexpr = C.D
    D_PADDED: tl.constexpr = C.D_PADDED
    batch, head, row, first = program_place(tiles, size, N, C, True)
    stop = end_of_keys(tiles, size, batch, C)
    key = first + tl.arange(0, N)
    k_head = head_start(k, batch, head)
    v_head = head_start(v, batch, head)
    k_tile = load_rows(k_head, first, key < stop, k.row, N, D, D_PADDED, True)
    v_tile = load_rows(v_head, first, key < stop, v.row, N, D, D_PADDED, True)
    dk_tile = tl.zeros([N, D_PADDED], C.ACC_DTYPE)
    dv_tile = tl.zeros([N, D_PADDED], C.ACC_DTYPE)
    for g in range(size.G):
        q_head_number = head * size.G + g
        q_head = head_start(q, batch, q_head_number)
        do_head = head_start(do, batch, q_head_number)
        statistics_row = (batch * size.H + q_head_number).to(tl.int64) * size.Sq
        layout_row = row + g * size.head_stride * ((size.Sk + C.T - 1) // C.T)
        for MASKED in tl.static_range(2):
            span, steps = row_steps(tiles, layout_row, stop, C.T, M, MASKED, False)
            if C.HAS_LENS:
                steps = tl.where(first < stop, steps, 0)
            for step in range(steps):
                tile, start = step_place(step, span, tiles, C.T, M, MASKED)
                query = start + tl.arange(0, M)
                sees = query < size.Sq
                if MASKED:
                    live = live_pairs(query, first, tile, stop, tiles, size, N, C, True, True)
                    # A query that attends to nothing may hold NaN, so it is not loaded.
                    sees = tl.max(live.to(tl.int32), 0) > 0
                q_tile = load_rows(q_head, start, sees, q.row, M, D, D_PADDED, MASKED or RAGGED)
                do_tile = load_rows(do_head, start, sees, do.row, M, D, D_PADDED, MASKED or RAGGED)
                lse_tile, delta_tile = load_statistics(
                    lse + statistics_row, delta + statistics_row, query, size.Sq, MASKED or RAGGED
                )
                s = tl.dot(k_tile, tl.trans(q_tile), input_precision=C.PRECISION)  # [N, M]
                p = tl.exp2(s * size.log2_scale - lse_tile[None, :])  # (4)
                dp = tl.dot(v_tile, tl.trans(do_tile), input_precision=C.PRECISION)
                ds = p * (dp - delta_tile[None, :])  # (6)
                if MASKED:
                    p = tl.where(live, p, 0.0)
                    ds = tl.where(live, ds, 0.0)
                dv_tile = tl.dot(p.to(do_tile.dtype), do_tile, dv_tile, input_precision=C.PRECISION)
                dk_tile = tl.dot(ds.to(q_tile.dtype), q_tile, dk_tile, input_precision=C.PRECISION)
    out_row = (batch * (size.H // size.G) + head).to(tl.int64) * size.Sk * D
    is_live = key[:, None] < stop
    dk_tile = tl.where(is_live, dk_tile * size.scale, 0.0)
    dv_tile = tl.where(is_live, dv_tile, 0.0)
    store_rows(dk + out_row, dk_tile, first, size.Sk, N, D, D_PADDED)  # (9)
    store_rows(dv + out_row, dv_tile, first, size.Sk, N, D, D_PADDED)  # (7)


# ==== Launching the kernels =======================================================================
@remember_per_layout
def tile_ranges(layout, T, Sq, Sk, causal):
    """`row_ranges` of the index by query tile, and of the index by key tile."""
    query_tiles = ceil_div(Sq, T)
    key_tiles = ceil_div(Sk, T)
    shift = Sk - Sq
    first_query = torch.arange(query_tiles, device=layout.mask_bits.device) * T
    first_key = torch.arange(key_tiles, device=layout.mask_bits.device) * T
    # For a query tile, key tiles before `whole_end` need no mask, those from `seen_end` are hidden.
    whole_end = torch.full_like(first_query, Sk // T)
    seen_end = torch.full_like(first_query, key_tiles)
    # For a key tile, query tiles before `seen_start` see nothing, those from `whole_start` need no
    # mask.
    seen_start = torch.zeros_like(first_key)
    whole_start = torch.where(first_key + T > Sk, query_tiles, 0)
    if causal:
        query_end = (first_query + T).clamp(max=Sq)
        whole_end = torch.minimum(whole_end, (first_query + shift + 1) // T)
        seen_end = (query_end + shift + T - 1) // T
        seen_start = (first_key - shift) // T
        last_start = (first_key + T - 1 - shift + T - 1) // T
        whole_start = torch.maximum(whole_start, last_start)
    by_query = row_ranges(layout.by_query, key_tiles, whole_end, seen_end, by_key=False)
    by_key = row_ranges(layout.by_key, query_tiles, seen_start, whole_start, by_key=True)
    return by_query, by_key


def row_ranges(index, columns, low, high, by_key):
    """Where the tiles of each row lie in the index: int32 [R, 6], three pairs of first and end.

    The pairs are the tiles that need no mask, the whole tiles that the diagonal or the end of the
    keys cuts, and the partial tiles. Tiles that causal=True hides are in none of them. `low` and
    `high` bound the cut columns of each row. By query, the columns before `low` need no mask and
    those from `high` on are hidden; by key, it is the other way round.
    """
    row_first = index.row_start[:-1:2]
    row_partial = index.row_start[1::2]
    row_end = index.row_start[2::2]
    repeats = len(row_end) // len(low)
    low = low.clamp(0, columns).repeat(repeats)
    high = high.clamp(0, columns).repeat(repeats)
    whole_key = torch.arange(len(row_end), device=row_end.device) * 2 * columns
    partial_key = whole_key + columns + (low if by_key else high)
    keys = torch.stack((whole_key + low, whole_key + high, partial_key))
    whole_low, whole_high, partial_bound = torch.searchsorted(index.sort_key, keys)
    if by_key:
        unmasked = (whole_high, row_partial)
        cut = (whole_low, whole_high)
        partial = (partial_bound, row_end)
    else:
        unmasked = (row_first, whole_low)
        cut = (whole_low, whole_high)
        partial = (row_partial, partial_bound)
    return torch.stack((*unmasked, *cut, *partial), -1).int()


class Launch(NamedTuple):
    """How a kernel runs: M x N scores in a step, pipeline stages and warps."""

    M: int
    N: int
    stages: int
    warps: int


# Settings by the bytes in a row of D, for tiles of 128. Tiles of 64 take half of the warps where no
# registers spill because of it.
FORWARD = {
    128: Launch(128, 128, 3, 8),
    256: Launch(128, 64, 3, 8),
    512: Launch(64, 32, 3, 4),
    1024: Launch(32, 32, 1, 4),
}
DQ = {
    128: Launch(128, 64, 3, 8),
    256: Launch(128, 64, 3, 8),
    512: Launch(64, 32, 2, 8),
    1024: Launch(32, 32, 1, 4),
}
DKDV = {
    128: Launch(64, 128, 3, 8),
    256: Launch(64, 128, 3, 8),
    512: Launch(64, 32, 2, 8),
    1024: Launch(32, 32, 1, 4),
}
# Float32 without tensor cores: larger tiles spill registers.
IEEE = {
    128: Launch(32, 32, 2, 8),
    256: Launch(32, 32, 2, 8),
    512: Launch(32, 32, 2, 8),
    1024: Launch(16, 16, 1, 8),
}
# The Launch that each kernel was found to fit with, by its constants and device.
WORKING_LAUNCHES = {}


def first_launch(table, q, C):
    """The Launch to try first."""
    size = min(4, q.element_size())
    if size == 4 and C.PRECISION == "ieee" and not INTERPRET:
        table = IEEE
    row_bytes = max(128, C.D_PADDED * size)
    launch = table[row_bytes]
    launch = launch._replace(M=min(launch.M, C.T), N=min(launch.N, C.T))
    fewer_warps = (
        table is FORWARD
        or (table is DQ and row_bytes <= 256)
        or (table is DKDV and row_bytes <= 128)
    )
    if fewer_warps:
        warps = min(launch.warps, max(4, max(launch.M, launch.N) // 16))
        launch = launch._replace(warps=warps)
    return launch


def smaller_launch(launch):
    """The next Launch to try: fewer stages, then smaller tiles. None if there is none."""
    if launch.stages > 1:
        return launch._replace(stages=launch.stages - 1)
    if max(launch.M, launch.N) <= 16:
        return None
    if launch.M >= launch.N:
        return launch._replace(M=launch.M // 2)
    return launch._replace(N=launch.N // 2)


def launch_kernel(kernel, table, grid, q, *args, C, **constants):
    """Run `kernel` with the largest Launch that fits the device."""
    key = (kernel, q.dtype, q.device, C, *constants.values())
    launch = WORKING_LAUNCHES.get(key) or first_launch(table, q, C)
    while True:
        options = {
            "M": launch.M,
            "N": launch.N,
            "num_stages": launch.stages,
            "num_warps": launch.warps,
            "enable_fp_fusion": True,
        }
        try:
            with torch.cuda.device_of(q):
                kernel[grid](*args, C=C, **constants, **options)
        except triton.runtime.errors.OutOfResources:
            launch = smaller_launch(launch)
            if launch is None:
                raise
        else:
            WORKING_LAUNCHES[key] = launch
            return


def kernel_sizes(q, k, sizes, scale):
    """The Sizes of a call."""
    batch_stride = sizes.heads if sizes.batch > 1 else 0
    head_stride = 1 if sizes.heads > 1 else 0
    log2_scale = scale_sign(scale) * unsigned_scale(scale) * LOG2_E
    return Sizes(
        batch_stride=batch_stride,
        head_stride=head_stride,
        H=q.shape[1],
        G=q.shape[1] // k.shape[1],
        Sq=q.shape[2],
        Sk=k.shape[2],
        scale=scale,
        log2_scale=log2_scale,
        log2_size=unsigned_scale(scale) * LOG2_E,
    )


def scale_sign(scale):
    """1, 0 or -1; a scale that float32 flushes to 0 counts as 0.

    The forward kernel applies sign and size of the scale separately: for a factor f > 0,
    max(s f) = max(s) f, so the maximum can be taken before the multiplication.
    """
    if scale > SMALLEST_SCALE:
        return 1
    if scale < -SMALLEST_SCALE:
        return -1
    return 0


def unsigned_scale(scale):
    """|scale|, or 1 where its sign counts as 0."""
    return abs(scale) if scale_sign(scale) else 1


def kernel_constants(q, layout, sizes, kv_lens, scale, causal):
    """The Constants of a call."""
    is_tf32 = q.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return Constants(
        T=sizes.tile,
        b=sizes.block,
        D=q.shape[3],
        D_PADDED=max(16, triton.next_power_of_2(q.shape[3])),
        CAUSAL=causal,
        HAS_LENS=kv_lens is not None,
        HAS_ELEMENT_MASKS=len(layout.mask_bits) > 0,
        SCALE_SIGN=scale_sign(scale),
        PRECISION="tf32" if is_tf32 else "ieee",
        ACC_DTYPE=tl.float64 if q.dtype == torch.float64 else tl.float32,
    )


def kernel_tiles(layout, sizes, Sq, Sk, kv_lens, causal):
    """The Tiles by query and by key."""
    # Without kv_lens a kernel still takes a pointer, which it never follows.
    lens = layout.by_query.row_start if kv_lens is None else kv_lens.contiguous()
    words = layout.mask_bits
    if len(words):
        words = words.view(torch.int32)
    both = []
    for index, ranges in zip(
        layout[:2], tile_ranges(layout, sizes.tile, Sq, Sk, causal), strict=True
    ):
        both.append(
            Tiles(
                lens=lens,
                ranges=ranges,
                row_order=index.row_order,
                column=index.column,
                sub_blocks=index.sub_blocks,
                mask_id=index.mask_id,
                mask_words=words,
            )
        )
    return both


def as_strided_rows(x):
    """x as a kernel argument; copied unless the last stride is 1 and rows are less than 2^24 apart.

    Offsets inside a tile are int32.
    """
    if x.stride(3) != 1 or x.stride(2) >= 2**24:
        x = x.contiguous()
    return Strided(x, x.stride(0), x.stride(1), x.stride(2))


def triton_forward(q, k, v, layout, sizes, kv_lens, scale, causal):
    """(1) to (3) in one kernel: output [B, H, Sq, D] and lse [B, H, Sq]."""
    if INTERPRET and q.dtype == torch.bfloat16:  # the interpreter would multiply the raw bits
        out, lse = triton_forward(
            q.float(), k.float(), v.float(), layout, sizes, kv_lens, scale, causal
        )
        return out.bfloat16(), lse
    B, H, Sq, _ = q.shape
    T = sizes.tile
    out = q.new_empty(q.shape)
    lse = q.new_empty(q.shape[:3], dtype=accumulation_dtype(q))
    by_query, _ = kernel_tiles(layout, sizes, Sq, k.shape[2], kv_lens, causal)
    size = kernel_sizes(q, k, sizes, scale)
    C = kernel_constants(q, layout, sizes, kv_lens, scale, causal)
    tile_rows = B * H * ceil_div(Sq, T)

    def grid(options):
        return (tile_rows * (T // options["M"]),)

    args = (as_strided_rows(q), as_strided_rows(k), as_strided_rows(v), out, lse, by_query, size)
    launch_kernel(forward_kernel, FORWARD, grid, q, *args, C=C)
    return out, lse


def triton_backward(q, k, v, out, lse, do, dlse, layout, sizes, kv_lens, scale, causal):
    """(4) to (9) in three kernels: dq [B, H, Sq, D], dk and dv [B, K, Sk, D]."""
    if INTERPRET and q.dtype == torch.bfloat16:
        floats = [x.float() for x in (q, k, v, out, lse, do, dlse)]
        gradients = triton_backward(*floats, layout, sizes, kv_lens, scale, causal)
        return tuple(x.bfloat16() for x in gradients)
    B, H, Sq, _ = q.shape
    K, Sk = k.shape[1:3]
    T = sizes.tile
    dq = q.new_empty(q.shape)
    dk = k.new_empty(k.shape)
    dv = v.new_empty(v.shape)
    delta = torch.empty_like(lse)
    by_query, by_key = kernel_tiles(layout, sizes, Sq, Sk, kv_lens, causal)
    size = kernel_sizes(q, k, sizes, scale)
    C = kernel_constants(q, layout, sizes, kv_lens, scale, causal)
    strided_do = as_strided_rows(do)
    inputs = (as_strided_rows(q), as_strided_rows(k), as_strided_rows(v), strided_do, lse, delta)
    delta_options = {
        "D": C.D,
        "D_PADDED": C.D_PADDED,
        "M": 64,
        "ACC_DTYPE": C.ACC_DTYPE,
        "num_stages": 1,
        "enable_fp_fusion": True,
    }
    with torch.cuda.device_of(q):
        grid = (B * H * ceil_div(Sq, 64),)
        delta_kernel[grid](out, strided_do, dlse.contiguous(), delta, H, Sq, **delta_options)
    tile_columns = B * K * ceil_div(Sk, T)
    tile_rows = B * H * ceil_div(Sq, T)

    def dkdv_grid(options):
        return (tile_columns * (T // options["N"]),)

    def dq_grid(options):
        return (tile_rows * (T // options["M"]),)

    dkdv_args = (*inputs, dk, dv, by_key, size)
    launch_kernel(dkdv_kernel, DKDV, dkdv_grid, q, *dkdv_args, C=C, RAGGED=Sq % T > 0)
    launch_kernel(dq_kernel, DQ, dq_grid, q, *inputs, dq, by_query, size, C=C)
    return dq, dk, dv


# ==== Operator and autograd =======================================================================
@contextmanager
def settings(x):
    """Disable autocast, which would round intermediate results, and use oneDNN where it pays."""
    use_onednn = (
        x.device.type == "cpu"
        and torch.backends.mkldnn.matmul.fp32_precision == "none"  # the user has not chosen
        and onednn_pays()
    )
    with torch.autocast(x.device.type, enabled=False):
        with onednn() if use_onednn else nullcontext():
            yield


@torch.library.custom_op("onefile::blocksparse_attention", mutates_args=())
def forward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: list[Tensor],
    sizes: list[int],
    kv_lens: Tensor | None,
    scale: float,
    causal: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Output and lse. `layout` is a LayoutTensors as a flat list; `sizes` is a LayoutSizes."""
    forward = torch_forward if backend == "torch" else triton_forward
    tensors = unflatten_layout(layout)
    with settings(q):
        return forward(q, k, v, tensors, LayoutSizes(*sizes), kv_lens, scale, causal)


@torch.library.custom_op("onefile::blocksparse_attention_backward", mutates_args=())
def backward_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    do: Tensor,
    dlse: Tensor,
    layout: list[Tensor],
    sizes: list[int],
    kv_lens: Tensor | None,
    scale: float,
    causal: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv."""
    backward = torch_backward if backend == "torch" else triton_backward
    tensors = unflatten_layout(layout)
    layout_sizes = LayoutSizes(*sizes)
    with settings(q):
        return backward(q, k, v, out, lse, do, dlse, tensors, layout_sizes, kv_lens, scale, causal)


@forward_op.register_fake
def forward_shapes(q, k, v, layout, sizes, kv_lens, scale, causal, backend):
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=accumulation_dtype(q))


@backward_op.register_fake
def backward_shapes(q, k, v, *rest):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def save_forward(ctx, inputs, output):
    q, k, v, layout, sizes, kv_lens, scale, causal, backend = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse, kv_lens, *layout)
    ctx.options = (sizes, scale, causal, backend)


def save_backward(ctx, inputs, output):
    q, k, v, out, lse, do, dlse, layout, sizes, kv_lens, scale, causal, backend = inputs
    ctx.save_for_backward(q, k, v, do, dlse, kv_lens, *layout)
    ctx.options = (sizes, scale, causal, backend)


def differentiate_forward(ctx, do, dlse):
    """Gradients of the inputs of `forward_op`."""
    saved = ctx.saved_tensors
    q, k, v, out, lse, kv_lens = saved[:6]
    layout = list(saved[6:])
    sizes, scale, causal, backend = ctx.options
    dq, dk, dv = backward_op(
        q, k, v, out, lse, do, dlse, layout, sizes, kv_lens, scale, causal, backend
    )
    return dq, dk, dv, [None] * len(layout), None, None, None, None, None


def differentiate_backward(ctx, *gradients):
    """Gradients of the inputs of `backward_op`, by autograd over `differentiable_forward`.

    dq, dk and dv are functions of q, k, v, do and dlse. If the result is to be differentiated
    again, it stays in the graph.
    """
    saved = ctx.saved_tensors
    kv_lens = saved[5]
    layout = list(saved[6:])
    sizes, scale, causal, backend = ctx.options
    if backend != "torch":
        raise RuntimeError(
            "blocksparse_attention: double backward needs the PyTorch path: pass backend='torch'"
        )
    keep_graph = torch.is_grad_enabled()
    with torch.enable_grad(), settings(saved[0]):
        inputs = []
        for x in saved[:5]:
            if keep_graph and x.requires_grad:
                inputs.append(x.view_as(x))
            else:
                inputs.append(x.detach().requires_grad_())
        q, k, v, do, dlse = inputs
        tensors = unflatten_layout(layout)
        outputs = differentiable_forward(
            q, k, v, tensors, LayoutSizes(*sizes), kv_lens, scale, causal
        )
        if outputs[0].requires_grad:
            first = torch.autograd.grad(outputs, (q, k, v), (do, dlse), create_graph=True)
            second = torch.autograd.grad(
                first, inputs, gradients, materialize_grads=True, create_graph=keep_graph
            )
        else:  # no block is live
            second = [torch.zeros_like(x) for x in inputs]
    dq, dk, dv, ddo, ddlse = second
    no_layout = [None] * len(layout)
    return dq, dk, dv, None, None, ddo, ddlse, no_layout, None, None, None, None, None


forward_op.register_autograd(differentiate_forward, setup_context=save_forward)
backward_op.register_autograd(differentiate_backward, setup_context=save_backward)


# ==== Zoo: known patterns =========================================================================
# Patterns for calls with causal=True say so; the others need no such call.
def dense(sq, sk, block_size, device=None):
    """Every block (Vaswani et al. 2017, arXiv 1706.03762)."""
    i, j = block_grid(sq, sk, block_size, device)
    return BlockLayout.from_mask((i >= 0) & (j >= 0), block_size)


def causal(sq, sk, block_size, device=None):
    """Key blocks up to the diagonal, which ends at the last query and key (Radford et al. 2018).

    For calls with causal=True.
    """
    i, j = block_grid(sq, sk, block_size, device)
    return BlockLayout.from_mask(j * block_size < (i + 1) * block_size + sk - sq, block_size)


def sliding_window(sq, sk, block_size, window, device=None):
    """The last `window` keys up to the query's own (Mistral: Jiang et al. 2023, 2310.06825)."""
    i, j = block_grid(sq, sk, block_size, device)
    b = block_size
    shift = sk - sq
    starts_in_time = j * b < (i + 1) * b + shift
    ends_in_window = (j + 1) * b - 1 > i * b + shift - window

    def rule(batch, head, query, key):
        own_key = query + shift
        return (key <= own_key) & (key > own_key - window)

    return BlockLayout.from_mask(starts_in_time & ends_in_window, b, rule)


def strided(sq, sk, block_size, stride, heads=1, device=None):
    """The last `stride` blocks and every stride-th before (Child et al. 2019, arXiv 1904.10509).

    The lattice of head h is shifted by h blocks. For calls with causal=True.
    """
    require_at_least(1, stride=stride, heads=heads)
    i, j = block_grid(sq, sk, block_size, device)
    head = torch.arange(heads, device=device)[:, None, None]
    first, last = own_key_blocks(i, sq, sk, block_size)
    is_local = first - j < stride
    is_on_lattice = (last - j - head) % stride == 0
    return BlockLayout.from_mask((j <= last) & (is_local | is_on_lattice), block_size)


def fixed(sq, sk, block_size, stride, summary=1, heads=1, device=None):
    """The query's own segment of `stride` blocks, and a summary of each segment before.

    A summary has `summary` blocks. Head 0 takes the last ones of a segment, head 1 those before
    them, and so on, cyclically (Child et al. 2019, arXiv 1904.10509). For calls with causal=True.
    """
    require_at_least(1, stride=stride, summary=summary, heads=heads)
    i, j = block_grid(sq, sk, block_size, device)
    head = torch.arange(heads, device=device)[:, None, None]
    first, last = own_key_blocks(i, sq, sk, block_size)
    is_own_segment = first // stride <= j // stride
    is_summary = (stride - 1 - j % stride) // summary == head % max(1, stride // summary)
    return BlockLayout.from_mask((j <= last) & (is_own_segment | is_summary), block_size)


def bigbird(sq, sk, block_size, window=3, globals=1, random=3, heads=1, seed=0, device=None):
    """A window, global blocks at the start and random ones (Zaheer et al. 2020, arXiv 2007.14062).

    `window`, `globals` and `random` count blocks.
    """
    require_at_least(0, random=random)
    i, j = block_grid(sq, sk, block_size, device)
    noise = uniform(heads, i, j, seed)
    chosen = noise.topk(min(random, j.shape[1])).indices
    is_random = torch.zeros_like(noise, dtype=torch.bool).scatter_(-1, chosen, True)
    is_near = (i - j).abs() <= window // 2
    is_global = (i < globals) | (j < globals)
    return BlockLayout.from_mask(is_random | is_near | is_global, block_size)


def longformer(sq, sk, block_size, window, globals=1, device=None):
    """A window of keys around the query's own, and `globals` tokens at the start.

    Global tokens attend to all and are attended to by all (Beltagy et al. 2020, arXiv 2004.05150).
    """
    i, j = block_grid(sq, sk, block_size, device)
    b = block_size
    half = window // 2
    is_near = ((j - i) * b - b < half) & ((i - j) * b - b < half)
    is_global = (i * b < globals) | (j * b < globals)

    def rule(batch, head, query, key):
        return ((query - key).abs() <= half) | (query < globals) | (key < globals)

    return BlockLayout.from_mask(is_near | is_global, b, rule)


def block_diagonal(lengths, block_size, device=None):
    """Packed documents of given lengths that do not see each other.

    Krell et al. 2021, arXiv 2107.02027.
    """
    require_at_least(0, **{f"lengths[{n}]": length for n, length in enumerate(lengths)})
    b = block_size
    lengths = torch.tensor(lengths, device=device, dtype=torch.long)
    document = torch.arange(len(lengths), device=device).repeat_interleave(lengths)
    tokens = len(document)
    block_grid(tokens, tokens, b, device)  # checks the sizes
    first = document[::b]  # the documents that each block begins and ends in
    last = torch.cat((document[b - 1 :: b], document[-1:]))[: ceil_div(tokens, b)]
    mask = (first[:, None] <= last) & (first <= last[:, None])

    def document_of(token):
        """The document of each token; tokens beyond the end belong to the last one."""
        return document.to(token.device)[token.clamp(max=tokens - 1)]

    def rule(batch, head, query, key):
        return document_of(query) == document_of(key)

    return BlockLayout.from_mask(mask, b, rule)


def random(sq, sk, block_size, density, heads=1, seed=0, device=None):
    """The diagonal, and random blocks up to `density` (Gray, Radford and Kingma 2017)."""
    i, j = block_grid(sq, sk, block_size, device)
    noise = uniform(heads, i, j, seed)
    diagonal = 1 / max(noise.shape[1:])  # the density of the diagonal
    is_random = noise * (1 - diagonal) < density - diagonal
    return BlockLayout.from_mask(is_random | (i == j), block_size)


def prefix_lm(sq, sk, block_size, prefix, device=None):
    """All keys of the prefix, and keys up to the query's own.

    Raffel et al. 2020, arXiv 1910.10683. openai/blocksparse has it as autoregress_at_key.
    """
    i, j = block_grid(sq, sk, block_size, device)
    b = block_size
    shift = sk - sq
    mask = (j * b < prefix) | (j * b < (i + 1) * b + shift)

    def rule(batch, head, query, key):
        return (key < prefix) | (key <= query + shift)

    return BlockLayout.from_mask(mask, b, rule)


def block_grid(sq, sk, block_size, device):
    """Indices of the query blocks [Qb, 1] and of the key blocks [1, Kb]."""
    if min(sq, sk) < 1 or block_size not in BLOCK_SIZES:
        raise ValueError(
            f"needs sq and sk above 0 and a block_size of {BLOCK_SIZES}: "
            f"they are {sq}, {sk}, {block_size}"
        )
    i = torch.arange(ceil_div(sq, block_size), device=device)
    j = torch.arange(ceil_div(sk, block_size), device=device)
    return i[:, None], j[None, :]


def require_at_least(least, **numbers):
    for name, number in numbers.items():
        if number < least:
            raise ValueError(f"{name} must be {least} or more; it is {number}")


def uniform(heads, i, j, seed):
    """Random numbers [heads, Qb, Kb], the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    shape = (heads, len(i), j.shape[1])
    noise = torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu")
    return noise.to(i.device)


def own_key_blocks(i, sq, sk, block_size):
    """First and last block of the keys j = query + sk - sq of the query blocks i."""
    return i + (sk - sq) // block_size, i - (sq - sk) // block_size


# ==== Self-check ==================================================================================
class CheckCase(NamedTuple):
    """A small problem for the self-check."""

    block_size: int
    heads: int
    kv_heads: int
    sq: int
    sk: int
    dim: int
    causal: bool = False
    element_mask: Callable | None = None
    kv_lens: tuple[int, int] | None = None
    scale: float | None = None


def check_rule(batch, head, query, key):
    """An element mask of the self-check; it leaves every second block of 64 keys whole."""
    return (key // 64 % 2 > 0) | ((query + 3 * key + head) % 5 > 0)


CHECK_CASES = (
    CheckCase(32, 2, 1, 120, 100, 64, causal=True),
    CheckCase(64, 2, 2, 140, 300, 80, scale=0.2),
    CheckCase(
        64, 2, 1, 150, 330, 64, causal=True, element_mask=check_rule, kv_lens=(110, 150), scale=-0.1
    ),
)


def dense_attention(q, k, v, live, scale):
    """(1) to (3) over all pairs, of which `live` [B, H, Sq, Sk] count: output and lse."""
    G = q.shape[1] // k.shape[1]
    k = k.repeat_interleave(G, 1)
    v = v.repeat_interleave(G, 1)
    is_empty = ~live.any(-1, keepdim=True)
    s = (q @ k.mT * scale).masked_fill(~live, -math.inf).masked_fill(is_empty, 0)
    out = s.softmax(-1).masked_fill(is_empty, 0) @ v
    lse = s.logsumexp(-1).masked_fill(is_empty[..., 0], -math.inf)
    return out, lse


def self_check(backend, device, dtype):
    """Compare outputs, lse and gradients of small cases with dense attention in float64.

    Returns the largest error as a multiple of what is allowed, or NaN if any result is NaN.
    """
    errors = []
    for case in CHECK_CASES:
        errors.extend(check_case(case, backend, device, dtype))
    return torch.stack(errors).max().item()


def check_case(case, backend, device, dtype):
    """The error of each result of a case, as a multiple of what is allowed."""
    mask = random(case.sq, case.sk, case.block_size, 0.6, case.heads, device=device).to_mask()
    layout = BlockLayout.from_mask(mask, case.block_size, case.element_mask)
    kv_lens = None if case.kv_lens is None else torch.tensor(case.kv_lens, device=device)
    live = case_live_pairs(case, mask, kv_lens)
    q = torch.randn(2, case.heads, case.sq, case.dim, device=device).to(dtype)
    k = torch.randn(2, case.kv_heads, case.sk, case.dim, device=device).to(dtype)
    v = torch.randn(2, case.kv_heads, case.sk, case.dim, device=device).to(dtype)
    do = torch.randn(2, case.heads, case.sq, case.dim, device=device).to(dtype)
    scale = case.scale or case.dim**-0.5

    def block_sparse(q, k, v):
        return blocksparse_attention(
            q,
            k,
            v,
            layout,
            causal=case.causal,
            scale=case.scale,
            kv_lens=kv_lens,
            return_lse=True,
            backend=backend,
        )

    def reference(q, k, v):
        return dense_attention(q, k, v, live, scale)

    ours = results_and_gradients(block_sparse, dtype, q, k, v, do)
    naive = results_and_gradients(reference, dtype, q, k, v, do)
    exact = results_and_gradients(reference, torch.float64, q, k, v, do)
    errors = []
    for x, x_naive, x_exact in zip(ours, naive, exact, strict=True):
        errors.append((x - x_exact).abs().max() / allowed_error(x_naive, x_exact, dtype))
    return errors


def case_live_pairs(case, mask, kv_lens):
    """Which pairs of a case are live, by the definition: bool [2, H, Sq, Sk]."""
    head = torch.arange(case.heads, device=mask.device)[:, None, None]
    query = torch.arange(case.sq, device=mask.device)[:, None]
    key = torch.arange(case.sk, device=mask.device)
    live = mask[head, query // case.block_size, key // case.block_size].expand(2, -1, -1, -1)
    if case.causal:
        live = live & (key <= query + case.sk - case.sq)
    if case.element_mask:
        live = live & case.element_mask(0, head, query, key)
    if kv_lens is not None:
        live = live & (key < kv_lens[:, None, None, None])
    return live


def results_and_gradients(attention, dtype, q, k, v, do):
    """Output, lse (0 where it is -inf), dq, dk and dv of `attention` in `dtype`, as float64."""
    inputs = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
    out, lse = attention(*inputs)
    lse = lse.masked_fill(lse == -math.inf, 0)
    loss = (out * do.to(dtype)).sum() + lse.sum()
    gradients = torch.autograd.grad(loss, inputs)
    return [x.double() for x in (out, lse, *gradients)]


def allowed_error(naive, exact, dtype):
    """The tolerance of the self-check.

    In 16 bits, it is twice the error of dense attention in the same dtype, and 1e-3 of the result.
    """
    size = exact.abs().max()
    if dtype == torch.float64:
        return 1e-10 * size
    if dtype == torch.float32:
        return 2e-5 * size
    return 2 * (naive - exact).abs().max() + 1e-3 * size


def run_self_checks(device):
    """Run the self-check of every backend and dtype; raise RuntimeError if one fails."""
    checks = [("torch", dtype) for dtype in DTYPES]
    if triton is not None and (device.type == "cuda" or INTERPRET):
        for dtype in DTYPES:
            if INTERPRET or dtype != torch.float64:
                checks.append(("triton", dtype))
    for backend, dtype in checks:
        worst = self_check(backend, device, dtype)
        name = str(dtype).removeprefix("torch.")
        print(f"check: {backend}, {name}: largest error {worst:.2f} of what is allowed")
        if not worst <= 1:  # NaN fails as well
            raise RuntimeError("block-sparse attention differs from dense attention")


# ==== Benchmark ===================================================================================
DtypeName = Literal["auto", "float16", "bfloat16", "float32", "float64"]


@dataclass
class Args:
    """Check block-sparse attention against dense attention, then time it over layouts."""

    batch: int = 1  # batch size; 4 suits a large GPU
    heads: int = 8  # query heads
    kv_heads: int | None = None  # key heads, a divisor of --heads; default: --heads
    seq: int = 4096  # number of queries and of keys
    dim: int = 64  # head size
    block: Literal[8, 16, 32, 64, 128] = 64  # block size
    densities: tuple[float, ...] = (0.05, 0.125, 0.25, 0.5, 0.9)  # densities of the random layouts
    zoo: bool = True  # time the known patterns as well
    dtype: DtypeName = "auto"  # data type; auto is bfloat16 on CUDA, else float32
    device: str = "auto"  # cpu, cuda or cuda:N; auto is cuda if available
    backend: Literal["auto", "torch", "triton"] = "auto"  # auto is triton on CUDA where it can run
    backward: bool = True  # time forward with backward as well
    flex: bool = True  # time FlexAttention as well; on a CPU it has no gradients
    check: bool = True  # compare with dense attention first
    repeats: int = 5  # report the best of this many runs; all contenders run in turn
    threads: int | None = None  # CPU threads; default: leave unchanged
    seed: int = 0  # seed of inputs and random layouts
    output: str | None = "blocksparse_attention.png"  # path of the figure; None draws none


class Pattern(NamedTuple):
    """A layout to time."""

    label: str
    layout: BlockLayout
    causal: bool


class Timing(NamedTuple):
    """Seconds of one call on a pattern."""

    pattern: Pattern
    backward: bool  # forward with backward, or forward alone
    ours: float
    dense: float
    flex: float | None


def check_flags(args):
    """Check the flags, set threads and seed; return device and dtype."""
    device = choose_device(args.device)
    if args.dtype == "auto":
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    else:
        dtype = getattr(torch, args.dtype)
    threads = torch.get_num_threads() if args.threads is None else args.threads
    sizes = {
        "--batch": args.batch,
        "--heads": args.heads,
        "--kv-heads": number_of_key_heads(args),
        "--seq": args.seq,
        "--dim": args.dim,
        "--repeats": args.repeats,
        "--threads": threads,
    }
    for flag, size in sizes.items():
        if not 0 < size < 2**31:
            raise ValueError(f"{flag} {size}: it must be above 0 and below 2^31")
    for density in args.densities:
        if not 0 < density <= 1:
            raise ValueError(f"--densities {density}: they must be above 0 and at most 1")
    if args.heads % number_of_key_heads(args):
        raise ValueError(f"--heads {args.heads} must be a multiple of --kv-heads {args.kv_heads}")
    if args.output:
        path = Path(args.output).absolute()
        if path.suffix != ".png" or path.is_dir() or not os.access(path.parent, os.W_OK):
            raise ValueError(f"--output {args.output} must be a .png in a writable folder")
    torch.set_num_threads(threads)
    torch.manual_seed(args.seed)
    return device, dtype


def choose_device(name):
    """The device that --device names; raise ValueError if it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    allowed = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    if name.split(":")[0] not in allowed:
        raise ValueError(f"--device {name}: it must be cpu, or cuda where there is one")
    return torch.device(name)


def number_of_key_heads(args):
    return args.heads if args.kv_heads is None else args.kv_heads


def benchmark_patterns(args, device):
    """The patterns to time: random layouts, the full layout, and the zoo."""
    S = args.seq
    b = args.block
    H = args.heads
    patterns = []
    with torch.device(device):
        for density in args.densities:
            layout = random(S, S, b, density, H, args.seed)
            patterns.append(Pattern(f"random {density:.3g}", layout, False))
        patterns.append(Pattern("dense", dense(S, S, b), False))
        if args.zoo:
            lengths = [S // 8, S // 4, S // 8, S - S // 2]
            patterns += [
                Pattern("causal", causal(S, S, b), True),
                Pattern("sliding window", sliding_window(S, S, b, S // 8), False),
                Pattern("strided", strided(S, S, b, 8, H), True),
                Pattern("fixed", fixed(S, S, b, 8, 1, H), True),
                Pattern("bigbird", bigbird(S, S, b, heads=H), False),
                Pattern("longformer", longformer(S, S, b, S // 8, b), False),
                Pattern("block-diagonal", block_diagonal(lengths, b), False),
                Pattern("prefix-lm", prefix_lm(S, S, b, S // 4), False),
            ]
    return patterns


class Benchmark:
    """Times attention over patterns, against dense attention and FlexAttention."""

    def __init__(self, args, device, dtype):
        self.args = args
        self.device = device
        q_shape = (args.batch, args.heads, args.seq, args.dim)
        kv_shape = (args.batch, number_of_key_heads(args), args.seq, args.dim)
        q = torch.randn(q_shape, device=device, dtype=dtype)
        self.do = torch.randn(q_shape, device=device, dtype=dtype)
        k = torch.randn(kv_shape, device=device, dtype=dtype)
        v = torch.randn(kv_shape, device=device, dtype=dtype)
        self.inputs = [x.requires_grad_() for x in (q, k, v)]
        self.grouped_heads = q_shape[1] != kv_shape[1]
        self.flex_attention = compiled_flex_attention() if args.flex else None
        if device.type == "cuda":
            name = torch.cuda.get_device_name(device)
        else:
            name = f"CPU, {torch.get_num_threads()} threads"
        self.title = (
            f"{name}, torch {torch.__version__}: B{args.batch} H{args.heads} K{kv_shape[1]} "
            f"S{args.seq} D{args.dim} {str(dtype).removeprefix('torch.')}, block {args.block}"
        )

    def run(self):
        """Time every pattern and print the table; return the Timings."""
        self.print_header()
        timings = []
        for pattern in benchmark_patterns(self.args, self.device):
            row = self.time_pattern(pattern)
            peak = None
            if self.args.backward:
                step = self.training_step(self.ours(pattern))
                peak = peak_memory(step, self.device)
            self.print_row(row, peak)
            timings += row
        return timings

    def ours(self, pattern):
        return functools.partial(
            blocksparse_attention,
            *self.inputs,
            pattern.layout,
            causal=pattern.causal,
            backend=self.args.backend,
        )

    def dense(self):
        return functools.partial(
            F.scaled_dot_product_attention, *self.inputs, enable_gqa=self.grouped_heads
        )

    def flex(self, pattern):
        """FlexAttention over a pattern, or None if it does not run it."""
        if self.flex_attention is None:
            return None
        inputs = self.inputs
        if self.device.type == "cpu":  # FlexAttention has no gradients on a CPU
            inputs = [x.detach() for x in inputs]
        try:
            mask = flex_mask(pattern.layout, self.args.seq, pattern.causal)
            contender = functools.partial(
                self.flex_attention, *inputs, block_mask=mask, enable_gqa=self.grouped_heads
            )
            trial = contender
            if self.args.backward and self.device.type == "cuda":
                trial = self.training_step(contender)
            trial()
        except Exception as error:  # anything that it cannot compile
            reason = (str(error) or repr(error)).splitlines()[0][:80]
            print(f"FlexAttention does not run {pattern.label}: {reason}", file=sys.stderr)
            return None
        return contender

    def training_step(self, forward):
        """A function that computes `forward` and its gradients."""

        def step():
            return torch.autograd.grad(forward(), self.inputs, self.do)

        return step

    def time_pattern(self, pattern):
        """The Timings of a pattern: forward, and with backward if --backward."""
        contenders = [self.ours(pattern), self.dense()]
        flex = self.flex(pattern)
        if flex is not None:
            contenders.append(flex)
        timings = [self.time_contenders(pattern, contenders, backward=False)]
        if self.args.backward:
            if self.device.type == "cpu":
                contenders = contenders[:2]
            steps = [self.training_step(contender) for contender in contenders]
            timings.append(self.time_contenders(pattern, steps, backward=True))
        return timings

    def time_contenders(self, pattern, contenders, backward):
        with torch.set_grad_enabled(backward):
            seconds = best_seconds(contenders, self.args.repeats, self.device)
        flex = seconds[2] if len(seconds) > 2 else None
        return Timing(pattern, backward, seconds[0], seconds[1], flex)

    def print_header(self):
        print(f"\n{self.title}, best of {self.args.repeats}")
        columns = f"{'ms':>9}{'TFLOP/s':>9}{'x dense':>9}{'x flex':>8}"
        first_line = f"{'':31}forward"
        second_line = f"{'layout':<16}{'density':>8} {columns}"
        if self.args.backward:
            first_line += f"{'':30}with backward"
            second_line += f"{columns}{'peak MB':>9}"
        print(first_line)
        print(second_line)

    def print_row(self, timings, peak):
        pattern = timings[0].pattern
        density = pattern.layout.density
        line = f"{pattern.label:<16}{density:>8.3f} "
        for timing in timings:
            rate = self.flops(density, timing.backward) / timing.ours / 1e12
            line += f"{timing.ours * 1e3:>9.2f}{rate:>9.3f}{timing.dense / timing.ours:>9.2f}"
            if timing.flex is None:
                line += f"{'-':>8}"
            else:
                line += f"{timing.flex / timing.ours:>8.2f}"
        if peak is not None:
            line += f"{peak / 2**20:>9.0f}"
        print(line, flush=True)

    def flops(self, density, backward):
        """Two products forward, five backward; a multiply-add counts as two operations.

        The density is that of the blocks: what causal removes inside them counts as done.
        """
        args = self.args
        forward = 4 * args.batch * args.heads * args.seq**2 * args.dim * density
        return forward * 3.5 if backward else forward


def best_seconds(contenders, repeats, device):
    """The least time of each function, all of them in turn.

    Each timed call follows an untimed call of the same function, so that the caches and the heap
    are not those that another contender left behind.
    """
    synchronize = getattr(torch, device.type).synchronize  # torch.cpu has one that does nothing
    calls = 10 if device.type == "cuda" else 1  # queued, so that a GPU does not wait for Python

    def seconds_per_call(contender):
        contender()
        synchronize(device)
        begin = time.perf_counter()
        for _ in range(calls):
            contender()
        synchronize(device)
        return (time.perf_counter() - begin) / calls

    times = []
    for _ in range(repeats):
        times.append([seconds_per_call(contender) for contender in contenders])
    return [min(times_of_one) for times_of_one in zip(*times, strict=True)]


def peak_memory(function, device):
    """The most bytes of tensors during a call, above what was allocated before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise it writes into the table
    with torch.profiler.profile(profile_memory=True) as profile:
        function()
    changes = []
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            changes.append((event.start_ns(), event.nbytes()))
    changes.sort()
    return max(itertools.accumulate(size for _, size in changes), default=0)


def compiled_flex_attention():
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.config.recompile_limit = 64  # every layout is a compilation
    return torch.compile(flex_attention, dynamic=False)


def flex_mask(layout, seq, is_causal):
    """The layout as FlexAttention's BlockMask.

    Whole blocks are listed apart from those that the diagonal or an element mask cuts, because
    FlexAttention computes no mask in them.
    """
    from torch.nn.attention.flex_attention import BlockMask

    b = layout.block_size
    live, cut = flex_blocks(layout, is_causal)
    heads = live.shape[1]
    live_of_head = live[0]
    factor = max(1, 128 // b) if live.is_cuda else 1  # on a GPU it takes no blocks below 128
    if factor > 1:
        live, cut = merge_flex_blocks(live, cut, factor)

    def rule(batch, head, query, key):
        allowed = key <= query if is_causal else key >= 0
        if factor > 1:
            allowed = allowed & live_of_head[head % heads, query // b, key // b]
        if layout.rule:
            allowed = allowed & layout.rule(batch, head, query, key)
        return allowed

    cut_count, cut_order = sort_flex_blocks(live & cut)
    whole_count, whole_order = sort_flex_blocks(live & ~cut)
    return BlockMask.from_kv_blocks(
        cut_count,
        cut_order,
        whole_count,
        whole_order,
        BLOCK_SIZE=b * factor,
        mask_mod=rule,
        seq_lengths=(seq, seq),
    )


def flex_blocks(layout, is_causal):
    """Which blocks are live, and which of them a mask or the diagonal cuts: bool [B, H, Qb, Kb]."""
    b = layout.block_size
    live = layout.to_mask()[(None,) * (4 - len(layout.shape))]
    cut = torch.zeros_like(live)
    index = layout.tensors.by_query
    if len(index.mask_id):
        row, column = block_positions(index)
        masked = (row * layout.key_blocks + column)[index.mask_id >= 0]
        cut = cut.view(-1).index_fill_(0, masked, True).view_as(live)
    if is_causal:
        query = torch.arange(live.shape[2], device=live.device)[:, None] * b
        key = torch.arange(live.shape[3], device=live.device) * b
        live = live & (key < query + b)
        cut = cut | (key + b > query + 1)
    return live, cut


def merge_flex_blocks(live, cut, factor):
    """Merge factor x factor blocks into one."""
    padding = (0, -live.shape[3] % factor, 0, -live.shape[2] % factor)

    def merge(blocks):
        return F.pad(blocks, padding).unflatten(3, (-1, factor)).unflatten(2, (-1, factor))

    any_live = merge(live).any(5).any(3)
    all_whole = merge(live & ~cut).all(5).all(3)
    return any_live, ~all_whole


def sort_flex_blocks(blocks):
    """bool [B, H, Qb, Kb] -> the number of blocks in each row, and their columns first in a row."""
    order = blocks.byte().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32), order.int()


def print_flex_means(timings):
    """Print how much faster than FlexAttention the patterns are on average."""
    for backward, label in ((False, "forward"), (True, "with backward")):
        ratios = []
        for timing in timings:
            if timing.backward == backward and timing.flex is not None:
                ratios.append(timing.flex / timing.ours)
        if ratios:
            mean = statistics.geometric_mean(ratios)
            print(f"against FlexAttention, {label}: geometric mean {mean:.2f}")


def draw(timings, path, title):
    """Plot time against density, with a line for a cost proportional to density."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = sorted({timing.backward for timing in timings})
    figure, axes = plt.subplots(1, len(panels), figsize=(6 * len(panels), 4.5), squeeze=False)
    for ax, backward in zip(axes[0], panels, strict=True):
        draw_panel(ax, [timing for timing in timings if timing.backward == backward])
        ax.set_title("forward + backward" if backward else "forward")
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def draw_panel(ax, timings):
    dense_ms = min(timing.dense for timing in timings) * 1e3
    ax.plot([0, 1], [0, dense_ms], "--", color="grey", label="proportional to density")
    ax.axhline(dense_ms, color="black", linewidth=1, label="dense SDPA")
    random_points = []
    other_points = []
    for timing in timings:
        points = random_points if timing.pattern.label.startswith("random") else other_points
        points.append((timing.pattern.layout.density, timing.ours * 1e3))
    for points, label, style in (
        (random_points, "random", "o-"),
        (other_points, "other layouts", "x"),
    ):
        if points:
            densities, ms = zip(*sorted(points), strict=True)
            ax.plot(densities, ms, style, label=label)
    ax.set(xlabel="density", ylabel="ms", xlim=(0, 1.02))
    ax.set_ylim(bottom=0)
    ax.legend(frameon=False)


# ==== Command line ================================================================================
def run(args):
    """Self-check, table and figure."""
    device, dtype = check_flags(args)
    if args.check:
        run_self_checks(device)
    benchmark = Benchmark(args, device, dtype)
    timings = benchmark.run()
    print_flex_means(timings)
    if args.output:
        draw(timings, args.output, benchmark.title)
        print(f"\nwrote {args.output}")


def main():
    """Run with the flags of the command line. Exit status 2 is bad input or a failed check."""
    import tyro

    args = tyro.cli(Args)
    try:
        run(args)
    except (ValueError, RuntimeError, OSError) as error:
        message = " ".join(str(error).split()) or repr(error)
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
