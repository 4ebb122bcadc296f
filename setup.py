"""The C++ kernels, built where a compiler is present; without them the engine runs on torch alone.

One library per instruction set, chosen when it is loaded. OpenMP is compiled in but not linked: the symbols come from
the runtime that torch has loaded, so that both share one pool of threads.
"""

import platform

from setuptools import Extension, setup

_SOURCES = [
    f"kernels/dspark_kernels/cpu/{name}.cpp"
    for name in ("pack", "gemm", "attention", "decoder", "draw", "filter", "head", "threads")
]
_HEADERS = [
    f"kernels/dspark_kernels/cpu/{name}.h"
    for name in ("simd", "team", "weights", "product", "attention", "decoder", "draw")
]
_FLAGS = ["-O3", "-std=c++17", "-ffp-contract=off", "-fopenmp"]
_SETS = {"base": []}
if platform.machine() in ("x86_64", "AMD64"):
    _SETS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    _SETS["avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"]

setup(
    ext_modules=[
        Extension(
            f"dspark_kernels._cpu_{name}",
            sources=_SOURCES,
            depends=_HEADERS,
            extra_compile_args=_FLAGS + flags,
            language="c++",
            optional=True,
        )
        for name, flags in _SETS.items()
    ]
)
