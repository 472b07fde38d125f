"""Builds the native CPU kernels; everything else about the package is in pyproject.toml.

They are optional: where they cannot be built the package installs without them.
"""

import pathlib

import jaxlib
from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "drconv_jax.native._kernels",
            ["drconv_jax/region_conv/cpu/handlers.cc"],
            depends=sorted(str(path) for path in pathlib.Path("drconv_jax").rglob("*.h")),
            include_dirs=[".", str(pathlib.Path(jaxlib.__file__).parent / "include")],
            extra_compile_args=["-std=c++17", "-O2", "-ftree-vectorize", "-g0", "-Wno-psabi"],
            optional=True,
        )
    ]
)
