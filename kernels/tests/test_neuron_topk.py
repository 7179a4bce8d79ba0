"""The largest products with a vocabulary: the kernel's answers are those of a full sort, ties by the smaller id."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from workbench_kernels.neuron_topk import kernel, neuron_topk, reference

IMPLS = ["reference", "triton"]
infinite = pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")  # the interpreter's


def whole(n: int, vocab: int, width: int, device: torch.device, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Vectors and rows of small whole numbers: products are exact in any order of summation, and many are equal."""
    draw = torch.Generator().manual_seed(seed)
    x, w = (torch.randint(-3, 4, (size, width), generator=draw).float().to(device) for size in (n, vocab))
    return x, w


def options(vocab: int, width: int, device: torch.device, seed: int = 0) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(seed + 100)
    numbers = {name: torch.randint(-2, 3, (size,), generator=draw).float().to(device)
               for name, size in (("scale", vocab), ("bias", vocab), ("centre", width))}  # fmt: skip
    return {**numbers, "allowed": (torch.rand(vocab, generator=draw) < 0.7).to(device), "negated": True}


def error(found: Tensor, truth: Tensor) -> float:
    """Relative root mean square."""
    return float((found.double() - truth.double()).square().mean().sqrt() / truth.double().square().mean().sqrt())


@pytest.mark.parametrize("k", [1, 3, 16, 64])
@pytest.mark.parametrize(("n", "vocab", "width"), [(1, 64, 1), (33, 301, 40), (5, 1000, 70)])
def test_scores_and_ids_are_those_of_a_full_sort(n: int, vocab: int, width: int, k: int, device: torch.device) -> None:
    x, w = whole(n, vocab, width, device, k)
    for given in ({}, {"negated": True}, options(vocab, width, device, k)):
        count = min(k, int(given["allowed"].sum())) if "allowed" in given else k
        made, truth = (neuron_topk(x, w, count, impl=impl, **given) for impl in ("triton", "reference"))
        assert torch.equal(made[0], truth[0]) and torch.equal(made[1], truth[1])


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float16, 2e-3)])  # the spec's
def test_scores_of_random_vectors_are_the_references_up_to_rounding(
    dtype: torch.dtype, bound: float, device: torch.device
) -> None:
    for seed in range(3):
        draw = torch.Generator().manual_seed(seed)
        x, w = (torch.randn(size, 96, generator=draw).to(device, dtype) for size in (20, 500))
        scores, ids = neuron_topk(x, w, 7, negated=True, impl="triton")
        truth, _ = neuron_topk(x, w, 7, negated=True, impl="reference")
        assert error(scores, truth) < bound
        products = x.double() @ w.double().T
        assert error(scores[0], products.gather(1, ids[0])) < bound
        assert error(-scores[1], products.gather(1, ids[1])) < bound


def test_rows_of_another_type_are_taken_in_the_type_of_the_vectors(device: torch.device) -> None:
    x, w = whole(4, 100, 20, device)
    truth = neuron_topk(x, w, 5, impl="reference")
    for made in (
        neuron_topk(x, w.half(), 5, impl="triton"),
        neuron_topk(x.half(), w, 5, impl="triton"),
        neuron_topk(x, w.bfloat16(), 5, impl="triton"),
    ):
        assert torch.equal(made[0], truth[0]) and torch.equal(made[1], truth[1])


@pytest.mark.parametrize("splits", [1, 2, 3, 7])
def test_parts_of_the_vocabulary_change_nothing(splits: int, device: torch.device) -> None:
    x, w = whole(6, 450, 24, device)
    given: dict[str, Any] = {"negated": True, "allowed": None, "centre": None, "scale": None, "bias": None}
    truth = reference.largest(x, w, 10, **given)
    made = kernel.largest(x, w, 10, splits=splits, **given)
    assert torch.equal(made[0], truth[0]) and torch.equal(made[1], truth[1])


def test_strides_and_what_lies_around_change_nothing(device: torch.device) -> None:
    x, w = whole(5, 130, 37, device)
    truth = neuron_topk(x, w, 4, negated=True, impl="triton")
    around_x = torch.full((39, 11), torch.nan, device=device).T
    around_w = torch.full((135, 80), torch.nan, device=device)
    around_x[1:11:2, 2:], around_w[3:133, 1:75:2] = x, w
    made = neuron_topk(around_x[1:11:2, 2:], around_w[3:133, 1:75:2], 4, negated=True, impl="triton")
    assert torch.equal(made[0], truth[0]) and torch.equal(made[1], truth[1])


