"""The fused layers with GELU against float64: python -m pytest tests/test_mlp.py (add -m gpu on a CUDA machine)."""

import os
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import CompileForHopper, compile_in_a_process, run_in_interpreter

from mlp import ROWS, add_mlp, linear_gelu, linear_gelu_gradient
from model import GPT, GPTConfig

INTERPRETED = "TRITON_INTERPRET" in os.environ  # CPU tensors go to the kernel


def errors(N, C, W, dtype, device="cpu", size=1.0):
    """Relative errors of the sum, and of the gradients by all that it depends on."""
    generator = torch.Generator(device).manual_seed(N + W)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def drawn(*shape, std=1.0, dtype=dtype):
        return (std * torch.randn(*shape, device=device, generator=generator)).to(dtype).requires_grad_()

    x, h, weight, bias = drawn(N, C), drawn(N, C, std=size), drawn(W, C, std=C**-0.5), drawn(W, dtype=wide)
    tensors = x, h, weight, bias, drawn(C, W, std=W**-0.5)
    kept, dx = x.detach().clone(), drawn(N, C).detach()
    out = add_mlp(*tensors)
    got = out, *torch.autograd.grad(out, tensors, dx)
    assert torch.equal(x, kept) and [t.dtype for t in got] == [dtype, *(t.dtype for t in tensors)]
    x, h, weight, bias, out_weight = exact = [t.detach().double().requires_grad_() for t in tensors]
    out = x + F.gelu(h @ weight.T + bias, approximate="tanh") @ out_weight.T
    expected = out, *torch.autograd.grad(out, exact, dx.double())
    return [((a - b).norm() / b.norm()).item() for a, b in zip(got, expected, strict=True)]


SHAPES = (1, 8, 32), (63, 24, 300), (300, 16, 1025)  # a program takes 128 rows and 512 columns


@pytest.mark.parametrize("size", (1e-3, 1.0, 30.0))
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(shape, size):
    assert max(errors(*shape, torch.float32, size=size)) < 2e-6
    assert max(errors(*shape, torch.bfloat16, size=size)) < 0.01  # a few roundings to 8 bits
    assert max(errors(*shape, torch.float64, size=size)) < 1e-14


def test_what_is_not_finite_stays_in_its_row():
    h = torch.ones(3, 4)
    h[1, 2] = float("nan")
    others = torch.ones(8, 4), torch.ones(8), torch.ones(4, 8)
    x = add_mlp(torch.ones(3, 4), h.requires_grad_(), *others)
    for rows in (x, *torch.autograd.grad(x.sum(), h)):
        assert rows.isfinite().all(1).tolist() == [True, False, True]


def test_opcheck():
    torch.library.opcheck(linear_gelu, (torch.randn(5, 8), torch.randn(16, 8), torch.randn(16)))
    torch.library.opcheck(linear_gelu_gradient, (torch.randn(5, 8), torch.randn(8, 16), torch.randn(5, 16)))


@pytest.mark.skipif(INTERPRETED, reason="is the interpreter run")
def test_the_kernel_in_the_interpreter():
    run_in_interpreter(__file__, "float64 or finite")


@pytest.mark.skipif(INTERPRETED, reason="is not the compiler")
def test_products_compile_for_hopper():
    """Within the 227 KB that a program may have."""
    pytest.importorskip("triton")
    compile_in_a_process(__file__)


def compile_products_for_hopper():
    import mlp_hopper

    torch.cuda.get_device_properties = lambda device: SimpleNamespace(multi_processor_count=132)
    mlp_hopper._product = kernel = CompileForHopper(mlp_hopper._product)
    cases = (9, 40, 200, torch.bfloat16), (1024, 768, 3072, torch.bfloat16), (9, 40, 200, torch.float16)
    for N, C, W, dtype in cases:
        x, weight, z = (torch.empty(*shape, dtype=dtype) for shape in ((N, C), (W, C), (N, W)))
        mlp_hopper.linear_gelu(x, weight, torch.empty(W), z, z)
        mlp_hopper.linear_gelu_gradient(x, weight.T.contiguous(), z, z, z, torch.empty(-(-N // ROWS), W))
    assert len(kernel.compiled) == 6
    for compiled in kernel.compiled:
        assert "wgmma" in compiled.asm["ptx"] and 200_000 < compiled.metadata.shared <= 227 * 1024


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_against_float64():
    torch.set_float32_matmul_precision("highest")
    for shape in (*SHAPES, (1, 8, 8), (129, 40, 1032), (5000, 768, 3072), (40_000, 72, 200)):
        assert max(errors(*shape, torch.float32, "cuda")) < 1e-5
        assert max(errors(*shape, torch.bfloat16, "cuda")) < 0.01
        assert max(errors(*shape, torch.float16, "cuda")) < 0.002


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_gives_the_same_bits_again():
    x, weight, z = (torch.randn(*shape, device="cuda").bfloat16() for shape in ((9000, 768), (768, 3072), (9000, 3072)))
    expected = *linear_gelu(x, weight.T, z[0]), *linear_gelu_gradient(x, weight, z)
    for _ in range(100):
        got = *linear_gelu(x, weight.T, z[0]), *linear_gelu_gradient(x, weight, z)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compiled", (False, True))
@pytest.mark.parametrize("in_16_bits, bound", ((False, 1e-4), (True, 0.1)))
def test_gpu_model_takes_it(compiled, in_16_bits, bound):
    """The gradients of a model are those of the same model on the CPU, whose layers are PyTorch's, in float32."""
    torch.set_float32_matmul_precision("highest")
    model = GPT(GPTConfig(2, 4, 64, 128, 257))
    model.init_weights(torch.Generator().manual_seed(0))
    tokens = torch.randint(257, (4, 129), generator=torch.Generator().manual_seed(1))
    gradients = []
    for device in ("cpu", "cuda"):
        model, tokens = model.to(device), tokens.to(device)
        call = torch.compile(model) if compiled and device == "cuda" else model
        with torch.autocast(device, dtype=torch.bfloat16, enabled=in_16_bits and device == "cuda"):
            loss = call(tokens[:, :-1], tokens[:, 1:], reduction="mean")
        gradients.append([x.cpu() for x in torch.autograd.grad(loss, list(model.parameters()))])
    for (name, _), expected, got in zip(model.named_parameters(), *gradients, strict=True):
        assert (got - expected).norm() <= bound * expected.norm(), name


if __name__ == "__main__":
    compile_products_for_hopper()
