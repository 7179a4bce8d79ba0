"""Is a pruned model faster? Whole, masked and sliced take turns; a mask costs what the whole does, and is the control.

speed-up = median time of the whole / median time sliced. Where masked / whole leaves 0.9 to 1.1 the machine is too
noisy to tell, and nothing is compared; a mask is never reported as a speed-up. Source: own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch

from workbench.cache import cache_bytes
from workbench.clock import read_clock
from workbench.pruned.report import parameter_bytes
from workbench.toggle import Composed

if TYPE_CHECKING:
    from workbench.subject import Subject
    from workbench.toggle import Toggle

WITHIN = (0.9, 1.1)  # of the control
COLUMNS = (
    "form", "prefill_ms", "decode_ms", "decode_low", "decode_high", "tokens_per_second", "parameter_bytes",
    "kv_bytes_per_token", "prefill_speed_up", "decode_speed_up", "verdict",
)  # fmt: skip


def timed(
    subject: Subject,
    *,
    sliced: Toggle,
    masked: Toggle,
    prompt_tokens: int = 128,
    new_tokens: int = 8,
    repeats: int = 20,
) -> pd.DataFrame:
    """One row per form, dense, masked and sliced: median ms of a prompt and per new token with its quartiles, bytes.

    One prompt of `prompt_tokens`, then `new_tokens` greedy tokens; one round warms up. Bytes are of the parameters that
    act: the originals wait in memory meanwhile. Speed-ups are NaN but for the slice, and there where it is too noisy.
    """
    if min(prompt_tokens, new_tokens, repeats) < 1:
        raise ValueError(
            f"timed: got prompt_tokens={prompt_tokens}, new_tokens={new_tokens}, repeats={repeats}, "
            "expected at least 1 of each."
        )
    forms = {"dense": Composed(), "masked": masked, "sliced": sliced}
    ids = torch.arange(prompt_tokens, device=subject.device)[None] % subject.anatomy.vocab
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in forms}
    held: dict[str, tuple[int, float]] = {}
    for _ in range(repeats + 1):
        for name, toggle in forms.items():
            with subject.under(toggle):
                *seconds, cached = _once(subject, ids, new_tokens)
                times[name].append((seconds[0], seconds[1]))
                held[name] = parameter_bytes(subject), cached
    medians = {name: np.median(np.array(rounds[1:]), axis=0) for name, rounds in times.items()}
    rows = []
    for name, rounds in times.items():
        low, high = np.quantile([decode for _, decode in rounds[1:]], (0.25, 0.75))
        prefill, decode = medians[name]
        ratios, verdict = _ratios(medians, name)
        rows.append((name, *(1e3 * t for t in (prefill, decode, low, high)), 1 / decode, *held[name], *ratios, verdict))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def too_noisy(seconds: Mapping[str, float]) -> str:
    """Why times of dense, masked and sliced can't be compared; "" where they can."""
    control = seconds["masked"] / seconds["dense"]
    if WITHIN[0] <= control <= WITHIN[1]:
        return ""
    return f"too noisy to compare: the mask, which costs the same, took {control:.2f} times as long"


def _ratios(medians: Mapping[str, np.ndarray], name: str) -> tuple[list[float], str]:
    """(prefill, decode) speed-ups of a form, NaN where there is none to tell of, and why."""
    if name != "sliced":
        return [float("nan")] * 2, "the control: a mask saves nothing" if name == "masked" else ""
    ratios, reasons = [], []
    for part, what in enumerate(("prompt", "new tokens")):
        seconds = {form: float(pair[part]) for form, pair in medians.items()}
        reason = too_noisy(seconds)
        ratios.append(float("nan") if reason else seconds["dense"] / seconds["sliced"])
        reasons += [f"{what}: {reason}"] if reason else []
    return ratios, "; ".join(reasons)


@torch.no_grad()
def _once(subject: Subject, ids: torch.Tensor, new_tokens: int) -> tuple[float, float, float]:
    """Seconds of the prompt, seconds per greedy token after it, and bytes per token of the cache."""
    start = read_clock(ids)
    output = subject.model(input_ids=ids, use_cache=True)
    middle = read_clock(ids)
    for _ in range(new_tokens):
        chosen = output.logits[:, -1:].argmax(-1)
        output = subject.model(input_ids=chosen, past_key_values=output.past_key_values, use_cache=True)
    end = read_clock(ids)
    held = cache_bytes(output.past_key_values) / (ids.shape[1] + new_tokens)
    return middle - start, (end - middle) / new_tokens, held
