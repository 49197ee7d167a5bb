"""Optional C extensions, which setup.cfg cannot declare; sslcli/kernels/library.py loads them."""

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
            optional=True,  # if compilation fails, torch's operations are used
        )
        for source in sorted(Path("sslcli").rglob("*.c"))
    ]
)
