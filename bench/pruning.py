"""What a cut is worth in time and bytes: dense, masked and sliced, in turns, medians; a mask is a control, no speed-up.

    python bench/pruning.py

feed-forward   one layer of width d x d_mlp with half of its neurons, chosen at random, at 1 to 512 tokens
model          8 blocks of 512: prompt of 4 x 128 tokens, then 16 tokens; with half of the neurons, half of the
               key/value heads, two blocks, and all three; parameters that act, cache bytes after the prompt, the
               same model exported and loaded again
Where masked / dense leaves [0.9, 1.1], the machine is too noisy for that row and no ratio is printed.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench._match import Match, timed, version_of
from bench._models import realistic_subject
from bench._timing import machine, medians, record
from workbench import Subject
from workbench.cache import cache_bytes
from workbench.pruned import Plan, export
from workbench.pruned.cut import cut_layer
from workbench.pruned.report import parameter_bytes
from workbench.toggles.prune import Prune

WIDTHS = ((256, 704), (512, 1408), (1024, 2816))
TOKENS = (1, 16, 128, 512)
ROUNDS = 15
NOISE = (0.9, 1.1)  # of masked over dense: both do the same work
ROWS, PROMPT, NEW = 4, 128, 16


def layer_subject(d_model: int, d_mlp: int) -> Subject:
    """A random model of one block."""
    config = LlamaConfig(
        vocab_size=100,
        hidden_size=d_model,
        intermediate_size=d_mlp,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    torch.manual_seed(0)
    return Subject(LlamaForCausalLM(config).eval(), Subject.tiny().tokenizer, name=f"{d_model}x{d_mlp}", verify=False)


@torch.no_grad()
def feed_forward_rows() -> list[dict[str, object]]:
    """Dense, masked and sliced by half: the same module, its Parameters swapped before each call and put back after."""
    rows = []
    for d_model, d_mlp in WIDTHS:
        subject = layer_subject(d_model, d_mlp)
        forms = forms_of(subject)
        for tokens in TOKENS:
            x = random_input(subject, tokens)
            repeats = max(1, 64 // tokens)
            found = medians({name: partial(feed, x, *each, repeats) for name, each in forms.items()}, ROUNDS)
            rows.append(told("feed-forward", f"{d_model} x {d_mlp}", tokens, found, repeats))
    return rows


def forms_of(subject: Subject) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """The weights of the feed-forward block: dense, and with half of its neurons by mask and by slice."""
    d_mlp = subject.anatomy.d_mlp or 0
    kept = torch.randperm(d_mlp, generator=torch.Generator().manual_seed(0))[: d_mlp // 2].tolist()
    mlp: Any = subject.model.model.layers[0].mlp
    forms = {"dense": weights_of(mlp)}
    for form in ("mask", "slice"):
        with ExitStack() as undo:
            plan = Plan.of(subject, {0: {"neurons": kept}})
            cut_layer(subject, subject.units[0], plan.at(0), form, undo)
            forms["masked" if form == "mask" else "sliced"] = weights_of(mlp)
    return forms


def random_input(subject: Subject, tokens: int) -> Tensor:
    return torch.randn(1, tokens, subject.anatomy.d_model, generator=torch.Generator().manual_seed(tokens))


def weights_of(mlp: Any) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(getattr(mlp, f"{name}_proj").weight.detach() for name in ("gate", "up", "down"))  # type: ignore[return-value]


def feed(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, repeats: int) -> None:
    for _ in range(repeats):
        linear = torch.nn.functional.linear
        linear(torch.nn.functional.silu(linear(x, gate)) * linear(x, up), down)


def told(what: str, case: str, tokens: int, found: dict[str, float], repeats: int) -> dict[str, object]:
    """One row, printed: milliseconds, and ratios where the control says that they mean something."""
    control = found["masked"] / found["dense"]
    quiet = NOISE[0] <= control <= NOISE[1]
    gain = found["dense"] / found["sliced"] if quiet else float("nan")
    ms = {name: 1e3 * seconds / repeats for name, seconds in found.items()}
    said = f"{gain:5.2f} x as fast" if quiet else "too noisy to compare"
    print(
        f"{what:<13}{case:<22}{tokens:>5} tokens  dense {ms['dense']:8.3f} ms  masked/dense {control:4.2f}"
        f"  sliced {ms['sliced']:8.3f} ms  {said}"
    )
    row: dict[str, object] = {"what": what, "case": case, "tokens": tokens, "masked_over_dense": control, "times": gain}
    return row | {f"{name}_ms": value for name, value in ms.items()}


@torch.no_grad()
def read(subject: Subject, ids: Tensor) -> Any:
    return subject.model(input_ids=ids, use_cache=True, logits_to_keep=1)


@torch.no_grad()
def write(subject: Subject, ids: Tensor) -> None:
    output = read(subject, ids)
    for _ in range(NEW):
        chosen = output.logits[:, -1:].argmax(-1)
        output = subject.model(input_ids=chosen, past_key_values=output.past_key_values, use_cache=True)


def model_rows() -> list[dict[str, object]]:
    """A whole model, pruned by its toggle and as the folder that is loaded again."""
    subject = realistic_subject()
    ids = prompt_of(ROWS)
    rows = []
    for name, plan in plans(subject).items():
        with tempfile.TemporaryDirectory() as folder, subject.under(Prune(plan)):
            cache = cache_bytes(read(subject, ids).past_key_values)
            held = parameter_bytes(subject)
            loaded = exported(subject, Path(folder))
        whole = cache_bytes(read(subject, ids).past_key_values)

        def under(form: Any, run: Callable[[Subject, Tensor], Any], plan: Plan = plan) -> None:
            with subject.under(Prune(plan, form)):
                run(subject, ids)

        masked = Plan(plan.shape, plan.layers)  # a dropped block can't be masked
        seconds = {}
        for what, run in (("prompt", read), ("and 16 tokens", write)):
            rivals: dict[str, Callable[[], object]] = {
                "dense": partial(run, subject, ids),
                "masked": partial(under, "mask", run, masked),
                "sliced": partial(run, loaded, ids),
                "toggled": partial(under, "slice", run),
            }
            seconds[what] = medians(rivals, 5)
            row = told(what, name, ROWS * PROMPT, seconds[what], 1)
            row |= {"parameter_bytes": held, "dense_parameter_bytes": parameter_bytes(subject)}
            rows.append(row | {"cache_bytes": cache, "dense_cache_bytes": whole})
        prompt, all_of_it = seconds["prompt"], seconds["and 16 tokens"]
        speed = {form: ROWS * NEW / (all_of_it[form] - prompt[form]) for form in ("dense", "sliced")}
        rows[-1] |= {f"{form}_tokens_per_second": value for form, value in speed.items()}
        print(
            f"{'':<13}{name:<22} parameters {held / parameter_bytes(subject):.2f}, cache {cache / whole:.2f} of dense; "
            f"{speed['dense']:.0f} -> {speed['sliced']:.0f} tokens per second after the prompt"
        )
    return rows


def plans(subject: Subject) -> dict[str, Plan]:
    a = subject.anatomy
    neurons = {"neurons": range(0, a.d_mlp or 0, 2)}
    groups = {"kv_heads": range(a.n_kv_heads // 2)}
    every = range(a.n_layers)
    return {
        "half of the neurons": Plan.of(subject, dict.fromkeys(every, neurons)),
        "half of the kv heads": Plan.of(subject, dict.fromkeys(every, groups)),
        "two of 8 blocks": Plan.of(subject, drop=[3, 4]),
        "all three": Plan.of(subject, dict.fromkeys(every, neurons | groups), drop=[3, 4]),
    }


def prompt_of(rows: int) -> Tensor:
    return torch.randint(5, 1200, (rows, PROMPT), generator=torch.Generator().manual_seed(0))


def exported(subject: Subject, folder: Path) -> Subject:
    """The pruned model as a folder that is loaded again."""
    export(subject, folder / "small")
    return Subject.load(folder / "small", verify=False)


def matches(quick: bool) -> Iterator[Match]:
    """The rows of the table, on one thread; dense is the peer."""
    torch.set_num_threads(1)  # see main
    subject = layer_subject(*WIDTHS[0 if quick else -1])
    forms = forms_of(subject)
    case, version = f"{subject.anatomy.d_model} x {subject.anatomy.d_mlp}", f"{version_of('torch')}, 1 thread"
    for tokens in (1, 128):
        x, repeats = random_input(subject, tokens), max(1, 64 // tokens)
        sliced, dense = (timed(partial(feed, x, *forms[form], repeats), 1 / repeats) for form in ("sliced", "dense"))
        what = f"pruning: one feed-forward block of {case}, half of its neurons, {tokens} tokens"
        yield Match(what, "Prune, sliced", "dense", sliced, dense, version, rounds=ROUNDS)
    whole, ids = realistic_subject(), prompt_of(1 if quick else ROWS)
    with tempfile.TemporaryDirectory() as folder, whole.under(Prune(plans(whole)["all three"])):
        small = exported(whole, Path(folder))
    sliced, dense = (timed(partial(write, one, ids)) for one in (small, whole))
    cut = "8 blocks of 512, half of the neurons and key/value heads, 2 blocks left out"
    what = f"pruning: {cut}: {ids.numel()} tokens, {NEW} more"
    yield Match(what, "Prune, exported, loaded", "dense", sliced, dense, version)


def main() -> None:
    torch.set_num_threads(1)  # several that share a busy machine wait for each other and hide every difference
    print(f"{torch.get_num_threads()} thread on {machine()['cores']} cores; sliced: the exported model, loaded again")
    record("pruning", feed_forward_rows() + model_rows())


if __name__ == "__main__":
    main()
