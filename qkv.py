"""The projection to queries, keys and values, for attention, whose gradients are in one tensor or in three.

Only the queries' bias is added. That of the keys shifts all scores of a query alike, of which softmax and entmax take
no notice; and as the weights of a query add up to 1, that of the values joins the output as it is (see Block.fused in
model.py).
"""

import torch
import torch.nn.functional as F

from residual import add_product_


def _project(ctx, x, weight, bias, n_head):
    """x weight^T + bias, (B, T, 3, H, D), and what the backward needs."""
    ctx.save_for_backward(x, weight)
    ctx.bias_dtype = bias.dtype
    B, T, C = x.shape
    bias = F.pad(bias.to(x.dtype), (0, 2 * C))
    return torch.addmm(bias, x.flatten(0, 1), weight.T).view(B, T, 3, n_head, C // n_head)


def _sum(ctx, dq):
    """The bias's gradient."""
    return dq.sum(0, dtype=torch.promote_types(dq.dtype, torch.float32)).to(ctx.bias_dtype)


class _Projection(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, n_head):
        return _project(ctx, x, weight, bias, n_head).permute(2, 0, 3, 1, 4).unbind(0)

    @staticmethod
    def backward(ctx, *gradients):
        x, weight = ctx.saved_tensors
        dq, dk, dv = gradients = [d.transpose(1, 2).flatten(2).flatten(0, 1) for d in gradients]
        wq, wk, wv = weight.chunk(3)
        dx = dq @ wq  # to put the three together first would take longer
        add_product_(dx, dk, wk)
        add_product_(dx, dv, wv)
        dweight = torch.cat([d.T @ x.flatten(0, 1) for d in gradients])
        return dx.view_as(x), dweight, _sum(ctx, dq), None


class _PackedProjection(torch.autograd.Function):
    forward = staticmethod(_project)

    @staticmethod
    def backward(ctx, dqkv):
        x, weight = ctx.saved_tensors
        dqkv = dqkv.flatten(2).flatten(0, 1)
        dq = dqkv[:, : x.shape[2]]
        return (dqkv @ weight).view_as(x), dqkv.T @ x.flatten(0, 1), _sum(ctx, dq), None


def queries_keys_values(x, weight, bias, n_head):
    """x weight^T, as three (B, H, T, D), the bias added to the first.

    x (B, T, C) and weight (3C, C) of one dtype, that of autocast where it is on; bias (C) of that or a wider one.
    """
    return _Projection.apply(x, weight, bias, n_head)


def queries_keys_values_packed(x, weight, bias, n_head):
    """The same as one (B, T, 3, H, D)."""
    return _PackedProjection.apply(x, weight, bias, n_head)
