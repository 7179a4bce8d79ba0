"""A tuned lens: one affine map per layer that carries its states into the last layer's basis before they are read.

p_l = softmax(unembed(h_l + A_l h_l + b_l)); A and b start at zero, the logit lens, and are trained to make
KL(p_L || p_l) small on text that is not analysed later.
Source: Belrose et al., 2023, "Eliciting Latent Predictions from Transformers with the Tuned Lens" (arXiv 2303.08112).
Ours: Adam instead of SGD, early stopping on texts of their own. A tuned lens can learn what the layer does not use.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from workbench.files import write_atomically
from workbench.methods.lens.lens import STATE_BYTES, Lens, lens_sites
from workbench.unembedding import Unembedding

if TYPE_CHECKING:
    from workbench.capture import Capture
    from workbench.site import Site
    from workbench.subject import Subject

CHECK_EVERY = 25  # steps between two looks at the validation texts


@dataclass(frozen=True, eq=False, repr=False)
class TunedLens:
    """One affine map per layer below the last. Make one with `fit_tuned_lens`.

    weight (layer, d_model, d_model), bias (layer, d_model)   float32; layer l stands after l blocks, 0 the embedding
    model     fingerprint of the subject it was trained on: it is refused on another
    history   layer -> KL in nats on the validation texts, before training and at every check
    """

    weight: Float[Tensor, "layer d_model d_model"]
    bias: Float[Tensor, "layer d_model"]
    model: str
    history: dict[int, tuple[float, ...]] = field(default_factory=dict)

    def moved(self, layer: int, states: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_model"]:
        """The states of one layer in the last layer's basis; those of the last layer stay as they are."""
        if layer == len(self.weight):
            return states
        values = states.float()
        return values + values @ self.weight[layer].to(values.device).T + self.bias[layer].to(values.device)

    def lens(self, unembedding: Unembedding) -> Lens:
        """This lens as a function of a layer and its states. ValueError on another model."""
        subject = unembedding.subject
        if self.model != subject.fingerprint:
            raise ValueError(
                f"TunedLens: was trained on model {self.model}, but {subject.name} is {subject.fingerprint}. "
                "Train one on this model with fit_tuned_lens."
            )
        return lambda layer, states: unembedding.logits(self.moved(layer, states))

    def save(self, path: str | Path) -> Path:
        """Write this lens to a safetensors file, which must end in .safetensors, and return its path."""
        path = Path(path)
        if path.suffix != ".safetensors":
            raise ValueError(f"TunedLens: got path {path.name!r}, expected a name that ends in .safetensors.")
        facts = {"model": self.model, "history": json.dumps(self.history, sort_keys=True)}
        tensors = {name: getattr(self, name).contiguous() for name in ("weight", "bias")}
        write_atomically(path, save(tensors, metadata=facts))
        return path

    @classmethod
    def load(cls, path: str | Path) -> TunedLens:
        """The lens that `save` wrote."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"TunedLens: {path} is no file, expected one that TunedLens.save wrote.")
        try:
            with safe_open(str(path), framework="pt") as file:
                facts = file.metadata() or {}
                if "model" not in facts or {"weight", "bias"} - set(file.keys()):
                    raise ValueError(
                        f"TunedLens: {path} holds no tuned lens, expected a file that TunedLens.save wrote."
                    )
                weight, bias = file.get_tensor("weight"), file.get_tensor("bias")
        except SafetensorError as error:
            raise ValueError(f"TunedLens: {path} can't be read ({error}), expected a file that save wrote.") from None
        history = {int(layer): tuple(values) for layer, values in json.loads(facts["history"]).items()}
        return cls(weight, bias, facts["model"], history)

    @property
    def digest(self) -> str:
        """12 hex digits of the maps' bytes."""
        total = hashlib.sha256(self.weight.contiguous().numpy().tobytes())
        total.update(self.bias.contiguous().numpy().tobytes())
        return total.hexdigest()[:12]

    def __repr__(self) -> str:
        return f"TunedLens({self.digest}: {len(self.weight)} layers of width {self.bias.shape[1]}, model {self.model})"


def lens_named(name: str, unembedding: Unembedding) -> tuple[str, Lens]:
    """The lens that a probe's setting names, with its name for tables: "logit", or the path of a saved tuned lens."""
    if name == "logit":
        return "logit", lambda _, states: unembedding.logits(states)
    if not name.endswith(".safetensors"):
        raise ValueError(f"lens: got {name!r}, expected 'logit' or the path of a file that TunedLens.save wrote.")
    made = TunedLens.load(name)
    return f"tuned {made.digest}", made.lens(unembedding)


