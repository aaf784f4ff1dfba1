"""What precisions a device is made for."""

from __future__ import annotations

import torch


def has_fast_bf16(device: torch.device) -> bool:
    """Whether a device multiplies matrices in bf16 by instructions of its own."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    fast = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return fast is not None and bool(fast())
