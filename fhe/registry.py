"""Backends by name."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

from fhe.backend import Backend
from fhe.errors import BackendUnavailable, UnknownBackend


@dataclass
class _Registry:
    factories: dict[str, Callable[[], Backend]] = field(default_factory=dict[str, Callable[[], Backend]])


_registry = _Registry()


def register_backend(name: str, factory: Callable[[], Backend], replace: bool = False) -> None:
    """Make `get_backend(name)` return `factory()`. Raises ValueError if the name is taken, unless `replace`."""
    if name in _registry.factories and not replace:
        raise ValueError(f"a backend named {name!r} exists already; pass replace=True to replace it")
    _registry.factories[name] = factory


def get_backend(name: str) -> Backend:
    """A backend by name. Raises UnknownBackend, or BackendUnavailable if its library is not installed."""
    if name not in _registry.factories:
        raise UnknownBackend(f"unknown backend {name!r}; known: {', '.join(backends())}")
    return _registry.factories[name]()


def backends() -> tuple[str, ...]:
    """The names of all registered backends, installed or not."""
    return tuple(sorted(_registry.factories))


def _clear() -> Backend:
    from fhe.clear import ClearBackend

    return ClearBackend()


def _concrete() -> Backend:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="pkg_resources is deprecated")  # concrete-python 2.11.0
            from fhe.tfhe.concrete import ConcreteBackend
    except ImportError as error:
        raise BackendUnavailable("concrete", "concrete-python", error) from error
    return ConcreteBackend()


def _ckks() -> Backend:
    try:
        from fhe.ckks.circuit import CKKSBackend
    except ImportError as error:
        raise BackendUnavailable("ckks", "tenseal", error) from error
    return CKKSBackend()


register_backend("clear", _clear)
register_backend("concrete", _concrete)
register_backend("ckks", _ckks)
