"""Marks for tests that assert what only some platforms have."""

from __future__ import annotations

import platform
import sys

import pytest
import torch

from sslcli.kernels.library import CAPABLE

needs_avx2 = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in CAPABLE,
    reason="the compiled parts need an x86 processor with AVX2; torch's operations take their place here",
)
needs_glibc = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc",
    reason="only malloc of glibc has these options",
)
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="only on Linux do data workers start by fork")
