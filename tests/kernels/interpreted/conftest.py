"""Tests that run kernels through Triton's interpreter, in a process of their own: test_triton_interpreted.py.

Triton reads TRITON_INTERPRET when it is imported, so no process can both interpret and compile.
"""

import os
import sys
from pathlib import Path

if os.environ.get("TRITON_INTERPRET") == "1":
    sys.path.insert(0, str(Path(__file__).parent))
    import repairs

    repairs.apply()
else:
    collect_ignore_glob = ["test_*.py"]
