"""Causal alpha-entmax attention (AdaSplash, arXiv 2502.12082): softmax's place in a transformer, with exact zeros."""

import math

import torch
import torch.nn.functional as F

from adasplash_kernels.reference import entmax_reference

try:
    from adasplash_kernels.kernels import INTERPRETED, LONGEST, entmax_kernels, entmax_kernels_packed
except ModuleNotFoundError as error:
    if error.name != "triton":
        raise
    entmax_kernels = None  # no triton on this platform

__all__ = ["causal_entmax_attention", "causal_entmax_attention_qkvpacked"]

SOFTMAX = 1.00001  # below it, alpha is taken for 1: 1 / (alpha - 1) times the rounding of float32 would be more
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def causal_entmax_attention(q, k, v, alpha=1.5, scale=None):
    """Attention with alpha-entmax in the place of softmax, each query over the keys up to its own.

    q: (B, H, R, D); k, v: (B, H, T, D) with 1 <= R <= T: the queries are the last R of the T positions.
        float32, bfloat16 or float16, summed in float32. The reference takes what the kernels do not: float64, D > 128,
        T > 2^19, B or H from 2^16 on, R < T.
    alpha: 1 is softmax, as is a number below 1.00001; 2 is sparsemax. A number, or a one-element float32 tensor on q's
        device from there to 2: the host never reads that, so a compiled or captured model follows as it changes.
    scale: of the scores q.k, positive; 1 / sqrt(D) by default.
    Returns (B, H, R, D) in q's dtype, for entmax in memory (B, R, H, D). Differentiable once, with respect to q, k, v.
    Raises TypeError for a wrong dtype or device, ValueError for a wrong shape, alpha or scale, and RuntimeError when
    differentiated twice.
    """
    _check(q, k, v, alpha, scale)
    if _is_softmax(alpha):
        R, T = q.shape[2], k.shape[2]
        mask = None if R == T else torch.ones(R, T, dtype=torch.bool, device=q.device).tril(T - R)
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=R == T, scale=scale)
    return _operator(q, k)(q, k, v, *_parameters(q, alpha, scale))[0]


def causal_entmax_attention_qkvpacked(qkv, alpha=1.5, scale=None):
    """The same with q, k and v = qkv[:, :, 0], 1 and 2, whose gradient then is one tensor, too, and not put together.

    qkv: (B, T, 3, H, D), what one projection gives for all; dtypes, alpha, scale and errors are as above.
    Returns (B, H, T, D), for entmax in memory (B, T, H, D).
    """
    if qkv.dim() != 5 or qkv.shape[2] != 3:
        raise ValueError(f"got qkv {tuple(qkv.shape)}; takes (B, T, 3, H, D)")
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    if _is_softmax(alpha) or _operator(q, k) is entmax_reference:
        return causal_entmax_attention(q, k, v, alpha, scale)
    _check(q, k, v, alpha, scale)
    return entmax_kernels_packed(qkv, *_parameters(q, alpha, scale))[0]


def _is_softmax(alpha):
    return not isinstance(alpha, torch.Tensor) and alpha < SOFTMAX


def _parameters(q, alpha, scale):
    """As the operators take them: alpha (a tensor, or None), r = 1 / (alpha - 1) (0 with a tensor), scale."""
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else float(scale)
    if isinstance(alpha, torch.Tensor):
        return alpha, 0, scale
    r = {1.5: 2, 2.0: 1}.get(alpha, 0)
    return None if r else torch.full((1,), alpha, dtype=torch.float32, device=q.device), r, scale


def _operator(q, k):
    """The Triton kernels where they run; the reference elsewhere, and for what is no part of training."""
    runs = entmax_kernels is not None and (q.is_cuda or (INTERPRETED.value and q.device.type == "cpu"))
    (B, H, R, D), T = q.shape, k.shape[2]
    takes = R == T <= max(LONGEST.values()) and D <= 128 and max(B, H) < 2**16 and q.dtype != torch.float64
    return entmax_kernels if runs and takes else entmax_reference


def _check(q, k, v, alpha, scale):
    got = f"got q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    takes = "takes q (B, H, R, D), k and v (B, H, T, D) with 1 <= R <= T"
    if not q.dim() == k.dim() == v.dim() == 4 or k.shape != v.shape or min(q.shape) == 0:
        raise ValueError(f"{got}; {takes}")
    if q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3] or q.shape[2] > k.shape[2]:
        raise ValueError(f"{got}; {takes}")
    if q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"got q {q.dtype}, k {k.dtype}, v {v.dtype}; takes float32, bfloat16 or float16, one for all")
    if not q.device == k.device == v.device:
        raise TypeError(f"got q on {q.device}, k on {k.device}, v on {v.device}; takes one device for all")
    if isinstance(alpha, torch.Tensor):
        if alpha.numel() != 1 or alpha.dtype != torch.float32 or alpha.device != q.device:
            got = f"{tuple(alpha.shape)} {alpha.dtype} on {alpha.device}"
            raise TypeError(f"got alpha {got}; takes a number, or one float32 element on {q.device}")
        if alpha.requires_grad and torch.is_grad_enabled():
            raise ValueError("got an alpha that requires a gradient, which there is none for; detach it")
    elif not 1 <= alpha <= 2:
        raise ValueError(f"got alpha = {alpha}; takes 1 (softmax) to 2 (sparsemax)")
    if scale is not None and not 0 < scale < math.inf:
        raise ValueError(f"got scale = {scale}; takes a positive number")
