"""What setup.cfg cannot say: the parts that are compiled where that is possible (see sslcli/kernels/library.py)."""

import zlib
from pathlib import Path

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            ".".join([*source.parent.parts, f"_{source.stem}"]),
            [str(source)],
            define_macros=[("SOURCE_CHECKSUM", f"{zlib.crc32(source.read_bytes())}u")],
            extra_compile_args=["-O3", "-fopenmp", "-mavx2", "-mfma", "-fno-math-errno", "-fno-trapping-math"],
            extra_link_args=["-fopenmp"],
            optional=True,  # without a compiler, or on another kind of processor, sslcli does without
        )
        for source in sorted(Path("sslcli").rglob("*.c"))
    ]
)
