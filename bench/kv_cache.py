"""Key/value caches: bytes, prefill and time per token against transformers' own, plain and quantised, in one run.

A random-weight llama of realistic heads; QuantizedCache runs with the backends that are importable (install
optimum-quanto and hqq beside the project, never into it). A time per token is the median of steps that pack nothing:
that QuantizedCache packs its whole cache again every 128 tokens is not in it.
Run: python bench/kv_cache.py [TOKENS ...]    (512 and 4096 by default; 16384 takes minutes)
"""

from __future__ import annotations

import importlib.util
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import Cache, DynamicCache, QuantizedCache

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench._match import Match, Side, version_of
from bench._timing import machine, record
from bench.peers import PeerProcess
from workbench import Subject
from workbench.cache.layer import KVLayer
from workbench.cache.packed import Format, PackStore
from workbench.cache.stages import Stages
from workbench.organism.tiny import tiny_pair
from workbench.step import Step
from workbench.toggle import Toggle
from workbench.toggles.evict import EvictKV
from workbench.toggles.quantize import QuantizeKV

LENGTHS, NEW = (512, 4096), 32
HEADS, KV_HEADS, D_HEAD, LAYERS = 16, 8, 128, 2
RIVALS: dict[str, Toggle | str | None] = {
    "DynamicCache": None,
    "QuantizeKV, 4 bits": QuantizeKV(4, 4),
    "EvictKV, a quarter": EvictKV(0.25, "snapkv"),
    "QuantizedCache, quanto, 4 bits": "quanto",
    "QuantizedCache, hqq, 4 bits": "hqq",
}
MODULES = {"quanto": "optimum.quanto", "hqq": "hqq"}


def matches(quick: bool) -> Iterator[Match]:
    """The rows of the table: three measures of each run."""
    lengths = LENGTHS[:1] if quick else LENGTHS
    subject = wide_subject(max(lengths) + NEW)
    for tokens in lengths:
        what = f"cache: {tokens:,} tokens, then {NEW}; {LAYERS} layers of {KV_HEADS} key/value heads of {D_HEAD}"
        plain = side(subject, None, tokens)
        rounds = None if tokens <= 1024 else 3
        version = version_of("transformers")
        for name in ("QuantizeKV, 4 bits", "EvictKV, a quarter"):
            yield Match(what, name, "DynamicCache", side(subject, RIVALS[name], tokens), plain, version, rounds=rounds)
        ours = side(subject, RIVALS["QuantizeKV, 4 bits"], tokens)
        for name in ("QuantizedCache, quanto, 4 bits", "QuantizedCache, hqq, 4 bits"):
            backend = str(RIVALS[name])
            with PeerProcess(backend) as peer:
                theirs = peer.side("run", backend=backend, tokens=tokens, context=max(lengths) + NEW)
                yield Match(what, "QuantizeKV, 4 bits", name, ours, theirs, peer.version, rounds=rounds)


def side(subject: Subject, what: Toggle | str | None, tokens: int) -> Side:
    """A side that is measured in milliseconds before and during decoding, and in bytes after it."""
    prompt = random_prompt(subject, tokens)
    names = "prefill ms", "ms per token", "MB held"

    def measured() -> dict[str, float]:
        prefill, decode, held = one_run(subject, what, prompt)
        return dict(zip(names, (prefill, decode, held / 1e6), strict=True))

    return measured


def random_prompt(subject: Subject, tokens: int) -> Tensor:
    return torch.randint(8, subject.anatomy.vocab, (1, tokens), generator=torch.Generator().manual_seed(tokens))


def main() -> None:
    lengths = [int(word) for word in sys.argv[1:]] or list(LENGTHS)
    subject = wide_subject(max(lengths) + NEW)
    rivals = {name: what for name, what in RIVALS.items() if not isinstance(what, str) or installed(what)}
    for name in RIVALS.keys() - rivals.keys():
        print(f"left out, as its backend is not installed: {name}")
    print(f"{LAYERS} layers, {HEADS} heads on {KV_HEADS} key/value heads of {D_HEAD}, float32; {machine()}\n")
    rows = [row for tokens in lengths for row in compared(subject, rivals, tokens)]
    print("\ntime to append one token to one layer, attention left out")
    for tokens in (1024, 2048, 4096, 8192, 16384):
        cost = append_us(tokens)
        rows.append({"what": "append", "tokens": tokens, "us_per_token": cost})
        print(f"{tokens:7d} tokens held {cost:9.1f} µs")
    print(f"written to {record('kv_cache', rows)}")


