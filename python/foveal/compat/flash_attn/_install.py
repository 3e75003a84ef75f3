"""Makes ``import flash_attn`` find :mod:`foveal.compat.flash_attn`, by entries in ``sys.modules``."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

_SUBMODULES = ("flash_attn_interface", "bert_padding")


def install() -> bool:
    """Let ``import flash_attn`` in this process mean foveal's functions, unless flash-attn itself can be found.

    Call it before the model that imports flash_attn is imported. Modules of flash-attn that hold no attention (layers,
    losses, ops) are not there, so importing them raises ModuleNotFoundError as before.

    Returns
    -------
    bool
        True: ``flash_attn`` is foveal's, from this call or an earlier one. False: flash-attn is installed, and nothing
        was done.

    Examples
    --------
    >>> from foveal.compat.flash_attn import install
    >>> if install():
    ...     from flash_attn import flash_attn_func
    """
    present = sys.modules.get("flash_attn")
    if present is not None:
        return getattr(present, "__foveal__", False)
    if importlib.util.find_spec("flash_attn") is not None:
        return False

    package = importlib.import_module(__package__)
    stand_in = _module("flash_attn", package, is_package=True)
    sys.modules["flash_attn"] = stand_in
    for name in _SUBMODULES:
        module = _module(f"flash_attn.{name}", importlib.import_module(f"{__package__}.{name}"))
        setattr(stand_in, name, module)
        sys.modules[f"flash_attn.{name}"] = module
    return True


def _module(name: str, origin: ModuleType, *, is_package: bool = False) -> ModuleType:
    """Make a module of another name with the same contents.

    The modules themselves cannot stand in: a module has one spec, and it names where the module was found.
    """
    module = ModuleType(name, origin.__doc__)
    module.__spec__ = ModuleSpec(name, None, origin=origin.__file__, is_package=is_package)
    module.__file__ = origin.__file__
    if is_package:
        module.__path__ = []
    names = [n for n in vars(origin) if not n.startswith("_") and n != "install"]
    vars(module).update({n: getattr(origin, n) for n in names}, __foveal__=True)
    if hasattr(origin, "__version__"):
        module.__version__ = origin.__version__  # type: ignore[attr-defined]
    return module
