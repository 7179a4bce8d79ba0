"""Position rules: functions of the logical position alone, whatever columns and padding there are."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from workbench.step import Step, check_positions, read_step

CPU = torch.device("cpu")


def step_of(lengths: list[int], prompt_lengths: list[int] | None = None) -> Step:
    """A whole left-padded batch in one forward."""
    width = max(lengths)
    mask = torch.tensor([[0] * (width - length) + [1] * length for length in lengths])
    prompts = None if prompt_lengths is None else torch.tensor(prompt_lengths)
    return read_step(
        (len(lengths), width), past=0, attention_mask=mask, position_ids=None, prompt_lengths=prompts, device=CPU
    )


def test_positions_count_real_tokens_from_zero() -> None:
    step = step_of([2, 4])
    assert step.positions.tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]
    assert step.real.tolist() == [[False, False, True, True], [True] * 4]
    assert step.prompt_lengths.tolist() == [2, 4]


def test_each_rule_names_its_tokens() -> None:
    step = step_of([3, 5], [2, 3])
    assert step.where("all").sum().item() == 8
    assert step.where("prompt").tolist() == [[False, False, True, True, False], [True, True, True, False, False]]
    assert step.where("generated").tolist() == [[False] * 4 + [True], [False] * 3 + [True] * 2]
    assert step.where("last").tolist() == [[False] * 3 + [True] * 2, [False] * 2 + [True] * 3]
    assert step.where([0, 2]).tolist() == [[False, False, True, False, True], [True, False, True, False, False]]


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 5)), min_size=1, max_size=4), st.data())
def test_a_cached_forward_sees_the_same_tokens_as_a_whole_one(rows: list[tuple[int, int]], data: st.DataObject) -> None:
    prompts, extra = [row[0] for row in rows], max(row[1] for row in rows)
    lengths = [prompt + extra for prompt in prompts]
    whole = step_of(lengths, prompts)
    width, cut = max(lengths), data.draw(st.integers(1, max(lengths)))
    mask = torch.tensor([[0] * (width - length) + [1] * length for length in lengths])
    parts = []
    for low, high in ((0, cut), (cut, width)):
        if low < high:
            parts.append(
                read_step(
                    (len(rows), high - low),
                    past=low,
                    attention_mask=mask[:, :high],
                    position_ids=None,
                    prompt_lengths=torch.tensor(prompts),
                    device=CPU,
                )
            )
    for rule in ("all", "prompt", "generated", "last", [0, 3]):
        assert torch.equal(torch.cat([part.where(rule) for part in parts], dim=1), whole.where(rule))


def test_given_position_ids_win() -> None:
    ids = torch.tensor([[7, 8, 9]])
    step = read_step(
        (1, 3), past=3, attention_mask=None, position_ids=ids, prompt_lengths=torch.tensor([9]), device=CPU
    )
    assert step.where("prompt").tolist() == [[True, True, False]]


@pytest.mark.parametrize("rule", ["first", "", [], [-1], [True], [1.5]])
def test_a_wrong_rule_is_refused(rule: object) -> None:
    with pytest.raises(ValueError, match="positions: got"):
        check_positions(rule)  # type: ignore[arg-type]
