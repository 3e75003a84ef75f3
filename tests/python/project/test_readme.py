"""What the README and the pages of docs/ tell a user to type does what it says."""

import ast
import contextlib
import io
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
OUTPUT = re.compile(r"[\d\[({]|torch\.")  # how a comment begins that says what is printed; others are remarks


def needs(example):
    return [name for name in ("torch", "transformers") if re.search(rf"(import|from|\.) ?{name}\b", example)]


def printed(example, names):
    """Run an example statement by statement; yield what each prints, with the comment at its end."""
    lines = example.splitlines()
    for statement in ast.parse(example).body:
        code = compile(ast.Module([statement], []), "<example>", "exec")
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(code, names)
        yield out.getvalue().strip(), lines[statement.end_lineno - 1].partition("  # ")[2]


@pytest.mark.parametrize("example", EXAMPLES.values(), ids=EXAMPLES)
def test_example_does_what_it_says(example):
    for name in needs(example):
        pytest.importorskip(name)
    before, names = set(sys.modules), {}
    for text, comment in printed(example, names):
        if text and OUTPUT.match(comment):
            assert re.split(r"[,:] [a-z]", comment)[0] == text  # what follows is a remark
    for module in set(sys.modules) - before:  # what an example installs is for itself alone
        if module.startswith("flash_attn"):
            del sys.modules[module]
    if {"q", "out"} <= set(names):
        assert names["out"].shape == names["q"].shape
    if "report" in names:
        assert set(names["report"].counts) == {"done"}
    if "model" in names:
        assert names["model"].config._attn_implementation == "foveal"


def test_an_output_that_is_not_the_comment_is_noticed():
    with pytest.raises(AssertionError):
        test_example_does_what_it_says("print(1 + 1)  # 23")
    test_example_does_what_it_says("print(1 + 1)  # 2, as ever")
    test_example_does_what_it_says("print(1 + 1)  # a number")


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
