"""The C++ kernels in cpu/, through their C interface: few-row products and paged attention in
float32, with weights of float32, bfloat16, float16 or blocks of codes.

Every result is row-invariant: the bits of a row do not depend on the other rows or on the number of threads.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Sequence
from ctypes import c_float, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from dspark_kernels import huge_pages
from dspark_kernels.packed import PackedWeight, pointer

logger = logging.getLogger(__name__)

PLAIN, RESIDUAL, SWIGLU = range(3)  # what a product does with its sums


class _Product(ctypes.Structure):  # mirrors product.h
    _fields_ = (
        *((name, c_void_p) for name in ("x", "norm", "packed", "bias", "residual", "y", "scratch")),
        *((name, c_int64) for name in ("storage", "group", "rows", "inputs", "outputs", "x_stride", "epilogue")),
        ("eps", c_float),
    )


class Attention(ctypes.Structure):  # mirrors attention.h
    _fields_ = (
        *((name, c_void_p) for name in ("q", "k", "v", "q_norm", "k_norm", "cosine", "sine", "positions", "slots")),
        *((name, c_void_p) for name in ("pages", "first", "queries", "contexts", "keys", "values", "out")),
        *((name, c_int64) for name in ("q_stride", "k_stride", "v_stride", "tokens", "rows", "max_pages")),
        *((name, c_int64) for name in ("page_size", "heads", "kv_heads", "head_dim", "value_dim", "window")),
        *((name, c_int64) for name in ("table_stride", "block", "threads")),
        *((name, c_float) for name in ("scale", "softcap", "eps")),
    )


class Draw(ctypes.Structure):  # mirrors draw.h
    _fields_ = (
        *((name, c_void_p) for name in ("logits", "temperature", "ids", "seed", "position", "out")),
        *((name, c_int64) for name in ("rows", "width", "stride", "ids_stride", "stream", "threads")),
        ("greedy", c_float),
    )


class _Filter(ctypes.Structure):  # mirrors filter.cpp
    _fields_ = (
        *((name, c_void_p) for name in ("logits", "probs", "top_k", "top_p", "out")),
        *((name, c_int64) for name in ("rows", "width", "threads")),
    )


class Kernels:
    """A loaded library. `isa`: the instruction set it was compiled for; `lanes`: floats per vector."""

    def __init__(self, library: ctypes.CDLL) -> None:
        library.dspark_isa.restype = ctypes.c_char_p
        library.dspark_lanes.restype = c_int64
        library.dspark_packed_size.argtypes = (c_void_p,)
        library.dspark_packed_size.restype = c_int64
        library.dspark_pack.argtypes = (c_void_p, c_void_p)
        library.dspark_products.argtypes = (c_void_p, c_int64, c_int64)
        library.dspark_bind.argtypes = (c_void_p, c_int64)
        library.dspark_bind.restype = c_int64
        library.dspark_argmax.argtypes = (c_void_p, c_void_p, c_int64, c_int64, c_int64)
        for name in [
            "pack",
            "products",
            "attention",
            "decoder",
            "argmax",
            "draw",
            "filter",
            "context",
            "block",
            "draft",
        ]:
            getattr(library, f"dspark_{name}").restype = None
        self.library = library
        self.isa: str = library.dspark_isa().decode()
        self.lanes: int = library.dspark_lanes()
        self._results = huge_pages.Reused()

    def bind(self, cores: Sequence[int]) -> bool:
        """Keep the calling thread, and the others that compute with it, to one of these cores each; whether all are."""
        bound: int = self.library.dspark_bind((c_int64 * len(cores))(*cores), len(cores))
        return bound == len(cores)

    def product(
        self,
        x: Tensor,  # [rows, inputs] float32, columns adjacent
        weight: PackedWeight,
        norm: Tensor | None = None,  # [inputs]: RMSNorm weight applied to x first; inputs must fill vectors
        eps: float = 0.0,
        residual: Tensor | None = None,  # [rows, outputs] contiguous, added to the result
    ) -> Tensor:
        """x W^T + bias, or silu(gates) * ups for a gated weight. Returns [rows, outputs]."""
        rows, inputs = x.shape
        if inputs != weight.inputs or x.stride(1) != 1:
            raise ValueError(f"x {list(x.shape)} does not fit a weight of {weight.inputs} inputs, or is not row-major")
        self._check_norm(norm, inputs)
        out = self._results.floats(rows, weight.outputs)
        scratch = None if norm is None else x.new_empty(rows, inputs)
        what = SWIGLU if weight.gated else PLAIN if residual is None else RESIDUAL
        task = _Product(
            x.data_ptr(),
            pointer(norm),
            weight.panels_at,
            weight.bias_at,
            pointer(residual),
            out.data_ptr(),
            pointer(scratch),
            weight.storage,
            weight.group,
            rows,
            inputs,
            weight.outputs,
            x.stride(0),
            what,
            eps,
        )
        self.library.dspark_products(ctypes.byref(task), 1, torch.get_num_threads())
        return out

    def _check_norm(self, norm: Tensor | None, width: int) -> None:
        if norm is not None and width % self.lanes:
            raise ValueError(f"a norm of {width} does not fill vectors of {self.lanes}")

    def finish_layer(
        self,
        attended: Tensor,  # [rows, out.inputs] contiguous
        hidden: Tensor,  # [rows, hidden] contiguous
        out: PackedWeight,
        norm: Tensor,  # [hidden], which must fill vectors
        eps: float,
        gate_up: PackedWeight,
        down: PackedWeight,
    ) -> Tensor:
        """What follows attention in a decoder layer, in one call: out-projection, residual, norm, SwiGLU MLP, residual.

        Returns [rows, hidden]; the bits are those of three separate products.
        """
        rows, width = hidden.shape
        self._check_norm(norm, width)
        inner = gate_up.outputs
        result = hidden.new_empty(rows, width)
        scratch = hidden.new_empty(rows * (2 * width + inner))  # after attention; normed; between the MLP's products
        middle = scratch.data_ptr()
        normed, between = middle + rows * width * 4, middle + rows * width * 8
        # Fields in _Product's order: pointers first, then sizes.
        first = (attended.data_ptr(), None, out.panels_at, out.bias_at, hidden.data_ptr(), middle, None)
        second = (middle, norm.data_ptr(), gate_up.panels_at, gate_up.bias_at, None, between, normed)
        third = (between, None, down.panels_at, down.bias_at, middle, result.data_ptr(), None)
        tasks = (_Product * 3)(
            _Product(*first, out.storage, out.group, rows, out.inputs, width, out.inputs, RESIDUAL, 0.0),
            _Product(*second, gate_up.storage, gate_up.group, rows, width, inner, width, SWIGLU, eps),
            _Product(*third, down.storage, down.group, rows, inner, width, inner, RESIDUAL, 0.0),
        )
        self.library.dspark_products(tasks, 3, torch.get_num_threads())
        return result

    def argmax(self, x: Tensor) -> Tensor:
        """Index of the largest entry per row, the lowest on ties, the first NaN if any; x [rows, width] float32."""
        x = x.contiguous()
        if not x.shape[1]:
            raise ValueError("no tokens to choose from")
        out = x.new_empty(x.shape[0], dtype=torch.int64)
        self.library.dspark_argmax(x.data_ptr(), out.data_ptr(), x.shape[0], x.shape[1], torch.get_num_threads())
        return out

    def draw(
        self,
        logits: Tensor,  # [rows, width] float32
        temperature: Tensor,  # [rows] float32
        seed: Tensor,  # [rows] int64
        position: Tensor,  # [rows] int64
        stream: int,
        greedy: float,  # rows of no higher temperature take their likeliest token
        ids: Tensor | None = None,  # [rows, width] int64 or [width]: the columns' tokens, else 0..width-1
    ) -> Tensor:
        """argmax of logits / temperature + addressed Gumbel noise, the lowest token on ties; [rows] int64.

        A row with NaN gives the token of its first NaN.
        """
        rows, width = logits.shape
        if not width:
            raise ValueError("no tokens to choose from")
        if logits.stride(1) != 1:
            logits = logits.contiguous()
        if ids is not None and ids.stride(-1) != 1:
            ids = ids.contiguous()
        temperature, seed, position = temperature.contiguous(), seed.contiguous(), position.contiguous()
        out = seed.new_empty(rows)
        ids_stride = 0 if ids is None or ids.dim() == 1 else ids.stride(0)
        pointers = (logits, temperature, ids, seed, position, out)
        sizes = (rows, width, logits.stride(0), ids_stride, stream, torch.get_num_threads())
        self.library.dspark_draw(ctypes.byref(Draw(*map(pointer, pointers), *sizes, greedy)))
        return out

    def nucleus(
        self,
        logits: Tensor,  # [rows, width] float32
        probs: Tensor,  # [rows, width] float32: their softmax
        top_k: Tensor,  # [rows] int64, 0 is off
        top_p: Tensor,  # [rows] float32, 1 is off
    ) -> Tensor:
        """The smallest logit that top-k, then top-p on what it kept, keep in each row: [rows] float32.

        -inf where both are off. NaN counts as the largest logit; a row with NaN has no mass.
        """
        if not logits.shape[1]:
            raise ValueError("no tokens to choose from")
        logits, probs, top_k, top_p = (part.contiguous() for part in (logits, probs, top_k, top_p))
        out = torch.empty_like(top_p)
        pointers = map(pointer, (logits, probs, top_k, top_p, out))
        self.library.dspark_filter(ctypes.byref(_Filter(*pointers, *logits.shape, torch.get_num_threads())))
        return out

    def attends(self, head_dim: int, value_dim: int) -> bool:
        """Whether heads of these widths fill vectors."""
        return head_dim % self.lanes == 0 and value_dim % self.lanes == 0

    def takes(self, q: Tensor, keys: Tensor, sinks: bool = False) -> bool:
        """Float32 in main memory, and no sinks."""
        return q.dtype == keys.dtype == torch.float32 and q.device.type == "cpu" and not sinks

    def attention(
        self,
        q: Tensor,  # [tokens, heads, head_dim] float32; heads of a token adjacent; overwritten if normed or rotated
        k: Tensor,  # [tokens, kv_heads, head_dim], likewise
        v: Tensor,  # [tokens, kv_heads, value_dim]
        keys: Tensor,  # [pages, page_size, kv_heads, head_dim]: k is written here first
        values: Tensor,  # [pages, page_size, kv_heads, value_dim]
        slots: Tensor,  # [tokens] int64, page * page_size + offset
        pages: Tensor,  # [rows, max_pages] int64
        rows: Tensor,  # [3, rows] int64 contiguous: first token, tokens, and keys its last token sees
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,  # must be None
        rotary: tuple[Tensor, Tensor] | None = None,  # positions [tokens], table [positions, 2, head_dim]
        norms: tuple[Tensor, Tensor, float] | None = None,  # RMSNorm of queries, of keys [head_dim] each, eps
        block: bool = False,
    ) -> Tensor:
        """Causal attention of every token over its row's keys; returns [tokens, heads, value_dim].

        As a `block` a row's tokens see its whole context and each other, and their keys and values are not kept.
        """
        if sinks is not None:
            raise ValueError("the C++ attention knows no sinks")
        tokens, heads, head_dim = q.shape
        kv_heads, value_dim = v.shape[1:]
        if not self.attends(head_dim, value_dim):
            raise ValueError(f"heads of {head_dim} and {value_dim} do not fill vectors of {self.lanes}")
        out = q.new_empty(tokens, heads, value_dim)
        positions, table = rotary if rotary is not None else (None, None)
        first = rows.data_ptr()
        row_bytes = rows.shape[1] * 8
        self.library.dspark_attention(
            ctypes.byref(
                Attention(
                    q.data_ptr(),
                    k.data_ptr(),
                    v.data_ptr(),
                    None if norms is None else norms[0].data_ptr(),
                    None if norms is None else norms[1].data_ptr(),
                    pointer(table),
                    None if table is None else table.data_ptr() + head_dim * 4,
                    pointer(positions),
                    slots.data_ptr(),
                    pages.data_ptr(),
                    first,
                    first + row_bytes,
                    first + 2 * row_bytes,
                    keys.data_ptr(),
                    values.data_ptr(),
                    out.data_ptr(),
                    q.stride(0),
                    k.stride(0),
                    v.stride(0),
                    tokens,
                    rows.shape[1],
                    pages.shape[1],
                    keys.shape[1],
                    heads,
                    kv_heads,
                    head_dim,
                    value_dim,
                    window or 0,
                    2 * head_dim,
                    block,
                    torch.get_num_threads(),
                    scale,
                    softcap or 0.0,
                    0.0 if norms is None else norms[2],
                )
            )
        )
        return out


@functools.cache
def load(name: str | None = None) -> Kernels | None:
    """The kernels for this machine, or None where they were not built. `name` asks for one instruction set.

    The instruction set is torch's choice, so ATEN_CPU_CAPABILITY=avx2 or default limits both. One that cannot be loaded
    is warned of, and the next one down serves.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    names = ["base"] if name is None else [name]
    if name is None and capability.startswith(("AVX2", "AVX512")):
        names.insert(0, "avx2")
        if capability.startswith("AVX512"):
            names.insert(0, "avx512")
    failures = []
    for wanted in names:
        for path in sorted(Path(__file__).parent.glob(f"_cpu_{wanted}.*")):
            try:
                _share_openmp()
                kernels = Kernels(ctypes.CDLL(str(path)))
            except (OSError, AttributeError) as error:  # no OpenMP runtime; a library of another machine or version
                failures.append(f"{path.name}: {error}")
                continue
            if failures:
                logger.warning(
                    "C++ kernels for %s serve, others cannot be loaded: %s", kernels.isa, "; ".join(failures)
                )
            return kernels
    if failures:
        logger.warning("the C++ kernels are built but cannot be loaded, torch serves instead: %s", "; ".join(failures))
    return None


def _share_openmp() -> None:
    """Make the OpenMP runtime that torch uses visible to the kernels, which are not linked to one of their own: two
    runtimes would keep two pools of threads that fight for the cores."""
    bundled = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*"))
    ctypes.CDLL(str(bundled[0]) if bundled else "libgomp.so.1", mode=ctypes.RTLD_GLOBAL)
