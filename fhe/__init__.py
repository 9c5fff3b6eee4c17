"""Run functions on encrypted data: one interface, several engines.

The interface is in `fhe.backend`: a `Backend` compiles each `Function` to a `Circuit`, which makes `Keys`, encrypts,
runs and decrypts. `get_backend(name)` gives a backend, and only it imports a library of encryption. Integer functions
use `Ops` and `LookupTable`; functions of slot vectors use `fhe.ckks.slots` and `fhe.ckks.linalg`.
"""

from fhe.backend import Backend, Circuit, CircuitReport, FHEConfig, Function, Keys, Rounding, RunCost
from fhe.cache import cached_keys, compile_cached, content_hash
from fhe.errors import (
    BackendUnavailable,
    CircuitFormatError,
    CompilationError,
    FHEError,
    InsecureParameters,
    KeyMismatch,
    NoWeights,
    UnknownBackend,
    UnknownName,
)
from fhe.registry import backends, get_backend, register_backend
from fhe.signatures import Output, Signature, Signatures
from fhe.storage import register_functions
from fhe.tfhe.cost import LOOKUP_TIMES, MILLISECONDS_PER_LOOKUP, Cost, Report
from fhe.tfhe.tables import LookupTable, NumpyOps, Ops

__all__ = [
    "LOOKUP_TIMES",
    "MILLISECONDS_PER_LOOKUP",
    "Backend",
    "BackendUnavailable",
    "Circuit",
    "CircuitFormatError",
    "CircuitReport",
    "CompilationError",
    "Cost",
    "FHEConfig",
    "FHEError",
    "Function",
    "InsecureParameters",
    "KeyMismatch",
    "Keys",
    "LookupTable",
    "NoWeights",
    "NumpyOps",
    "Ops",
    "Output",
    "Report",
    "Rounding",
    "RunCost",
    "Signature",
    "Signatures",
    "UnknownBackend",
    "UnknownName",
    "backends",
    "cached_keys",
    "compile_cached",
    "content_hash",
    "get_backend",
    "register_backend",
    "register_functions",
]
