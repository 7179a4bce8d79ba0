"""The bench: ratios of planted timings, exponents of planted curves, peers that fail in words, the README's table."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from bench import peers, readme_table, scaling, table
from bench._match import Match, Unavailable, in_words, numbers, rows_of, short, timed
from bench.peers import Peer, PeerProcess
from bench.readme_table import CLOSES, OPENS, README

FACTS = {
    "family": "capture",
    "quick": False,
    "processor": "one",
    "cores": 2,
    "threads": 2,
    "memory_gb": 8.0,
    "torch": "2",
    "commit": "abc",
    "load": 1.0,
    "date": "2026-01-02T00:00:00+00:00",
}


def planted(ours: list[float], theirs: list[float], **settings: object) -> Match:
    """A match whose sides measure what is written down."""
    here, there = iter(ours), iter(theirs)
    sides = (lambda: {"seconds": next(here)}), (lambda: {"seconds": next(there)})
    return Match("the work", "Ours", "theirs", *sides, "peer 1.0", **settings)  # type: ignore[arg-type]


def test_the_ratio_is_taken_round_by_round_so_that_a_slow_round_cancels() -> None:
    row = numbers("seconds", [(1.0, 2.0), (10.0, 20.0), (3.0, 6.0)])
    assert (row["ratio"], row["ratio_low"], row["ratio_high"]) == (2.0, 2.0, 2.0)
    assert (row["here"], row["here_low"], row["here_high"]) == (3.0, 2.0, 6.5)


def test_medians_and_quartiles_are_those_of_planted_rounds_without_the_warm_up() -> None:
    row = rows_of(planted([9, 1, 1, 1, 1, 1], [900, 1, 2, 3, 4, 5]), rounds=5)[0]
    assert (row["ratio_low"], row["ratio"], row["ratio_high"], row["rounds"]) == (2.0, 3.0, 4.0, 5)
    assert rows_of(planted([1, 1], [4, 2], rounds=2, warm=False), rounds=5)[0]["ratio"] == 3.0


def test_exchanging_the_sides_inverts_every_ratio() -> None:
    ours, theirs = [1.0, 2.0, 5.0], [3.0, 1.0, 4.0]
    one = numbers("seconds", list(zip(ours, theirs, strict=True)))
    other = numbers("seconds", list(zip(theirs, ours, strict=True)))
    assert float(str(one["ratio"])) * float(str(other["ratio"])) == pytest.approx(1)  # an odd number of rounds


def test_sides_take_turns() -> None:
    order: list[str] = []
    match = Match("w", "o", "t", timed(lambda: order.append("ours")), timed(lambda: order.append("theirs")))
    rows_of(match, rounds=2)
    assert order == ["ours", "theirs"] * 3


def test_a_run_that_measures_several_things_gives_a_row_for_each() -> None:
    def side() -> dict[str, float]:
        return {"ms": 1.0, "bytes": 2.0}

    assert [row["measure"] for row in rows_of(Match("w", "o", "t", side, side), 1)] == ["ms", "bytes"]


def test_a_side_that_measures_nothing_is_refused_rather_than_divided_by() -> None:
    row = rows_of(planted([0, 0], [1, 1]), rounds=1)[0]
    assert row["failed"] == "ours" and "a ratio needs more than 0" in str(row["note"])


def raising(error: Exception) -> Callable[[], dict[str, float]]:
    def side() -> dict[str, float]:
        raise error

    return side


def test_a_failing_peer_becomes_a_row_in_words_without_a_number() -> None:
    works = timed(lambda: None)
    [row] = rows_of(Match("w", "o", "t", works, raising(Unavailable("t could not be installed: no wheel"))), 2)
    assert row["failed"] == "the peer" and row["note"] == "t could not be installed: no wheel"
    assert not {"here", "there", "ratio"} & set(row)
    [row] = rows_of(Match("w", "o", "t", works, raising(KeyError("x\ny"))), 2)
    assert (row["failed"], row["note"]) == ("the peer", "KeyError: 'x\\ny'")


def test_a_failure_of_ours_or_of_the_check_is_told_apart_from_the_peers() -> None:
    works = timed(lambda: None)
    assert rows_of(Match("w", "o", "t", raising(OSError("disk")), works), 1)[0]["failed"] == "ours"
    wrong = Match("w", "o", "t", works, works, check=lambda: (_ for _ in ()).throw(AssertionError("they differ")))
    assert rows_of(wrong, 1)[0]["failed"] == "the check"
    for error, side in ((TypeError("ours, in the check"), "the check"), (Unavailable("no wheel"), "the peer")):
        assert rows_of(Match("w", "o", "t", works, works, check=raising(error)), 1)[0]["failed"] == side
    assert rows_of(Match("w", "o", "t", raising(AssertionError()), works), 1)[0]["failed"] == "ours"


def test_words_stay_one_short_line() -> None:
    assert len(in_words(ValueError("a" * 500))) == 200 and in_words(ValueError()) == "ValueError: "


def test_numbers_keep_three_digits_or_two_and_a_power_of_ten() -> None:
    assert [short(x) for x in (0.012345, 1.2345, 12.345, 1234.5, 0, 1e-9)] == [
        "0.0123", "1.23", "12.3", "1,234", "0", "1.0e-09",
    ]  # fmt: skip


def test_a_planted_exponent_is_found_exactly() -> None:
    sizes = (10, 100, 1000, 10_000)
    slope, low, high = scaling.exponent(sizes, [3 * size**1.7 for size in sizes])
    assert slope == pytest.approx(1.7, abs=1e-9) and low <= slope <= high and high - low < 1e-6


def test_the_interval_of_an_exponent_holds_the_truth_as_often_as_it_says() -> None:
    rng, sizes = np.random.default_rng(0), (1, 2, 4, 8, 16)
    held = 0
    for noise in rng.normal(0, 0.1, (400, len(sizes))):
        _, low, high = scaling.exponent(sizes, [size**0.5 * np.exp(e) for size, e in zip(sizes, noise, strict=True)])
        held += low <= 0.5 <= high
    assert 0.92 <= held / 400 <= 0.98  # three standard errors of .95 over 400 draws


@pytest.mark.parametrize(("sizes", "values"), [((1, 2), [1.0, 2.0]), ((1, 2, 3), [1.0, 0.0, 2.0])])
def test_an_exponent_of_too_little_is_refused(sizes: tuple[int, ...], values: list[float]) -> None:
    with pytest.raises(ValueError, match="at least 3 of each are needed, all above 0"):
        scaling.exponent(sizes, values)


def test_a_curve_is_measured_told_and_drawn() -> None:
    curve = scaling.Curve("lists, length", "items", (1000, 10_000, 100_000), lambda n: lambda: list(range(n)))
    grown = pd.DataFrame(scaling.measured(curve, curve.sizes, 1))
    assert grown["peak_mb_exponent"].between(0.8, 1.2).all()  # bytes of a list; a few kB stand beside them
    assert "lists, length" in scaling.told(grown)
    layout: Any = scaling.figure_of(grown, "peak_mb").layout
    title = layout.title.text
    assert title.startswith("Memory grows most with lists, length")


def recorded(path: Path) -> pd.DataFrame:
    good = rows_of(planted([1, 1, 1, 1], [8, 1, 2, 3]), rounds=3)
    bad = rows_of(Match("the work", "Ours", "a|b", timed(lambda: None), raising(Unavailable("no wheel"))), 1)
    table.written([FACTS | row for row in good + bad], path)
    return pd.read_parquet(path)


def test_the_readmes_table_renders_from_a_recorded_parquet(tmp_path: Path) -> None:
    lines = readme_table.markdown(recorded(tmp_path / "table.parquet")).splitlines()
    assert lines[2] == "| the work | `Ours`: 1.00 seconds | theirs (peer 1.0) | 2.00 (1.50 to 2.50) |"
    assert lines[3] == "|  | `Ours` | a\\|b | the peer failed: no wheel |"
    assert (
        "one, 2 cores, 2 threads, 8 GB, torch 2, commit abc; 2026-01-02; load" in lines[-1] and "busy" not in lines[-1]
    )


def test_several_measures_of_one_pair_stand_in_one_line_and_bytes_without_a_spread(tmp_path: Path) -> None:
    seconds = iter([1.0, 1.0, 2.0, 3.0])
    sides = (lambda: {"s": 1.0, "MB": 5.0}), (lambda: {"s": next(seconds), "MB": 10.0})
    match = Match("w", "Ours", "t", *sides, "t 1")
    table.written([FACTS | row for row in rows_of(match, rounds=3)], tmp_path / "table.parquet")
    lines = readme_table.markdown(pd.read_parquet(tmp_path / "table.parquet")).splitlines()
    assert lines[2] == "| w | `Ours`: 1.00 s, 5.00 MB | t (t 1) | s 2.00 (1.50 to 2.50), MB 2.00 |"


def test_a_busy_machine_is_said_below_the_table(tmp_path: Path) -> None:
    assert "busy with other work" in readme_table.markdown(recorded(tmp_path / "table.parquet").assign(load=9.0))


def test_families_that_are_not_run_again_keep_their_rows(tmp_path: Path) -> None:
    path = tmp_path / "table.parquet"
    table.written([{"family": "hftp", "here": 1.0}, {"family": "capture", "here": 2.0}], path)
    table.written([{"family": "hftp", "here": 3.0}], path)
    kept = pd.read_parquet(path)
    assert list(kept["family"]) == ["capture", "hftp"] and list(kept["here"]) == [2.0, 3.0]


def test_the_table_is_put_between_its_markers_and_nowhere_else() -> None:
    text = f"before\n{OPENS}\nold\n{CLOSES}\nafter\n"
    assert readme_table.replaced(text, "new") == f"before\n{OPENS}\nnew\n{CLOSES}\nafter\n"
    for wrong in ("nothing", f"{CLOSES}{OPENS}", text + text):
        with pytest.raises(ValueError, match="once each"):
            readme_table.replaced(wrong, "new")


def test_the_readmes_figures_are_those_of_the_parquet() -> None:
    text = README.read_text()
    assert readme_table.replaced(text, readme_table.markdown(pd.read_parquet(table.TABLE))) == text


def test_every_family_of_the_table_is_a_script_with_matches(root: Path) -> None:
    assert all("\ndef matches(quick: bool)" in (root / "bench" / f"{name}.py").read_text() for name in table.FAMILIES)
    assert all((root / "bench" / "peer" / f"{peer.script}.py").exists() for peer in peers.PEERS.values())


def test_a_family_whose_process_ends_early_becomes_a_row_in_words() -> None:
    [row] = table.family("no_such_family", quick=True)
    assert row["failed"] == "ours" and "No module named 'bench.no_such_family'" in str(row["note"])


def test_a_family_that_takes_too_long_is_ended_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "LIMIT_S", 0.01)
    [row] = table.family("capture", quick=True)
    assert row["failed"] == "ours" and str(row["note"]).startswith("the process was ended after 0.01 s")


def test_a_kill_while_the_table_is_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "table.parquet"
    table.written([{"family": "hftp", "here": 1.0}], path)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        table.written([{"family": "hftp", "here": 2.0}], path)
    assert list(pd.read_parquet(path)["here"]) == [1.0] and list(tmp_path.iterdir()) == [path]


@pytest.fixture
def fake_peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, root: Path) -> PeerProcess:
    """A peer that this interpreter answers for: it prints, doubles, fails and leaves."""
    script = tmp_path / "fake.py"
    script.write_text(
        f"import os, sys\nsys.path.insert(0, {str(root / 'bench' / 'peer')!r})\nfrom serve import serve\n"
        "def double(x):\n    print('noise')\n    return lambda: {'seconds': 2 * x}\n"
        "def leave():\n    print('last words', file=sys.stderr)\n    os._exit(3)\n"
        "def long():\n    return lambda: 'a' * 300_000\n"
        "serve(double=double, leave=leave, long=long)\n"
    )
    monkeypatch.setitem(peers.PEERS, "fake", Peer("pip", (), str(script.with_suffix(""))))
    return PeerProcess("fake", make=lambda name, peer: Path(sys.executable))


def test_a_peer_answers_and_what_it_prints_is_no_answer(fake_peer: PeerProcess) -> None:
    with fake_peer as peer:
        assert peer.side("double", x=2)() == {"seconds": 4} and peer.side("double", x=3)() == {"seconds": 6}
        assert len(peer.ask("long")) == 300_000  # more than a pipe holds at once
        with pytest.raises(Unavailable, match="fake: KeyError: 'triple'"):
            peer.ask("triple")
        assert peer.ask("double", x=1) == {"seconds": 2}, "one job that fails spoils no other"


def test_a_peer_that_leaves_says_its_last_words_in_every_row(fake_peer: PeerProcess) -> None:
    with fake_peer as peer:
        for job in ("leave", "double"):
            with pytest.raises(Unavailable, match="fake: its process ended: last words"):
                peer.ask(job)


def test_an_installation_that_fails_gives_its_error_in_words() -> None:
    words = [sys.executable, "-c", "import sys; sys.exit('WARNING: x\\nERROR: no version fits\\nhint')"]
    with pytest.raises(Unavailable, match="fake could not be installed: no version fits"):
        peers.made("fake", words)


def test_an_environment_is_made_once_for_one_interpreter_and_one_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[list[str]] = []

    def made(name: str, words: list[str]) -> None:
        steps.append(words)
        site = tmp_path / "fake" / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
        site.mkdir(parents=True, exist_ok=True)

    monkeypatch.setattr(peers, "made", made)
    for needs in (("a==1",), ("a==1",), ("a==2",)):
        peers.environment("fake", Peer("a", needs, "fake"), tmp_path)
    assert [words[-3] for words in steps if "pip" in words] == ["a==1", "a==2"]
    assert "a==2" in json.loads((tmp_path / "fake" / "made_for.json").read_text())