@pytest.mark.parametrize("impl", IMPLS)
def test_a_planted_row_is_found_and_its_opposite_too(impl: str, device: torch.device) -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(3, 64, generator=draw).to(device)
    w = 0.1 * torch.randn(900, 64, generator=draw).to(device)
    w[[17, 850, 444]], w[[18, 0, 899]] = x, -x
    _, ids = neuron_topk(x, w, 1, negated=True, impl=impl)
    assert ids[..., 0].tolist() == [[17, 850, 444], [18, 0, 899]]


@infinite
@pytest.mark.parametrize("impl", IMPLS)
def test_the_order_is_that_of_numbers_and_nan_is_never_hidden(impl: str, device: torch.device) -> None:
    inf, nan = torch.inf, torch.nan
    rows = [1.5, -inf, nan, 0.0, inf, -0.0, 1e-40, -3e38, -nan, 1.5, -1e-40, 3e38]
    x, w = torch.ones(1, 1, device=device), torch.tensor(rows, device=device)[:, None]
    scores, ids = neuron_topk(x, w, len(rows), negated=True, impl=impl)
    assert ids[0, 0].tolist() == [2, 8, 4, 11, 0, 9, 6, 3, 5, 10, 7, 1]
    assert ids[1, 0].tolist() == [2, 8, 1, 7, 10, 3, 5, 6, 0, 9, 11, 4]
    ordered = torch.tensor(rows, device=device)[ids[:, 0]] * torch.tensor([[1.0], [-1.0]], device=device)
    assert torch.equal(scores[:, 0].nan_to_num(9.0), ordered.nan_to_num(9.0))
    signs = torch.tensor([1.0, -1.0, 1.0], device=device)  # 0, -0 and 0 are one score
    _, ids = neuron_topk(x, torch.zeros(3, 1, device=device), 3, scale=signs, negated=True, impl=impl)
    assert ids[:, 0].tolist() == [[0, 1, 2]] * 2
    bad = torch.stack([torch.full((1,), nan), torch.ones(1)]).to(device)  # one bad vector is no other's trouble
    scores, ids = neuron_topk(bad, w[[0, 3, 9]], 2, impl=impl)
    assert scores[0].isnan().all() and ids.tolist() == [[0, 1], [0, 2]]


@infinite
@pytest.mark.parametrize("impl", IMPLS)
def test_barred_rows_are_no_answers_whatever_their_score(impl: str, device: torch.device) -> None:
    x = torch.ones(2, 3, device=device)
    w = torch.full((70, 3), -torch.inf, device=device)
    allowed = torch.zeros(70, dtype=torch.bool, device=device)
    allowed[[4, 66, 69]], w[5] = True, torch.nan
    _, ids = neuron_topk(x, w, 3, allowed=allowed, impl=impl)
    assert ids.tolist() == [[4, 66, 69]] * 2
    w[:], w[5] = 1.0, torch.nan
    scores, ids = neuron_topk(x, w, 3, allowed=allowed, negated=True, impl=impl)
    assert ids.tolist() == [[[4, 66, 69]] * 2] * 2 and scores.flatten().tolist() == [3.0] * 6 + [-3.0] * 6


@pytest.mark.parametrize("impl", IMPLS)
def test_centre_and_scale_are_the_same_as_prepared_rows(impl: str, device: torch.device) -> None:
    draw = torch.Generator().manual_seed(1)
    x, w = torch.randn(9, 48, generator=draw).to(device), (torch.randn(200, 48, generator=draw) + 2).to(device)
    centred = w.double() - w.double().mean(0)
    prepared = centred / centred.norm(dim=1, keepdim=True)
    scores, ids = neuron_topk(x, w, 5, centre=w.mean(0), scale=1 / centred.norm(dim=1).float(), impl=impl)
    truth = (x.double() @ prepared.T).topk(5)
    assert torch.equal(ids, truth.indices) and error(scores, truth.values) < 1e-5  # float32, measured 4e-7


