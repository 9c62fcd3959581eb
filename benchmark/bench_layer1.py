"""Benchmark of kernels against plain torch, and of the rank sketch against singular values.

``python -m benchmark.bench_layer1`` appends its rows to ``results/kernels.csv``. It also prints the time of a decoder
layer with fewer visual tokens, beside stored rows of accuracy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmark.retained import print_retained
from benchmark.timed import Bench, Work
from sparsevlm.kernels import (
    coverage,
    farthest_points,
    gram_matrix,
    pivoted_cholesky,
    rater_attention,
    received_attention,
)
from sparsevlm.kernels.attention import (
    RaggedCache,
    decode_attention,
    varlen_attention,
    varlen_attention_reference,
)
from sparsevlm.kernels.elementwise import (
    rms_norm,
    rms_norm_reference,
    rotate,
    rotate_reference,
    swiglu,
    swiglu_reference,
)
from sparsevlm.kernels.energy_rank import sketch_rank

_EPS = 1e-6
_NOISE = 1e-6
_NO_GAIN = 1e-12
_DIMENSIONS = 32
_TOLERANCE = 0.1
_AT_THRESHOLD = 1e-5
_DRIVERS = ("gesvd", "gesvdj", "gesvda")


@dataclass(frozen=True)
class Sizes:
    """Sizes of a decoder, of a vision tower, and of requests."""

    hidden: int = 3584
    heads: int = 28
    kv_heads: int = 4
    head_dim: int = 128
    intermediate: int = 18944
    vision_heads: int = 16
    vision_head_dim: int = 80
    window: int = 64
    patches: int = 4096
    visual: int = 1024
    text: int = 42
    batch: int = 32
    visual_of_batch: int = 256
    raters: int = 64
    columns: int = 4096

    @property
    def rows(self) -> int:
        """Rows of one prompt."""
        return self.visual + self.text

    @property
    def lengths(self) -> list[int]:
        """Unequal rows of the prompts of a batch."""
        return [self.visual_of_batch - b % 4 * (self.visual_of_batch // 8) + self.text for b in range(self.batch)]


SMALL = Sizes(64, 4, 2, 16, 96, 2, 20, 8, 32, 24, 6, 3, 16, 8, 40)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures everything and appends the rows to ``results/kernels.csv``."""
    bench = Bench.begin("bench_layer1", "kernels.csv", arguments)
    sizes = SMALL if bench.small else Sizes()
    with torch.no_grad():
        for measure in (elementwise, attention, decoding, raters, received, choosing, distances, covering, rank):
            measure(bench, sizes)
        print_retained(bench, sizes.text)
    bench.end()


def _pair(
    bench: Bench, operation: str, shape: str, reference: Callable[..., object], kernel: Callable[..., object],
    make: Callable[[], tuple[object, ...]], work: Work, *, reference_waits: bool = False,
) -> None:  # fmt: skip
    sets = bench.sets(make)
    bench.time(operation, shape, "plain torch", reference, sets, graph=not reference_waits, work=work)
    bench.time(operation, shape, "ours", kernel, sets, work=work)


def elementwise(bench: Bench, sizes: Sizes) -> None:
    """Measures norm, activation and rotation."""
    element = torch.empty(0, dtype=bench.dtype).element_size()
    for n in (sizes.rows, 1):
        weight = bench.random(sizes.hidden)
        _pair(
            bench, "rms_norm with residual", f"{n} x {sizes.hidden}",
            lambda x, y, w=weight: rms_norm_reference(x, w, _EPS, y),
            lambda x, y, w=weight: rms_norm(x, w, _EPS, y),
            lambda n=n: (bench.random(n, sizes.hidden), bench.random(n, sizes.hidden)),
            Work(bytes=4 * n * sizes.hidden * element),
        )  # fmt: skip
        _pair(
            bench, "swiglu", f"{n} x {sizes.intermediate}",
            swiglu_reference, swiglu,
            lambda n=n: bench.random(n, 2 * sizes.intermediate).chunk(2, dim=1),
            Work(bytes=3 * n * sizes.intermediate * element),
        )  # fmt: skip
        heads = (sizes.heads, sizes.kv_heads)

        def make(n: int = n, heads: tuple[int, int] = heads) -> tuple[Tensor, ...]:
            rows = bench.random(n, sum(heads), sizes.head_dim)
            return (*rows.split(heads, dim=1), bench.random(n, sizes.head_dim), bench.random(n, sizes.head_dim))

        _pair(
            bench, "rotate", f"{n} x ({heads[0]} + {heads[1]}) x {sizes.head_dim}",
            rotate_reference, rotate, make,
            Work(bytes=2 * n * (sum(heads) + 1) * sizes.head_dim * element),
        )  # fmt: skip


