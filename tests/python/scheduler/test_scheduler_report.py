"""Reports of the scheduler as table, dict, DataFrame and chart, and its progress bar."""

import contextlib
import gc
import importlib
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
from scheduler_cases import Clock, endless

from foveal import Scheduler


def report_of_three():
    scheduler = Scheduler(clock=Clock(), max_in_flight=1)
    scheduler.submit(int, key="good", urgency=2.0)
    scheduler.submit(lambda: 1 / 0, key="bad")
    scheduler.add_stepper(endless, key="long", max_steps=3)
    return scheduler.run()


def test_report_as_table_dict_and_rows():
    report = report_of_three()
    text = str(report)
    for word in ("good", "bad", "long", "failed", "ZeroDivisionError", "2 done, 1 failed"):
        assert word in text
    data = report.to_dict()
    assert data["counts"] == {"done": 2, "failed": 1}
    assert {task["key"]: task["turns"] for task in data["tasks"]} == {"good": 1, "bad": 1, "long": 3}
    assert len(data["decisions"]) == len(data["spans"]) == 5
    assert all(span["start"] < span["stop"] for span in data["spans"])


def test_report_without_rich(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    lines = str(report_of_three()).splitlines()
    assert lines[1].split() == ["task", "status", "urgency", "importance", "waited", "took", "turns", "cost", "error"]
    assert len(lines) == 6


def test_a_long_report_is_cut():
    scheduler = Scheduler()
    for _ in range(100):
        scheduler.submit(int)
    assert "..." in str(scheduler.run())


def test_report_to_pandas():
    pd = pytest.importorskip("pandas")
    frame = report_of_three().to_pandas()
    assert isinstance(frame, pd.DataFrame)
    assert frame.set_index("key").loc["long", "cost"] == 3.0


def test_gantt_chart(tmp_path):
    pytest.importorskip("matplotlib")
    ax = report_of_three().plot(tmp_path / "gantt.png")
    assert (tmp_path / "gantt.png").stat().st_size > 1000
    assert [label.get_text() for label in ax.get_yticklabels()] == ["good", "bad", "long"]


@pytest.mark.parametrize("has_tqdm", [True, False])
def test_progress(capsys, monkeypatch, has_tqdm):
    if has_tqdm:
        pytest.importorskip("tqdm")
    else:
        monkeypatch.setitem(sys.modules, "tqdm", None)
    scheduler = Scheduler()
    for _ in range(10):
        scheduler.submit(int)
    scheduler.run(progress=True)
    shown = capsys.readouterr().err
    assert ("10/10" if has_tqdm else "10 of 10 tasks") in shown


class Held:
    """What a frame holds."""


@pytest.mark.parametrize("how", ["background", "run", "raise", "derived"])
def test_a_report_keeps_the_text_of_a_failure_and_not_its_frames(how):
    seen = []

    def bad():
        held = Held()
        seen.append(weakref.ref(held))
        raise ValueError("why")

    class Derived(ThreadPoolExecutor):
        """Is given every task."""

    with Derived(1) if how == "derived" else contextlib.nullcontext() as pool:
        scheduler = Scheduler(pool, max_in_flight=1)
        if how == "background":
            scheduler.start()
        futures = [scheduler.submit(bad) for _ in range(3)]
        if how == "background":
            scheduler.shutdown()
            report = scheduler.report()
        elif how == "raise":
            with pytest.raises(ValueError, match="why"):
                scheduler.run(on_error="raise")
            report = scheduler.run()
        else:
            report = scheduler.run()
        assert report.rows[-1].error == "ValueError('why')"
        assert isinstance(futures[0].exception(), ValueError)
        gc.collect()
        assert seen[0]() is not None, "the Future holds it"
        gc.disable()  # no cycle is to hold it
        try:
            del futures
            gc.collect() if how == "raise" else None  # what pytest.raises holds
        finally:
            gc.enable()
        assert [ref() for ref in seen] == [None] * 3


def test_nobody_waits_for_a_report(monkeypatch):
    """The rows are made a few at a time, and the scheduler is free between."""
    module = importlib.import_module("foveal._scheduler.views")
    scheduler, made = Scheduler(), module.row_of

    def slowly(task):
        time.sleep(0.001)
        return made(task)

    monkeypatch.setattr(module, "row_of", slowly)
    monkeypatch.setattr(module, "_ROWS_AT_ONCE", 10)
    for i in range(500):
        scheduler.submit(int, key=i)
    reports = []
    reporter = threading.Thread(target=lambda: reports.append(scheduler.report()))
    reporter.start()
    updates = 0
    while reporter.is_alive():
        scheduler.update(updates % 500, urgency=1.0)
        updates += 1
        time.sleep(0.001)
    assert updates > 10
    assert [row.key for row in reports[0].rows] == list(range(500))
    assert reports[0].counts == {"waiting": 500}
