"""What the README tells a user to type does what it says."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES, ids=[example.splitlines()[0] for example in EXAMPLES])
def test_example_runs(example):
    if "import torch" in example:
        pytest.importorskip("torch")
    names = {}
    exec(example, names)
    assert names["out"].shape == names["q"].shape


def test_there_is_an_example_for_numpy_and_for_torch():
    assert ["import torch" in example for example in EXAMPLES] == [False, True]


def test_ci_runs_the_commands_of_the_readme():
    commands = [line for line in README.splitlines() if line.startswith("pip install '.[")]
    assert len(commands) == 2
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert set(commands) <= set(ci)


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)]+)\)", README))
def test_links_lead_somewhere(link):
    assert (ROOT / link).is_file()
