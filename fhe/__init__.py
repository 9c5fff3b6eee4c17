"""Run functions on encrypted data: one interface, several engines. See `fhe.backend`.

Importing this package imports no library of encryption; `get_backend(name)` does.
"""

import warnings

from .backend import (
    LOOKUP_TIMES,
    MILLISECONDS_PER_LOOKUP,
    Backend,
    Circuit,
    Cost,
    Function,
    Keys,
    Ops,
    Output,
    Report,
    Rounding,
    Settings,
    Table,
    backends,
    get_backend,
    register_backend,
)
from .cache import cached_keys, compile_cached
from .clear import NumpyOps
from .errors import (
    BackendUnavailable,
    CircuitFormatError,
    CompilationError,
    FHEError,
    KeyMismatch,
    UnknownBackend,
)
from .steps import Steps

__all__ = [
    "LOOKUP_TIMES",
    "MILLISECONDS_PER_LOOKUP",
    "Backend",
    "BackendUnavailable",
    "Circuit",
    "CircuitFormatError",
    "CompilationError",
    "Cost",
    "FHEError",
    "Function",
    "KeyMismatch",
    "Keys",
    "NumpyOps",
    "Ops",
    "Output",
    "Report",
    "Rounding",
    "Settings",
    "Steps",
    "Table",
    "UnknownBackend",
    "backends",
    "cached_keys",
    "compile_cached",
    "get_backend",
    "register_backend",
]


def _clear() -> Backend:
    from .clear import ClearBackend

    return ClearBackend()


def _concrete() -> Backend:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="pkg_resources is deprecated")  # concrete-python 2.11.0
            from .concrete import ConcreteBackend
    except ImportError as error:
        raise BackendUnavailable(
            f"the backend 'concrete' needs concrete-python ({error}); install it with: pip install jaxgpt2[fhe]"
        ) from error
    return ConcreteBackend()


register_backend("clear", _clear)
register_backend("concrete", _concrete)
