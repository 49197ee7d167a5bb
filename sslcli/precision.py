"""Number formats: which one a device is fast in, and the contexts that use it."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve(name: str, device: torch.device) -> str:
    """Turn "auto" into bf16 where the hardware multiplies it natively, else fp32; other names stay.

    A pure function of the hardware, so that a resumed run computes in the same format.
    """
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if device.type == "cpu":
        capable: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # older versions of torch do not tell
        return "bf16" if capable.get("amx_bf16") or capable.get("avx512_bf16") else "fp32"
    return "fp32"


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """Run convolutions and products in `precision`; "fp32" changes nothing."""
    return torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32")


def grad_scaler(device: torch.device, precision: str) -> torch.amp.GradScaler:
    """Loss scaling for fp16, a no-op for other formats."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")
