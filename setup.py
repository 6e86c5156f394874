"""Compiles the int8 kernels of the decoding engine (gpt2core/inference/native.c); pyproject.toml has everything else.

The compiler is clang from PyPI's `ziglang`, the same on every machine; gcc 12 makes them 1.6 times as slow (32 rows).
Without it, or on another system, gpt2core is installed without the kernels and decodes with torch's operators.
"""

import os
import platform
import sys
from importlib.util import find_spec

from setuptools import Extension, setup

FLAGS = ["-O3", *(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl", "vnni")), "-mfma"]
kernels = Extension(
    "gpt2core.inference._native",
    ["gpt2core/inference/native.c"],
    extra_compile_args=FLAGS,
    py_limited_api=True,  # it does not use Python's API at all: one file for all versions
    optional=True,
)
can_compile = (platform.system(), platform.machine()) == ("Linux", "x86_64") and find_spec("ziglang") is not None
if can_compile:
    os.environ["CC"] = f"{sys.executable} -m ziglang cc -target x86_64-linux-gnu.2.28"
    os.environ["LDSHARED"] = f"{os.environ['CC']} -shared"  # Debian's Python adds options that this linker lacks
setup(ext_modules=[kernels] if can_compile else [])
