"""What setup.cfg cannot say: the part that is compiled where that is possible (see sslcli/winograd_passes.py)."""

from setuptools import Extension, setup

PASSES = Extension(
    "sslcli._winograd_passes",
    ["sslcli/winograd_passes.c"],
    extra_compile_args=["-O3", "-fopenmp", "-mavx2", "-mfma"],
    extra_link_args=["-fopenmp"],
    optional=True,  # without a compiler, or on another kind of processor, sslcli does without
)

setup(ext_modules=[PASSES])
