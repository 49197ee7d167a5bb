"""What setup.cfg cannot say: the parts that are compiled where that is possible (see sslcli/compiled.py)."""

import zlib
from pathlib import Path

from setuptools import Extension, setup

PARTS = {
    "sslcli._winograd_passes": "sslcli/winograd_passes.c",
    "sslcli.data._resize": "sslcli/data/resize.c",
    "sslcli.data._change": "sslcli/data/change.c",
}

setup(
    ext_modules=[
        Extension(
            name,
            [source],
            define_macros=[("SOURCE_CHECKSUM", f"{zlib.crc32(Path(source).read_bytes())}u")],
            extra_compile_args=["-O3", "-fopenmp", "-mavx2", "-mfma", "-fno-math-errno", "-fno-trapping-math"],
            extra_link_args=["-fopenmp"],
            optional=True,  # without a compiler, or on another kind of processor, sslcli does without
        )
        for name, source in PARTS.items()
    ]
)
