"""Builds the native CPU kernel; everything else about the package is in pyproject.toml.

The kernel is optional: where it cannot be built the package installs without it.
"""

import pathlib

import jaxlib
from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "drconv_jax.region_conv._cpu",
            ["drconv_jax/region_conv/cpu.cc"],
            include_dirs=[str(pathlib.Path(jaxlib.__file__).parent / "include")],
            extra_compile_args=["-std=c++17", "-O2", "-ftree-vectorize", "-g0", "-Wno-psabi"],
            optional=True,
        )
    ]
)
