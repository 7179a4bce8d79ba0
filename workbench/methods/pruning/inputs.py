"""What the matrices of a block read: sums over the tokens of calibration texts, one block at a time.

H = sum over tokens of x x^T, or its diagonal alone, in float64. A forward stops behind the block that is asked for, and
no receipt counts it. Texts of one length share a batch, so that nothing is padded and every number read is a token's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from workbench.discovery import is_linear
from workbench.pruned.units import rows_of
from workbench.swap import standing_in
from workbench.tokens import batches

if TYPE_CHECKING:
    from workbench.subject import Subject


def linears_in(subject: Subject, layer: int) -> dict[str, nn.Module]:
    """Full path -> matrix, of those in one block that run as they stand: where a toggle runs something else, none.

    Raises ValueError where a weight is shared with another module, which would change with it.
    """
    path = f"{subject.anatomy.blocks}.{layer}"
    inside = {name: module for name, module in subject.model.get_submodule(path).named_modules() if is_linear(module)}
    found = {f"{path}.{name}": module for name, module in inside.items() if not _replaced(subject, path, name)}
    _refuse_shared(subject, found)
    return found


def others_in(subject: Subject, layer: int) -> dict[str, nn.Parameter]:
    """Full path -> matrix that is no linear's, such as the fused experts of a mixture and their router."""
    path = f"{subject.anatomy.blocks}.{layer}"
    return {
        f"{path}.{name}.{key}": value
        for name, module in subject.model.get_submodule(path).named_modules()
        for key, value in module._parameters.items()
        if value is not None and value.dim() > 1 and not is_linear(module)
    }


@torch.no_grad()
def input_moments(
    subject: Subject,
    ids: Sequence[Sequence[int]],
    linears: Mapping[str, nn.Module],
    last: int,
    *,
    whole: bool,
    batch: int = 4096,
) -> dict[str, Tensor]:
    """What the linears read of the texts: name -> (in, in) X^T X, or (in,) its diagonal where not `whole`.

    last    the deepest block that holds one of them: the forward stops behind it
    batch   tokens per forward, about
    The subject is read as it is, without a cache. A linear that never ran has no entry.
    """
    sums: dict[str, Tensor] = {}

    def see(name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = (*args, *kwargs.values())[0]
        x = given.reshape(-1, given.shape[-1]).double()
        found = x.T @ x if whole else x.square().sum(0)
        sums[name] = sums[name] + found if name in sums else found

    with uncounted(subject), ExitStack() as undo:
        for name, module in linears.items():
            undo.callback(module.register_forward_pre_hook(partial(see, name), with_kwargs=True).remove)
        block = subject.model.get_submodule(f"{subject.anatomy.blocks}.{last}")
        undo.callback(block.register_forward_hook(_stop).remove)
        for rows in batches([len(row) for row in ids], batch, even=True):
            texts = torch.tensor([list(ids[row]) for row in rows], device=subject.device)
            with contextlib.suppress(_Enough):
                subject.model(input_ids=texts, use_cache=False)
    return sums


@torch.no_grad()
def output_errors(
    subject: Subject, ids: Sequence[Sequence[int]], dense: Mapping[str, Tensor], *, batch: int = 4096
) -> tuple[Tensor, Tensor]:
    """(linear, text) sums of |x W'^T - x W^T|^2 and of |x W^T|^2, W' what stands there now and W its `dense` (out, in).

    x is what the linear reads now, so that an error is its own and not that of the blocks before it. Texts are read
    without a cache. A linear that never ran has zeros.
    """
    lost, whole = torch.zeros(2, len(dense), len(ids), dtype=torch.float64)
    rows: list[int] = []

    def see(number: int, weight: Tensor, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = (*args, *kwargs.values())[0]
        x = given.reshape(len(rows), -1, given.shape[-1]).to(torch.promote_types(given.dtype, torch.float32))
        before, after = (x @ one.to(x).T for one in (weight, rows_of(module)))
        lost[number, rows] += (after - before).double().square().sum((1, 2)).cpu()
        whole[number, rows] += before.double().square().sum((1, 2)).cpu()

    with uncounted(subject), ExitStack() as undo:
        for number, (name, weight) in enumerate(dense.items()):
            hook = partial(see, number, weight)
            undo.callback(subject.model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True).remove)
        for group in batches([len(row) for row in ids], batch, even=True):
            rows[:] = group
            texts = torch.tensor([list(ids[row]) for row in group], device=subject.device)
            subject.model(input_ids=texts, use_cache=False)
    return lost, whole


@contextmanager
def uncounted(subject: Subject) -> Iterator[None]:
    """Within: forwards that no receipt counts, as they belong to how a toggle is made."""
    held = [(receipt, {name: _copied(value) for name, value in vars(receipt).items()}) for receipt in subject.receipts]
    try:
        yield
    finally:
        for receipt, before in held:
            vars(receipt).update(before)


def _copied(value: Any) -> Any:
    """Containers anew, whatever they hold as it is: sums are replaced, and lengths are known by their memory."""
    if isinstance(value, dict):
        return {name: _copied(item) for name, item in value.items()}
    return value.copy() if isinstance(value, list) else value


class _Enough(Exception):
    """The blocks that are asked for have run."""


def _stop(*_: Any) -> None:
    raise _Enough


def _replaced(subject: Subject, path: str, name: str) -> bool:
    """Whether something else runs in the place of a module, or of one that holds it."""
    module = subject.model.get_submodule(path)
    for part in [None, *name.split(".")]:
        module = module if part is None else module.get_submodule(part)
        found = standing_in(module)
        if found is not None and (found.silent or found.reason):
            return True
    return False


def _refuse_shared(subject: Subject, linears: Mapping[str, nn.Module]) -> None:
    owners: dict[int, list[str]] = {}
    for name, parameter in subject.model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for name, module in linears.items():
        shared = owners.get(id(module.weight), [])
        if len(shared) > 1:
            raise ValueError(
                f"sparsify: {name} shares its weight with {', '.join(o for o in shared if o != f'{name}.weight')}, "
                "which would lose it too. Untie the model first."
            )
