"""What a new user types by mistake: whatever it is, the answer says in words what was got and what was expected."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import subclasses_in, subject_of, texts

import workbench
import workbench.probes
import workbench.toggles
from workbench import (
    BitPlan,
    Clamp,
    Counterfactual,
    Dice,
    Direction,
    DropBlocks,
    Edit,
    EvictKV,
    LayerPlan,
    Plan,
    ProjectOut,
    QuantizeKV,
    Run,
    Runs,
    Site,
    SkipFFN,
    Steer,
    Subject,
    Weights,
    difference_in_means,
)
from workbench.cli import main
from workbench.probe import Probe
from workbench.toggle import Toggle

NAN, INF = float("nan"), float("inf")
WRONG = [None, "nonsense", -1, 0, 10**9, 1.5, NAN, INF, (), (-1,), (10**6,), ("x",), {}, True, torch.zeros(3), object]
WRONG_DATA = [None, 5, "one text", [], [""], [1, 2], [None], [[10**9]], [[-1]], {}, object()]
IN_WORDS = (
    "expected",
    "Choose",
    "Allow",
    "Keep",
    "Was it",
    "Give",
    "Write",
    "Find it",
    "Carve it",
    "Name",
    "Ask",
    "has blocks",
    "has d_head",
    "no direction",
)
SUBJECT = "llama"


def refusal(call: Callable[[], Any]) -> str | None:
    """What a refused call says; None where it works. An error of another kind is a bug, and comes through."""
    try:
        call()
    except (ValueError, FileNotFoundError, FileExistsError) as error:
        return str(error)
    return None


def without_words(told: Iterable[str | None]) -> list[str]:
    """Those of some refusals that speak to a programmer and not to a user."""
    return [said for said in told if said is not None and not (len(said) > 20 and any(w in said for w in IN_WORDS))]


def example(cls: type) -> Any:
    """A small value of a toggle or a probe, and what it is run on."""
    made = cls.examples(subject_of(SUBJECT))[0] if issubclass(cls, Toggle) else cls.example(subject_of(SUBJECT))[0]
    return made


CLASSES = subclasses_in(workbench.toggles, Toggle) + subclasses_in(workbench.probes, Probe)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_any_wrong_setting_is_refused_in_words_when_it_is_made(cls: type) -> None:
    value = example(cls)
    for field in (field for field in dataclasses.fields(value) if field.init):
        told = [refusal(lambda w=wrong, n=field.name: dataclasses.replace(value, **{n: w})) for wrong in WRONG]
        assert not without_words(told), field.name
        assert any(told), f"{field.name} takes anything"


@pytest.mark.parametrize("cls", subclasses_in(workbench.toggles, Toggle), ids=lambda cls: cls.__name__)
@pytest.mark.filterwarnings("ignore:.*never fired")
def test_settings_that_can_be_made_act_or_are_refused_in_words(cls: type) -> None:
    subject, value, prompts = subject_of(SUBJECT), example(cls), list(texts())[:1]
    for field in (field for field in dataclasses.fields(value) if field.init):
        for wrong in (-1, 0, 10**9, 1.5, (), (10**6,)):
            try:
                toggle = dataclasses.replace(value, **{field.name: wrong})
            except ValueError:
                continue
            told = refusal(lambda toggle=toggle: under(subject, toggle, prompts))
            assert not without_words([told]), field.name


def under(subject: Subject, toggle: Toggle, prompts: list[str]) -> None:
    with subject.under(toggle):
        subject.generate(prompts, max_new_tokens=1)


@pytest.mark.parametrize("cls", subclasses_in(workbench.probes, Probe), ids=lambda cls: cls.__name__)
def test_any_wrong_data_is_refused_in_words(cls: type) -> None:
    told = [refusal(lambda wrong=wrong: example(cls).run(subject_of(SUBJECT), wrong)) for wrong in WRONG_DATA]
    assert not without_words(told)
    assert any(told), "it takes anything"


@pytest.mark.parametrize(
    "cls", [cls for cls in CLASSES if cls.__name__ not in ("Prune",)], ids=lambda cls: cls.__name__
)
def test_a_misspelt_setting_is_refused_by_its_name(cls: type) -> None:
    with pytest.raises(TypeError, match="'kep'"):
        dataclasses.replace(example(cls), kep=1)


def subject() -> Subject:
    return subject_of(SUBJECT)


def unit(width: int = 32) -> torch.Tensor:
    return torch.ones(width)


AT = Site(1, "resid_out")
CALLS: list[tuple[Callable[[], Any], str]] = [
    (lambda: workbench.Steeer, "it offers .*Steer"),
    (lambda: Site("neurons", 3), "Site: got kind 3, expected one of"),
    (lambda: Site(1.0, "neurons"), "expected an integer from 0"),
    (lambda: Site(-1, "neurons"), "got layer -1, expected"),
    (lambda: Site(0, "neuron"), "got kind 'neuron', expected one of"),
    (lambda: Site.parse("neurons 3"), "expected KIND@LAYER"),
    (lambda: subject().capture(["a"], [Site(99, "resid_out")]), "got layer 99, but this model has 3 blocks"),
    (lambda: subject().capture([], [AT]), "expected at least one text"),
    (lambda: subject().capture("a text", [AT]), "got one string, expected a list"),
    (lambda: subject().capture([""], []), "expected at="),
    (lambda: subject().capture([None], [AT]), "expected a text, or a list of token ids"),
    (lambda: subject().capture([[10**9]], [AT]), "got token id 1000000000, expected ids from 0 to"),
    (lambda: subject().capture([["1"]], [AT]), "expected a text, or a list of token ids"),
    (lambda: subject().capture(["xyzzyq"], [AT]), "not in this model's vocabulary"),
    (lambda: subject().generate([], max_new_tokens=1), "expected at least one"),
    (lambda: subject().generate([[5, 6]], max_new_tokens=0), "max_new_tokens"),
    (lambda: subject().generate([[5, 6]], max_new_tokens=10**9), "context"),
    (lambda: subject().nll([[5]]), "expected|two tokens"),
    (lambda: Subject.open("tiny:lama"), "got family 'lama', expected"),
    (lambda: Subject.open("tiny:llama:x"), "expected tiny:FAMILY"),
    (lambda: Subject.open(""), "got an empty name, expected"),
    (lambda: Subject.load("/nowhere/at/all"), "there is no folder /nowhere/at/all"),
    (lambda: Direction(None), "got None, expected one vector"),
    (lambda: Direction("refuse"), "got 'refuse', expected one vector"),
    (lambda: Direction(torch.zeros(2, 2)), r"shape \(2, 2\), expected one vector"),
    (lambda: Direction([1.0, NAN]), "NaN or infinity, expected"),
    (lambda: Direction(unit()) + Direction(unit(16)), "they don't add"),
    (lambda: difference_in_means(subject(), [], ["a"], AT), "expected a list of at least one text"),
    (lambda: difference_in_means(subject(), "a", ["a"], AT), "expected a list of at least one text"),
    (lambda: difference_in_means(subject(), [[5]], [[6]], AT, tokens=7), "it has no position 7"),
    (lambda: Steer(unit(), "resid_out@1"), "got at='resid_out@1', expected a Site"),
    (lambda: Steer(unit(), AT, "strong"), "got strength='strong', expected a finite number"),
    (lambda: Steer(unit(), AT, NAN), "got strength=nan, expected a finite number"),
    (lambda: Steer(unit(), AT, positions="first"), "positions: got 'first', expected one of"),
    (lambda: Steer(unit(), AT, positions=3), "positions: got 3, expected logical positions"),
    (lambda: under(subject(), Steer(unit(7), AT), ["the"]), "direction has 7 dims, resid_out@1 of .* has 32"),
    (lambda: under(subject(), Steer(Direction(unit(), AT, "0" * 16), AT), ["the"]), "was found on model 0000"),
    (lambda: ProjectOut(unit(), "everywhere"), "expected"),
    (lambda: Clamp({AT: ["a"]}), "expected"),
    (lambda: Clamp({AT: [1]}, to="high"), "got to='high', expected a finite number or a tuple"),
    (lambda: Clamp({AT: [1, 2]}, to=[1.0]), "got 1 values for 2 units"),
    (lambda: under(subject(), Clamp({AT: [99]}), ["the"]), "got unit 99 at resid_out@1, expected 0 to 31"),
    (lambda: EvictKV("half"), "got keep='half', expected a finite number"),
    (lambda: EvictKV(0.0), "expected a share kept, above 0"),
    (lambda: EvictKV(by="snapkw"), "got by='snapkw', expected one of"),
    (lambda: EvictKV(sinks=1.5), "got sinks=1.5, expected a whole number"),
    (lambda: QuantizeKV(3), "got key_bits=3, expected 2, 4, 8 or 16"),
    (lambda: QuantizeKV(group=True), "got group=True, expected a whole number"),
    (lambda: SkipFFN(static=("x",)), r"got static=\('x',\), expected a tuple, each a whole number"),
    (lambda: under(subject(), SkipFFN(0.9, last=10**12), ["the"]), "but this model has blocks 0 to 2"),
    (lambda: DropBlocks((9,)).install(subject(), None), "has blocks 0 to 2"),
    (lambda: Plan.of(subject(), {0: {"neuron": [1]}}), "got 'neuron', expected heads, kv_heads or neurons"),
    (lambda: Plan.of(subject(), {0: {"neurons": [1.5]}}), r"got neurons .*1.5.*expected whole numbers"),
    (lambda: Plan.of(subject(), {9: {"neurons": [1]}}), "got layer 9, expected 0 to 2"),
    (lambda: Plan.of(subject(), drop=[0, 1, 2]), "all 3 blocks are dropped"),
    (lambda: LayerPlan(heads="all"), "got heads 'all', expected whole numbers"),
    (lambda: Plan.load("nowhere.json"), "nowhere.json"),
    (lambda: subject().under(EvictKV(0.5) | EvictKV(0.25)).__enter__(), "claim|kv.select|both|same"),
    (lambda: EvictKV(0.5) | "QuantizeKV", "unsupported operand"),
    (lambda: Dice(sampler="nucleus").check(), "got sampler 'nucleus', expected one of"),
    (lambda: Dice(temperature=NAN).check(), "got temperature nan, expected"),
    (lambda: Runs(root="nowhere").run("abc"), "names 0 runs, expected one"),
    (lambda: Runs(root="nowhere").results("hftp"), "was kept by none of these runs"),
    (lambda: Runs(root="foo://x").table(), "can't be opened"),
    (lambda: Run(Path("nowhere")).finding("  "), "got an empty sentence"),
]


@pytest.mark.parametrize(("call", "words"), CALLS, ids=[words for _, words in CALLS])
def test_a_mistake_is_told_in_these_words(call: Callable[[], Any], words: str) -> None:
    kinds = (ValueError, TypeError, FileNotFoundError, AttributeError if "offers" in words else ValueError)
    with pytest.raises(kinds, match=words):
        call()


COMMANDS: list[tuple[list[str], str]] = [
    (["rum"], "invalid choice: 'rum'"),
    (["runs", "lst"], "invalid choice: 'lst'"),
    (["run"], "required: NOTEBOOK"),
    (["run", "nowhere.ipynb"], "nowhere.ipynb: no such notebook. Expected"),
    (["run", "{file}"], "not a notebook. Expected"),
    (["run", "{file}", "--threads", "0"], "got '0', expected a whole number of at least 1"),
    (["run", "{file}", "--threads", "x"], "got 'x', expected a whole number of at least 1"),
    (["run", "{file}", "--timeout", "soon"], "got 'soon', expected seconds above 0"),
    (["run", "{file}", "--timeout", "nan"], "got 'nan', expected seconds above 0"),
    (["run", "{file}", "--timeout", "inf"], "got 'inf', expected seconds above 0"),
    (["run", "{file}", "--runs", "{file}"], "is a file, expected a folder of runs"),
    (["runs", "list", "--runs", "{file}"], "is a file, expected a folder of runs"),
    (["runs", "list", "--runs", "nowhere"], "there is no folder nowhere. Check the path"),
    (["runs", "list", "--runs", "foo://x"], "Expected a path or an fsspec URL"),
    (["runs", "list", "--since", "99999999999d", "--runs", "{folder}"], "expected an age such as 12h"),
    (["runs", "list", "--since", "2026-13-45", "--runs", "{folder}"], "expected an age such as 12h"),
    (["runs", "gc", "--days", "nan", "--runs", "{folder}"], "got nan days, expected an age"),
    (["runs", "gc", "--days", "-1", "--runs", "{folder}"], "got -1.0 days, expected an age"),
    (["runs", "show", "abc", "--runs", "{folder}"], "names 0 runs, expected one"),
    (["runs", "sql", "", "--runs", "{folder}"], "got no statement, expected one SELECT"),
    (["rerun", "abc", "--runs", "{folder}"], "names 0 runs, expected one"),
    (["sweep", "{file}", "--workers", "0"], "got 0, expected at least 1"),
    (["sweep", "{file}", "-p", "seed"], "got 'seed', expected NAME=VALUES"),
    (["sweep", "{file}", "--grid", "nowhere.yaml"], "nowhere.yaml: no such file. Expected a grid"),
    (["doctor", ""], "got an empty name, expected"),
    (["lab", "nowhere"], "nowhere: no such folder. Start in the project"),
]


@pytest.mark.parametrize(("words", "told"), COMMANDS, ids=[" ".join(words) for words, _ in COMMANDS])
def test_a_wrong_command_is_told_in_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], told: str
) -> None:
    file = tmp_path / "a.txt"
    file.write_text("no notebook")
    given = [word.format(file=file, folder=tmp_path) for word in words]
    try:
        code = main(given)
    except SystemExit as error:
        code = error.code
    said = capsys.readouterr().err
    assert code == 2 and told in said and "Traceback" not in said


def test_an_interrupted_command_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(arguments: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("workbench.cli.check_root", interrupt)
    assert main(["runs", "list"]) == 130 and capsys.readouterr().err == "interrupted\n"


def test_a_folder_without_rights_is_told_in_words(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> None:
    def deny(*arguments: Any, **options: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(tmp_path))

    monkeypatch.setattr("workbench.storage.files", deny)
    assert main(["runs", "list", "--runs", str(tmp_path)]) == 1
    assert f"Permission denied: '{tmp_path}'" in capsys.readouterr().err


@pytest.mark.parametrize("value", [np.int64(3), np.float32(0.5), np.array([0.1, 0.2]), torch.tensor([1, 2])], ids=repr)
def test_numbers_of_numpy_and_torch_are_as_good_where_they_can_be_turned(value: Any) -> None:
    if isinstance(value, np.ndarray):
        assert Clamp({AT: [1, 2]}, to=value).to == pytest.approx((0.1, 0.2))
    elif isinstance(value, torch.Tensor):
        assert Steer(unit(), AT, positions=value).positions == (1, 2)
    elif isinstance(value, np.int64):
        assert EvictKV(16, sinks=value).sinks == 3
    else:
        assert Steer(unit(), AT, value).strength == 0.5


def test_values_without_settings_are_refused_in_words_too() -> None:
    edited = [Edit(None)]  # an edit is looked at together with the model that it is for
    calls = (lambda: BitPlan(()), lambda: BitPlan(((3, 3),)), lambda: Weights("x"))
    told = [refusal(call) for call in (*calls, lambda: Counterfactual().run(subject(), edited))]
    assert all(told) and not without_words(told)
