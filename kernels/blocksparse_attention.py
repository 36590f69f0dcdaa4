# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.11", "numpy>=2", "tyro>=1,<2", "matplotlib>=3.9", "triton>=3.6; sys_platform == 'linux'"]
# ///
"""Block-sparse attention: softmax attention over chosen blocks, whose cost follows the number of blocks.
DOC
"""

# Shapes: B batch, H query heads, K key heads, G = H / K, Sq queries, Sk keys, D head size; b block, Qb and Kb blocks of
# queries and of keys, E live blocks; R rows of blocks, n blocks in each; T tile of blocks in the kernels, M x N scores.

import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # the CPU wheel of torch brings none, and the PyTorch path works without
    triton, tl = None, SimpleNamespace(constexpr=float)
jit = triton.jit if triton else lambda kernel: kernel

INTERPRET = triton is not None and os.environ.get("TRITON_INTERPRET") == "1"  # the kernels run on the CPU, in numpy
BLOCKS = (8, 16, 32, 64, 128)
DTYPES = torch.float16, torch.bfloat16, torch.float32, torch.float64
CHUNK = 2**19  # scores that the PyTorch path holds at a time, unless one row has more


# ==== the layout ======================================================================================================
def entries(live):
    """bool [heads, own, other] -> row [E], heads and own in one number, and column [E], in order."""
    *head, row, col = live.squeeze(0).nonzero().unbind(1)
    return head[0] * live.shape[1] + row if head else row, col


def index(row, col, shape, partial, sub, part, late):
    """The index of blocks, given in order, of heads x own x other = `shape`: six tensors.

    seg [2 R + 1]: row r has its whole blocks from seg[2r] to seg[2r + 1], its partial ones from there to seg[2r + 2];
    idx [E] columns, ascending in either part; key [E] to search in, sub [E] which sub-blocks live, part [E] which
    element mask, or -1, all three [0] where there are none; order [heads, own]: rows, the longest first.
    """
    heads, own, other = shape
    rows = torch.arange(2 * heads * own + 1, device=row.device)
    if partial is not None:
        key, by_key = ((row * 2 + partial) * other + col).sort()
        sub, part = (x[by_key] if len(x) else x for x in (sub, part))
        col, seg = key % other, torch.searchsorted(key, rows * other)
    else:
        key, seg = row[:0], torch.searchsorted(row.contiguous(), rows[: heads * own + 1]).repeat_interleave(2)[1:]
    count = (seg[2::2] - seg[:-2:2]).view(heads, own)
    if late:  # of equally long rows the late ones go first: under causal=True they are longer
        order = own - 1 - count.flip(-1).argsort(dim=-1, descending=True, stable=True)
    else:
        order = count.argsort(dim=-1, descending=True, stable=True)
    return [seg.int(), col.int(), key, sub, part, order.int()]


