"""Decision whether torch.compile compiles the steps of a run, and the compilation itself."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import sysconfig
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sslcli.config.settings import TrainSettings
from sslcli.errors import ConfigError
from sslcli.methods.base import Method

# Minimum number of steps of a run with train.compile=auto. This is an estimate, not a measurement: a compilation takes
# about 1 minute, and compiled steps save about 5 to 30 ms, so that the time is regained after 2,000 to 12,000 steps.
MIN_STEPS = 10_000
MIN_CAPABILITY = (7, 0)  # compute capability of the oldest GPUs that Triton supports


def why_not(settings: TrainSettings, device: torch.device, total_steps: int) -> str | None:
    """Return the reason why the steps of a run are not compiled, or None if they are compiled.

    With train.compile=auto, the steps are compiled on CUDA if the run has at least `MIN_STEPS` steps, if the machine
    has what torch.compile needs, and if no other setting excludes the compilation. The number of steps is that of the
    whole run, so that the result does not change when the run resumes. Raises ConfigError if train.compile is true, and
    the machine lacks something that torch.compile needs.
    """
    if settings.compile is False:
        return "train.compile=false"
    missing = missing_requirement(device)
    if settings.compile is True:
        if missing is not None:
            raise ConfigError(f"train.compile is true, but {missing}: install it, or set train.compile=false")
        return None
    if device.type != "cuda":
        return f"train.compile=auto does not compile on {device.type}"
    if settings.sharding == "fsdp" or settings.activation_checkpointing:
        return "train.sharding or train.activation_checkpointing is set"
    if total_steps < MIN_STEPS:
        return f"the run has fewer than {MIN_STEPS:,} steps"
    return missing


def missing_requirement(device: torch.device) -> str | None:
    """Return what torch.compile needs on `device` and does not find, as a clause such as "there is no ...", or None."""
    if device.type != "cuda":
        default = "clang++" if sys.platform == "darwin" else "g++"
        compiler = os.environ.get("CXX", default)
        if not shutil.which(compiler.partition(" ")[0]):
            return f"torch.compile finds no C++ compiler ({compiler or 'the environment variable CXX is empty'})"
        return missing_header()
    if torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        return f"torch.compile supports no GPU of this age ({torch.cuda.get_device_name(device)})"
    if importlib.util.find_spec("triton") is None:
        return "torch.compile does not find the package triton"
    compilers = (os.environ.get("CC", ""), "gcc", "clang", "cc")
    return missing_header() if any(map(shutil.which, compilers)) else "torch.compile finds no C compiler (gcc)"


def missing_header() -> str | None:
    """Return a clause if Python's C header is missing, which Triton and compiled code for the CPU include, or None."""
    header = Path(sysconfig.get_path("include"), "Python.h")
    return None if header.exists() else f"torch.compile does not find {header} (package python3-dev on Linux)"


def compile_method(method: Method, *, cached_gradients: bool, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile `forward` of `method` with torch.compile. The compilation itself takes place in the first step.

    The graph contains the losses, heads and momentum encoders. Features of images are computed without compiled code.
    Only the backbone is compiled with `cached_gradients`, which does not call `forward`, and if torch.compile does not
    support the loss (`Method.differentiates_twice`, `Method.has_varying_shapes`, or mixtures of images, whose weights
    are numbers of the host). `backend` is a backend of torch.compile.
    """
    # Unlike the debug mode that `devices.prepare` sets, this also applies to code that torch.compile generates. The
    # call imports modules of torch.compile, which takes seconds.
    torch.use_deterministic_algorithms(torch.are_deterministic_algorithms_enabled(), warn_only=True)
    # torch.compile recommends TF32 for matrix products, which `devices.prepare` rejects.
    warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores", category=UserWarning)
    is_unsupported = method.differentiates_twice or method.has_varying_shapes or method.mixture is not None
    if cached_gradients or is_unsupported:
        method.backbone.compile(backend=backend)
    else:
        method.compile(dynamic=False, backend=backend)
