"""What the kernels for Hopper (sm_90) serve, those in Triton and those in CUDA.

That is what most training steps ask for; everything else goes to the plain kernels of each.
"""

from __future__ import annotations

import torch


def refusal(dtype: torch.dtype, softcap: float, scale: float, arch: int) -> str | None:
    """None where the kernels serve these arguments of ``tree_attention``, else why not, in a few words.

    ``arch`` is the compute capability, 90 for 9.0. Each family has its own head dims beside.
    """
    if not 90 <= arch < 100:
        return f"compute capability {arch // 10}.{arch % 10}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"{dtype}"
    if softcap:
        return "softcap"
    # the kernels take row maxima before scaling, and -inf * 0 is no score
    return None if scale > 0 else f"scale {scale}"