def both_ways(row, col, shape, partial, sub, part, bits, back=None):
    """The index of the query blocks, that of the key blocks, and the packed element masks: thirteen tensors."""
    heads, Qb, Kb = shape
    forth = index(row, col, shape, partial, sub, part, late=True)
    back = back or (row // Qb * Kb + col, row % Qb)
    return [*forth, *index(*back, (heads, Kb, Qb), partial, sub, part, late=False), bits]


def blocks_of(tensors):
    """Row [E] and column [E] of every block of an index."""
    seg, idx = tensors[0].long(), tensors[1].long()
    count = seg[2::2] - seg[:-2:2]
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
    (heads, Qb, Kb), part, bits = shape, tensors[4], tensors[12]
    row, col = blocks_of(tensors)

    def tiles(T):
        f = T // b
        return row // Qb * -(-Qb // f) * -(-Kb // f) + row % Qb // f * -(-Kb // f) + col // f

    T = max(b, 64)
    if 8 < b < 128 and len(row) and 0.9 * len(tiles(128).unique()) * (128 // b) ** 2 <= len(row):
        T = 128  # where the blocks fill them, wide tiles are faster
    f, (tile, of) = T // b, tiles(T).unique(return_inverse=True)
    Qt, Kt = -(-Qb // f), -(-Kb // f)
    at, sub, partial, tile_part = row % Qb % f * f + col % f, part[:0].long(), torch.zeros_like(tile).bool(), part
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
        *_, self.lead_b, self.lead_h, self.Qb, self.Kb = 1, 1, *self.shape
        self.tile, self.tiles = block_size, tensors
        if self.device.type == "cuda" or INTERPRET:  # where there are kernels to take them
            self.tile, self.tiles = coarsen(tensors, (self.lead_b * self.lead_h, self.Qb, self.Kb), block_size)

    @classmethod
    def from_mask(cls, mask, block_size, element_mask=None):
        """`mask`, bool [Qb, Kb], [H, Qb, Kb] or [B, H, Qb, Kb], has the live blocks; leading dimensions may be 1.

        `element_mask` has patterns inside of them: bool [E, b, b] in the order of mask.nonzero(), or a function of
        batch, head, query and key (integer tensors that broadcast) that says which pairs live; it is called on live
        blocks only. What causal=True, the ends and kv_lens remove needs no element mask.
        """
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.dim() not in (2, 3, 4) or not mask.numel():
            got = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"mask must be bool [Qb, Kb], [H, Qb, Kb] or [B, H, Qb, Kb], not empty; it is {got}")
        if block_size not in BLOCKS:
            raise ValueError(f"block_size must be one of {BLOCKS}; it is {block_size}")
        b, (_, H, Qb, Kb) = block_size, (1, 1, *mask.shape)[-4:]
        blocks = mask.reshape(-1, Qb, Kb)
        row, col = entries(blocks)
        part, bits = row.new_empty(0, dtype=torch.int32), row.new_empty(0, b, b // 8, dtype=torch.uint8)
        partial = None
        if element_mask is not None and len(row):
            if isinstance(element_mask, Tensor) and (
                element_mask.dtype != torch.bool or element_mask.shape != (len(row), b, b)
            ):
                got = f"{element_mask.dtype} {list(element_mask.shape)}"
                raise ValueError(f"element_mask must be bool {[len(row), b, b]}, a [b, b] for each block; it is {got}")
            within, packed = torch.arange(b, device=row.device), []
            for some in torch.arange(len(row), device=row.device).split(max(1, 2**22 // b**2)):
                r, c = row[some, None, None], col[some, None, None]
                i, j = r % Qb * b + within[:, None], c * b + within
                live = element_mask[some] if isinstance(element_mask, Tensor) else element_mask(
                    r // Qb // H, r // Qb % H, i, j
                )
                packed.append(pack(live.to(row.device).expand(len(some), b, b)))
            partial, bits = (torch.cat(x) for x in zip(*packed))
            part, partial = (torch.where(partial, partial.cumsum(0) - 1, -1).int(), partial) if len(bits) else (part, None)
        back = entries(blocks.mT) if partial is None else None  # already sorted
        tensors = both_ways(row, col, blocks.shape, partial, part[:0].long(), part, bits, back)
        return cls(mask.shape, b, tensors, element_mask if callable(element_mask) else None)

    @property
    def device(self):
        return self.tensors[0].device

    @property
    def density(self):
        """The share of the blocks that live."""
        return len(self.tensors[1]) / math.prod(self.shape)

    def to(self, device):
        return BlockLayout(self.shape, self.block_size, [x.to(device) for x in self.tensors], self.rule)

    def to_mask(self):
        """The mask of blocks that it was made from."""
        row, col = blocks_of(self.tensors)
        mask = torch.zeros(math.prod(self.shape), dtype=torch.bool, device=self.device)
        return mask.index_fill_(0, row * self.Kb + col, True).view(self.shape)

    def __repr__(self):
        b, E, masked = self.block_size, len(self.tensors[1]), len(self.tensors[12])
        return (
            f"BlockLayout({list(self.shape)} of {b} x {b}: {self.Qb * b} queries, {self.Kb * b} keys, {E} blocks, "
            f"density {self.density:.3g}, {masked} with an element mask, on {self.device})"
        )


# ==== the zoo: known patterns =========================================================================================
def grid(sq, sk, block_size, device):
    """Indices of the query blocks [Qb, 1] and of the key blocks [1, Kb]."""
    i, j = (torch.arange(-(-s // block_size), device=device) for s in (sq, sk))
    return i[:, None], j[None, :]


def dense(sq, sk, block_size, device="cpu"):
    """Every block (Vaswani et al. 2017, arXiv 1706.03762)."""
    i, j = grid(sq, sk, block_size, device)
    return BlockLayout.from_mask((i >= 0) & (j >= 0), block_size)


def causal(sq, sk, block_size, device="cpu"):
    """Key blocks up to the diagonal, aligned to the bottom right (Radford et al. 2018); for a call with causal=True."""
    i, j = grid(sq, sk, block_size, device)
    return BlockLayout.from_mask(j * block_size < (i + 1) * block_size + sk - sq, block_size)


def sliding_window(sq, sk, block_size, window, device="cpu"):
    """The `window` keys that end at the query's own (Mistral: Jiang et al. 2023, arXiv 2310.06825)."""
    (i, j), b, shift = grid(sq, sk, block_size, device), block_size, sk - sq
    near = (j * b < (i + 1) * b + shift) & ((j + 1) * b - 1 > i * b + shift - window)
    return BlockLayout.from_mask(near, b, lambda _, h, i, j: (j <= i + shift) & (j > i + shift - window))


def strided(sq, sk, block_size, stride, heads=1, device="cpu"):
    """The last `stride` blocks and every stride-th one before (Child et al. 2019, arXiv 1904.10509); with causal=True.

    The lattice of head h is shifted by h.
    """
    i, j = grid(sq, sk, block_size, device)
    h, i = torch.arange(heads, device=device)[:, None, None], i + (sk - sq) // block_size
    return BlockLayout.from_mask((j <= i) & ((i - j < stride) | ((i - j - h) % stride == 0)), block_size)


def fixed(sq, sk, block_size, stride, summary=1, heads=1, device="cpu"):
    """Blocks of the query's own stretch of `stride`, and `summary` of every stretch before (Child et al. 2019).

    Head h takes the summary h stretches of `summary` from the end, around; for a call with causal=True.
    """
    i, j = grid(sq, sk, block_size, device)
    h, i = torch.arange(heads, device=device)[:, None, None], i + (sk - sq) // block_size
    last = (stride - 1 - j % stride) // summary == h % max(1, stride // summary)
    return BlockLayout.from_mask((j <= i) & ((i // stride == j // stride) | last), block_size)


def bigbird(sq, sk, block_size, window=3, globals=1, random=3, heads=1, seed=0, device="cpu"):
    """A window, global blocks at the beginning and random ones (Zaheer et al. 2020, arXiv 2007.14062), in blocks."""
    i, j = grid(sq, sk, block_size, device)
    draw = torch.rand(heads, len(i), j.shape[1], generator=torch.Generator().manual_seed(seed)).to(device)
    chosen = torch.zeros_like(draw, dtype=torch.bool).scatter_(-1, draw.topk(min(random, j.shape[1])).indices, True)
    return BlockLayout.from_mask(chosen | ((i - j).abs() <= window // 2) | (i < globals) | (j < globals), block_size)


def longformer(sq, sk, block_size, window, globals=1, device="cpu"):
    """`window` keys around the query's own, and tokens that see and are seen by all (Beltagy et al. 2020, 2004.05150)."""
    (i, j), b, half = grid(sq, sk, block_size, device), block_size, window // 2
    near = ((j - i) * b - b < half) & ((i - j) * b - b < half)
    mask = near | (i * b < globals) | (j * b < globals)
    return BlockLayout.from_mask(mask, b, lambda _, h, i, j: ((i - j).abs() <= half) | (i < globals) | (j < globals))


def block_diagonal(lengths, block_size, device="cpu"):
    """Documents of given lengths, packed, that do not see each other (Krell et al. 2021, arXiv 2107.02027)."""
    b, owner = block_size, torch.arange(len(lengths), device=device).repeat_interleave(torch.tensor(lengths).to(device))
    first, last = owner[::b], torch.cat((owner[b - 1 :: b], owner[-1:]))[: -(-len(owner) // b)]  # of each block
    mask = (first[:, None] <= last) & (first <= last[:, None])
    end = len(owner) - 1
    return BlockLayout.from_mask(mask, b, lambda _, h, i, j: owner[i.clamp(max=end)] == owner[j.clamp(max=end)])


def random(sq, sk, block_size, density, heads=1, seed=0, device="cpu"):
    """Each block with probability `density`, the diagonal always (Gray, Radford and Kingma 2017)."""
    i, j = grid(sq, sk, block_size, device)
    draw = torch.rand(heads, len(i), j.shape[1], generator=torch.Generator().manual_seed(seed)).to(device)
    return BlockLayout.from_mask((draw < density) | (i == j), block_size)


def prefix_lm(sq, sk, block_size, prefix, device="cpu"):
    """Keys of the prefix, and those up to the query (Raffel et al. 2020, arXiv 1910.10683; autoregress_at_key)."""
    (i, j), b, shift = grid(sq, sk, block_size, device), block_size, sk - sq
    mask = (j * b < prefix) | (j * b < (i + 1) * b + shift)
    return BlockLayout.from_mask(mask, b, lambda _, h, i, j: (j < prefix) | (j <= i + shift))


# ==== the PyTorch path ================================================================================================
def chunks(layout, sizes, q, k, kv_lens, causal, by_key):
    """Rows of query blocks, or of key blocks, batched by their number of blocks, some CHUNK scores at a time.

    Yields rows [R] and blocks [R n], as numbers of blocks of q and of k, and a mask [R, b, t b] of the last t blocks of
    each row, or None where t is 0: only blocks that need a mask are there, or whole ones to fill up.
    """
    (B, H, Sq, _), (K, Sk), (lead_b, lead_h, b, _) = q.shape, k.shape[1:3], sizes
    seg, idx, _, _, part, _ = layout[6:12] if by_key else layout[:6]
    Qb, Kb, shift = -(-Sq // b), -(-Sk // b), Sk - Sq
    own, arange = Kb if by_key else Qb, torch.arange(b, device=q.device)

    # Every live block: row, entry of the layout, block of queries i, block of keys j, where the keys end.
    first, last = (x.view(lead_b, lead_h, own).expand(B, H, own).flatten().long() for x in (seg[:-2:2], seg[2::2]))
    count = last - first
    row = torch.arange(B * H * own, device=q.device).repeat_interleave(count)
    entry = torch.arange(len(row), device=q.device) + (last - count.cumsum(0))[row]
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

    # Sorted by row, whole blocks first; rows sorted by their number of blocks, of masked ones.
    q_block, k_block = head * Qb + i, (head // H * K + head % H // (H // K)) * Kb + j
    row, block, R = (k_block, q_block, B * K * Kb) if by_key else (q_block, k_block, B * H * Qb)
    by_row = (row * 2 + partial).argsort(stable=True)
    block, entry, i, j, stop = (x[by_row] for x in (block, entry, i, j, stop))
    count, tail = torch.bincount(row, minlength=R), torch.bincount(row[partial], minlength=R)
    first, order = count.cumsum(0) - count, (count * (len(row) + 1) + tail).argsort()
    numbers, groups = count[order].unique_consecutive(return_counts=True)
    for n, rows in zip(numbers.tolist(), order.split(groups.tolist())):
        for rows in rows.split(max(1, CHUNK // max(1, n * b * b))):
            at = first[rows, None] + torch.arange(n, device=q.device)  # [R, n]
            t, mask = int(tail[rows[-1]]), None  # the rows of a group have them in ascending order
            if t:
                late = at[:, n - t :]
                query, key = i[late][..., None, None] * b + arange[:, None], j[late][..., None, None] * b + arange
                mask = (query < Sq) & (key < stop[late][..., None, None])  # [R, t, b of queries, b of keys]
                if causal:
                    mask &= key <= query + shift
                if len(part):
                    which = part[entry[late]].long()
                    mask &= unpack(layout[12][which.clamp(min=0)]) | (which < 0)[..., None, None]
                mask = (mask.permute(0, 3, 1, 2) if by_key else mask.transpose(1, 2)).flatten(2)
            yield rows, block[at].flatten(), mask


def to_blocks(x, b):
    """[B, H, S, D] -> [B H blocks, b, D], the end padded with zeros; a view where it can be one."""
    short = -x.shape[2] % b
    return (F.pad(x, (0, 0, 0, short)) if short else x).reshape(-1, b, x.shape[3])


def from_blocks(x, shape):
    """The way back: [B H blocks, b, ...] -> [B, H, S, ...]."""
    return x.view(*shape[:2], -1, *x.shape[2:])[:, :, : shape[2]].contiguous()


class Pool(dict):
    """Named buffers that are used again, since fresh pages cost as much as arithmetic."""

    def __init__(self, like, dtype):
        self.like, self.dtype = like, dtype

    def get(self, name, *shape):
        size = math.prod(shape)
        if name not in self or self[name].numel() < size:
            self[name] = None  # give the old one back first
            self[name] = self.like.new_empty(size, dtype=self.dtype)
        return self[name][:size].view(shape)

    def take(self, name, x, rows):
        """x[rows] in the type to compute in."""
        out = self.get(name, len(rows), *x.shape[1:])
        return torch.index_select(x, 0, rows, out=out) if x.dtype == self.dtype else out.copy_(x.index_select(0, rows))


def accurate(x):
    """The type of statistics and sums."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def whole(layout, sizes, q, k, kv_lens, causal):
    """Whether a layout is full, on a CPU, where PyTorch's own attention does the same."""
    square = q.shape[2] == k.shape[2] or not causal
    full = layout[1].numel() == math.prod(sizes[:2]) * -(-q.shape[2] // sizes[2]) * -(-k.shape[2] // sizes[2])
    return full and not len(layout[12]) and kv_lens is None and square and q.shape[1] == k.shape[1] and not q.is_cuda


def torch_forward(q, k, v, layout, sizes, kv_lens, scale, causal):
    b, D, dtype = sizes[2], q.shape[3], accurate(q)
    if whole(layout, sizes, q, k, kv_lens, causal):
        q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
        return out.contiguous(), lse.contiguous()
    Q, K, V = (to_blocks(x, b) for x in (q, k, v))
    out, lse, pool = torch.empty_like(Q), Q.new_empty(Q.shape[:2], dtype=dtype), Pool(q, dtype)
    for rows, blocks, mask in chunks(layout, sizes, q, k, kv_lens, causal, by_key=False):
        R, n = len(rows), len(blocks) // len(rows)
        if not n:
            out[rows], lse[rows] = 0, -math.inf
            continue
        x, y = pool.take("q", Q, rows), pool.take("k", K, blocks).view(R, n * b, D)
        t = 0 if mask is None else mask.shape[2]
        unseen = ~mask.any(1)[..., None] if t else None  # [R, t b, 1], of keys whose 0 p would meet a NaN
        t and y[:, n * b - t :].masked_fill_(unseen, 0)
        s = pool.get("s", R, b, n * b)
        torch.baddbmm(s, x, y.mT, beta=0, alpha=scale, out=s)  # (1)
        t and s[:, :, n * b - t :].masked_fill_(~mask, -math.inf)
        m = s.amax(-1, keepdim=True)
        t and m.masked_fill_(m == -math.inf, 0)  # a row that sees nothing
        s.sub_(m).exp_()
        total = s.sum(-1, keepdim=True)
        y = pool.take("k", V, blocks).view(R, n * b, D)
        t and y[:, n * b - t :].masked_fill_(unseen, 0)
        o = torch.bmm(s, y, out=pool.get("o", R, b, D)).div_(total.masked_fill(total == 0, 1) if t else total)  # (3)
        out.index_copy_(0, rows, o.to(q.dtype))
        lse.index_copy_(0, rows, m.add_(total.log_())[..., 0])  # (2)
    return from_blocks(out, q.shape), from_blocks(lse, q.shape)


def torch_backward(q, k, v, out, lse, do, dlse, layout, sizes, kv_lens, scale, causal):
    b, D, dtype = sizes[2], q.shape[3], accurate(q)
    if whole(layout, sizes, q, k, kv_lens, causal) and not dlse.any():  # which knows no gradient of lse
        q, k, v, do = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v, do))
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        return tuple(x.contiguous() for x in backward(do, q, k, v, out, lse, 0.0, causal, scale=scale))
    Q, K, V, dO = (to_blocks(x, b) for x in (q, k, v, do))
    empty = lse == -math.inf
    delta = torch.cat([(x.to(dtype) * y).sum(-1) for x, y in zip(do.flatten(0, 1).split(1), out.flatten(0, 1).split(1))])
    delta = (delta.view_as(lse) - dlse).masked_fill_(empty, 0)  # (5), and whatever came for an empty row
    ends = lse.masked_fill(empty, math.inf)  # exp(s - inf) is 0
    delta, ends = (F.pad(x, (0, -x.shape[2] % b), value=z).view(-1, 1, b) for x, z in ((delta, 0), (ends, math.inf)))
    dq, dk, dv = torch.zeros_like(Q, dtype=dtype), torch.empty_like(K), torch.empty_like(V)
    pool = Pool(q, dtype)
    for rows, blocks, mask in chunks(layout, sizes, q, k, kv_lens, causal, by_key=True):
        R, n = len(rows), len(blocks) // len(rows)
        if not n:
            dk[rows], dv[rows] = 0, 0
            continue
        x, g = (pool.take(name, z, blocks).view(R, n * b, D) for name, z in (("q", Q), ("do", dO)))
        y, z = pool.take("k", K, rows), pool.take("v", V, rows)
        t = 0 if mask is None else mask.shape[2]
        if t:  # no 0 may meet the NaN of an unseen key, or of a query that sees none
            blind = ~mask.any(1)[..., None]
            x[:, n * b - t :].masked_fill_(blind, 0)
            g[:, n * b - t :].masked_fill_(blind, 0)
            if t == n * b:
                unseen = ~mask.any(2)[..., None]
                y.masked_fill_(unseen, 0)
                z.masked_fill_(unseen, 0)
        p, ds = pool.get("p", R, b, n * b), pool.get("ds", R, b, n * b)  # [R, keys, queries]
        p.view(R, b, n, b).copy_(ends[blocks].view(R, 1, n, b))
        torch.baddbmm(p, y, x.mT, beta=-1, alpha=scale, out=p).exp_()  # (4)
        t and p[:, :, n * b - t :].masked_fill_(~mask, 0)
        dv.index_copy_(0, rows, torch.bmm(p, g, out=pool.get("o", R, b, D)).to(q.dtype))  # (7)
        ds.view(R, b, n, b).copy_(delta[blocks].view(R, 1, n, b))
        torch.baddbmm(ds, z, g.mT, beta=-1, out=ds).mul_(p)  # (6)
        dk.index_copy_(0, rows, torch.bmm(ds, x, out=pool.get("o", R, b, D)).mul_(scale).to(q.dtype))  # (9)
        torch.baddbmm(x, ds.mT, y, beta=0, alpha=scale, out=x)
        dq.index_add_(0, blocks, x.view(-1, b, D))  # (8)
    dq, dk, dv = from_blocks(dq, q.shape), from_blocks(dk, k.shape), from_blocks(dv, v.shape)
    return dq.to(q.dtype), dk, dv


def differentiable(q, k, v, layout, sizes, kv_lens, scale, causal):
    """(1) to (3) again for autograd to differentiate twice: it keeps every score."""
    b, D, dtype = sizes[2], q.shape[3], accurate(q)
    Q, K, V = (to_blocks(x, b).to(dtype) for x in (q, k, v))
    out, lse = torch.zeros_like(Q), Q.new_full(Q.shape[:2], -math.inf)
    for rows, blocks, mask in chunks(layout, sizes, q, k, kv_lens, causal, by_key=False):
        R, n = len(rows), len(blocks) // len(rows)
        if not n:
            continue
        live = torch.ones(R, b, n * b, dtype=torch.bool, device=q.device)
        if mask is not None:
            live[..., n * b - mask.shape[2] :] = mask
        y, z = (x[blocks].view(R, n * b, D).masked_fill(~live.any(1)[..., None], 0) for x in (K, V))
        s = (Q[rows] @ y.mT * scale).masked_fill(~live, -math.inf)
        m = s.detach().amax(-1, keepdim=True)
        p = (s - m.masked_fill(m == -math.inf, 0)).exp()
        total = p.sum(-1, keepdim=True)
        some = total.masked_fill(total == 0, 1)
        out = out.index_copy(0, rows, p @ z / some)
        lse = lse.index_copy(0, rows, torch.where(total == 0, -math.inf, m + some.log())[..., 0])
    return from_blocks(out, q.shape).to(q.dtype), from_blocks(lse, q.shape)


# ==== the Triton kernels ==============================================================================================
@jit
def rows_of(x, start, stop, stride, N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, MASKED: tl.constexpr):
    """N rows of x [S, D] from `start` on, padded with zeros: to DP, a power of two, and, where MASKED, from `stop` on."""
    n, d = tl.arange(0, N), tl.arange(0, DP)
    at = x + start.to(tl.int64) * stride + n[:, None] * stride + d[None, :]
    if MASKED:
        return tl.load(at, mask=((start + n) < stop)[:, None] & (d < D)[None, :], other=0.0)
    elif D < DP:
        return tl.load(at, mask=(d < D)[None, :], other=0.0)
    else:
        return tl.load(at)


@jit
def put_rows(x, y, start, stop, N: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """Write y [N, DP] to x [S, D], contiguous, from `start` to `stop`."""
    n, d = tl.arange(0, N), tl.arange(0, DP)
    at = x + start.to(tl.int64) * D + n[:, None] * D + d[None, :]
    tl.store(at, y.to(x.dtype.element_ty), mask=((start + n) < stop)[:, None] & (d < D)[None, :])


@jit
def visible(
    i, j, entry, sub, part, bits, Sq, stop, shift,
    T: tl.constexpr, b: tl.constexpr, CAUSAL: tl.constexpr, PART: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Whether queries i see keys j, which broadcast, in a tile; where not MASKED the ends alone decide."""
    live = (i < Sq) & (j < stop)
    if MASKED:
        if CAUSAL:
            live = live & (j <= i + shift)
        if b < T:
            at = i % T // b * (T // b) + j % T // b
            live = live & (((tl.load(sub + entry) >> at.to(tl.int64)) & 1) == 1)
        if PART:
            which = tl.load(part + entry)
            at = tl.maximum(which, 0).to(tl.int64) * (T * T // 8) + (i % T * (T // 8) + j % T // 8)
            octet = tl.load(bits + at).to(tl.int32)
            live = live & ((which < 0) | (((octet >> (j % 8)) & 1) == 1))
    return live


@jit
def tile_at(step, idx, a, na, c, T: tl.constexpr, N: tl.constexpr, MASKED: tl.constexpr):
    """Entry and first row of the step-th N rows of the tiles from `a`, and, where MASKED, after `na` tiles from `c`."""
    entry = step // (T // N)
    if MASKED:
        entry = tl.where(entry < na, a + entry, c + entry - na)
    else:
        entry = a + entry
    return entry, tl.load(idx + entry) * T + step % (T // N) * N


@jit
def forward_tiles(
    acc, total, m, x, k, v, idx, sub, part, bits, a, na, c, nc, i, k_s, v_s, Sq, stop, shift, scale,
    D: tl.constexpr, DP: tl.constexpr, T: tl.constexpr, b: tl.constexpr, N: tl.constexpr, CAUSAL: tl.constexpr,
    LENS: tl.constexpr, PART: tl.constexpr, SIGN: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Online softmax over some tiles: m the largest score so far in units of log 2, total and acc relative to it."""
    CHECK: tl.constexpr = MASKED or LENS
    for step in range(0, (na + nc) * (T // N)):
        entry, start = tile_at(step, idx, a, na, c, T, N, MASKED)
        y = rows_of(k, start, stop, k_s, N, D, DP, CHECK)
        z = rows_of(v, start, stop, v_s, N, D, DP, CHECK)
        if CHECK:
            j = start + tl.arange(0, N)
            live = visible(i[:, None], j[None, :], entry, sub, part, bits, Sq, stop, shift, T, b, CAUSAL, PART, MASKED)
            seen = tl.max(live.to(tl.int32), 0)[:, None] > 0
            y = tl.where(seen, y, 0.0)  # no 0 p may meet the NaN of a key that nobody here sees
            z = tl.where(seen, z, 0.0)
        s = tl.dot(x, tl.trans(y), input_precision=PRECISION)  # (1)
        if SIGN != 1:
            s = s * SIGN
        if CHECK:
            s = tl.where(live, s, float("-inf"))
        largest = tl.maximum(m, tl.max(s, 1) * scale)
        m_ = largest
        if CHECK:
            m_ = tl.where(largest == float("-inf"), 0.0, largest)  # -inf - -inf is NaN
        p = tl.exp2(s * scale - m_[:, None])
        shrink = tl.exp2(m - m_)
        total = total * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(z.dtype), z, acc * shrink[:, None], input_precision=PRECISION)  # (3)
        m = largest
    return acc, total, m


@jit
def forward_kernel(
    q, k, v, out, lse, lens, ranges, order, idx, sub, part, bits, q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s,
    lay_b, lay_h, H, G, Sq, Sk, scale, D: tl.constexpr, DP: tl.constexpr, T: tl.constexpr, b: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, CAUSAL: tl.constexpr, LENS: tl.constexpr, PART: tl.constexpr,
    SIGN: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A program: M queries of one head against their tiles, whole ones first, then those that need a mask."""
    Qt = (Sq + T - 1) // T
    steps = Qt * (T // M)
    bh, pid = tl.program_id(0) // steps, tl.program_id(0) % steps
    batch, head = bh // H, bh % H
    row = (batch * lay_b + head * lay_h) * Qt
    tile = tl.load(order + row + pid // (T // M))
    at = ranges + (row + tile) * 6
    start, stop = tile * T + pid % (T // M) * M, Sk
    if LENS:
        stop = tl.minimum(tl.load(lens + batch), Sk).to(tl.int32)
    i = start + tl.arange(0, M)
    x = rows_of(q + batch.to(tl.int64) * q_b + head.to(tl.int64) * q_h, start, Sq, q_s, M, D, DP, True)
    k += batch.to(tl.int64) * k_b + (head // G).to(tl.int64) * k_h
    v += batch.to(tl.int64) * v_b + (head // G).to(tl.int64) * v_h
    acc, total, m = tl.zeros([M, DP], ACC), tl.zeros([M], ACC), tl.full([M], float("-inf"), ACC)
    a, a1, c, c1, e, e1 = (
        tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), tl.load(at + 4), tl.load(at + 5)
    )  # fmt: skip
    acc, total, m = forward_tiles(
        acc, total, m, x, k, v, idx, sub, part, bits, a, a1 - a, 0, 0, i, k_s, v_s, Sq, stop, Sk - Sq, scale,
        D, DP, T, b, N, CAUSAL, LENS, PART, SIGN, PRECISION, False,
    )  # fmt: skip
    acc, total, m = forward_tiles(
        acc, total, m, x, k, v, idx, sub, part, bits, c, c1 - c, e, e1 - e, i, k_s, v_s, Sq, stop, Sk - Sq, scale,
        D, DP, T, b, N, CAUSAL, LENS, PART, SIGN, PRECISION, True,
    )  # fmt: skip
    some = tl.where(total == 0.0, 1.0, total)
    put_rows(out + bh.to(tl.int64) * Sq * D, acc / some[:, None], start, Sq, M, D, DP)
    log_sum = tl.where(total == 0.0, float("-inf"), (m + tl.log2(some)) * 0.6931471805599453)  # (2)
    tl.store(lse + bh.to(tl.int64) * Sq + i, log_sum, mask=i < Sq)


@jit
def delta_kernel(
    out, do, lse, dlse, delta, g_b, g_h, g_s, H, Sq,
    D: tl.constexpr, DP: tl.constexpr, M: tl.constexpr, N: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """(5) of M queries; 0 where a query sees nothing, whatever came for it."""
    steps = (Sq + M - 1) // M
    bh, start = tl.program_id(0) // steps, tl.program_id(0) % steps * M
    i = start + tl.arange(0, M)
    at = bh.to(tl.int64) * Sq + i
    x = rows_of(out + bh.to(tl.int64) * Sq * D, start, Sq, D, M, D, DP, True)
    g = rows_of(do + (bh // H).to(tl.int64) * g_b + (bh % H).to(tl.int64) * g_h, start, Sq, g_s, M, D, DP, True)
    value = tl.sum(x.to(ACC) * g.to(ACC), 1) - tl.load(dlse + at, mask=i < Sq, other=0.0)
    empty = tl.load(lse + at, mask=i < Sq, other=0.0) == float("-inf")
    tl.store(delta + at, tl.where(empty, 0.0, value), mask=i < Sq)


@jit
def ends_of(lse, at, inside):
    """Log-sum-exp in units of log 2; inf, so that p is 0, where there is no query or where it sees nothing."""
    ends = tl.load(lse + at, mask=inside, other=float("inf"))
    return tl.where(ends == float("-inf"), float("inf"), ends) * 1.4426950408889634


@jit
def dq_tiles(
    dq, x, g, ends, delta, k, v, idx, sub, part, bits, a, na, c, nc, i, k_s, v_s, Sq, stop, shift, scale,
    D: tl.constexpr, DP: tl.constexpr, T: tl.constexpr, b: tl.constexpr, N: tl.constexpr, CAUSAL: tl.constexpr,
    LENS: tl.constexpr, PART: tl.constexpr, SIGN: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    CHECK: tl.constexpr = MASKED or LENS
    for step in range(0, (na + nc) * (T // N)):
        entry, start = tile_at(step, idx, a, na, c, T, N, MASKED)
        y = rows_of(k, start, stop, k_s, N, D, DP, CHECK)
        z = rows_of(v, start, stop, v_s, N, D, DP, CHECK)
        if CHECK:
            j = start + tl.arange(0, N)
            live = visible(i[:, None], j[None, :], entry, sub, part, bits, Sq, stop, shift, T, b, CAUSAL, PART, MASKED)
            seen = tl.max(live.to(tl.int32), 0)[:, None] > 0
            y = tl.where(seen, y, 0.0)
            z = tl.where(seen, z, 0.0)
        s = tl.dot(x, tl.trans(y), input_precision=PRECISION)
        if SIGN != 1:
            s = s * SIGN
        p = tl.exp2(s * scale - ends[:, None])  # (4)
        ds = p * (tl.dot(g, tl.trans(z), input_precision=PRECISION) - delta[:, None])  # (6)
        if CHECK:
            ds = tl.where(live, ds, 0.0)
        dq = tl.dot(ds.to(y.dtype), y, dq, input_precision=PRECISION)  # (8)
    return dq


@jit
def dq_kernel(
    q, k, v, do, lse, delta, dq, lens, ranges, order, idx, sub, part, bits, q_b, q_h, q_s, k_b, k_h, k_s,
    v_b, v_h, v_s, g_b, g_h, g_s, lay_b, lay_h, H, G, Sq, Sk, scale, factor, D: tl.constexpr, DP: tl.constexpr,
    T: tl.constexpr, b: tl.constexpr, M: tl.constexpr, N: tl.constexpr, CAUSAL: tl.constexpr, LENS: tl.constexpr,
    PART: tl.constexpr, SIGN: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A program: the gradient of M queries, over the same tiles as forward."""
    Qt = (Sq + T - 1) // T
    steps = Qt * (T // M)
    bh, pid = tl.program_id(0) // steps, tl.program_id(0) % steps
    batch, head = bh // H, bh % H
    row = (batch * lay_b + head * lay_h) * Qt
    tile = tl.load(order + row + pid // (T // M))
    at = ranges + (row + tile) * 6
    start, stop = tile * T + pid % (T // M) * M, Sk
    if LENS:
        stop = tl.minimum(tl.load(lens + batch), Sk).to(tl.int32)
    i = start + tl.arange(0, M)
    x = rows_of(q + batch.to(tl.int64) * q_b + head.to(tl.int64) * q_h, start, Sq, q_s, M, D, DP, True)
    g = rows_of(do + batch.to(tl.int64) * g_b + head.to(tl.int64) * g_h, start, Sq, g_s, M, D, DP, True)
    ends = ends_of(lse, bh.to(tl.int64) * Sq + i, i < Sq)
    delta = tl.load(delta + bh.to(tl.int64) * Sq + i, mask=i < Sq, other=0.0)
    k += batch.to(tl.int64) * k_b + (head // G).to(tl.int64) * k_h
    v += batch.to(tl.int64) * v_b + (head // G).to(tl.int64) * v_h
    a, a1, c, c1, e, e1 = (
        tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), tl.load(at + 4), tl.load(at + 5)
    )  # fmt: skip
    acc = tl.zeros([M, DP], ACC)
    acc = dq_tiles(
        acc, x, g, ends, delta, k, v, idx, sub, part, bits, a, a1 - a, 0, 0, i, k_s, v_s, Sq, stop, Sk - Sq, scale,
        D, DP, T, b, N, CAUSAL, LENS, PART, SIGN, PRECISION, False,
    )  # fmt: skip
    acc = dq_tiles(
        acc, x, g, ends, delta, k, v, idx, sub, part, bits, c, c1 - c, e, e1 - e, i, k_s, v_s, Sq, stop, Sk - Sq, scale,
        D, DP, T, b, N, CAUSAL, LENS, PART, SIGN, PRECISION, True,
    )  # fmt: skip
    put_rows(dq + bh.to(tl.int64) * Sq * D, acc * factor, start, Sq, M, D, DP)


@jit
def dkdv_tiles(
    dk, dv, y, z, q, do, lse, delta, idx, sub, part, bits, a, na, c, nc, j, q_s, g_s, Sq, stop, shift, scale,
    D: tl.constexpr, DP: tl.constexpr, T: tl.constexpr, b: tl.constexpr, M: tl.constexpr, CAUSAL: tl.constexpr,
    RAGGED: tl.constexpr, PART: tl.constexpr, SIGN: tl.constexpr, PRECISION: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    CHECK: tl.constexpr = MASKED or RAGGED
    for step in range(0, (na + nc) * (T // M)):
        entry, start = tile_at(step, idx, a, na, c, T, M, MASKED)
        i = start + tl.arange(0, M)
        x = rows_of(q, start, Sq, q_s, M, D, DP, CHECK)
        g = rows_of(do, start, Sq, g_s, M, D, DP, CHECK)
        ends = ends_of(lse, i, i < Sq)
        if MASKED:
            live = visible(i[None, :], j[:, None], entry, sub, part, bits, Sq, stop, shift, T, b, CAUSAL, PART, True)
            sees = tl.max(live.to(tl.int32), 0)[:, None] > 0
            x = tl.where(sees, x, 0.0)  # nor the NaN of a query that sees nothing
            g = tl.where(sees, g, 0.0)
        s = tl.dot(y, tl.trans(x), input_precision=PRECISION)  # [keys, queries]
        if SIGN != 1:
            s = s * SIGN
        p = tl.exp2(s * scale - ends[None, :])  # (4)
        ds = p * (tl.dot(z, tl.trans(g), input_precision=PRECISION) - tl.load(delta + i, mask=i < Sq, other=0.0)[None, :])
        if MASKED:
            p = tl.where(live, p, 0.0)
            ds = tl.where(live, ds, 0.0)  # (6)
        dv = tl.dot(p.to(g.dtype), g, dv, input_precision=PRECISION)  # (7)
        dk = tl.dot(ds.to(x.dtype), x, dk, input_precision=PRECISION)  # (9)
    return dk, dv


@jit
def dkdv_kernel(
    q, k, v, do, lse, delta, dk, dv, lens, ranges, order, idx, sub, part, bits, q_b, q_h, q_s, k_b, k_h, k_s,
    v_b, v_h, v_s, g_b, g_h, g_s, lay_b, lay_h, H, G, Sq, Sk, scale, factor, D: tl.constexpr, DP: tl.constexpr,
    T: tl.constexpr, b: tl.constexpr, M: tl.constexpr, N: tl.constexpr, CAUSAL: tl.constexpr, LENS: tl.constexpr,
    PART: tl.constexpr, SIGN: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """A program: the gradient of N keys and values of one key head, over the tiles of all the query heads it serves."""
    Kt = (Sk + T - 1) // T
    steps = Kt * (T // N)
    bh, pid = tl.program_id(0) // steps, tl.program_id(0) % steps
    batch, head = bh // (H // G), bh % (H // G)
    row = (batch * lay_b + head * G * lay_h) * Kt
    tile = tl.load(order + row + pid // (T // N))
    start, stop = tile * T + pid % (T // N) * N, Sk
    if LENS:
        stop = tl.minimum(tl.load(lens + batch), Sk).to(tl.int32)
    j = start + tl.arange(0, N)
    y = rows_of(k + batch.to(tl.int64) * k_b + head.to(tl.int64) * k_h, start, stop, k_s, N, D, DP, True)
    z = rows_of(v + batch.to(tl.int64) * v_b + head.to(tl.int64) * v_h, start, stop, v_s, N, D, DP, True)
    acc_k, acc_v = tl.zeros([N, DP], ACC), tl.zeros([N, DP], ACC)
    for g in range(0, G):
        h = head * G + g
        at = ranges + ((batch * lay_b + h * lay_h) * Kt + tile) * 6
        x = q + batch.to(tl.int64) * q_b + h.to(tl.int64) * q_h
        gradient = do + batch.to(tl.int64) * g_b + h.to(tl.int64) * g_h
        queries = (batch * H + h).to(tl.int64) * Sq
        a, a1, c, c1, e, e1 = (
            tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), tl.load(at + 4), tl.load(at + 5)
        )  # fmt: skip
        acc_k, acc_v = dkdv_tiles(
            acc_k, acc_v, y, z, x, gradient, lse + queries, delta + queries, idx, sub, part, bits, a, a1 - a, 0, 0, j,
            q_s, g_s, Sq, stop, Sk - Sq, scale, D, DP, T, b, M, CAUSAL, RAGGED, PART, SIGN, PRECISION, False,
        )  # fmt: skip
        acc_k, acc_v = dkdv_tiles(
            acc_k, acc_v, y, z, x, gradient, lse + queries, delta + queries, idx, sub, part, bits, c, c1 - c, e, e1 - e,
            j, q_s, g_s, Sq, stop, Sk - Sq, scale, D, DP, T, b, M, CAUSAL, RAGGED, PART, SIGN, PRECISION, True,
        )  # fmt: skip
    inside = (j < stop)[:, None]
    put_rows(dk + bh.to(tl.int64) * Sk * D, tl.where(inside, acc_k * factor, 0.0), start, Sk, N, D, DP)
    put_rows(dv + bh.to(tl.int64) * Sk * D, tl.where(inside, acc_v, 0.0), start, Sk, N, D, DP)


def ranges(seg, key, own, other, lo, hi, back):
    """Where the tiles of each row lie among its entries: [R, 6], beginnings and ends of those that need no mask, of
    whole ones that the diagonal or the end of the keys cuts, of partial ones. What causal hides is in none of them.

    `lo` and `hi` [own] bound the cut ones: columns before lo are seen whole, those from hi on not at all; or, in the
    index of the key blocks (`back`), columns from hi on are seen whole, and those before lo not at all.
    """
    R = len(seg) // 2
    row = torch.arange(R, device=seg.device) * 2 * other
    lo, hi = (x.clamp(0, other).repeat(R // own) for x in (lo, hi))
    cut, after, late = torch.searchsorted(key, torch.stack((row + lo, row + hi, row + other + (lo if back else hi))))
    first, middle, last = seg[:-2:2], seg[1::2], seg[2::2]
    if back:
        return torch.stack((after, middle, cut, after, late, last), -1).int()
    return torch.stack((first, cut, cut, after, middle, late), -1).int()


def ranges_both(layout, T, Sq, Sk, causal):
    Qt, Kt, shift, device = -(-Sq // T), -(-Sk // T), Sk - Sq, layout[0].device
    i, j = torch.arange(Qt, device=device) * T, torch.arange(Kt, device=device) * T
    lo, hi = torch.full_like(i, Sk // T), torch.full_like(i, Kt)
    back_lo, back_hi = torch.zeros_like(j), torch.where(j + T > Sk, Qt, 0)
    if causal:
        lo, hi = torch.minimum(lo, (i + shift + 1) // T), ((i + T).clamp(max=Sq) + shift + T - 1) // T
        back_lo, back_hi = (j - shift) // T, torch.maximum(back_hi, (j + T - 1 - shift + T - 1) // T)
    forth = ranges(layout[0], layout[2], Qt, Kt, lo, hi, False)
    return forth, ranges(layout[6], layout[8], Kt, Qt, back_lo, back_hi, True)


# Tiles M x N, stages and warps by the bytes of a row of D: what is known to suit Hopper in 16 bits, less elsewhere.
FORWARD = {128: (128, 128, 3, 4), 256: (128, 64, 3, 8), 512: (64, 32, 3, 4), 1024: (32, 32, 1, 4)}
DQ = {128: (128, 64, 3, 8), 256: (128, 64, 3, 8), 512: (64, 32, 2, 4), 1024: (32, 32, 1, 4)}
DKDV = {128: (64, 128, 3, 8), 256: (64, 128, 3, 8), 512: (32, 64, 2, 4), 1024: (32, 32, 1, 4)}
DELTA = dict.fromkeys((128, 256, 512, 1024), (64, 16, 1, 4))
FITS = {}  # what a device with less shared memory takes instead


def launch(kernel, table, q, tile, programs, *args, **constants):
    """Start `kernel` with the tiles of its table, cut to `tile`; where they do not fit, with fewer stages, then smaller."""
    D, size = q.shape[3], 4 if q.dtype in (torch.float32, torch.float64) else 2
    DP = max(16, triton.next_power_of_2(D))
    key = kernel, tile, DP, size, q.device
    M, N, stages, warps = FITS.get(key) or table[max(128, DP * size)]
    M, N = min(M, tile), min(N, tile)
    while True:
        try:
            with torch.cuda.device_of(q):
                kernel[(programs(M, N),)](
                    *args, D=D, DP=DP, M=M, N=N, ACC=tl.float64 if q.dtype == torch.float64 else tl.float32, num_stages=stages, num_warps=warps, **constants
                )
            FITS[key] = M, N, stages, warps
            return
        except triton.runtime.errors.OutOfResources:
            if stages == 1 and max(M, N) <= 16:
                raise
            M, N, stages = (M, N, stages - 1) if stages > 1 else (M // 2, N, 1) if M >= N else (M, N // 2, 1)


def triton_setup(q, k, layout, sizes, kv_lens, scale, causal):
    """What all the kernels take: index of either way, sizes, and constants."""
    (_, H, Sq, _), (K, Sk), (lead_b, lead_h, b, T) = q.shape, k.shape[1:3], sizes
    forth, back = ranges_both(layout, T, Sq, Sk, causal)
    lens = layout[0] if kv_lens is None else kv_lens.contiguous()
    forth = lens, forth, layout[5], layout[1], layout[3], layout[4], layout[12]
    back = lens, back, layout[11], layout[7], layout[9], layout[10], layout[12]
    # Kernels take a positive factor for the exponent, in units of log 2, and the sign apart: max(s) scale = max(s scale).
    factor = (abs(scale) or 1) * math.log2(math.e)
    numbers = (lead_h if lead_b > 1 else 0, int(lead_h > 1), H, H // K, Sq, Sk, factor)
    tf32 = q.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    constants = {"T": T, "b": sizes[2], "CAUSAL": causal, "LENS": kv_lens is not None, "PART": len(layout[12]) > 0}
    constants |= {"SIGN": (scale > 0) - (scale < 0), "PRECISION": "tf32" if tf32 else "ieee"}
    return forth, back, numbers, constants


def triton_forward(q, k, v, layout, sizes, kv_lens, scale, causal):
    (B, H, Sq, D), T = q.shape, sizes[3]
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    out, lse = q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=accurate(q))
    forth, _, numbers, constants = triton_setup(q, k, layout, sizes, kv_lens, scale, causal)
    strides = *q.stride()[:3], *k.stride()[:3], *v.stride()[:3]
    args = (q, k, v, out, lse, *forth, *strides, *numbers)
    launch(forward_kernel, FORWARD, q, T, lambda M, N: B * H * -(-Sq // T) * (T // M), *args, **constants)
    return out, lse


def triton_backward(q, k, v, out, lse, do, dlse, layout, sizes, kv_lens, scale, causal):
    (B, H, Sq, D), (K, Sk), T = q.shape, k.shape[1:3], sizes[3]
    q, k, v, do = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v, do))
    dq, dk, dv, delta = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), torch.empty_like(lse)
    forth, back, numbers, constants = triton_setup(q, k, layout, sizes, kv_lens, scale, causal)
    strides = [n for x in (q, k, v, do) for n in x.stride()[:3]]
    args = out, do, lse, dlse.contiguous(), delta, *strides[9:], H, Sq
    launch(delta_kernel, DELTA, q, 64, lambda M, N: B * H * -(-Sq // M), *args)
    inputs, rest = (q, k, v, do, lse, delta), (*strides, *numbers, scale)
    args = *inputs, dk, dv, *back, *rest
    programs, ragged = B * K * -(-Sk // T) * T, Sq % T > 0
    launch(dkdv_kernel, DKDV, q, T, lambda M, N: programs // N, *args, **constants, RAGGED=ragged)
    args = *inputs, dq, *forth, *rest
    launch(dq_kernel, DQ, q, T, lambda M, N: B * H * -(-Sq // T) * (T // M), *args, **constants)
    return dq, dk, dv


# ==== the operator ====================================================================================================
@torch.library.custom_op("onefile::blocksparse_attention", mutates_args=())
def forward_op(
    q: Tensor, k: Tensor, v: Tensor, layout: list[Tensor], sizes: list[int], kv_lens: Tensor | None, scale: float,
    causal: bool, backend: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`layout` are the thirteen tensors of blocks or of tiles, `sizes` two leading dimensions of it, block and tile."""
    run = torch_forward if backend == "torch" else triton_forward
    return run(q, k, v, layout, sizes, kv_lens, scale, causal)


@torch.library.custom_op("onefile::blocksparse_attention_backward", mutates_args=())
def backward_op(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, do: Tensor, dlse: Tensor, layout: list[Tensor],
    sizes: list[int], kv_lens: Tensor | None, scale: float, causal: bool, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    run = torch_backward if backend == "torch" else triton_backward
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
    """Of dq, dk and dv, as functions of q, k, v, do and dlse: autograd over `differentiable`, in PyTorch alone."""
    q, k, v, _, _, do, dlse, kv_lens, *layout = ctx.saved_tensors
    sizes, scale, causal, backend = ctx.numbers
    if backend != "torch":
        raise RuntimeError("blocksparse_attention: double backward needs the PyTorch path: pass backend='torch'")
    with torch.enable_grad():
        q, k, v, do, dlse = (x.detach().requires_grad_() for x in (q, k, v, do, dlse))
        outputs = differentiable(q, k, v, layout, sizes, kv_lens, scale, causal)
        first = torch.autograd.grad(outputs, (q, k, v), (do, dlse), create_graph=True)
        inputs = q, k, v, do, dlse
        dq, dk, dv, ddo, ddlse = torch.autograd.grad(first, inputs, gradients, materialize_grads=True)
    return dq, dk, dv, None, None, ddo, ddlse, [None] * len(layout), None, None, None, None, None


forward_op.register_autograd(backward, setup_context=keep)
backward_op.register_autograd(double_backward, setup_context=keep)


def blocksparse_attention(
    q, k, v, layout, *, causal=False, scale=None, kv_lens=None, return_lse=False, backend="auto"
):
    """Attention of q [B, H, Sq, D] over k and v [B, K, Sk, D] in the blocks of `layout`; H is a multiple of K.

    causal: query i sees key j only where j <= i + Sk - Sq, so the last query sees the last key. scale: of q . k, any
    number, D^-1/2 by default. kv_lens [B]: keys from there on are seen by none. return_lse: also return the logarithm
    of the sum of exp(scores), [B, H, Sq], differentiable. backend: torch, triton, or auto, which is triton on CUDA.
    A query that sees nothing gives 0, lse -inf and gradients 0.
    """
    backend = check(q, k, v, layout, kv_lens, backend)
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    tensors, tile = (layout.tensors, layout.block_size) if backend == "torch" else (layout.tiles, layout.tile)
    sizes = [layout.lead_b, layout.lead_h, layout.block_size, tile]
    out, lse = forward_op(q, k, v, tensors, sizes, kv_lens, scale, causal, backend)
    return (out, lse) if return_lse else out


def check(q, k, v, layout, kv_lens, backend):
    """Refuse bad input before any kernel starts; returns the backend that auto stands for."""

    def require(holds, message, error=ValueError):
        if not holds:
            raise error(f"blocksparse_attention: {message}")

    shapes = "q {}, k {}, v {}".format(*(list(x.shape) for x in (q, k, v)))
    require(q.dim() == k.dim() == v.dim() == 4, f"q, k and v must be [batch, heads, length, size]: {shapes}")
    (B, H, Sq, D), (_, K, Sk, _) = q.shape, k.shape
    require(k.shape == v.shape, f"k and v must have one shape: {shapes}")
    require(q.numel() and k.numel(), f"no dimension may be 0: {shapes}")
    require(k.shape[0] == B and k.shape[3] == D, f"q and k must have one batch and one head size: {shapes}")
    require(H % K == 0, f"the {H} heads of q must be a multiple of the {K} of k: {shapes}")
    dtypes = f"q {q.dtype}, k {k.dtype}, v {v.dtype}"
    require(q.dtype == k.dtype == v.dtype, f"q, k and v must have one dtype: {dtypes}")
    require(q.dtype in DTYPES, f"q, k and v must be float16, bfloat16, float32 or float64: {dtypes}")
    require(isinstance(layout, BlockLayout), f"layout must be a BlockLayout: it is {type(layout).__name__}")
    devices = f"q {q.device}, k {k.device}, v {v.device}, layout {layout.device}"
    require(q.device == k.device == v.device == layout.device, f"all must be on one device: {devices}")
    b, Qb, Kb = layout.block_size, layout.Qb, layout.Kb
    covers = f"layout covers {Qb} x {Kb} blocks of {b}, up to {Qb * b} queries and {Kb * b} keys"
    require(Qb == -(-Sq // b) and Kb == -(-Sk // b), f"{covers}, but q has {Sq} and k has {Sk}")
    lead = f"layout has batch and heads {layout.lead_b} and {layout.lead_h}, each must be 1 or that of q"
    require(layout.lead_b in (1, B) and layout.lead_h in (1, H), f"{lead}: {shapes}")
    if kv_lens is not None:
        got = f"{kv_lens.dtype} {list(kv_lens.shape)} on {kv_lens.device}"
        integer = kv_lens.dtype in (torch.int32, torch.int64) and kv_lens.shape == (B,) and kv_lens.device == q.device
        require(integer, f"kv_lens must be int32 or int64 [{B}] on {q.device}: it is {got}")
    require(backend in ("auto", "torch", "triton"), f"backend must be auto, torch or triton: it is {backend!r}")
    fits = D <= 256 and (q.dtype != torch.float64 or INTERPRET)
    if backend == "auto":
        return "triton" if triton and q.is_cuda and fits else "torch"
    if backend == "triton":
        require(triton, "backend='triton' needs Triton: pip install triton", RuntimeError)
        need = f"needs a GPU, or TRITON_INTERPRET=1 from the start of the process: q is on {q.device}"
        require(q.is_cuda or INTERPRET, f"backend='triton' {need}", RuntimeError)
        require(fits, f"backend='triton' takes head sizes up to 256, and no float64: {shapes}, {q.dtype}")
    return backend
