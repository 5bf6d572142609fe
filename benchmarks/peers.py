"""Other ways to multiply, each at its best: what the sparse product is compared with.

A peer prepares one or more variants (layouts, algorithms, tilings) of one product; `bench_peers.py` checks every
variant against float32, times them and keeps the fastest that is right. Where a peer has a pattern of its own (2:4,
square blocks) it gets a random matrix of that pattern with the same shape and sparsity: its best case. Peers that take
any matrix (CSR, the Triton gather) get the Shfl-BW matrix itself.

A peer that cannot run raises; the text of the error goes into the table. What a peer finds out once and uses again (the
order of Blocked-ELL's values, the tuner's parameters, cuSPARSELt's algorithms) is kept for the life of the process.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from cases import PEER_SHAPES, Case, Shape
from cusparselt_search import found_for, layouts, run
from matrices import dense_of, random_packed
from peer_operands import DTYPE, Operands, two_of_four
from protocol import check

import shflnb

__all__ = ["DTYPE", "GROUPS", "PEER_V", "Operands", "Peer", "Variant", "expected"]

PEER_V = (32, 64, 128)
"""Group heights that the peers are compared with."""
BLOCKS = (32, 64, 128)
"""Sides of torch's square blocks."""


@dataclass
class Variant:
    """One way to run a peer: the call, the dense equal of its weight, and whether the result is (n, m)."""

    name: str
    call: Callable[[], torch.Tensor]
    weight: torch.Tensor
    is_token_major: bool = False
    capture: bool = True
    eager: Callable[[], torch.Tensor] | None = None
    """The call as users write it, with a new result each time, where `call` fills a given one."""


@dataclass(frozen=True)
class Peer:
    """A way to multiply. `sparsity` None takes any, 0 is dense, 0.5 only that."""

    name: str
    pattern: str
    prepare: Callable[[Operands, float], list[Variant]]
    sparsity: float | None = None
    compiles: str = ""
    """What it compiles: "" for nothing that is worth a process of its own, "all" for the same (or nearly) for all
    shapes, "shape" for each shape something else."""


# -- dense ------------------------------------------------------------------------------------------------------------


def dense_feature(o: Operands, _: float) -> list[Variant]:
    return [Variant("W @ X", lambda: torch.matmul(o.w, o.x, out=o.out), o.w)]


def dense_token(o: Operands, _: float) -> list[Variant]:
    return [Variant("F.linear(X.T, W)", lambda: F.linear(o.xt, o.w), o.w, is_token_major=True)]


INDUCTOR = {
    "max_autotune_prune_choices_based_on_shared_mem": True, "fx_graph_cache": False, "autotune_local_cache": False,
}  # fmt: skip


def compiled(mode: str) -> Callable[[Operands, float], list[Variant]]:
    """torch.compile of the dense product; max-autotune without its own CUDA graphs, since all is timed in a graph.

    Candidates that need more shared memory than there is are left out beforehand: torch 2.11 would compile each once
    more without pipelining, which takes it 25 s, and then leave it out (its issue 194161 tells why). What it chose in
    another process is not taken over: only its kernels are.
    """

    def prepare(o: Operands, _: float) -> list[Variant]:
        import torch._inductor.config as inductor

        for option, value in INDUCTOR.items():
            if hasattr(inductor, option):
                setattr(inductor, option, value)
        if mode == "default":  # the first of a shape: forget the last shape, or dynamo gives up after 8 recompiles
            torch._dynamo.reset()
        feature = torch.compile(lambda w, x: w @ x, mode=mode, dynamic=False)
        found = [Variant(f"W @ X, {mode}", lambda: feature(o.w, o.x), o.w)]
        if mode == "default":
            token = torch.compile(lambda x, w: F.linear(x, w), mode=mode, dynamic=False)
            found.append(Variant(f"F.linear, {mode}", lambda: token(o.xt, o.w), o.w, is_token_major=True))
        return found

    return prepare


# -- ours, and a plain Triton kernel on the same matrix ---------------------------------------------------------------


