"""What bounds a training step: matrix products a second, operations and bytes, where time goes."""

import time
from collections.abc import Sequence
from typing import Any

import torch
from step_cases import CPU, Step
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from core.config import Recipe
from core.device import uses_bf16
from core.step_memory import step_memory

KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::linear"),
    "attention's products": ("aten::bmm", "aten::baddbmm"),
    "copies and casts": ("aten::copy_", "aten::cat", "aten::clone"),
    "GELU": ("aten::gelu", "aten::gelu_backward"),
    "softmax": ("aten::_softmax", "aten::_softmax_backward_data"),
    "layer norm": ("aten::native_layer_norm", "aten::native_layer_norm_backward"),
    "patch embedding": ("aten::mkldnn_convolution", "aten::convolution_backward"),
    "resampling": ("aten::grid_sampler_2d",),
    "sums, products, adding": ("aten::sum", "aten::mul", "aten::add", "aten::add_", "aten::mul_"),
    "optimiser": ("aten::_fused_adamw_", "aten::_foreach_lerp_", "aten::_foreach_norm"),
}


def matmul_rates() -> dict[str, float]:
    """GFLOP/s of square products, and of the widest product of a step's first layer."""
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        for label, rows, inner, columns in (("1024^3", *[1024] * 3), ("MLP", 7280, 192, 768)):
            a, b = torch.randn(rows, inner).to(dtype), torch.randn(inner, columns).to(dtype)
            best = min(_seconds(a, b) for _ in range(20))
            rates[f"{str(dtype)[6:]} {label}"] = 2e-9 * rows * inner * columns / best
    return rates


def _seconds(a: torch.Tensor, b: torch.Tensor) -> float:
    began = time.process_time()
    for _ in range(4):
        a @ b
    return (time.process_time() - began) / 4


class _Bytes(TorchDispatchMode):
    """Sums the bytes of the tensors that go into and come out of every operation but views."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and "empty" not in func.__name__:
            held = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)]
            self.total += sum(t.numel() * t.element_size() for t in held)
        return result


def bytes_and_flops(step: Step, files: Sequence[tuple[int, Sequence[bytes]]]) -> dict[str, float]:
    """Floating-point operations of the products of a step, and bytes that its operations touch."""
    step(files)
    with FlopCounterMode(display=False) as counter, _Bytes() as touched:
        step(files)
    return {"flops": counter.get_total_flops(), "bytes": touched.total}


def foretold_mb(recipe: Recipe) -> float:
    """What core.step_memory says of our step, less what is there before it."""
    half = uses_bf16(recipe, CPU)
    memory = step_memory(recipe, half=half, fused_attention=False)
    networks = memory.weights * 8 // (22 if half else 20)  # of the bytes a parameter
    return (memory.total - networks - memory.bank) / 2**20


def profile_table(step: Step) -> list[tuple[str, float]]:
    """Share of a step's time by kind of operation, largest first."""
    step()
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        step()
    times = {event.key: event.self_cpu_time_total for event in seen.key_averages()}
    total = sum(times.values())
    shares = {kind: sum(times.get(n, 0) for n in names) / total for kind, names in KINDS.items()}
    shares["all else"] = 1 - sum(shares.values())
    return sorted(shares.items(), key=lambda item: -item[1])
