"""What the README and the pages of docs/ tell a user to type does what it says."""

import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = {
    f"{page.stem}-{index}": example
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    for index, example in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL))
}


def needs(example):
    return [name for name in ("torch", "transformers") if re.search(rf"(import|from|\.) ?{name}\b", example)]


@pytest.mark.parametrize("example", EXAMPLES.values(), ids=EXAMPLES)
def test_example_runs(example):
    for name in needs(example):
        pytest.importorskip(name)
    before, names = set(sys.modules), {}
    exec(example, names)
    for module in set(sys.modules) - before:  # what an example installs is for itself alone
        if module.startswith("flash_attn"):
            del sys.modules[module]
    if "foveal.torch.nn" in example:  # which says itself what must hold
        assert {"attention", "mixture", "tasks"} & set(names)
    elif "out" in names:
        assert names["out"].shape == names["q"].shape
    elif "jobs" in names:
        assert names["ids"].tolist() == [2, 3]
        assert names["order"] == {"read": 1.0}
        assert names["jobs"].get_nowait() == "answer the phone"
    elif "tree" in names:
        assert (abs(names["tree"].weights() - [1, 4, 2, 1]) == 0).all()
        assert set(names["ids"]) == {0, 1, 2, 3}
    elif "report" in names:
        assert set(names["report"].counts) == {"done"}
    elif "tokens" in names:
        assert names["tokens"].shape == (2, 48)
        assert [layer.shape for layer in names["weights"]] == [(2, 4, 40, 40)] * 2
    else:
        assert names["model"].config._attn_implementation == "foveal"


def test_there_is_an_example_of_each_kind():
    assert {tuple(needs(example)) for example in EXAMPLES.values()} == {(), ("torch",), ("torch", "transformers")}


def test_ci_runs_the_commands_of_the_readme():
    commands = [line for line in README.splitlines() if line.startswith("pip install '.[")]
    assert len(commands) == 2
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert set(commands) <= set(ci)


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)]+)\)", README))
def test_links_lead_somewhere(link):
    assert (ROOT / link).is_file()