def same_matrix(o: Operands, v: int, sparsity: float) -> tuple[shflnb.ShflBWMatrix, torch.Tensor]:
    """The Shfl-BW matrix that `bench_spmm.py` times, and its dense equal."""
    case = Case(o.shape, sparsity, v)
    packed = random_packed(case.shape.m, case.shape.k, v, sparsity, DTYPE, device=o.device)
    return packed, dense_of(packed, o.device)


def ours(v: int) -> Callable[[Operands, float], list[Variant]]:
    def prepare(o: Operands, sparsity: float) -> list[Variant]:
        packed, dense = same_matrix(o, v, sparsity)
        call = functools.partial(shflnb.matmul, packed, o.x)
        return [Variant("matmul", functools.partial(call, out=o.out), dense, eager=call)]

    return prepare


def triton_gather(v: int) -> Callable[[Operands, float], list[Variant]]:
    def prepare(o: Operands, sparsity: float) -> list[Variant]:
        from triton_gather import gather_calls

        packed, dense = same_matrix(o, v, sparsity)
        return [Variant(name, call, dense) for name, call in gather_calls(packed, o.x, o.out).items()]

    return prepare


# -- 2:4 --------------------------------------------------------------------------------------------------------------


def cusparselt(o: Operands, _: float) -> list[Variant]:
    """As torch ships it: the default algorithm, all operand layouts."""
    sparse, dense = two_of_four(o)
    return [
        Variant("torch.mm(W, X)", lambda: torch.mm(sparse, o.x), dense, capture=False),
        Variant("torch.mm(W, X.T.t())", lambda: torch.mm(sparse, o.xt.t()), dense, capture=False),
        Variant("F.linear(X.T, W)", lambda: F.linear(o.xt, sparse), dense, is_token_major=True, capture=False),
    ]


def cusparselt_searched(o: Operands, _: float) -> list[Variant]:
    """With the fastest algorithm for each layout of the operands, see `cusparselt_search.py`."""
    sparse, dense = two_of_four(o)
    variants = []
    for layout, choice in found_for(o.shape, tuple(PEER_SHAPES)).items():
        x, is_transposed = layouts(o)[layout]
        call = functools.partial(run, sparse.packed, x, is_transposed, choice.options)
        name = f"{layout}, {choice.text}"
        variants.append(Variant(name, call, dense, is_token_major=is_transposed, capture=False))
    return variants


# -- square blocks ----------------------------------------------------------------------------------------------------