def compared(subject: Subject, rivals: dict[str, Toggle | str | None], tokens: int) -> Iterator[dict[str, object]]:
    """One row per rival at one prompt length; in every round each rival runs once."""
    prompt = random_prompt(subject, tokens)
    found: dict[str, list[tuple[float, float, int]]] = {name: [] for name in rivals}
    rounds = 6 if tokens <= 1024 else 4 if tokens <= 4096 else 2  # the first warms up
    for turn in range(rounds):
        for name, what in rivals.items():
            measured = one_run(subject, what, prompt if turn else prompt[:, :512])
            if turn:
                found[name].append(measured)
    medians = {name: [statistics.median(column) for column in zip(*runs, strict=True)] for name, runs in found.items()}
    plain = medians["DynamicCache"]
    for name, (prefill, decode, held) in medians.items():
        print(
            f"{tokens:6d}  {name:31s} {held / 2**20:8.2f} MiB ({held / plain[2]:5.3f})   prefill {prefill:9.1f} ms "
            f"({prefill / plain[0]:5.2f})   {decode:8.2f} ms per token ({decode / plain[1]:5.2f})"
        )
        yield {"what": name, "tokens": tokens, "bytes": held, "prefill_ms": prefill, "decode_ms_per_token": decode}


@torch.no_grad()
def one_run(subject: Subject, what: Toggle | str | None, prompt: Tensor) -> tuple[float, float, int]:
    """(prefill ms, ms per token, bytes after the last token)."""
    with subject.under(what) if isinstance(what, Toggle) else nullcontext():
        cache = None if isinstance(what, Toggle) else made_by_transformers(subject, what)
        start = time.perf_counter()
        output = subject.model(input_ids=prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
        middle = time.perf_counter()
        each = []
        for _ in range(NEW):
            chosen, begun = output.logits[:, -1:].argmax(-1), time.perf_counter()
            output = subject.model(input_ids=chosen, past_key_values=output.past_key_values, use_cache=True)
            each.append(time.perf_counter() - begun)
        held = stored_bytes(output.past_key_values)
    return 1e3 * (middle - start), 1e3 * statistics.median(each), held


def made_by_transformers(subject: Subject, backend: str | None) -> Cache:
    config = subject.model.config
    if backend is None:
        return DynamicCache(config=config)
    axis = 1 if backend == "hqq" else 0  # what each backend takes for contiguous groups
    return QuantizedCache(backend, config, nbits=4, axis_key=axis, axis_value=axis, q_group_size=64)


def stored_bytes(what: Any) -> int:
    """Bytes of every distinct storage behind a cache, those inside quanto's and hqq's own objects included."""
    storages: dict[int, int] = {}
    seen: set[int] = set()
    waiting = [layer for layer in what.layers]
    while waiting:
        item = waiting.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        inner = getattr(item, "__tensor_flatten__", None)  # a tensor made of others
        if inner is not None:
            waiting += [getattr(item, name) for name in inner()[0]]
        elif isinstance(item, Tensor):
            storages[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
        elif isinstance(item, dict):
            waiting += item.values()
        elif isinstance(item, list | tuple):
            waiting += item
        elif isinstance(item, Stages):
            continue  # shared by all layers, and no token's
        elif type(item).__module__.startswith(("workbench.cache", "transformers.cache_utils")):
            waiting += vars(item).values()
    return sum(storages.values())


@torch.no_grad()
def append_us(tokens: int, appended: int = 1024) -> float:
    """Mean microseconds per token of appending and packing, from `tokens` held to `appended` more."""
    store = PackStore((Format(4, 4),), residual=128, sinks=4)
    layer = KVLayer(0, Stages(store=store), lambda: None)
    layer.stages.acted = lambda *_: None  # type: ignore[method-assign]  # no toggle acts here: no receipt to fill in
    made = torch.randn(1, KV_HEADS, tokens, D_HEAD)
    step = one_row(0, tokens)
    layer.recent.append((made, made), step.positions, step.real)
    store.pack(layer)
    one = torch.randn(1, KV_HEADS, 1, D_HEAD)
    start = time.perf_counter()
    for number in range(appended):
        step = one_row(tokens + number, 1)
        layer.recent.append((one, one), step.positions, step.real)
        store.pack(layer)
    return 1e6 * (time.perf_counter() - start) / appended


def one_row(first: int, count: int) -> Step:
    positions = torch.arange(first, first + count)[None]
    return Step(positions, torch.ones_like(positions, dtype=torch.bool), torch.tensor([first + count]))


def wide_subject(context: int) -> Subject:
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=D_HEAD,
        vocab_size=1024,
        max_position_embeddings=context,
    )
    torch.manual_seed(0)
    return Subject(LlamaForCausalLM(config).eval(), tiny_pair("llama")[1], name="wide random llama", verify=False)


def installed(backend: str) -> bool:
    try:
        return importlib.util.find_spec(MODULES[backend]) is not None
    except ModuleNotFoundError:
        return False


if __name__ == "__main__":
    main()
