"""Compiles the int8 kernels of the decoding engine (gpt2core/inference/native.c); pyproject.toml has everything else.

The compiler is clang from PyPI's `ziglang`, the same on every machine; gcc 12 makes them 1.6 times as slow (32 rows).
There is one library for processors with AVX-512 VNNI and one for AVX2. Without clang, or on another system, gpt2core is
installed without the kernels: int8 then uses torch's operators, or is refused.
"""

import os
import platform
import sys
from importlib.util import find_spec

from setuptools import Extension, setup

FLAGS = {
    "avx512": ["-mfma", *(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl", "vnni"))],
    "avx2": ["-mfma", "-mavx2"],
}
FOLDER = "gpt2core/inference"
kernels = [
    Extension(
        f"gpt2core.inference._native_{name}",
        [f"{FOLDER}/native.c"],
        depends=[f"{FOLDER}/{header}.h" for header in ("vectors", *FLAGS)],
        extra_compile_args=["-O3", *flags],
        py_limited_api=True,  # it does not use Python's API at all: one file for all versions
        optional=True,
    )
    for name, flags in FLAGS.items()
]
can_compile = (platform.system(), platform.machine()) == ("Linux", "x86_64") and find_spec("ziglang") is not None
if can_compile:
    os.environ["CC"] = f"{sys.executable} -m ziglang cc -target x86_64-linux-gnu.2.28"
    os.environ["LDSHARED"] = f"{os.environ['CC']} -shared"  # Debian's Python adds options that this linker lacks
setup(ext_modules=kernels if can_compile else [])
