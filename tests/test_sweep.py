"""Sweeps without processes: the loop and its retries, what is known before, progress, records, refusals."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench import cli
from workbench.files import write_json
from workbench.grid import axes_of
from workbench.keys import package_digest
from workbench.leases import lease
from workbench.run import plan
from workbench.sweep import Where, clusters, loop, make, survey
from workbench.sweep.gpus import VARIABLE, one_gpu, visible_gpus
from workbench.sweep.loop import Driven
from workbench.sweep.outlook import duration
from workbench.sweep.page import failure_groups, page
from workbench.sweep.progress import Progress, label, time_to_go
from workbench.sweep.record import Writer
from workbench.sweep.task import INFRASTRUCTURE, Outcome, Task

ENDINGS = [*sorted(INFRASTRUCTURE), "cell failed", "out of time", "done"]


def task(key: str) -> Task:
    return Task("a.ipynb", "{}", ".", {"seed": int(key)}, key, f"workbench run a.ipynb -p seed={key}", "runs")


class Simulated:
    """Workers that end a task when all places are busy or when they are looked at; `endings` are used up in turn."""

    refresh = staticmethod(lambda: None)
    patience_s = 5.0

    def __init__(self, places: dict[str, int], endings: dict[str, list[str]], most: int | None = None) -> None:
        self.free, self.endings, self.most = places, endings, most
        self.at_work: list[tuple[str, str, Callable[[], None]]] = []
        self.started: list[str] = []
        self.busiest: dict[str, int] = {}
        self.n_interruptions = 0

    def places(self) -> dict[str, int]:
        self.end(len(self.at_work))
        return dict(self.free)

    def start(self, place: str, task: Task, done: Callable[[Any], Any]) -> Any:
        endings = self.endings.get(task.key, [])
        ending = endings.pop(0) if endings else "done"
        outcome = Outcome(task.key, ending, made=True, seconds=1.0)
        if ending not in ("done", "held", "interrupted"):
            outcome = Outcome.failure(task.key, ending, "why")
        ticket = Ticket(outcome)
        self.started.append(task.key)
        self.at_work.append((task.key, place, lambda: done(ticket)))
        busy = [where for _, where, _ in self.at_work].count(place)
        self.busiest[place] = max(busy, self.busiest.get(place, 0))
        if len(self.at_work) >= min(sum(self.free.values()), self.most or 1000):
            self.end(1)
        return ticket

    def end(self, number: int) -> None:
        for _ in range(number):
            self.at_work.pop(0)[2]()

    def interrupt(self) -> None:
        self.n_interruptions += 1


class Ticket:
    def __init__(self, outcome: Outcome) -> None:
        self.value = outcome

    def outcome(self) -> Outcome:
        return self.value

    def lost(self) -> None:
        raise AssertionError("no worker is lost here")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(loop, "TICK_S", 0.002)


def driven(workers: Any, keys: Any, retries: int = 2, stream: Any = None) -> Driven:
    progress = Progress(len(keys), stream or io.StringIO(), live=False)
    result = loop.drive([task(key) for key in keys], workers, progress, retries)
    progress.close()
    return result


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.lists(st.sampled_from(ENDINGS), max_size=5), max_size=12),
    st.dictionaries(st.sampled_from("abc"), st.integers(1, 2), min_size=1),
    st.integers(0, 3),
    st.none() | st.integers(1, 3),
)
def test_every_task_gets_one_outcome_and_only_machines_get_another_chance(endings, places, retries, most):
    keys = [str(n) for n in range(len(endings))]
    workers = Simulated(places, {key: list(ends) for key, ends in zip(keys, endings, strict=True)}, most)
    result = driven(workers, keys, retries)
    assert set(result.outcomes) == set(keys) and not result.interrupted
    for key, ends in zip(keys, endings, strict=True):
        tries = [*ends, "done", "done", "done", "done"][: retries + 1]
        n_tries = next((n for n, end in enumerate(tries, 1) if end not in INFRASTRUCTURE), retries + 1)
        assert workers.started.count(key) == result.attempts[key] == n_tries
        assert (result.outcomes[key].kind or result.outcomes[key].status) == tries[n_tries - 1]
    assert all(busiest <= places[place] for place, busiest in workers.busiest.items())


def test_a_run_that_is_tried_again_comes_after_the_others():
    workers = Simulated({"a": 1}, {"0": ["kernel died"]})
    driven(workers, "0123")
    assert workers.started == ["0", "1", "2", "3", "0"]


def test_a_run_that_another_process_has_at_work_is_waited_for_last_and_costs_no_attempt():
    workers = Simulated({"a": 1}, {"0": ["held", "done"]})
    result = driven(workers, "012")
    assert workers.started == ["0", "1", "2", "0"] and result.attempts["0"] == 1


def test_the_run_of_a_worker_that_is_gone_is_made_elsewhere():
    class Fleeting(Simulated):
        def places(self) -> dict[str, int]:
            if self.started:
                self.free = {"b": 1}
            return dict(self.free)

        def start(self, place: str, task: Task, done: Callable[[Any], Any]) -> Any:
            self.started.append(place)
            if place == "b":
                return super().start(place, task, done)
            lost = Ticket(Outcome.failure(task.key, "worker lost", "gone"))
            lost.lost = lambda: done(lost)  # type: ignore[method-assign]
            return lost

    workers = Fleeting({"a": 1}, {})
    result = driven(workers, "0")
    assert workers.started == ["a", "b", "0"] and result.outcomes["0"].status == "done" and result.attempts["0"] == 2


def test_without_any_worker_for_too_long_the_sweep_ends_in_words():
    workers = Simulated({}, {})
    workers.patience_s = 0.01
    result = driven(workers, "0")
    assert not result.outcomes and "no worker was there for 0.01 s. The same command resumes" in str(result.trouble)


class Interrupting(Simulated):
    """Workers whose third task comes with a Ctrl-C; they end runs when told to, unless they are stubborn."""

    stubborn = False

    def places(self) -> dict[str, int]:
        return dict(self.free)

    def start(self, place: str, task: Task, done: Callable[[Any], Any]) -> Any:
        if len(self.started) == 2:
            signal.raise_signal(signal.SIGINT)
        return super().start(place, task, done)

    def interrupt(self) -> None:
        super().interrupt()
        if not self.stubborn:
            self.end(len(self.at_work))
        elif self.n_interruptions == 1:
            signal.raise_signal(signal.SIGTERM)


def test_ctrl_c_starts_nothing_more_and_takes_in_what_ends():
    before = signal.getsignal(signal.SIGINT)  # a shell may have started this to ignore it
    workers = Interrupting({"a": 3}, {key: ["interrupted"] for key in "012"})
    stream = io.StringIO()
    result = driven(workers, "012345", stream=stream)
    assert result.interrupted and workers.n_interruptions == 1 and workers.started == ["0", "1", "2"]
    assert {outcome.status for outcome in result.outcomes.values()} == {"interrupted"}
    assert "interrupted: nothing new is started" in stream.getvalue()
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_waits_for_nobody():
    workers = Interrupting({"a": 7}, {})
    workers.stubborn = True
    result = driven(workers, "012345")
    assert result.interrupted and workers.n_interruptions == 2 and not result.outcomes


@pytest.mark.parametrize("ending", ["worker lost", "kernel died", "held"])
def test_what_falls_to_the_interruption_is_no_failure_and_is_not_started_again(ending):
    workers = Interrupting({"a": 3}, {key: [ending] for key in "012"})
    result = driven(workers, "012345")
    assert {outcome.status for outcome in result.outcomes.values()} == {"interrupted"} and len(workers.started) == 3


def test_a_run_that_someone_else_interrupts_is_made_again():
    result = driven(Simulated({"a": 1}, {"0": ["interrupted"]}), "0")
    assert result.outcomes["0"].status == "done" and result.attempts["0"] == 2 and not result.interrupted


def test_tasks_and_outcomes_travel_as_one_line():
    sent = Task(
        "a b.ipynb", "line\nline ≥", "/x", {"x": float("inf"), "s": 'a"\n', "n": None, "b": True}, "k", "c", "r"
    )
    assert Task.from_json(sent.to_json()) == sent and "\n" not in sent.to_json()
    failed = Outcome.failure("k", "kernel died", "a", "b")
    assert Outcome.from_json(failed.to_json()) == failed and failed.kind == "kernel died"


@pytest.fixture
def tiny(tmp_path, write_notebook) -> Path:
    return write_notebook(tmp_path / "tiny.ipynb", "1", params="seed: int = 0\nkeep: float = 1.0")


def pretend(notebook: Path, runs: Path, params: dict[str, Any], **manifest: Any) -> str:
    """A run on disk that never ran; its key."""
    run = plan(notebook, params, runs=runs).run
    run.folder.mkdir(parents=True)
    write_json(run.folder / "manifest.json", {"started": "2026-01-01T00:00:00+00:00"} | manifest)
    return run.key


def test_a_survey_knows_what_is_cached_and_left_and_how_long_a_run_takes(tmp_path, tiny):
    runs = tmp_path / "runs"
    for seed, spent in [(0, 10.0), (1, 20.0), (99, 40.0)]:
        pretend(tiny, runs, {"seed": seed}, status="done", seconds=spent)
    pretend(tiny, runs, {"seed": 2}, status="failed", error={"kind": "cell failed", "lines": []}, seconds=1.0)
    pretend(tiny, runs, {"seed": 3}, status="running", pid=1, host="gone")
    busy = pretend(tiny, runs, {"seed": 4}, status="running")
    with lease(runs / "tiny" / busy):
        known = survey(tiny, [axes_of(["seed=4,0..5,5"])], runs)
    assert (known.count("cached"), known.count("left"), known.n_folded, known.median_s) == (2, 3, 2, 20.0)
    assert [known.given[n]["seed"] for n in known.to_make] == [2, 3, 5, 4], "what goes on elsewhere comes last"
    text = "\n".join(known.lines(at_once=2))
    assert f"elsewhere   1 at work now: process {os.getpid()} on " in text
    assert "tiny.ipynb: 6 runs (2 named more than once)" in text and "seed        4, 0, 1, 2, 3, 5" in text
    assert "left        3 (1 failed before, 1 lost before)" in text
    assert "about 40 s with 2 at a time; a run takes 20 s, the median of 3 past runs" in text


def test_without_past_runs_the_time_is_said_to_be_unknown(tmp_path, tiny):
    lines = survey(tiny, [{}], tmp_path / "runs").lines(at_once=1)
    assert lines[-1] == "time        not known: no run of this notebook has finished yet"
    assert not (tmp_path / "runs").exists(), "a survey writes nothing"


def test_a_sweep_with_everything_there_starts_nothing_and_shows_itself(tmp_path, tiny, monkeypatch):
    runs = tmp_path / "runs"
    for seed in (0, 1):
        pretend(tiny, runs, {"seed": seed}, status="done", seconds=2.0)
    monkeypatch.setitem(make.__globals__, "opened", None)  # what starts workers
    made = make(survey(tiny, [{"seed": [0, 1]}], runs), Where(), command="workbench sweep tiny.ipynb")
    assert made.status == "done" and [run.params or run.status for run in made.runs] == ["done", "done"]
    assert made.table()["seed"].tolist() == [0, 1] and made.table()["cached"].all()
    assert "2 of 2 runs done" in repr(made) and "<table" in made._repr_html_() and made.page.exists()


def ended(tmp_path: Path, tiny: Path, outcomes: Callable[[str, int], Outcome | None], interrupted: bool = False) -> Any:
    """The record of a sweep of six runs with these outcomes."""
    known = survey(tiny, [{"seed": range(6)}], tmp_path / "runs")
    keys = [planned.run.key for planned in known.plans]
    found = {key: outcome for n, key in enumerate(keys) if (outcome := outcomes(key, n)) is not None}
    return Writer(known, "workbench sweep 'a b.ipynb'").ended(Driven(found, dict.fromkeys(keys, 1), interrupted))


def failing(key: str, n: int) -> Outcome:
    if n == 5:
        return Outcome(key, "done", True, 3.0, None, ["It's <b>found</b>"])
    error = {
        "kind": "cell failed",
        "cell": 3,
        "source": "assert x",
        "lines": ["Traceback", f"AssertionError: {n}.5 <i>"],
    }
    return Outcome(key, "failed", True, 1.0, error | ({"cell": 4} if n == 4 else {}))


def test_identical_failures_are_one_group_with_the_command_of_each(tmp_path, tiny):
    made = ended(tmp_path, tiny, failing)
    groups = failure_groups(made.facts["runs"])
    assert made.status == "failed" and [len(group) for group in groups] == [4, 1]
    text = made.page.read_text()
    assert "4 runs: cell failed in cell 3" in text and "1 run: cell failed in cell 4" in text
    assert all(text.count(f"-p seed={n}\n") + text.count(f"-p seed={n}<") == 1 for n in range(5))
    assert "<i>" not in text and "&lt;i&gt;" in text and "It&#x27;s &lt;b&gt;found" in text
    assert "4 x cell failed" in made._repr_html_()


def test_the_page_fetches_and_runs_nothing(tmp_path, tiny):
    tags: list[str] = []

    class Tags(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            tags.append(tag)
            assert not {name for name, _ in attrs} & {"src", "href", "onclick", "onload"}

    Tags().feed(page(ended(tmp_path, tiny, failing).facts))
    assert "table" in tags and not set(tags) & {"script", "link", "img", "iframe"}


def test_a_record_tells_what_was_not_made(tmp_path, tiny):
    made = ended(tmp_path, tiny, lambda key, n: Outcome(key, "done", True, 1.0) if n < 2 else None, interrupted=True)
    assert made.status == "interrupted" and made.table()["status"].tolist() == ["done"] * 2 + ["not made"] * 4
    assert json.loads(made.page.with_suffix(".json").read_text()) == made.facts
    again = ended(tmp_path, tiny, lambda key, n: Outcome(key, "done", True, 1.0))
    assert again.page == made.page and again.status == "done", "the same runs are the same sweep"


def test_a_parameter_that_is_called_like_a_fact_of_the_run_stands_beside_it(tmp_path, write_notebook):
    notebook = write_notebook(tmp_path / "timed.ipynb", "1", params="seconds: float = 1.0")
    known = survey(notebook, [{"seconds": [0.5]}], tmp_path / "runs")
    key = known.plans[0].run.key
    table = Writer(known, "sweep").ended(Driven({key: Outcome(key, "done", True, 3.0)}, {key: 1})).table()
    assert table["param_seconds"].tolist() == [0.5] and table["seconds"].tolist() == [3.0]


def test_progress_without_a_terminal_is_lines_without_control_characters():
    stream = io.StringIO()
    driven(Simulated({"a": 2}, {"1": ["kernel died"], "2": ["cell failed"]}), "012", stream=stream)
    text = stream.getvalue()
    assert "\x1b" not in text and "\r" not in text
    assert (
        "2 workers there\n" in text
        and "done         seed=0" in text
        and "failed       seed=2   cell failed: why" in text
    )
    assert "again        seed=1   attempt 1 ended: kernel died: why" in text


def test_in_a_terminal_the_table_is_drawn_in_place(monkeypatch):
    monkeypatch.setattr("workbench.sweep.progress.REDRAW_S", 0.0)
    stream = io.StringIO()
    progress = Progress(20, stream, live=True, median_s=10.0)
    progress.tick(10)
    for n in range(10):
        progress.started(task(str(n)), "a")
    drawn = stream.getvalue().rsplit("\x1b[J", 1)[1].splitlines()
    assert drawn[0].startswith("running 10   done 0   failed 0   left 10   about 20 s to go")
    assert len(drawn) == 1 + 8 + 1 and drawn[1].endswith("seed=0") and drawn[-1] == "  and 2 more"
    progress.close()
    assert stream.getvalue().endswith(f"\x1b[10F\x1b[J{drawn[0]}\n")


def test_the_time_to_go_is_the_work_that_is_left_over_the_places():
    assert time_to_go(None, 5, [], 2) is None and time_to_go(10.0, 5, [], 0) is None
    assert time_to_go(10.0, 4, [4.0, 6.0], 2) == 25.0
    assert time_to_go(10.0, 0, [12.0], 2) == 0.0 and time_to_go(10.0, 1, [], 8) == 10.0
    assert [duration(s) for s in (0.04, 9.94, 59, 119, 120, 7100, 7200, 1e6)] == [
        "0.0 s",
        "9.9 s",
        "59 s",
        "119 s",
        "2 min",
        "118 min",
        "2.0 h",
        "11.6 days",
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"workers": 0}, "--workers: got 0, expected at least 1"),
        ({"gpus": -1}, "--gpus: got -1"),
        ({"gpus": 2, "workers": 3}, "--gpus alone says how many run at once"),
        ({"scheduler": "tcp://a:1", "slurm": "q"}, "expected one of them"),
    ],
)
def test_places_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Where(**settings)


def test_what_this_machine_does_not_have_is_refused_with_the_cure(monkeypatch):
    monkeypatch.setenv(VARIABLE, "3")
    with pytest.raises(ValueError, match="--gpus 2: this machine shows 1"):
        Where(gpus=2).check()
    Where(gpus=1).check()
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(clusters.importlib.util, "find_spec", lambda name: True)  # as if dask-jobqueue were installed
    with pytest.raises(ValueError, match="no `sbatch` on this machine"):
        Where(slurm="long").check()
    monkeypatch.setitem(sys.modules, "dask_jobqueue", None)
    monkeypatch.setattr(clusters.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install dask-jobqueue"):
        Where(slurm="long").check()


def test_runs_share_the_cpus_unless_said(monkeypatch):
    monkeypatch.setattr(clusters, "n_cpus", lambda: 8)
    assert [Where().at_once(n) for n in (1, 3, 40)] == [1, 3, 4]
    assert Where(workers=6).at_once(40) == 6 and Where(gpus=2).at_once(40) == 2 and Where(slurm="q").at_once(40) == 1


def test_workers_with_another_package_are_refused():
    client = SimpleNamespace(run=lambda function: {"tcp://a:1": package_digest(), "tcp://b:2": "another"})
    with pytest.raises(ValueError, match="1 of 2 workers have another source of this package, such as tcp://b:2"):
        clusters._refuse_other_packages(client)
    client = SimpleNamespace(run=lambda function: {"tcp://a:1": package_digest()})
    clusters._refuse_other_packages(client)


def test_each_process_gets_a_gpu_of_its_own_and_gives_it_back(monkeypatch):
    monkeypatch.setenv(VARIABLE, " 4, GPU-7a ")
    names = visible_gpus()
    assert names == ["4", "GPU-7a"]
    with one_gpu(names) as first, one_gpu(names) as second:
        assert {first, second} == {"4", "GPU-7a"}
    with one_gpu(names) as again:
        assert again == first
    with pytest.raises(ValueError, match="this machine shows none"), one_gpu([]):
        pass


def test_a_slurm_job_is_one_worker_for_one_run_at_a_time(monkeypatch, tmp_path):
    jobqueue = pytest.importorskip("dask_jobqueue", reason="dask-jobqueue is optional, for --slurm")
    job = jobqueue.slurm.SLURMJob(scheduler="tcp://head:8786", name="0", **clusters.slurm_settings("long", True))
    script = job.job_script()
    for line in ("-J workbench-sweep", "-p long", "-n 1", "--cpus-per-task=4", "--mem=15G", "--gres=gpu:1"):
        assert f"#SBATCH {line}\n" in script
    assert "distributed.cli.dask_worker tcp://head:8786" in script and "--nthreads 1" in script
    assert "--resources GPU=1" in script and os.fsdecode(sys.executable) in script


def test_a_long_text_is_cut_in_the_label_of_a_run():
    assert label({"prompt": "two\n lines " * 9, "n": 1}) == "prompt=two lines two lines two lines two lin... n=1"
    assert label({}) == "defaults"


def test_a_dry_run_shows_every_run_and_writes_nothing(tmp_path, tiny, capsys):
    grid = tmp_path / "grid.yaml"
    grid.write_text("- {seed: 0..1}\n- {seed: 7, keep: 0.5}\n")
    key = pretend(tiny, tmp_path / "runs", {"seed": 0, "keep": 0.25}, status="done", seconds=2.0)
    words = ["sweep", str(tiny), "--grid", str(grid), "-p", "keep=0.25,0.5", "--runs", str(tmp_path / "runs")]
    assert cli.main([*words, "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("tiny.ipynb: 6 runs") and "cached      1" in lines and "left        5" in lines
    assert f"  {key}  cached     seed=0 keep=0.25" in lines and lines[-1].endswith("left       seed=7 keep=0.5")
    assert not (tmp_path / "runs" / "tiny" / "sweeps").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-p", "seed=0..1", "-p", "keep=x,y"], "workbench: 2 wrong parameters:\n  parameter keep: got 'x'"),
        (["-p", "seed=a"], "workbench: parameter seed: got 'a', expected int.\n"),
        (["-p", "seed"], "workbench: -p: got 'seed', expected NAME=VALUES"),
        (["--grid", "none.yaml"], "workbench: none.yaml: no such file"),
        (["--retries", "-1"], "workbench: retries: got -1, expected 0 or more.\n"),
        (["--workers", "0"], "workbench: --workers: got 0, expected at least 1.\n"),
    ],
)
def test_a_users_mistake_is_told_before_anything_runs(tmp_path, tiny, capsys, words, message):
    assert cli.main(["sweep", str(tiny), "--runs", str(tmp_path / "runs"), *words]) == 2
    assert capsys.readouterr().err.startswith(message) and not (tmp_path / "runs").exists()


def test_a_number_that_can_not_be_is_refused_with_the_usage(tmp_path, tiny, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["sweep", str(tiny), "--runs", str(tmp_path / "runs"), "--threads", "0"])
    assert "--threads: got '0', expected a whole number of at least 1" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
