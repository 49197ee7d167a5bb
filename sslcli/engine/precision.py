"""Mixed precision: choice of dtype per device, autocast and loss scaling."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve(name: str, device: torch.device) -> str:
    """Return the precision to use on `device`.

    "auto" becomes bf16 if `device` supports bf16 natively, else fp32. Any other name is returned unchanged.

    The choice depends only on the hardware. A run that resumes on the same hardware therefore uses the same dtype.
    """
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if device.type == "cpu":
        capable: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # missing in older torch
        return "bf16" if capable.get("amx_bf16") or capable.get("avx512_bf16") else "fp32"
    return "fp32"


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """Return an autocast context for `precision`: "fp32", "bf16" or "fp16". With "fp32", autocast is disabled."""
    return torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32")


def grad_scaler(device: torch.device, precision: str) -> torch.amp.GradScaler:
    """Return a gradient scaler. It is enabled only for fp16."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")
