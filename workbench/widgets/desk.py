"""A desk: settings to play with, and the picture that each of them gives; a value, which knows no widget.

Its settings are scalars, the same that the parameters cell of its notebook declares: a slider, papermill and a sweep
set the same things. A slider does not change a desk: it makes a new one with one setting replaced. Source: own.
"""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

from workbench.environment import versions
from workbench.folder import RUN_VARIABLE, Run, run_command
from workbench.memo import Memo
from workbench.parameters import Parameter
from workbench.prefix import PrefixStates
from workbench.result import Provenance
from workbench.runs.runs import Runs
from workbench.subject import Subject
from workbench.toggle import Toggle
from workbench.values import fingerprint
from workbench.widgets.controls import Control
from workbench.widgets.picture import STYLE, DeskResult, Picture, facts_table

T = TypeVar("T")
GIVEN = "given"  # metadata of fields that are no settings: what a program hands over, such as its own directions
PREFIX_BYTES = 2**29  # that the prefix states of one set of texts may take
REMEMBERED = 512  # values that a desk and all made from it keep


def given(**options: Any) -> Any:
    """A field that is no setting: a value that a program hands over, which no control and no parameter can hold."""
    return field(kw_only=True, repr=False, metadata={GIVEN: True}, **options)


@dataclass(frozen=True)
class Desk(ABC):
    """Settings over a subject. Subclasses are frozen dataclasses whose fields are typed scalars with defaults.

    notebook   the notebook that shows this desk and runs it in batch      question   what stands above it
    memo       what was computed, shared by all desks that `changed` made of this one
    """

    subject: Subject
    memo: Memo = field(default_factory=lambda: Memo(REMEMBERED), kw_only=True, repr=False, compare=False)

    notebook: ClassVar[str]
    question: ClassVar[str]

    def __post_init__(self) -> None:
        for name, parameter in self.parameters().items():
            object.__setattr__(self, name, parameter.check(getattr(self, name)))
        for name, value in self.fitted().items():
            object.__setattr__(self, name, value)
        for control in self.controls():
            if control.shown:
                control.check(getattr(self, control.name))

    # What a desk says of itself

    @abstractmethod
    def controls(self) -> tuple[Control, ...]:
        """What can be moved now, in reading order. Cheap: no forward."""

    @abstractmethod
    def picture(self) -> Picture:
        """What these settings show. Raises ValueError in words where they can't be shown."""

    def fitted(self) -> dict[str, Any]:
        """Settings that stand for "whatever suits the subject", such as layer -1, replaced by what suits it."""
        return {}

    @classmethod
    def grid(cls) -> tuple[str, ...]:
        """The settings that an exported page lets a reader move."""
        return ()

    # What can be done with it

    @classmethod
    def parameters(cls) -> dict[str, Parameter]:
        """The settings by name with type and default, as a parameters cell declares them."""
        found = {}
        for item in dataclasses.fields(cls):
            if item.name not in ("subject", "memo") and GIVEN not in item.metadata:
                found[item.name] = Parameter(item.name, str(item.type), False, item.default)
        return found

    @property
    def settings(self) -> dict[str, Any]:
        """The settings as they are."""
        return {name: getattr(self, name) for name in self.parameters()}

    def changed(self, **settings: Any) -> Self:
        """This desk with other settings. Raises ValueError for an unknown or an impossible one."""
        known = self.parameters()
        for name in settings:
            if name not in known:
                raise ValueError(f"{type(self).__name__}: got setting {name!r}, expected one of {', '.join(known)}.")
        return dataclasses.replace(self, **settings)

    def once(self, key: tuple[Hashable, ...], compute: Callable[[], T]) -> T:
        """What `compute` gives, computed once per key and toggles that act on the subject now."""
        return self.memo((*key, self.subject.active), compute)

    @contextmanager
    def under(self, toggle: Toggle) -> Iterator[Subject]:
        """The subject under `toggle`; that it never acted is what its receipt says, without a warning."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".* was active but never fired", category=UserWarning)
            with self.subject.under(toggle):
                yield self.subject

    def resumed(self, texts: tuple[str, ...]) -> AbstractContextManager[Any]:
        """Within: forwards over these texts run only the blocks that a change reaches, to the same bits."""
        states = self.subject.remember(("prefix", texts, self.subject.active), lambda: _states(self.subject, texts))
        return states.resume() if states else nullcontext()

    def command(self) -> str:
        """The command that makes this picture in a batch run; it names what is not as a fresh desk has it."""
        fresh = {name: item.default for name, item in self.parameters().items()}
        named: dict[str, Any] = {}
        # Again while there are any: what suits a fresh desk's text, such as its last position, may not suit this one's.
        while not (other := self._unlike(fresh | named)).keys() <= named.keys():
            named |= other
        told = {name: value for name, value in self.settings.items() if name in named}
        return run_command(f"notebooks/{self.notebook}.ipynb", {"model": self.subject.name} | told)

    def _unlike(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Own settings that a desk made with these settings would not have."""
        theirs = dataclasses.replace(self, **settings).settings
        return {name: value for name, value in self.settings.items() if value != theirs[name]}

    def result(self) -> DeskResult:
        """The picture as a result that a run keeps, with its provenance."""
        started, picture = datetime.now(UTC), self.picture()
        drawn = json.dumps(json.loads(str(picture.figure.to_json())), sort_keys=True)
        stamp = Provenance(
            subject=self.subject.describe(),
            probe={"class": type(self).__qualname__, "settings": self.settings},
            toggles=tuple(toggle.to_json() for toggle in self.subject.active),
            receipts=(),
            data={"fingerprint": fingerprint(self.settings), "items": None},
            versions=versions(),
            seed=self.settings.get("seed"),
            started=started.isoformat(timespec="seconds"),
            seconds=round((datetime.now(UTC) - started).total_seconds(), 3),
        )
        result = DeskResult(settings=self.settings, facts=facts_table(picture.facts), drawn=drawn)
        return result.stamped(stamp)

    def to_run(self) -> Run:
        """Write the settings down as the parameters of a run of the notebook, whose command the run tells."""
        run = Run.start(self.notebook, model=self.subject.name, **self.settings)
        run.keep("desk", self.result())
        return run

    @classmethod
    def from_run(cls, key: str, subject: Subject | None = None, *, root: Any = None) -> Self:
        """The desk with the parameters of a run of its notebook; without a subject, on the run's own model.

        key   of a run, or the beginning of one        root   where runs live, as for `Runs`
        """
        known, params = cls.parameters(), Runs(cls.notebook, root=root).run(key).params
        settings = {name: value for name, value in params.items() if name in known}
        return cls(subject or Subject.open(params["model"]), **settings)

    def export_html(self, path: str | Path, *settings: str, **values: Sequence[Any]) -> Path:
        """Write a page that works from a file without a server: the pictures of a grid, and controls to move in it.

        settings   those that a reader can move, each over a few values of its range; values names them instead
        Neither: those that the desk itself thinks of, as far as they can be moved now. Raises ValueError where the
        grid has too many places.
        """
        from workbench.widgets.page import export

        movable = {control.name for control in self.controls() if control.shown}
        named = settings if settings or values else tuple(name for name in self.grid() if name in movable)
        return export(self, Path(path), named, values)

    def face(self) -> Any:
        """The widget for JupyterLab."""
        from workbench.widgets.face import Face

        return Face(self)

    def _ipython_display_(self) -> None:
        """In JupyterLab the widget; in a batch run its static twin, since a stored FigureWidget is about 5 MB."""
        from IPython.display import HTML, display

        if not os.environ.get(RUN_VARIABLE):
            display(self.face())
            return
        picture = self.picture()
        display(picture.figure)
        display(HTML(STYLE + picture.html()))


def _states(subject: Subject, texts: tuple[str, ...]) -> PrefixStates | None:
    """What the blocks did with these texts; None for a model or toggles that it can't be told of."""
    try:
        return PrefixStates.read(subject, texts, max_bytes=PREFIX_BYTES)
    except ValueError:  # the numbers are the same without, a little later
        return None
