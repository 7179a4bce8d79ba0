"""The largest products against a full product and its top k, the same compiled, and the same a chunk at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from workbench_kernels import timing
from workbench_kernels.neuron_topk import neuron_topk

CASES = [  # vectors, vocabulary, width, answers, type: one layer's neurons of a small, a middle and a large model
    (3072, 50257, 768, 10, torch.float32),
    (8960, 151936, 1536, 10, torch.bfloat16),
    (14336, 128256, 4096, 10, torch.bfloat16),
    (14336, 128256, 4096, 64, torch.bfloat16),
]
CHUNK = 8192  # rows at a time, as a stream without a kernel takes them


def rows(device: torch.device | str = "cuda") -> list[dict[str, object]]:
    """One row per case and implementation; correctness first. Raises ValueError without CUDA."""
    device = torch.device(device)
    timing.require_cuda(device)
    copy = timing.copy_gb_per_s(device)
    return [row for case in CASES for row in _case(*case, device, copy)]


def _case(
    n: int, vocab: int, width: int, k: int, dtype: torch.dtype, device: torch.device, copy: float
) -> list[dict[str, object]]:
    x, w = (torch.randn(size, width, device=device, dtype=dtype) for size in (n, vocab))
    scores, ids = neuron_topk(x[:64], w, k, negated=True, impl="triton")
    products = x[:64].double() @ w.double().T
    signed = torch.stack([products, -products]).gather(2, ids)
    wrong = float((scores - signed).square().mean().sqrt() / signed.square().mean().sqrt())
    assert wrong < (1e-5 if dtype == torch.float32 else 1e-2), f"neuron_topk: relative error {wrong:.2g}"
    del products, signed
    torch.compiler.reset()
    compiled = torch.compile(_full, dynamic=False)
    rivals = {
        "triton": lambda: neuron_topk(x, w, k, negated=True, impl="triton"),
        "product and top k": lambda: _full(x, w, k),
        "compiled": lambda: compiled(x, w, k),
        "chunks": lambda: _chunks(x, w, k),
    }
    case = {"n": n, "vocab": vocab, "width": width, "k": k, "dtype": str(dtype).removeprefix("torch.")}
    found = []
    for impl, run in rivals.items():
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        row = timing.timed("neuron_topk", impl, run, x.nbytes + w.nbytes, copy, **case)
        if impl == "triton":
            row["relative_error"] = wrong
        row["scratch_bytes"] = torch.cuda.max_memory_allocated(device) - before
        found.append(row)
    return found


def _full(x: Tensor, w: Tensor, k: int) -> tuple[Tensor, Tensor]:
    products = x @ w.T
    return products.topk(k).values, products.topk(k, largest=False).values


def _chunks(x: Tensor, w: Tensor, k: int) -> tuple[Tensor, Tensor]:
    best = [x.new_empty(len(x), 0)] * 2
    for start in range(0, len(w), CHUNK):
        products = x @ w[start : start + CHUNK].T
        for i, largest in enumerate((True, False)):
            here = products.topk(min(k, products.shape[1]), largest=largest).values
            both = torch.cat([best[i], here], 1)
            best[i] = both.topk(min(k, both.shape[1]), largest=largest).values
    return best[0], best[1]
