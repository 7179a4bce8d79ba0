"""Leave out blocks whose weights were fused into their neighbours: a smaller model that was taught to make up for them.

W'_j = W_j + B A + (P Q) o W_i, multiplied out: ordinary dense tensors of the same shapes, nothing is slower.
Source: FuseGPT, Pan et al., 2024 (arXiv 2411.14507); what differs, `workbench.methods.pruning.fusing` tells.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from workbench.loading import model_fingerprint
from workbench.methods.pruning.fused import Fusion, FusionResult
from workbench.methods.pruning.fusing import Fusing, fuse, install_fused
from workbench.pruned.blocks import block_of
from workbench.pruned.report import parameter_bytes
from workbench.pruned.weights import Weights
from workbench.toggle import Toggle

if TYPE_CHECKING:
    from workbench.subject import Subject


@dataclass(frozen=True)
class FuseBlocks(Toggle):
    """A model without some blocks, and other weights in their neighbours. Make one with `FuseBlocks.fit`.

    blocks    those that are left out
    weights   the new tensors of the others, named "block.parameter"
    made_of   ((block, fingerprint), ...) of what these tensors replace: other weights are not overwritten
    fusions   what each fusion did, see `report`
    """

    blocks: tuple[int, ...] = ()
    weights: Weights = field(default_factory=lambda: Weights({}))
    made_of: tuple[tuple[int, str], ...] = ()
    fusions: tuple[Fusion, ...] = ()

    values: ClassVar[tuple[type, ...]] = (Weights, Fusion)
    precedes: ClassVar[frozenset[str]] = frozenset({"kv.project", "ffn.experts"})
    in_weights: ClassVar[bool] = True

    @classmethod
    def fit(
        cls, subject: Subject, texts: Sequence[Any], n: int | None = None, *, progress: bool = True, **settings: Any
    ) -> FuseBlocks:
        """Fuse `n` blocks of `subject`, one after another, each time the one with the lowest macro influence.

        texts      or rows of token ids; one in eight is held out, and decides when to stop and what is kept
        n          None: a quarter of the blocks, rounded up
        settings   those of `Fusing`: group, rank, epochs, batch, rate, base_rate, loss, patience, donor, seed
        The subject stays as it is, also after an interruption. Deterministic on one device with one number of threads.
        Raises ValueError under toggles, and where blocks of a group are not alike.
        """
        if subject.active:
            raise ValueError(f"FuseBlocks: {subject} is under toggles, expected the plain model. Leave the with block.")
        if isinstance(texts, str) or len(texts) < 2:
            raise ValueError(f"FuseBlocks: got {texts!r:.40}, expected at least 2 texts: one trains, one is held out.")
        n = -(-subject.n_layers // 4) if n is None else n
        if not 1 <= n < subject.n_layers:
            raise ValueError(f"FuseBlocks: got n={n}, expected 1 to {subject.n_layers - 1} of the blocks.")
        dense, fusions = fuse(subject, subject.tokenize(texts).ids, n, Fusing(**settings), progress=progress)
        gone = tuple(fusion.block for fusion in fusions)
        dense = {name: tensor for name, tensor in dense.items() if _block_in(name) not in gone}
        return cls.of(subject, gone, Weights(dense), tuple(fusions))

    @classmethod
    def of(
        cls, subject: Subject, blocks: tuple[int, ...], weights: Weights, fusions: tuple[Fusion, ...] = ()
    ) -> FuseBlocks:
        """The toggle that puts `weights` in the place of what `subject` has."""
        changed = sorted({_block_in(name) for name in weights})
        made_of = tuple((block, model_fingerprint(block_of(subject, block))) for block in changed)
        return cls(tuple(sorted(blocks)), weights, made_of, fusions)

    def install(self, subject: Subject, undo: ExitStack) -> None:
        if not self.blocks and not len(self.weights):
            return
        before = parameter_bytes(subject)
        for block, fingerprint in self.made_of:
            there = block < subject.n_layers and model_fingerprint(block_of(subject, block))
            if there != fingerprint:
                raise ValueError(
                    f"FuseBlocks: the weights of block {block} of {subject.name} are not those that were fused. Was it "
                    "fitted on another model? Toggles that change weights come after it: FuseBlocks | Prune."
                )
        install_fused(subject, self.weights, self.blocks, undo)
        subject.count_forwards(undo)
        subject.receipt.bytes_freed = before - parameter_bytes(subject)

    def report(self, subject: Subject) -> FusionResult:
        """What each fusion did: a table, loss curves, and who took over the work."""
        if not self.fusions:
            raise ValueError("FuseBlocks: nothing was fused here, so there is nothing to report. Use FuseBlocks.fit.")
        sizes = [sum(p.numel() for p in block_of(subject, fusion.block).parameters()) for fusion in self.fusions]
        return FusionResult.of(self.fusions, subject.n_layers, sizes)

    def save(self, path: str | Path) -> FuseBlocks:
        """This toggle with its tensors in a safetensors file, which its JSON then names instead of holding them."""
        return replace(self, weights=self.weights.save(path))

    @classmethod
    def examples(cls, subject: Subject) -> tuple[Toggle, ...]:
        """A tenth of a block added to each of its neighbours."""
        middle = subject.n_layers // 2
        leaving = dict(block_of(subject, middle).named_parameters())
        weights = {
            f"{other}.{name}": (parameter + 0.1 * leaving[name]).detach()
            for other in (middle - 1, middle + 1)
            if 0 <= other < subject.n_layers
            for name, parameter in block_of(subject, other).named_parameters()
        }
        return (cls.of(subject, (middle,), Weights(weights)),)

    @classmethod
    def neutral(cls, subject: Subject) -> Toggle:
        return cls()

    def __str__(self) -> str:
        return f"FuseBlocks({', '.join(map(str, self.blocks))}; {self.weights.digest[:8]})"


def _block_in(name: str) -> int:
    return int(name.partition(".")[0])
