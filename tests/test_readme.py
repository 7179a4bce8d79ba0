"""The README is true: its example runs as printed, its map names every file, its commands exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
MAP = README.split("## Map")[1].split("## Glossary")[0]
MAPPED = re.findall(r"^\| `([^`]+)` \| \S", MAP, flags=re.MULTILINE)


def test_the_example_runs_as_printed(capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(BLOCKS[0], "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "neurons follow the sentence rate" in printed and "perplexity" in printed
    assert len(re.findall(r"assistant : → sorry", printed)) == 3, "pushed towards refusal, all three are refused"


def test_the_desk_is_kept_opened_again_and_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from workbench import Subject

    monkeypatch.chdir(tmp_path)
    names: dict = {"subject": Subject.organism()}
    small = BLOCKS[1].replace('"method", "keep")', 'method=["none", "snapkv"])')
    assert small != BLOCKS[1]
    exec(compile(small, "README.md", "exec"), names)
    assert (tmp_path / "cache.html").exists() and list(tmp_path.glob("runs/72_cache_desk/*/params.json"))


def test_the_block_of_your_own_runs_on_the_names_of_the_first() -> None:
    from workbench import Subject

    names: dict = {}
    exec(compile(BLOCKS[0], "README.md", "exec"), names)
    body = BLOCKS[2].replace('Subject.load("path/or/name")', "Subject.organism()")
    assert body != BLOCKS[2]
    names |= {"texts": names["harmless"]}
    exec(compile(body, "README.md", "exec"), names)
    assert isinstance(names["subject"], Subject) and tuple(names["capture"].values) == (names["Site"](4, "neurons"),)


def test_the_map_names_every_file_and_no_other() -> None:
    assert all((ROOT / path).exists() for path in MAPPED), [path for path in MAPPED if not (ROOT / path).exists()]
    files = [path for pattern in ("workbench/**/*.py", "notebooks/*.ipynb") for path in ROOT.glob(pattern)]
    names = {path.relative_to(ROOT).as_posix() for path in files if path.name != "__init__.py"}
    folders = tuple(path for path in MAPPED if path.endswith("/"))
    assert not sorted(name for name in names if name not in MAPPED and not name.startswith(folders))


def test_pictures_and_commands_exist() -> None:
    from workbench.cli import _parser

    assert all((ROOT / path).exists() for path in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README))
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)
    for line in re.findall(r"^workbench (.+?)(?:\s+#.*)?$", README, flags=re.MULTILINE):
        _parser().parse_args(shlex.split(line))


def test_the_first_words_stay_short() -> None:
    lines = README.split("```python")[0].strip().splitlines()
    assert len(lines) <= 20 and len(BLOCKS[0].strip().splitlines()) == 12
