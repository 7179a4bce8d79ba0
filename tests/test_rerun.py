"""The same run twice gives the same bytes, and a run that is made again says what differs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from workbench.run import Run, all_runs, execute
from workbench.runs.removal import removable
from workbench.runs.rerun import BESIDE, rerun
from workbench.signature import signature_of

PROBE = """
from workbench import HFTP, Run, Subject
from workbench.corpora import streams
run = Run.start("probe")
result = HFTP(n_shuffles=2, seed=n).run(Subject.open("tiny:llama"), streams.corpus("four", 12, n))
run.keep("hftp", result)
run.finding(result.finding)
"""
# What the run says depends on a file beside it, as on a library or a machine that changes under a run.
OUTSIDE = """
from pathlib import Path
from workbench.run import Run
Run.start("outside").finding(f"{{n}}: " + Path({file!r}).read_text())
"""


def tables(run: Run) -> dict[str, bytes]:
    return {
        path.relative_to(run.folder).as_posix(): path.read_bytes() for path in run.folder.glob("results/*/*.parquet")
    }


@pytest.fixture(scope="module")
def probed(tmp_path_factory, write_notebook) -> tuple[Run, Run]:
    """One notebook with a probe on a tiny Llama, run twice in two places."""
    folder = tmp_path_factory.mktemp("twice")
    notebook = write_notebook(folder / "probe.ipynb", PROBE)
    first, second = (execute(notebook, {"n": 1}, runs=folder / place, threads=1) for place in ("one", "two"))
    assert first.status == second.status == "done", first.manifest.get("error") or second.manifest.get("error")
    return first, second


def test_the_same_run_twice_gives_the_same_bytes(probed):
    first, second = probed
    assert first.key == second.key, "the source of the package was changed between the two"
    assert list(tables(first)) and tables(first) == tables(second)
    for pattern in ("results/*/*.safetensors", "figures/*.json", "findings.json", "params.json"):
        files = [sorted(run.folder.glob(pattern)) for run in probed]
        assert files[0] and [path.read_bytes() for path in files[0]] == [path.read_bytes() for path in files[1]]


def test_a_run_stores_where_its_numbers_came_from(probed):
    recorded = json.loads((probed[0].folder / "environment.json").read_text())
    assert len(recorded["lock_sha256"]) == 64 and {"torch", "transformers", "numpy", "pyarrow"} <= set(
        recorded["versions"]
    )
    assert recorded["git"] is None or set(recorded["git"]) == {"commit", "dirty"}
    assert recorded["cpu"] and recorded["variables"]["OMP_NUM_THREADS"] == "1" and "gpus" in recorded
    assert set(recorded["key_parts"]) == {"code", "params", "package", "inputs"}
    assert signature_of(probed[0].figures()["hftp"]) == {"key": probed[0].key, "command": probed[0].command}
    (result,) = probed[0].results().values()
    assert result.provenance is not None and {"device", "fingerprint"} <= set(result.provenance.subject)


@pytest.fixture
def outside(tmp_path, write_notebook) -> tuple[Run, Path, Path]:
    """A run, its notebook, and the file that its outcome depends on."""
    file = tmp_path / "file"
    file.write_text("old")
    notebook = write_notebook(tmp_path / "outside.ipynb", OUTSIDE.format(file=str(file)))
    return execute(notebook, {"n": 7}, runs=tmp_path / "runs", threads=1), notebook, file


def test_a_run_made_again_is_equal_and_the_old_one_stays(outside):
    run, notebook, _ = outside
    before = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    notebook.unlink()
    compared = rerun(run)
    assert compared.equal and compared.second.command == run.command
    assert compared.notes == (f"the notebook's file is not at {notebook} any more; the stored one was run",)
    assert compared.second.folder.parents[1] == run.folder.parents[1] / BESIDE and compared.second.params["n"] == 7
    assert {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()} == before
    assert all_runs(run.folder.parents[1]) == [run], "a list of runs does not show it twice"
    assert [item.path for item in removable(run.folder.parents[1])] == [compared.second.folder]
    assert compared.second.manifest["kernel"] in ("warm", "cold")
    variables = json.loads((compared.second.folder / "environment.json").read_text())["variables"]
    assert variables["OMP_NUM_THREADS"] == "1", "as many threads as then: they decide the order of sums"


def test_a_different_outcome_is_named_and_so_is_a_changed_notebook(outside, write_notebook):
    run, notebook, file = outside
    file.write_text("new")
    write_notebook(notebook, OUTSIDE.format(file=str(file)) + "# and more")
    compared = rerun(run)
    assert not compared.same_outcome and "only the second: 7: new" in str(compared)
    assert [item.part for item in compared.differences] == ["findings", "findings"], "the stored notebook was run"
    assert compared.notes == (f"{notebook} has changed since, in cell 2; the stored one was run",)


def test_a_run_without_a_notebook_or_at_work_is_refused(outside, tmp_path, monkeypatch):
    run, _, _ = outside
    monkeypatch.setenv("WORKBENCH_RUNS", str(tmp_path / "runs"))
    interactive = Run.start("outside", n=1)
    with pytest.raises(
        ValueError, match=r"stored no notebook, expected a run that is over\. Its command is: workbench run"
    ):
        rerun(interactive)
    from workbench.leases import lease

    manifest = run.folder / "manifest.json"
    manifest.write_text(json.dumps(run.manifest | {"status": "running"}))
    with lease(run.folder), pytest.raises(ValueError, match="is still running"):
        rerun(run)