def attention(bench: Bench, sizes: Sizes) -> None:
    """Measures attention over packed sequences: prompts of a batch, and windows of an image."""
    cases = [
        ("prompts", sizes.lengths, sizes.heads, sizes.kv_heads, sizes.head_dim, True),
        ("windows", [sizes.window] * (sizes.patches // sizes.window), sizes.vision_heads, sizes.vision_heads,
         sizes.vision_head_dim, False),
    ]  # fmt: skip
    for what, lengths, heads, kv_heads, head_dim, causal in cases:
        n, max_seqlen, cu_seqlens, scaling = sum(lengths), max(lengths), bench.cu_seqlens(lengths), head_dim**-0.5
        pairs = sum(length * (length + 1) / 2 if causal else length**2 for length in lengths)
        element = torch.empty(0, dtype=bench.dtype).element_size()
        _pair(
            bench, f"varlen_attention, {what}", f"{len(lengths)} sequences, {n} x {heads}/{kv_heads} x {head_dim}",
            lambda q, k, v, o=cu_seqlens, s=scaling, c=causal: varlen_attention_reference(q, k, v, o, s, c),
            lambda q, k, v, o=cu_seqlens, m=max_seqlen, s=scaling, c=causal: varlen_attention(q, k, v, o, m, s, c),
            lambda n=n, h=heads, g=kv_heads, d=head_dim: tuple(bench.random(n, x, d) for x in (h, g, g)),
            Work(4 * heads * head_dim * pairs, 2 * n * (heads + kv_heads) * head_dim * element),
            reference_waits=True,
        )  # fmt: skip


def decoding(bench: Bench, sizes: Sizes) -> None:
    """Measures decode attention, against torch's attention over padded keys and values."""
    element = torch.empty(0, dtype=bench.dtype).element_size()
    scaling, n_new = sizes.head_dim**-0.5, sizes.raters // 2
    for lengths in ([sizes.rows], sizes.lengths):
        batch, max_seqlen = len(lengths), max(lengths)
        width = max_seqlen + n_new
        shape = f"batch {batch}, {sum(lengths)} + {batch} x {n_new} keys"
        work = Work(bytes=2 * (sum(lengths) + batch * n_new) * sizes.kv_heads * sizes.head_dim * element)
        ends = torch.tensor(lengths, device=bench.device)[:, None]
        places = torch.arange(width, device=bench.device)
        seen = ((places < ends) | (places >= max_seqlen))[:, None, None]
        padded = bench.sets(
            lambda b=batch, w=width: (
                bench.random(b, sizes.heads, 1, sizes.head_dim),
                *(bench.random(b, sizes.kv_heads, w, sizes.head_dim) for _ in range(2)),
            )
        )

        def dense(query: Tensor, key: Tensor, value: Tensor, seen: Tensor = seen) -> Tensor:
            if query.shape[0] == 1:  # nothing is padded
                return scaled_dot_product_attention(query, key, value, scale=scaling, enable_gqa=True)
            key, value = (x.repeat_interleave(sizes.heads // sizes.kv_heads, dim=1) for x in (key, value))
            return scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scaling)

        def make(lengths: list[int] = lengths) -> tuple[object, ...]:
            parts = [bench.random(sum(lengths), sizes.kv_heads, sizes.head_dim) for _ in range(2)]
            new = [bench.random(len(lengths), n_new, sizes.kv_heads, sizes.head_dim) for _ in range(2)]
            count = torch.full((1,), n_new, dtype=torch.int32, device=bench.device)
            cache = RaggedCache(*parts, bench.cu_seqlens(lengths), *new, count)
            return bench.random(len(lengths), sizes.heads, sizes.head_dim), cache

        bench.time("decode_attention", shape, "plain torch, padded", dense, padded, work=work)
        bench.time(
            "decode_attention", shape, "ours",
            lambda query, cache: decode_attention(query, cache, scaling),
            [make() for _ in padded], work=work,
        )  # fmt: skip


def raters(bench: Bench, sizes: Sizes) -> None:
    """Measures both passes of rater attention."""
    n, scaling = sizes.rows, sizes.head_dim**-0.5
    lengths, cu_seqlens = bench.cu_seqlens([sizes.text]), bench.cu_seqlens([n])
    ends = torch.arange(sizes.visual, n, device=bench.device, dtype=torch.int32) + 1
    marked = torch.arange(n, device=bench.device) < sizes.visual
    columns = rater_attention.Columns(
        torch.arange(sizes.visual, device=bench.device)[None],
        torch.tensor([sizes.visual], dtype=torch.int32, device=bench.device),
    )
    weight = torch.full((1, sizes.heads), 1 / sizes.heads, device=bench.device)

    def both(
        statistics: Callable[..., tuple[Tensor, Tensor]], attended: Callable[..., Tensor]
    ) -> Callable[..., Tensor]:
        def run(query: Tensor, key: Tensor) -> Tensor:
            rows = rater_attention.Rows(query, lengths, ends, sizes.text)
            lse, _ = statistics(rows, key, cu_seqlens, marked, scaling)
            return attended(rows, key, columns, lse, weight, scaling)

        return run

    _pair(
        bench, "rater attention", f"{sizes.text} rows, {n} keys, {sizes.heads} heads",
        both(rater_attention.row_statistics_reference, rater_attention.row_attention_reference),
        both(rater_attention.row_statistics, rater_attention.row_attention),
        lambda: (
            bench.random(sizes.text, sizes.heads, sizes.head_dim), bench.random(n, sizes.kv_heads, sizes.head_dim)
        ),
        Work(flops=4 * sizes.text * n * sizes.heads * sizes.head_dim),
        reference_waits=True,
    )  # fmt: skip


def received(bench: Bench, sizes: Sizes) -> None:
    """Measures the attention that the patches of an image receive."""
    n, heads, head_dim = sizes.patches, sizes.vision_heads, sizes.vision_head_dim
    cu_seqlens, scaling = bench.cu_seqlens([n]), head_dim**-0.5
    _pair(
        bench, "received attention", f"{n} x {heads} x {head_dim}",
        lambda query, key: received_attention.received_attention_reference(query, key, cu_seqlens, scaling),
        lambda query, key: received_attention.received_attention(query, key, cu_seqlens, scaling),
        lambda: tuple(bench.random(n, heads, head_dim) for _ in range(2)),
        Work(flops=4 * heads * head_dim * n**2),
        reference_waits=True,
    )  # fmt: skip


def choosing(bench: Bench, sizes: Sizes) -> None:
    """Measures Gram matrices, and the pivots picked from them."""
    for batch, n in ((1, sizes.visual), (sizes.batch, sizes.visual_of_batch)):
        n_keep = n // 4
        _pair(
            bench, "products", f"{batch} x {n} x {sizes.hidden}",
            lambda rows: rows @ rows.mT, gram_matrix.gram_matrix,
            lambda b=batch, n=n: (bench.random(b, n, sizes.hidden, dtype=torch.float32),),
            Work(flops=6 * batch * n * n * sizes.hidden),
        )  # fmt: skip

        def make(batch: int = batch, n: int = n) -> tuple[Tensor, Tensor]:
            rows = bench.random(batch, n, sizes.hidden, dtype=torch.float32)
            return rows @ rows.mT, torch.ones((batch, n), device=bench.device)

        _pair(
            bench, "pivots", f"{batch} x {n}, {n_keep} picks",
            lambda gram, quality, k=n_keep: pivoted_cholesky.pivoted_cholesky_reference(gram, quality, k, True, _NOISE),
            lambda gram, quality, k=n_keep: pivoted_cholesky.pivoted_cholesky(gram, quality, k, True, _NOISE),
            make, Work(bytes=4 * batch * n_keep * n), reference_waits=True,
        )  # fmt: skip


def distances(bench: Bench, sizes: Sizes) -> None:
    """Measures farthest points, from cosines."""
    for batch, n in ((1, sizes.visual), (sizes.batch, sizes.visual_of_batch)):

        def make(batch: int = batch, n: int = n) -> tuple[Tensor, Tensor]:
            return _cosines(bench, batch, n), torch.ones((batch, n), dtype=torch.bool, device=bench.device)

        def plain(gram: Tensor, valid: Tensor, k: int = n // 4) -> Tensor:
            scale = gram.diagonal(dim1=-2, dim2=-1).rsqrt()
            return farthest_points.farthest_points_reference(gram, scale, valid, k, _NOISE)

        _pair(
            bench, "farthest points", f"{batch} x {n}, {n // 4} picks", plain,
            lambda gram, valid, k=n // 4: farthest_points.farthest_points(gram, valid, k, _NOISE),
            make, Work(bytes=4 * batch * n * (n + n // 4)), reference_waits=True,
        )  # fmt: skip


def covering(bench: Bench, sizes: Sizes) -> None:
    """Measures coverage, of cosines."""
    for batch, n in ((1, sizes.visual), (sizes.batch, sizes.visual_of_batch)):

        def make(batch: int = batch, n: int = n) -> tuple[Tensor, Tensor, Tensor]:
            ones = torch.ones((batch, n), device=bench.device)
            return _cosines(bench, batch, n), ones, ones.bool()

        _pair(
            bench, "coverage", f"{batch} x {n}, {n // 4} picks",
            lambda values, factor, valid, k=n // 4: coverage.coverage_reference(values, factor, valid, k, _NO_GAIN),
            lambda values, factor, valid, k=n // 4: coverage.coverage(values, factor, valid, k, _NO_GAIN),
            make, Work(bytes=4 * batch * n * (n + n // 4)), reference_waits=True,
        )  # fmt: skip


def _cosines(bench: Bench, batch: int, n: int) -> Tensor:
    """Cosines of all pairs, of few dimensions: in many all rows are about as far from each other."""
    rows = torch.nn.functional.normalize(bench.random(batch, n, _DIMENSIONS, dtype=torch.float32), dim=-1)
    return rows @ rows.mT


def rank(bench: Bench, sizes: Sizes) -> None:
    """Measures ranks by sketch, which have to be those of the singular values."""
    drivers = _DRIVERS if bench.device.type == "cuda" else (None,)
    for batch in (1, sizes.batch):

        def make(batch: int = batch) -> tuple[Tensor]:
            left = bench.random(batch, sizes.raters, 8, dtype=torch.float32)
            return ((left @ bench.random(batch, 8, sizes.columns, dtype=torch.float32)).softmax(dim=-1),)

        sets = bench.sets(make)
        shape = f"{batch} x {sizes.raters} x {sizes.columns}"
        ranks = torch.cat([sketch_rank(matrices, _TOLERANCE) for (matrices,) in sets])
        check_ranks(torch.cat([matrices for (matrices,) in sets]), ranks)
        for driver in drivers:
            theirs = partial(singular_ranks, tolerance=_TOLERANCE, driver=driver)
            n_differ = int((torch.cat([theirs(matrices) for (matrices,) in sets]) != ranks).sum())
            name, note = f"svdvals {driver or ''}".strip(), f"{n_differ} of {len(ranks)} ranks differ"
            bench.time("rank", shape, name, theirs, sets, graph=False, note=note)
        bench.time("rank", shape, "sketch", lambda matrices: sketch_rank(matrices, _TOLERANCE), sets)


def check_ranks(matrices: Tensor, ranks: Tensor) -> None:
    """Raises if ranks are not those of singular values in float64, rounding at the threshold aside."""
    most, least = (singular_ranks(matrices.double(), _TOLERANCE + margin) for margin in (-_AT_THRESHOLD, _AT_THRESHOLD))
    n_wrong = int(((ranks < least) | (ranks > most)).sum())
    if n_wrong:
        raise RuntimeError(f"{n_wrong} of {len(ranks)} ranks by sketch are not those of the singular values.")


def singular_ranks(matrices: Tensor, tolerance: float, driver: str | None = None) -> Tensor:
    """Ranks of matrices: singular values that hold all but ``tolerance`` of the energy."""
    energy = torch.linalg.svdvals(matrices, driver=driver).double().square()
    wanted = (1.0 - tolerance) * energy.sum(dim=-1, keepdim=True)
    return (energy.cumsum(dim=-1) < wanted).sum(dim=-1) + 1


if __name__ == "__main__":
    main()
