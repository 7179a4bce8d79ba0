"""pyproject.toml, requirements.lock and environment.yml describe one environment; the package holds its files."""

from __future__ import annotations

import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
EXTRAS = PROJECT["optional-dependencies"]
REQUIRED = [Requirement(text) for text in PROJECT["dependencies"] + EXTRAS["dev"] + EXTRAS["demo"]]
LINES = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
LOCK = {canonicalize_name(pin.name): pin for pin in map(Requirement, LINES)}
OUTSIDE = {"pip", "setuptools"}  # tools that install, required by no library of the lock
CONDA = yaml.safe_load((ROOT / "environment.yml").read_text())


def version(pin: Requirement) -> Version:
    """The one version that a line of the lock admits."""
    (clause,) = pin.specifier
    assert clause.operator == "==", f"{pin}: expected one version, as in name==1.2"
    return Version(clause.version)


@pytest.mark.parametrize("required", REQUIRED, ids=str)
def test_the_lock_pins_each_requirement_at_a_version_its_range_admits(required):
    pin = LOCK[canonicalize_name(required.name)]
    assert version(pin) in required.specifier, f"{pin} is outside of {required}"
    assert str(pin.marker or "").replace('"', "'") == str(required.marker or "").replace('"', "'")


def test_the_lock_names_versions_and_nothing_else():
    in_order = sorted(LINES, key=str.lower)
    assert in_order == LINES and len(LOCK) == len(LINES)
    for pin in LOCK.values():
        assert version(pin).local is None and pin.url is None, f"{pin}: a build of one machine"
    assert not [name for name in LOCK if name.startswith(("nvidia-", "cuda-"))], (
        "torch brings these where it needs them"
    )


def test_torch_and_triton_are_the_pinned_ones():
    assert str(LOCK["torch"]) == "torch==2.13.0"
    assert str(LOCK["triton"]) == 'triton==3.7.1; sys_platform == "linux"'


def test_the_lock_is_complete():
    """Whatever a locked library needs on this machine is locked too, at a version that it accepts."""
    for name, pin in LOCK.items():
        if pin.marker and not pin.marker.evaluate():
            continue
        extras = {extra for item in REQUIRED if canonicalize_name(item.name) == name for extra in item.extras} | {""}
        for text in metadata.requires(name) or []:
            need = Requirement(text)
            if need.marker and not any(need.marker.evaluate({"extra": extra}) for extra in extras):
                continue
            if canonicalize_name(need.name).startswith(("nvidia-", "cuda-")):
                continue
            found = LOCK.get(canonicalize_name(need.name))
            assert found is not None, f"{name} needs {need}, which is not locked"
            assert need.specifier.contains(version(found), prereleases=True), f"{name} needs {need}, locked is {found}"


def test_conda_users_get_the_same_lock_and_a_python_that_fits():
    python, pip, through_pip = CONDA["dependencies"]
    assert pip == "pip" and through_pip == {"pip": ["--requirement requirements.lock"]}
    name, _, wanted = python.partition("=")
    assert name == "python" and Requirement(f"python{PROJECT['requires-python']}").specifier.contains(f"{wanted}.0")
    assert CONDA["name"] == PROJECT["name"]


def test_every_file_the_package_reads_is_declared_as_its_data():
    """Weights, texts and scripts are found in an installed package only if pyproject.toml lists them."""
    package = ROOT / "workbench"
    patterns = PYPROJECT["tool"]["setuptools"]["package-data"]["workbench"]
    listed = {path for pattern in patterns for path in package.glob(pattern)}
    skipped = {".py", ".pyc"}
    found = {path for path in package.rglob("*") if path.is_file() and path.suffix not in skipped}
    assert not sorted(found - listed), "add a pattern to package-data"


def test_every_folder_of_code_is_a_package():
    folders = {path.parent for path in ROOT.glob("workbench/**/*.py")}
    assert not [folder for folder in folders if not (folder / "__init__.py").exists()], "setuptools would leave it out"


def test_the_command_and_the_licence_are_declared():
    assert PROJECT["scripts"] == {"workbench": "workbench.cli:main"} and PROJECT["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    assert not (ROOT / "kernels" / "__init__.py").exists(), "that import name belongs to Hugging Face"