def random_blocks(o: Operands, block: int, sparsity: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Block columns (m / block, kept) int32, rising, equally many in each block row; and the dense weight."""
    rows, cols = o.shape.m // block, o.shape.k // block
    keep = max(1, round(cols * (1 - sparsity)))
    columns = torch.rand(rows, cols, device=o.device).argsort(1)[:, :keep].sort(1).values
    mask = torch.zeros(rows, cols, dtype=torch.bool, device=o.device).scatter_(1, columns, True)
    dense = (o.w.view(rows, block, cols, block) * mask[:, None, :, None]).view_as(o.w).contiguous()
    return columns.int(), dense


def bsr(block: int) -> Callable[[Operands, float], list[Variant]]:
    """torch's BSR product (Triton), as shipped."""

    def prepare(o: Operands, sparsity: float) -> list[Variant]:
        from torch.sparse._triton_ops import bsr_dense_mm

        _, dense = random_blocks(o, block, sparsity)
        weight = dense.to_sparse_bsr((block, block))
        return [
            Variant("bsr_dense_mm", lambda: bsr_dense_mm(weight, o.x, out=o.out), dense, capture=False),
            Variant("F.linear", lambda: F.linear(o.xt, weight), dense, is_token_major=True, capture=False),
        ]

    return prepare


_BSR_TUNED: dict[tuple[int, int, bool], dict[str, int]] = {}
"""What the tuner found, by block, n, and whether k is short; it serves all shapes that agree in these."""
BSR_START = {"GROUP_SIZE_ROW": 4, "num_stages": 3, "num_warps": 4}
SHORT_K, TUNE_S, TUNE_AHEAD_S = 2048, 6.0, 20.0
"""What a short k is; seconds of tuning for a key of `_BSR_TUNED`, and where it only compiles what will be tried."""


def bsr_tuned(block: int) -> Callable[[Operands, float], list[Variant]]:
    """torch's BSR product with the parameters that torch's own tuner finds for this block, n and kind of k at 75 %; or
    with those it found for another shape, or as shipped, where they are faster: a short search may end badly.

    The tuner runs with four changes, so that it ends within seconds. It begins at the parameters of the last shape, or
    at `BSR_START` with tiles of 128 columns, and not at one stage; it looks at neighbours one step away (as shipped
    two); it times each candidate for 20 ms (as shipped 100 ms after 500 ms of warming); after `TUNE_S` seconds it tries
    no more of them.
    """

    def prepare(o: Operands, sparsity: float) -> list[Variant]:
        from torch.sparse import _triton_ops_meta as meta_module
        from torch.sparse._triton_ops import bsr_dense_addmm

        key = (block, o.shape.n, o.shape.k <= SHORT_K)
        if key not in _BSR_TUNED:
            weight = random_blocks(o, block, 0.75)[1].to_sparse_bsr((block, block))
            with _quick_tuner(meta_module, bsr_start(block, o.shape.n)):
                found = meta_module.tune_bsr_dense_addmm(o.out, weight, o.x, beta=0, alpha=1, force=True)
            if not found:
                raise RuntimeError("torch's tuner found no parameters that run")
            _BSR_TUNED[key] = found
        _, dense = random_blocks(o, block, sparsity)
        weight = dense.to_sparse_bsr((block, block))

        def call(meta: dict[str, int] | None) -> torch.Tensor:
            given = None if meta is None else dict(meta)
            return bsr_dense_addmm(o.out, weight, o.x, beta=0, alpha=1, out=o.out, meta=given)

        metas: list[dict[str, int] | None] = [_BSR_TUNED[key], None]
        metas += [meta for meta in known_metas(block, o.shape.n) if meta not in metas]
        return [
            Variant(
                "as shipped" if meta is None else ", ".join(f"{name} {value}" for name, value in sorted(meta.items())),
                functools.partial(call, meta),
                dense,
                capture=False,
            )
            for meta in metas
        ]

    return prepare


def known_metas(block: int, n: int) -> list[dict[str, int]]:
    """What the tuner found for this block, whatever the shape, with tiles of as many columns."""
    return [
        meta | {"SPLIT_N": max(1, n // (n_then // meta["SPLIT_N"]))}
        for (of, n_then, _), meta in _BSR_TUNED.items()
        if of == block
    ]


def bsr_start(block: int, n: int) -> dict[str, int]:
    """Where the tuner begins: at what it found last for this block, with tiles of as many columns."""
    known = known_metas(block, n)
    return known[-1] if known else BSR_START | {"SPLIT_N": max(1, n // 128)}


@contextlib.contextmanager
def _quick_tuner(meta_module: Any, start: dict[str, int]) -> Iterator[None]:
    """Replace the first parameters, the step and the timer of torch's tuner, and end it in time."""
    import triton

    minimize, do_bench = meta_module.minimize, triton.testing.do_bench
    deadline = time.perf_counter() + TUNE_S
    starts, owed = [start], [0]

    def near(target: Any, initial: Any, reference: Any, step: Any, **given: Any) -> Any:
        given["max_step"] = 1
        owed[0] = 2  # the reference and the first parameters, without which it finds nothing
        return minimize(target, starts.pop() if starts else initial, reference, step, **given)

    def brief(call: Any, **_: Any) -> float:
        owed[0] -= 1
        if owed[0] < 0 and time.perf_counter() > deadline:  # the tuner leaves out a candidate that raises
            raise RuntimeError(f"{TUNE_S:g} s of tuning are over")
        return do_bench(call, warmup=5, rep=20)

    meta_module.minimize, triton.testing.do_bench = near, brief
    try:
        yield
    finally:
        meta_module.minimize, triton.testing.do_bench = minimize, do_bench


# -- cuSPARSE ---------------------------------------------------------------------------------------------------------


def csr(o: Operands, sparsity: float) -> list[Variant]:
    """torch's CSR product (cuSPARSE) on the Shfl-BW matrix with v = 64, 32-bit indices."""
    _, dense = same_matrix(o, 64, sparsity)
    wide = dense.to_sparse_csr()
    narrow = torch.sparse_csr_tensor(
        wide.crow_indices().int(), wide.col_indices().int(), wide.values(), size=wide.shape, check_invariants=False
    )
    return [
        Variant("int32 indices", lambda: narrow @ o.x, dense, capture=False),
        Variant("int32 indices, X.T.t()", lambda: narrow @ o.xt.t(), dense, capture=False),
    ]


def ell_operands(o: Operands, block: int, sparsity: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Block columns, the kept blocks (m / block, kept, block, block), and the dense weight."""
    columns, dense = random_blocks(o, block, sparsity)
    grid = dense.view(len(columns), block, -1, block).transpose(1, 2)
    return columns, grid[torch.arange(len(columns), device=o.device)[:, None], columns.long()], dense


@functools.cache
def ell_order(block: int, device: str) -> str:
    """The order of a block row's values that gives the right result: tried on a small product, once."""
    from blocked_ell import BlockedEll

    o = Operands(Shape("small", 4 * block, 8 * block, 64), device)
    columns, values, dense = ell_operands(o, block, 0.5)
    reference = dense.float() @ o.x.float()
    for order in ("rows", "blocks"):
        call = BlockedEll(columns, values, o.shape.k, order).product(o.x, o.out)
        if check(call, reference, DTYPE, poison=o.out)[1]:
            return order
    raise RuntimeError("its result is wrong with either order of the values")


def blocked_ell(block: int) -> Callable[[Operands, float], list[Variant]]:
    """cuSPARSE's Blocked-ELL product, operands row-major and column-major."""

    def prepare(o: Operands, sparsity: float) -> list[Variant]:
        from blocked_ell import BlockedEll

        order = ell_order(block, o.device)
        columns, values, dense = ell_operands(o, block, sparsity)
        ell = BlockedEll(columns, values, o.shape.k, order)
        out_column_major = torch.empty(o.shape.n, o.shape.m, dtype=o.out.dtype, device=o.device).t()
        return [
            Variant(f"row-major, {order}", ell.product(o.x, o.out), dense, capture=False),
            Variant(f"column-major, {order}", ell.product(o.xt.t(), out_column_major), dense, capture=False),
        ]

    return prepare


# -- the list ---------------------------------------------------------------------------------------------------------

DENSE = [Peer("cuBLAS W @ X", "dense", dense_feature, 0.0), Peer("cuBLAS F.linear", "dense", dense_token, 0.0)]

GROUPS: dict[str, list[Peer]] = {
    "main": [
        *(Peer(f"shflnb v = {v}", f"Shfl-BW, v = {v}", ours(v)) for v in PEER_V),
        *(Peer(f"Triton gather v = {v}", f"Shfl-BW, v = {v}", triton_gather(v), compiles="all") for v in PEER_V),
        Peer("cuSPARSELt 2:4", "2 of 4", cusparselt, 0.5),
        *(Peer(f"torch BSR {b}", f"blocks {b} x {b}", bsr(b), compiles="all") for b in BLOCKS),
    ],
    "searched": [Peer("cuSPARSELt 2:4, searched", "2 of 4", cusparselt_searched, 0.5)],
    "cusparse": [
        Peer("cuSPARSE CSR", "Shfl-BW, v = 64", csr),
        *(Peer(f"cuSPARSE Blocked-ELL {b}", f"blocks {b} x {b}", blocked_ell(b)) for b in (32, 64)),
    ],
    "compile": [
        Peer("torch.compile", "dense", compiled("default"), 0.0),
        Peer("torch.compile, max-autotune", "dense", compiled("max-autotune-no-cudagraphs"), 0.0, "shape"),
    ],
    "tuned": [Peer(f"torch BSR {b}, tuned", f"blocks {b} x {b}", bsr_tuned(b), compiles="all") for b in BLOCKS],
}
"""Peers by the process that runs them: what may fail badly, or takes long, does not take the others along."""


def expected(group: str, sparsities: tuple[float, ...]) -> list[tuple[Peer, float]]:
    """Every (peer, sparsity) that a group owes for a shape."""
    return [(p, s) for p in GROUPS[group] for s in (sparsities if p.sparsity is None else (p.sparsity,))]