@pytest.mark.parametrize("impl", IMPLS)
def test_no_vector_at_all_has_no_answers(impl: str, device: torch.device) -> None:
    scores, ids = neuron_topk(torch.zeros(0, 4, device=device), torch.zeros(9, 4, device=device), 3, impl=impl)
    assert scores.shape == ids.shape == (0, 3) and ids.dtype == torch.int64
    scores, _ = neuron_topk(
        torch.zeros(0, 4, device=device), torch.zeros(9, 4, device=device), 3, negated=True, impl=impl
    )
    assert scores.shape == (2, 0, 3)


@pytest.mark.parametrize("impl", IMPLS)
def test_answers_carry_no_gradient(impl: str, device: torch.device) -> None:
    x, w = whole(2, 20, 4, device)
    scores, _ = neuron_topk(x.requires_grad_(), torch.nn.Parameter(w), 2, impl=impl)
    assert not scores.requires_grad


def test_what_does_not_fit_is_refused_in_words() -> None:
    x, w = torch.zeros(2, 4), torch.zeros(100, 4)
    for k in (0, 101):
        with pytest.raises(ValueError, match=f"got k={k}, expected 1 to 64: 100 rows, at most 64"):
            neuron_topk(x, w, k)
    with pytest.raises(ValueError, match="got k=3, expected 1 to 2: 2 rows"):
        neuron_topk(x, w, 3, allowed=torch.arange(100) < 2)
    with pytest.raises(ValueError, match=r"got \(2, 4\) and \(100, 3\), expected \(n, d\) and \(vocab, d\)"):
        neuron_topk(x, w[:, 1:], 3)
    with pytest.raises(ValueError, match=r"got torch.float64, expected float32, float16 or bfloat16"):
        neuron_topk(x.double(), w, 3)
    with pytest.raises(ValueError, match=r"got allowed \(100,\) torch.float32, expected bool \(100,\)"):
        neuron_topk(x, w, 3, allowed=torch.ones(100))
    with pytest.raises(ValueError, match=r"got centre \(100,\) torch.float32, expected numbers \(4,\)"):
        neuron_topk(x, w, 3, centre=torch.ones(100))


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
def test_a_whole_vocabulary_on_a_gpu_is_the_references(dtype: torch.dtype, bound: float, device: torch.device) -> None:
    x, w = whole(300, 50257, 256, device)
    for given in ({"negated": True}, options(50257, 256, device)):
        made, truth = (
            neuron_topk(x.to(dtype), w.to(dtype), 20, impl=impl, **given) for impl in ("triton", "reference")
        )
        assert torch.equal(made[0], truth[0]) and torch.equal(made[1], truth[1])
    x, w = torch.randn(300, 256, device=device).to(dtype), torch.randn(50257, 256, device=device).to(dtype)
    scores, ids = neuron_topk(x, w, 20, impl="triton")
    assert error(scores, (x.double() @ w.double().T).gather(1, ids)) < bound


AHEAD = """
import json, torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from workbench_kernels.neuron_topk import kernel

found = []
for capability in (80, 90):
    for name, dtype, k in (("fp32", torch.float32, 10), ("fp16", torch.float16, 64), ("bf16", torch.bfloat16, 10)):
        vectors, rows, depth, warps = kernel.pick_config(dtype)
        switches = dict.fromkeys(("SHIFT", "ALLOWED", "SCALE", "BIAS"), k == 10)
        sizes = dict(K=k, SIGNS=2, PLACES=triton.next_power_of_2(k), N=vectors, V=rows, D=depth, **switches)
        sizes |= {"x_column": 1, "w_column": 1, "n": 1}  # integers of 1 are constants of the kernel
        types = dict.fromkeys(kernel.stream.arg_names, "i32") | dict.fromkeys(sizes, "constexpr")
        types |= {"x": "*" + name, "w": "*" + name, "out": "*i64", "allowed": "*u8"}
        types |= dict.fromkeys(("shift", "scale", "bias"), "*fp32")
        source = ASTSource(kernel.stream, types, sizes)
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
        ptx = made.asm["ptx"]
        found.append([capability, name, ptx.count("mma.sync") + ptx.count("wgmma.mma"), "tf32" in ptx])
print(json.dumps(found))
"""


def test_kernels_compile_ahead_of_time_and_use_tensor_cores_where_that_is_exact(ahead_of_time: Any) -> None:
    found = ahead_of_time(AHEAD)
    assert len(found) == 6 and not any(tf32 for *_, tf32 in found)
    assert all((products > 0) == (name != "fp32") for _, name, products, _ in found)
