"""The numbers that a training computes with."""

from __future__ import annotations

import torch


def native_precision(accelerator: str = "auto") -> str:
    """Gives "bf16-mixed" where the hardware computes in bfloat16, "32-true" elsewhere."""
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    if accelerator in ("auto", "cpu"):
        capabilities = torch.cpu.get_capabilities()
        if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"):
            return "bf16-mixed"
    return "32-true"
