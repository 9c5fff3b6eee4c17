"""Attention methods: how a head is computed in integers, and the registry that names them.

A method is a few pure functions `f(ops, params, *inputs)`, a `calibrate` that makes their `params`, and a `decode` that
reads their results. The same functions run in JAX, in NumPy and under an FHE compiler; `docs/adding-a-method.md` walks
through adding one.
"""

from jaxgpt2.methods.files import load, named
from jaxgpt2.methods.formula import attention
from jaxgpt2.methods.lowrank import LOWRANK
from jaxgpt2.methods.method import (
    HeadWeights,
    Method,
    MethodConfig,
    MethodError,
    QuantizedFunction,
    QuantizedModule,
    bodies,
    get,
    names,
    register,
)
from jaxgpt2.methods.polynomial import POLYNOMIAL
from jaxgpt2.methods.softmax import softmax as SOFTMAX

register(SOFTMAX)
register(LOWRANK)
register(POLYNOMIAL)

__all__ = [
    "HeadWeights",
    "Method",
    "MethodConfig",
    "MethodError",
    "QuantizedFunction",
    "QuantizedModule",
    "attention",
    "bodies",
    "get",
    "load",
    "named",
    "names",
    "register",
]
