"""Optional C libraries, which setup.cfg cannot declare; sslcli/kernels/library.py loads them."""

import sysconfig
import zlib
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class BuildLibraries(build_ext):
    """Compiles the C files to libraries that Python does not regard as modules.

    The libraries have no initialization function of Python. With the file name of an extension module, every program
    that imports all modules of sslcli would fail.
    """

    def get_ext_filename(self, fullname: str) -> str:
        return f"{fullname.replace('.', '/')}.{sysconfig.get_platform()}.sharedlib"


setup(
    cmdclass={"build_ext": BuildLibraries},
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
    ],
)
