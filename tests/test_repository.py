"""What a repository promises beside its code: files that must be there, and that say the same thing."""

import importlib
import pkgutil
import tomllib
import types
from pathlib import Path

import pytest
import yaml

import alignguard
import fishergeo

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def read_yaml(path):
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "path",
    [
        *("README.md", "LICENSE", "NOTICE", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "CITATION.cff"),
        *(".pre-commit-config.yaml", ".ci/run", ".github/PULL_REQUEST_TEMPLATE.md", ".github/ISSUE_TEMPLATE/bug.md"),
        *(".github/ISSUE_TEMPLATE/proposal.md", "fishergeo/py.typed", "alignguard/py.typed"),
    ],
)
def test_it_is_there(path):
    assert (ROOT / path).is_file()


def test_the_citation_names_this_version_and_licence():
    citation = read_yaml("CITATION.cff")
    assert citation["version"] == fishergeo.__version__ and citation["license"] == PROJECT["project"]["license"]
    assert f"## {fishergeo.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_workflow_runs_what_a_contributor_runs_on_every_python_that_is_promised():
    job = read_yaml(".github/workflows/ci.yml")["jobs"]["check"]
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    assert PROJECT["project"]["requires-python"] == f">={min(job['strategy']['matrix']['python'])}"


def test_a_release_is_published_without_a_stored_token():
    publish = read_yaml(".github/workflows/release.yml")["jobs"]["publish"]
    assert publish["permissions"] == {"id-token": "write"} and publish["environment"]
    assert not any("password" in step.get("with", {}) for step in publish["steps"])


def test_every_hook_is_a_tool_of_the_developers_extra():
    hooks = [
        hook["entry"].split()[0] for repo in read_yaml(".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]
    ]
    assert all(
        any(need.startswith(tool) for need in PROJECT["project"]["optional-dependencies"]["dev"]) for tool in hooks
    )


@pytest.mark.parametrize("package", [fishergeo, alignguard], ids=lambda package: package.__name__)
def test_no_name_is_at_once_a_module_and_something_else(package):
    for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if found.name.endswith("__main__") or found.name == "fishergeo.updates._triton":
            continue
        if found.name.startswith("alignguard.integrations."):  # of tools that need not be there
            continue
        parent, leaf = found.name.rsplit(".", 1)
        module = importlib.import_module(found.name)
        assert isinstance(getattr(importlib.import_module(parent), leaf), types.ModuleType), module


def test_a_stranger_finds_the_rooms():
    ground = [entry for entry in (ROOT / "fishergeo").iterdir() if entry.is_file()]
    assert len(ground) <= 6 and len(list((ROOT / "alignguard").glob("*.py"))) <= 8
    for package in ("fishergeo", "alignguard"):
        folders = {path.parent for path in (ROOT / package).rglob("*.py")}
        assert all(len(list(folder.glob("*.py"))) <= 11 for folder in folders)


def test_no_two_test_files_are_named_alike():
    # Without packages pytest imports them by these names alone.
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert not {name for name in names if names.count(name) > 1}
