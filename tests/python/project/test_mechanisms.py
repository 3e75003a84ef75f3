"""The worked example of docs/mechanisms.md: its numbers are those of the formulas, and of foveal."""

import re
from pathlib import Path

import numpy as np
import pytest

import foveal

PAGE = (Path(__file__).parents[3] / "docs" / "mechanisms.md").read_text(encoding="utf-8")
EXAMPLE = PAGE.split("## A worked example")[1].split("\n## ")[0]
ROWS = {
    cells[0]: [float(x) for x in cells[2:6]]
    for line in EXAMPLE.splitlines()
    if line.startswith("| ")
    and (cells := [x.strip() for x in line.strip("|").split("|")])[0] in foveal._core.NORMALIZERS
}
Q, K, V = np.array([[1.0, 2.0]]), np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), np.eye(3)


def test_the_page_has_every_normaliser():
    assert set(ROWS) == set(foveal._core.NORMALIZERS)
    table = PAGE.split("## The normalisers")[1].split("###")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE)) == set(ROWS)


@pytest.mark.parametrize("normalizer", ROWS)
def test_the_weights_of_the_example(normalizer):
    *weights, total = ROWS[normalizer]
    found = foveal.attention(Q, K, V, scale=0.5, normalizer=normalizer)[0]  # the values are unit vectors
    np.testing.assert_allclose(found, weights, rtol=0, atol=5.001e-5)
    np.testing.assert_allclose(found.sum(), total, rtol=0, atol=1e-4)


def test_the_example_of_a_gate():
    table = PAGE.split("## A learned threshold")[1].split("\n## ")[0]
    rows = {
        cells[0]: [float(x) for x in cells[1:]]
        for line in table.splitlines()
        if line.startswith("| ") and "key" not in line
        for cells in [[x.strip() for x in line.strip("|").split("|")]]
    }
    found = foveal.attention(Q, K, V, scale=0.5, gate=(1.0, 0.25))[0]
    np.testing.assert_allclose(found, rows["weight"], rtol=0, atol=5.001e-5)
    np.testing.assert_allclose(
        (np.array([0.5, 1.0, 1.5]) - 1) / 0.25, next(x for name, x in rows.items() if name.startswith("(s"))
    )


def test_the_steps_of_softmax():
    scores = (Q @ K.T)[0] / 2
    steps = re.findall(r"^\d\. .*", EXAMPLE, flags=re.MULTILINE)
    numbers = [[float(x) for x in re.findall(r"-?\d+\.\d+", step)] for step in steps]
    assert re.findall(r"= (\d\.\d)$", EXAMPLE, flags=re.MULTILINE) == [str(x) for x in scores]
    less = scores - scores.max()
    for found, expected in zip(
        numbers,
        ([scores.max(), *less], np.exp(less), [np.exp(less).sum()], np.exp(less) / np.exp(less).sum()),
        strict=False,
    ):
        np.testing.assert_allclose(found, expected, rtol=0, atol=5.001e-5)
    np.testing.assert_allclose(numbers[4], numbers[3])
