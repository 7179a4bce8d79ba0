"""G-ACT: steer each prompt along the one of a few directions that a probe picks from the prompt's own residual.

h_l <- h_l + strength * sum_c p_l(c | h_l at the prompt's end) m_{l,c};  m the mean difference of cluster c at layer l
Source: Sharma and Raman, 2025, "Steering Conceptual Bias via Transformer Latent-Subspace Activation" (G-ACT, arXiv
2506.18887). No code is public: the reading of the prompt before any push and the test for skipping layers are ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import pandas as pd
import torch
from torch import Tensor

from workbench.methods.steering.clusters import REFINEMENT_RATE, Clusters, fit_clusters
from workbench.site import Site
from workbench.step import Positions, Step, check_positions
from workbench.toggle import Toggle

if TYPE_CHECKING:
    from workbench.subject import Subject


@dataclass(frozen=True)
class ClusteredSteer(Toggle):
    """Add, at each layer, the mean difference of the cluster that the layer's probe finds in the prompt.

    layers      ((site, Clusters), ...), found by `ClusteredSteer.fit`
    model       fingerprint of the subject they were found on; another is refused. None: taken anywhere
    name        what the push stands for
    strength    1 adds at each layer as much as the prompts differed there. What is added at a layer is carried to those
                above it, so over n layers the pushes add up: 1 / n is about one difference
    choice      "soft": the clusters' means weighed by their probability; "hard": the most probable one
    margin      a layer acts only where its probe, on prompts held out, surely beats always naming the largest cluster
                by more than this; the others are skipped and named in the receipt
    keep_norm   rescale each token's value to the norm that it had
    All probes read the prompt's last token before anything is pushed, as they did when they were trained; with several
    layers that takes a second pass over the prompt, and nothing per generated token.
    """

    layers: tuple[tuple[Site, Clusters], ...]
    model: str | None = None
    name: str = ""
    strength: float = 1.0
    choice: Literal["soft", "hard"] = "soft"
    positions: Positions | tuple[int, ...] = "last"
    keep_norm: bool = False
    margin: float = 0.0

    values: ClassVar[tuple[type, ...]] = (Clusters,)

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple((site, clusters) for site, clusters in self.layers))
        object.__setattr__(self, "positions", check_positions(self.positions))
        if not self.layers or len({site for site, _ in self.layers}) < len(self.layers):
            raise ValueError(f"ClusteredSteer: got sites {[str(s) for s, _ in self.layers]}, expected each once.")
        if self.choice not in ("soft", "hard"):
            raise ValueError(f"ClusteredSteer: got choice={self.choice!r}, expected 'soft' or 'hard'.")

    @classmethod
    def fit(
        cls,
        subject: Subject,
        prompts: Sequence[str],
        towards: Sequence[str],
        away: Sequence[str],
        *,
        at: Sequence[Site] | None = None,
        k: int | None = None,
        seed: int = 0,
        **settings: Any,
    ) -> ClusteredSteer:
        """Cluster the differences between `towards` and `away` and train the probes on `prompts`, row by row alike.

        prompts         as they will come when steered: what the probes read
        towards, away   the same prompts asking for the target, and for its alternative
        at              None: the output of every block        k   clusters per layer; None: 2 to 8, by silhouette
        settings        of the toggle: name, strength, choice, ...
        Everything is read at the last token, under the toggles that are active. Don't pass one of the two sides as
        `prompts`: a side's own noise is in the difference, and a probe reads the cluster off it where there is nothing
        to know (on pure noise 9 of 10 such layers pass the held-out test).

            asked, new = code_styles.combinations("train")[::2], code_styles.combinations("held_out")
            by_task = {task: code_styles.STYLES[i % 2] for i, task in enumerate(code_styles.TASKS)}
            other = {"brace": "layout", "layout": "brace"}
            prompts = [code_styles.prompt(*each) for each in asked]
            towards = [code_styles.prompt(*each, by_task[each[0]]) for each in asked]
            away = [code_styles.prompt(*each, other[by_task[each[0]]]) for each in asked]
            at = [Site(4, "resid_out")]
            steer = ClusteredSteer.fit(subject, prompts, towards, away, at=at, strength=0.5, positions="prompt")
            with subject.under(steer):  # every second task turns to the other style; steer.evidence() says why
                print(subject.generate([code_styles.prompt(*each) for each in new], max_new_tokens=40))
            control = steer.random_control(seed)  # the same probes and norms, random directions
        """
        lengths = [len(prompts), len(towards), len(away)]
        if len(set(lengths)) > 1:
            raise ValueError(f"ClusteredSteer.fit: got {lengths} prompts, towards and away; expected as many of each.")
        sites = tuple(Site(layer, "resid_out") for layer in range(subject.n_layers)) if at is None else tuple(at)
        read, plus, minus = (_at_end(subject, texts, sites) for texts in (prompts, towards, away))
        found = tuple((site, fit_clusters(read[site], plus[site] - minus[site], k=k, seed=seed)) for site in sites)
        return cls(found, subject.fingerprint, **settings)

    @property
    def acting(self) -> tuple[tuple[Site, Clusters], ...]:
        """The layers whose probe knows something: those that are steered."""
        return tuple((site, clusters) for site, clusters in self.layers if clusters.has_signal(self.margin))

    def evidence(self) -> pd.DataFrame:
        """One row per layer: its clusters, the probe's accuracy on held-out prompts (95 % interval), skipped or not."""
        rows = [
            (site.layer, site.kind, c.k, c.silhouette, float(c.means.norm(dim=1).mean()), c.accuracy, *c.interval)
            for site, c in self.layers
        ]
        table = pd.DataFrame(
            rows, columns=["layer", "kind", "k", "silhouette", "norm", "probe_accuracy", "low", "high"]
        )
        majority = [c.majority for _, c in self.layers]
        return table.assign(majority=majority, skipped=[not c.has_signal(self.margin) for _, c in self.layers])

    def install(self, subject: Subject, undo: ExitStack) -> None:
        self._refuse_misfit(subject)
        for site, c in self.layers:
            if not c.has_signal(self.margin):
                facts = f"probe right on {c.accuracy:.0%}, largest cluster {c.majority:.0%}"
                subject.receipt.notes.append(f"{site} skipped ({facts})")
        on_device = {site: c.moved_to(subject.device) for site, c in self.acting}
        if not on_device:
            return

        def decide(values: Mapping[Site, Tensor]) -> Tensor:
            """(batch, sum of k): how much of each cluster's mean each row gets, layer after layer."""
            shares = [self._shares(c, values[site].flatten(1).to(subject.device)) for site, c in on_device.items()]
            return self.strength * torch.cat(shares, dim=1)

        sites = tuple(on_device)
        reading = subject.read_prompt(sites, decide, undo, edited=sites)
        start = 0
        for site, c in on_device.items():
            columns, start = slice(start, start + c.k), start + c.k

            def edit(value: Tensor, step: Step, means: Tensor = c.means, columns: slice = columns) -> Tensor:
                means = means.to(value.device)  # a model may be spread over devices
                return self._pushed(value, reading.now[:, columns].to(value.device) @ means)

            subject.edit(site, edit, undo, positions=self.positions)

    def _pushed(self, value: Tensor, push: Tensor) -> Tensor:
        """The value (batch, seq, ...) with each row's push (batch, width) added to all of its tokens."""
        flat = value.flatten(2)
        new = flat + push[:, None].to(value.dtype)
        if self.keep_norm and self.strength != 0:  # at strength 0 nothing may change, not even by rounding
            new = new * (flat.norm(dim=-1) / new.norm(dim=-1).clamp_min(torch.finfo(new.dtype).tiny))[..., None]
        return new.reshape(value.shape)

    def refined(
        self, subject: Subject, prompts: Sequence[str], confirmed: Sequence[bool], *, rate: float = REFINEMENT_RATE
    ) -> ClusteredSteer:
        """A new toggle whose probes took one gradient step per confirmed prompt, towards the cluster that they chose.

        confirmed   one per prompt: whether an outside check accepted what was generated under this toggle
        The labels come from the steered model itself, so errors can feed back: keep this toggle, and look at the
        new one's `agreement` with it.
        """
        if len(confirmed) != len(prompts):
            raise ValueError(f"refined: got {len(confirmed)} outcomes for {len(prompts)} prompts, expected one each.")
        self._refuse_while_active(subject)
        kept = [text for text, right in zip(prompts, confirmed, strict=True) if right]
        if not kept:
            return self
        values = _at_end(subject, kept, [site for site, _ in self.layers])
        layers = tuple((s, c.refined(values[s], c.choice(values[s]), rate=rate)) for s, c in self.layers)
        return replace(self, layers=layers)

    def agreement(self, frozen: ClusteredSteer, subject: Subject, prompts: Sequence[str]) -> dict[Site, float]:
        """Share of prompts for which this toggle and a frozen copy choose the same cluster, per layer of both."""
        self._refuse_while_active(subject)
        theirs = dict(frozen.layers)
        values = _at_end(subject, prompts, [site for site, _ in self.layers if site in theirs])
        return {
            site: float((c.choice(values[site]) == theirs[site].choice(values[site])).double().mean())
            for site, c in self.layers
            if site in theirs
        }

    def random_control(self, seed: int = 0) -> ClusteredSteer:
        """The same probes, layers and norms with random orientations: the control for any effect of this toggle."""
        generator = torch.Generator().manual_seed(seed)
        layers = []
        for site, c in self.layers:
            noise = torch.randn(c.means.shape, generator=generator, dtype=torch.float64)
            means = noise / noise.norm(dim=1, keepdim=True) * c.means.norm(dim=1, keepdim=True)
            layers.append((site, replace(c, means=means)))
        return replace(self, layers=tuple(layers), name=f"random, seed {seed}")

    @classmethod
    def examples(cls, subject: Subject) -> tuple[Toggle, ...]:
        first, second = (Site(layer, "resid_out") for layer in (0, subject.n_layers - 2))
        width, name = subject.anatomy.d_model, "random"
        known, unknown = _example_clusters(width, 3, known=True), _example_clusters(width, 2, known=False)
        return (
            cls(((first, known), (second, known)), subject.fingerprint, name),
            cls(((first, unknown), (second, known)), subject.fingerprint, name, 0.5, "hard", "all", keep_norm=True),
        )

    @classmethod
    def neutral(cls, subject: Subject) -> Toggle:
        layer = (Site(0, "resid_out"), _example_clusters(subject.anatomy.d_model, 2, known=True))
        return cls((layer,), strength=0.0, keep_norm=True)

    def __str__(self) -> str:
        where = f"{len(self.acting)} of {len(self.layers)} layers"
        rule = "" if self.positions == "last" else f", {self.positions}"
        return f"ClusteredSteer({self.name or 'clusters'} x {self.strength:g} at {where}{rule})"

    def _shares(self, clusters: Clusters, residual: Tensor) -> Tensor:
        p = clusters.probabilities(residual)
        return p if self.choice == "soft" else torch.nn.functional.one_hot(p.argmax(-1), clusters.k).to(p.dtype)

    def _refuse_misfit(self, subject: Subject) -> None:
        if self.model is not None and self.model != subject.fingerprint:
            raise ValueError(
                f"{self}: was found on model {self.model}, but {subject.name} is {subject.fingerprint}. "
                "Fit it again on this model."
            )
        for site, c in self.layers:
            width = torch.Size(subject.anatomy.width(site)).numel()
            if c.means.shape[1] != width:
                raise ValueError(f"{self}: has {c.means.shape[1]} dims at {site}, {subject.name} has {width}.")

    def _refuse_while_active(self, subject: Subject) -> None:
        if any(isinstance(toggle, ClusteredSteer) for toggle in subject.active):
            raise ValueError(
                "ClusteredSteer: probes read prompts before any push, but a ClusteredSteer acts now. "
                "Leave its `with` block first."
            )


def _at_end(subject: Subject, texts: Sequence[str], sites: Sequence[Site]) -> dict[Site, Tensor]:
    """(text, width) at the last token of each text, in float64."""
    capture = subject.capture(texts, sites, tokens="last", progress=False)
    return {site: capture[site].double().flatten(1) for site in sites}


def _example_clusters(width: int, k: int, *, known: bool) -> Clusters:
    """Random clusters; `known`: as if their probe had named all of 20 held-out prompts rightly, else at chance."""
    noise = torch.randn(2, k, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.arange(20) % k
    predicted = labels if known else labels[torch.arange(20) // 2]
    flat, one = (torch.full((size,), value, dtype=torch.float64) for size, value in ((width, 0.0), (width, 1.0)))
    return Clusters(4.0 * noise[0], noise[1], flat[:k], flat, one, labels, predicted, 0.0)