def fit_tuned_lens(
    subject: Subject,
    texts: Sequence[str],
    *,
    steps: int = 250,
    rows: int = 128,
    rate: float = 2e-3,
    patience: int = 3,
    n_tokens: int = 8192,
    seed: int = 0,
) -> TunedLens:
    """Train a lens for every layer on `texts`, which should share nothing with the texts that are read later.

    One text in five, at least one, is kept for validation: every 25 steps its KL is taken, training of a layer stops
    after `patience` checks without a gain, and the best maps stay, so that no layer gets worse there than untrained.
    n_tokens   at most so many positions are learned from, drawn with `seed`; a quarter as many validate
    Raises ValueError under toggles: a lens is bound to the weights of the model alone.
    """
    if subject.active:
        raise ValueError(f"fit_tuned_lens: {subject} is under toggles, expected the plain model. Leave the with block.")
    if isinstance(texts, str):
        raise ValueError(f"fit_tuned_lens: got one string, expected a list of texts. Write [{texts[:30]!r}, ...].")
    if len(texts) < 2:
        raise ValueError(f"fit_tuned_lens: got {len(texts)} text, expected at least 2: one trains, one validates.")
    if min(steps, rows, patience, n_tokens) < 1 or rate <= 0:
        raise ValueError("fit_tuned_lens: steps, rows, rate, patience and n_tokens must be positive.")
    unembedding = Unembedding.of(subject)
    order = np.random.default_rng(seed).permutation(len(texts))
    cut = max(1, len(texts) // 5)
    parts = [[texts[int(i)] for i in some] for some in (order[cut:], order[:cut])]  # training, validation
    masks = [
        _chosen(subject, part, size, seed) for part, size in zip(parts, (n_tokens, n_tokens // 4 + 1), strict=True)
    ]

    def states(at: list[Site]) -> list[Capture]:
        pairs = zip(parts, masks, strict=True)
        return [subject.capture(part, at, tokens=mask, progress=False) for part, mask in pairs]

    *at, end = lens_sites(subject.n_layers)
    last = [seen[end] for seen in states([end])]
    together = max(1, STATE_BYTES // (4 * subject.anatomy.d_model * n_tokens))  # layers per forward
    training: dict[str, Any] = {"steps": steps, "rows": rows, "rate": rate, "patience": patience}
    weight, bias, history = [], [], {}
    for layer, site in enumerate(at):
        if layer % together == 0:
            held = states(at[layer : layer + together])
        trained = _fit_layer(unembedding, [seen[site] for seen in held], last, seed=seed + layer, **training)
        weight.append(trained[0])
        bias.append(trained[1])
        history[layer] = trained[2]
    return TunedLens(torch.stack(weight), torch.stack(bias), subject.fingerprint, history)


def _fit_layer(
    unembedding: Unembedding,
    states: list[Tensor],
    last: list[Tensor],
    *,
    steps: int,
    rows: int,
    rate: float,
    patience: int,
    seed: int,
) -> tuple[Tensor, Tensor, tuple[float, ...]]:
    """A, b and the validation KL of one layer; states and last are those of training and of validation."""
    device, d_model = unembedding.weight.device, states[0].shape[1]
    maps = [torch.zeros(shape, device=device, requires_grad=True) for shape in ((d_model, d_model), (d_model,))]
    optimiser = torch.optim.Adam(maps, lr=rate)
    draw = torch.Generator().manual_seed(seed)
    best = [value.detach().clone() for value in maps]
    history, stale = [_validation_kl(unembedding, maps, states[1], last[1], rows)], 0
    for step in range(1, steps + 1):
        some = torch.randint(len(states[0]), (min(rows, len(states[0])),), generator=draw)
        target = unembedding.logits(last[0][some]).softmax(-1)
        loss = torch.nn.functional.cross_entropy(_scores(unembedding, maps, states[0][some]), target)  # KL + constant
        optimiser.zero_grad()
        loss.backward(inputs=maps)  # the model's own parameters get no gradient
        optimiser.step()
        if step % CHECK_EVERY and step != steps:
            continue
        history.append(_validation_kl(unembedding, maps, states[1], last[1], rows))
        if history[-1] == min(history):
            best, stale = [value.detach().clone() for value in maps], 0
        else:
            stale += 1
        if stale == patience:
            break
    return best[0].cpu(), best[1].cpu(), tuple(history)


@torch.no_grad()
def _validation_kl(unembedding: Unembedding, maps: Sequence[Tensor], states: Tensor, last: Tensor, rows: int) -> float:
    """Mean KL(last || layer) in nats."""
    total = 0.0
    for some, final in zip(states.split(rows), last.split(rows), strict=True):
        target = unembedding.logits(final).log_softmax(-1)
        logs = _scores(unembedding, maps, some).log_softmax(-1)
        total += float((target.exp() * (target - logs)).sum(dtype=torch.float64))
    return total / len(states)


def _scores(unembedding: Unembedding, maps: Sequence[Tensor], states: Tensor) -> Float[Tensor, "row vocab"]:
    """Logits of the moved states with gradients to the maps; `Unembedding.logits` keeps none."""
    values = states.to(maps[0].device).float()
    moved = (values + values @ maps[0].T + maps[1]).to(unembedding.weight.dtype)
    raw = unembedding.head(moved if unembedding.norm is None else unembedding.norm(moved)).float() * unembedding.scale
    return raw if unembedding.soft_cap is None else unembedding.soft_cap * torch.tanh(raw / unembedding.soft_cap)


def _chosen(subject: Subject, texts: Sequence[str], n_tokens: int, seed: int) -> list[list[bool]]:
    """A mask per text that marks at most n_tokens positions over all of them."""
    lengths = subject.tokenize(texts).lengths
    marked = np.zeros(sum(lengths), dtype=bool)
    marked[np.random.default_rng(seed).permutation(len(marked))[:n_tokens]] = True
    return [part.tolist() for part in np.split(marked, np.cumsum(lengths)[:-1])]
