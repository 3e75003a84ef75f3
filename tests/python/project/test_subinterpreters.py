"""foveal in a subinterpreter: an ImportError, and nothing that waits for ever."""

import subprocess
import sys

import pytest

PROGRAM = """if True:
    import sys
    try:
        import _interpreters as interpreters
        new = [("isolated",), ("legacy",)]
    except ImportError:
        import _xxsubinterpreters as interpreters
        new = [()]
    if {first}:
        import foveal
    for arguments in new:
        made = interpreters.create(*arguments)
        interpreters.run_string(made, '''if True:
            import sys
            sys.path[:] = {path!r}
            for _ in range(2):
                try:
                    import {module}
                except ImportError as error:
                    print(error)
        ''')
        interpreters.destroy(made)
    import foveal
    print(foveal.PriorityMap({{"a": 1.0}}).popitem())
"""


@pytest.mark.parametrize("first", [False, True], ids=["alone", "after the main interpreter"])
@pytest.mark.parametrize("module", ["foveal", "foveal._core"])
def test_an_import_is_refused(first, module):
    program = PROGRAM.format(first=first, module=module, path=sys.path)
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr
    *refusals, last = result.stdout.splitlines()
    assert last == "('a', 1.0)"
    assert len(refusals) >= 2
    if sys.version_info < (3, 13):  # there NumPy or Python may refuse first
        text = "foveal: imported in a subinterpreter, expected the main interpreter of the process"
        assert set(refusals) == {text}
