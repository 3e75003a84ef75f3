"""Where calls run: threads, instruction set, and what this installation has."""

from __future__ import annotations

import importlib.metadata
import sys
from typing import NamedTuple

from foveal import _core

_MAX_THREADS = 4096


class Info(NamedTuple):
    """What :func:`info` found."""

    version: str
    isa: str
    """The instruction set whose kernels run."""
    isas: tuple[str, ...]
    """Those of this build that this machine can run, best first."""
    num_threads: int
    torch: str | None
    """The version of PyTorch that is installed, or None."""
    cuda: bool
    """Whether this build has CUDA kernels; nothing calls them yet unless ``FOVEAL_CUDA=experimental`` is set."""


def set_num_threads(n: int | None) -> None:
    """Set how many threads a call may use, in this process, before every other setting.

    Results do not depend on it, bit for bit. Without it the count is, whichever is set first: the environment variable
    ``FOVEAL_NUM_THREADS``; for tensors ``torch.get_num_threads()``; ``OMP_NUM_THREADS``; the processors that this
    process may use; at most 4096. A call uses no more than it has pieces of work, and fewer on small arrays.

    Parameters
    ----------
    n : int or None
        At least 1; None goes back to the environment.

    Raises
    ------
    ValueError
        ``n`` is not from 1 to 4096.

    Examples
    --------
    >>> import foveal
    >>> foveal.set_num_threads(2)
    >>> foveal.get_num_threads()
    2
    >>> foveal.set_num_threads(None)
    """
    if n is not None and not 1 <= n <= _MAX_THREADS:
        raise ValueError(f"set_num_threads: n is {n}, expected 1 to {_MAX_THREADS}, or None")
    _core.set_num_threads(n or 0)


def get_num_threads() -> int:
    """Give how many threads a call on NumPy arrays may use; see :func:`set_num_threads`.

    Raises
    ------
    ValueError
        The environment variable ``FOVEAL_NUM_THREADS`` is no integer from 1 to 4096.
    """
    return _core.get_num_threads()


def info() -> Info:
    """Describe this installation: version, instruction sets, threads, PyTorch and CUDA. Imports nothing large.

    Raises
    ------
    ValueError
        The environment variable ``FOVEAL_ISA`` names an instruction set that this build or machine lacks, or
        ``FOVEAL_NUM_THREADS`` is no integer from 1 to 4096.

    Examples
    --------
    >>> import foveal
    >>> foveal.info().isa in foveal.info().isas
    True
    """
    from foveal import __version__, _cuda

    return Info(
        version=__version__,
        isa=_core.isa(),
        isas=tuple(_core.isas()),
        num_threads=_core.get_num_threads(),
        torch=_torch_version(),
        cuda=_cuda.is_built(),
    )


def _torch_version() -> str | None:
    loaded = sys.modules.get("torch")
    if loaded is not None:
        return str(loaded.__version__)
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return None
