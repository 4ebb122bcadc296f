"""dspark-serve. Settings that must be in the environment before torch is loaded live here, and nothing else."""

import os

# torch's threads spin for milliseconds at the end of every operation. Where another process wants a core, the spinners
# keep it from the thread they wait for, and a step takes ten times as long. So they spin briefly, then sleep.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

# MKL's matrix products then have the same bits for a row however many come with it, with AVX2 as with AVX-512.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

# oneDNN keeps a compiled product per shape and row count; prompts come in so many lengths that 1024 of them pile up.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")
