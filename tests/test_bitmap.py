"""Bitmap files: bit-exact for every number there is, as large as the formula says, refused where damaged."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

from workbench import Subject
from workbench.memory import AllocationMeter
from workbench.pruned import bitmap
from workbench.pruned.bitmap import Bitmap, bitmap_sizes, load_bitmap, load_into, save_bitmap, stream_bitmap
from workbench.toggles.sparsify import Sparsify

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8)


def bits_of(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def equal(a: Tensor, b: Tensor) -> bool:
    """Equal to the bit: torch.equal takes -0.0 for 0.0, and NaN for something else than itself."""
    return a.dtype == b.dtype and a.shape == b.shape and bits_of(a) == bits_of(b)


def reference(tensor: Tensor) -> tuple[list[int], list[bytes]]:
    """Bits and values, one number at a time."""
    size = tensor.element_size()
    data = bits_of(tensor)
    numbers = [data[i : i + size] for i in range(0, len(data), size)]
    packed = [0] * -(-len(numbers) // 8)
    for place, number in enumerate(numbers):
        packed[place // 8] |= any(number) << place % 8
    return packed, [number for number in numbers if any(number)]


def sparse(shape: tuple[int, ...], share: float = 0.5, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    there = torch.rand(shape, generator=generator) >= share
    return (torch.randint(1, 100, shape, generator=generator) * there).to(dtype)


def strange(dtype: torch.dtype) -> Tensor:
    """Every kind of number that a comparison with zero, or a rounding, would lose; seven are zero."""
    zeros = [0] * 7
    if not dtype.is_floating_point:
        return torch.tensor([*zeros, -128, 127, -1, 1, 5, 6], dtype=dtype)
    limits = torch.finfo(dtype)
    numbers = torch.tensor([*zeros, -0.0, float("inf"), -float("inf"), limits.max, limits.tiny, 1.5], dtype=dtype)
    kind = bitmap.AS_INTEGERS[dtype.itemsize]
    quiet = torch.tensor([float("nan")], dtype=dtype).view(kind)
    return torch.cat(
        [numbers, (quiet + 1).view(dtype), (-quiet - 5).view(dtype), torch.ones(1, dtype=kind).view(dtype)]
    )


# Laws


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bool, torch.uint8, torch.int64, torch.complex64])
def test_a_tensor_comes_back_to_the_bit(dtype: torch.dtype) -> None:
    tensors = {
        "sparse": sparse((13, 17), dtype=dtype),
        "size of whole bytes": sparse((8, 16), dtype=dtype),
        "many pieces": sparse((3, bitmap.CHUNK + 5), 0.9, dtype),
        "empty": torch.zeros(0, 4, dtype=dtype),
        "0-d": torch.zeros((), dtype=dtype),
        "0-d one": torch.ones((), dtype=dtype),
        "zeros": torch.zeros(5, 7, dtype=dtype),
        "full": torch.ones(5, 7, dtype=dtype),
        "transposed": sparse((13, 17), dtype=dtype).T,
    }
    for name, tensor in tensors.items():
        assert equal(Bitmap.pack(tensor).unpack(), tensor), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_strange_numbers_come_back_to_the_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    tensor = strange(dtype)
    made = Bitmap.pack(tensor)
    assert equal(made.unpack(), tensor) and len(made.values) == len(tensor) - 7
    path = save_bitmap({"strange": torch.cat([tensor, torch.zeros(90, dtype=dtype)])}, tmp_path / "a")
    assert bits_of(load_bitmap(path)["strange"])[: tensor.nbytes] == bits_of(tensor)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_fast_packing_is_the_slow_one(dtype: torch.dtype) -> None:
    tensor = torch.cat([strange(dtype), sparse((205,), dtype=dtype)])
    packed, numbers = reference(tensor)
    made = Bitmap.pack(tensor)
    assert made.bits.tolist() == packed and bits_of(made.values) == b"".join(numbers)


def test_a_test_of_values_would_lose_minus_zero() -> None:
    tensor = sparse((40, 40), dtype=torch.float16)
    tensor[3, 4] = -0.0
    by_value = torch.where(tensor != 0, tensor, 0.0)
    assert (
        not equal(by_value, tensor)
        and sum(a != b for a, b in zip(bits_of(by_value), bits_of(tensor), strict=True)) == 1
    )
    assert equal(Bitmap.pack(tensor).unpack(), tensor)


@pytest.mark.parametrize(
    ("dtype", "at_half"), [(torch.float32, 0.53125), (torch.bfloat16, 0.5625), (torch.int8, 0.625)]
)
def test_the_size_is_that_of_the_formula(dtype: torch.dtype, at_half: float) -> None:
    half = torch.tensor([0, 1], dtype=dtype).repeat(8, 64)
    assert Bitmap.pack(half).nbytes == at_half * half.nbytes
    row = bitmap_sizes({"odd": sparse((513, 77), dtype=dtype)}).iloc[0]
    assert row["bitmap_bytes"] == row["ratio"] * row["dense_bytes"]
    padding = -513 * 77 % 8 / 8 / row["dense_bytes"]  # bits to the last whole byte
    assert row["ratio"] == pytest.approx(row["formula"] + padding, rel=1e-12)


def test_the_break_even_is_one_zero_in_as_many_numbers_as_a_number_has_bits() -> None:
    for dtype, bits in ((torch.float32, 32), (torch.float16, 16), (torch.int8, 8)):
        tensor = torch.ones(64, 2 * bits).to(dtype)
        tensor[:, :2] = 0  # saves exactly what the bits cost
        assert not bitmap.pays(tensor)
        tensor[0, 2] = 0
        assert bitmap.pays(tensor)


# Files


def tensors() -> dict[str, Tensor]:
    return {
        "a.weight": sparse((33, 20), dtype=torch.bfloat16),
        "dense": torch.arange(1.0, 50.0),
        "b.weight": sparse((7, 9), 0.7, torch.float64),
        "empty": torch.zeros(0, 3),
        "none": torch.zeros(6, 6),
        "count": torch.tensor(3),
    }


def test_a_file_gives_back_names_order_and_bits(tmp_path: Path) -> None:
    held = tensors()
    found = load_bitmap(save_bitmap(held, tmp_path / "a.safetensors"))
    assert list(found) == list(held) and all(equal(found[name], held[name]) for name in held)
    inside = load((tmp_path / "a.safetensors").read_bytes())
    assert {"a.weight.bits", "a.weight.values", "dense"} <= inside.keys() and "a.weight" not in inside
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"], "nothing else is left"


def test_the_same_tensors_give_the_same_bytes(tmp_path: Path) -> None:
    paths = [save_bitmap(tensors(), tmp_path / name) for name in ("a", "b")]
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_a_tensor_whose_bitmap_would_be_larger_stays_as_it_is() -> None:
    verdicts = bitmap_sizes(tensors()).set_index("tensor")["verdict"].to_dict()
    assert verdicts == {
        "a.weight": "bitmap", "dense": "dense", "b.weight": "bitmap", "empty": "dense", "none": "bitmap",
        "count": "dense",
    }  # fmt: skip


def test_names_that_a_bitmap_would_take_stay_apart(tmp_path: Path) -> None:
    held = {"a": sparse((30, 30)), "a.bits": torch.ones(3), "b": sparse((30, 30)), "b.values": sparse((9, 9))}
    found = load_bitmap(save_bitmap(held, tmp_path / "a"))
    assert all(equal(found[name], held[name]) for name in held)


def test_views_of_one_memory_and_tied_tensors_are_written_once_or_apart(tmp_path: Path) -> None:
    whole = torch.arange(1.0, 4001.0)
    held = {"left": whole[:1000], "right": whole[1000:], "again": whole[:1000], "strided": whole[::2]}
    path = save_bitmap(held, tmp_path / "a")
    found = load_bitmap(path)
    assert all(equal(found[name], held[name]) for name in held)
    assert path.stat().st_size < 4 * (1000 + 3000 + 2000) + 2000, "left is there once"
    assert bitmap_sizes(held).set_index("tensor").loc["again", "verdict"] == "same"


def test_the_file_of_a_sparse_model_is_as_large_as_the_formulas_sum_to(tmp_path: Path) -> None:
    subject = Subject.organism()
    with subject.under(Sparsify(0.7)):
        path = save_bitmap(subject.model, tmp_path / "a")
        sizes = bitmap_sizes(subject.model)
        held = {name: value.clone() for name, value in subject.model.state_dict().items()}
    sizes = sizes[sizes["verdict"] != "same"]
    expected = (sizes["dense_bytes"] * np.minimum(sizes["formula"], 1)).sum()
    assert path.stat().st_size == pytest.approx(expected, rel=0.01)  # header and padding
    found = load_bitmap(path)
    assert all(equal(found[name], held[name]) for name in held) and found.keys() == held.keys()


def test_a_model_reads_a_file_tensor_by_tensor(tmp_path: Path) -> None:
    subject, other = Subject.tiny("qwen2", 0), Subject.tiny("qwen2", 1)
    ids = torch.tensor([[5, 9, 2, 7]])
    with subject.under(Sparsify(0.5)), torch.no_grad():
        path = save_bitmap(subject.model, tmp_path / "a")
        said = subject.model(input_ids=ids).logits
    held = {id(parameter) for parameter in other.model.parameters()}
    load_into(other.model, path)
    with torch.no_grad():
        assert torch.equal(other.model(input_ids=ids).logits, said)
    assert {id(parameter) for parameter in other.model.parameters()} == held


def test_reading_holds_one_tensor_at_a_time(tmp_path: Path) -> None:
    held = {f"layers.{i}.weight": sparse((512, 512), seed=i) for i in range(12)}
    path, whole = save_bitmap(held, tmp_path / "a"), sum(tensor.nbytes for tensor in held.values())
    model: Any = torch.nn.Module()
    model.layers = torch.nn.ModuleList(torch.nn.Linear(512, 512, bias=False) for _ in held)
    with AllocationMeter():
        load_into(model, path)  # its first use imports much
    tracemalloc.start()  # numpy's memory; tensors made of it share it
    with AllocationMeter() as meter:
        load_into(model, path)
    peak = tracemalloc.get_traced_memory()[1] + meter.peak_bytes
    tracemalloc.stop()
    one = whole / len(held)
    assert peak < 3 * one < whole / 3, f"{peak / one:.1f} tensors"  # the tensor, its values, pieces of it
    found = model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in held.items())


# Refusals


def broken(path: Path, change: Any) -> Path:
    """A copy of a file with tensors and metadata changed, well-formed as safetensors."""
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    inside, metadata = load(data), header["__metadata__"]
    change(inside, metadata)
    other = path.with_name("broken")
    other.write_bytes(save(inside, metadata))
    return other


def fewer(inside: dict, metadata: dict) -> None:
    inside["a.weight.values"] = inside["a.weight.values"][:-1].clone()


def more_bits(inside: dict, metadata: dict) -> None:
    inside["a.weight.bits"][:3] = 255


def beyond_the_end(inside: dict, metadata: dict) -> None:
    inside["a.weight.bits"][-1] = 128 + inside["a.weight.bits"][-1] % 128


def too_short(inside: dict, metadata: dict) -> None:
    inside["a.weight.bits"] = inside["a.weight.bits"][:-1].clone()


def gone(inside: dict, metadata: dict) -> None:
    del inside["a.weight.bits"]


def later(inside: dict, metadata: dict) -> None:
    metadata[bitmap.FORMAT] = metadata[bitmap.FORMAT].replace('"version": 1', '"version": 2')


def foreign(inside: dict, metadata: dict) -> None:
    metadata["format"] = metadata.pop(bitmap.FORMAT)


def untold(inside: dict, metadata: dict) -> None:
    metadata[bitmap.FORMAT] = "{"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (fewer, r"a\.weight contradicts itself: got \d+ values for \d+ bits"),
        (more_bits, r"a\.weight contradicts itself: got \d+ values for \d+ bits"),
        (beyond_the_end, "expected one each and zeros to a whole byte"),
        (too_short, "expected one each and zeros to a whole byte"),
        (gone, "is damaged"),
        (later, "is of version 2, this reads version 1"),
        (foreign, "is no bitmap file"),
        (untold, "is damaged"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(change: Any, words: str, tmp_path: Path) -> None:
    held = {"a.weight": sparse((11, 9)), "dense": torch.ones(3)}
    path = save_bitmap(held, tmp_path / "a")
    assert load_bitmap(broken(path, lambda *_: None)).keys() == held.keys()
    with pytest.raises(ValueError, match=words):
        load_bitmap(broken(path, change))


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.99])
def test_a_file_that_is_cut_short_is_refused(share: float, tmp_path: Path) -> None:
    path = save_bitmap(tensors(), tmp_path / "a")
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ValueError, match="is damaged"):
        load_bitmap(path)


def test_no_file_and_strange_tensors_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected one that save_bitmap wrote"):
        load_bitmap(tmp_path / "nothing")
    with pytest.raises(ValueError, match="is a list, expected tensors in memory"):
        save_bitmap({"a": [1.0]}, tmp_path / "a")  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="on another machine or disk"):
        save_bitmap({"a": torch.empty(3, device="meta")}, tmp_path / "a")
    with pytest.raises(ValueError, match="expected numbers of 1, 2, 4 or 8 bytes"):
        save_bitmap({"a": torch.ones(3, dtype=torch.complex128)}, tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_a_killed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_bitmap({"a": sparse((9, 9))}, tmp_path / "a")
    before = path.read_bytes()

    def killed(self: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save_bitmap({"a": sparse((99, 9))}, path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_a_model_of_other_shapes_dtypes_or_names_is_refused(tmp_path: Path) -> None:
    path = save_bitmap({"weight": sparse((4, 4)), "bias": torch.ones(4)}, tmp_path / "a")
    with pytest.raises(ValueError, match=r"weight is \(4, 4\) of torch.float32, the model has \(4, 5\)"):
        load_into(torch.nn.Linear(5, 4), path)
    with pytest.raises(ValueError, match=r"the model has \(4, 4\) of torch.float64"):
        load_into(torch.nn.Linear(4, 4).double(), path)
    with pytest.raises(ValueError, match="holds bias, which Linear has not"):
        load_into(torch.nn.Linear(4, 4, bias=False), path)
    with pytest.raises(ValueError, match=r"lacks 2\.bias, 2\.weight of the model"):
        two = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
        load_into(two, save_bitmap({"1.weight": sparse((4, 4)), "1.bias": torch.ones(4)}, tmp_path / "b"))


def test_a_stream_may_be_left_early(tmp_path: Path) -> None:
    stream = stream_bitmap(save_bitmap(tensors(), tmp_path / "a"))
    name, tensor = next(stream)
    assert name == "a.weight" and equal(tensor, tensors()[name])
    stream.close()  # type: ignore[attr-defined]


def test_a_tensor_and_a_view_of_all_of_it_in_another_shape_are_written_apart(tmp_path: Path) -> None:
    whole = torch.arange(1.0, 17.0)
    held = {"flat": whole, "square": whole.reshape(4, 4)}
    found = load_bitmap(save_bitmap(held, tmp_path / "a"))
    assert all(equal(found[name], held[name]) for name in held)
