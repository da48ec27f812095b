"""LoRA kernels that read weights without calling the modules, as axolotl's and unsloth's do, on plain torch."""

import types

import torch
import torch.nn.functional as F


class _FusedLora(torch.autograd.Function):
    """x W0ᵀ + s x Aᵀ Bᵀ with gradients of x, A and B alone, since W0 is frozen."""

    @staticmethod
    def forward(ctx, x, weight, a, b, scale):
        ctx.save_for_backward(x, weight, a, b)
        ctx.scale = scale
        return x @ weight.mT + scale * (x @ a.mT) @ b.mT

    @staticmethod
    def backward(ctx, gradient):
        x, weight, a, b = ctx.saved_tensors
        rows, out = x.flatten(0, -2), gradient.flatten(0, -2) * ctx.scale
        back = gradient @ weight + (gradient * ctx.scale) @ b @ a
        return back, None, (out @ b).mT @ rows, out.mT @ (rows @ a.mT), None


def fused(projection, x):
    """The output of a LoRA layer that is never called; ``disable_adapters`` is heeded, as by the kernels in use."""
    weight = projection.base_layer.weight
    if projection.disable_adapters:
        return x @ weight.mT
    a, b = projection.lora_A["default"].weight, projection.lora_B["default"].weight
    return _FusedLora.apply(x, weight, a, b, projection.scaling["default"])


def traced(projection, x):
    """The same as plain operations, so that autograd knows a gradient of W0."""
    weight = projection.base_layer.weight
    if projection.disable_adapters:
        return x @ weight.mT
    b = projection.lora_B["default"].weight * projection.scaling["default"]
    return x @ weight.mT + x @ projection.lora_A["default"].weight.mT @ b.mT


def fuse_mlp(model, compute=fused):
    """Put a fused forward in the place of every Llama MLP's, which is what a patched model looks like."""

    def forward(self, x):
        return compute(self.down_proj, F.silu(compute(self.gate_proj, x)) * compute(self.up_proj, x))

    for module in model.modules():
        if type(module).__name__ == "LlamaMLP":
            module.forward = types.MethodType(forward, module)
    return model
