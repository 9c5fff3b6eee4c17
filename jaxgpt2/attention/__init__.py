"""Attention formulas: how a head is computed in integers, and the registry that names them.

A formula is one pure function `run(ops, params, x)`, a `calibrate` that makes its `params` and a `decode` that reads
its result. The same function runs in JAX, in NumPy and under an FHE compiler; `docs/adding-a-formula.md` walks through
adding one.
"""

from jaxgpt2.attention.formula import (
    Calibrated,
    Formula,
    FormulaError,
    HeadWeights,
    Program,
    Recipe,
    formulas,
    get,
    register,
)
from jaxgpt2.attention.lowrank import LOWRANK
from jaxgpt2.attention.polynomial import POLYNOMIAL
from jaxgpt2.attention.softmax import SOFTMAX

register(SOFTMAX)
register(LOWRANK)
register(POLYNOMIAL)

__all__ = ["Calibrated", "Formula", "FormulaError", "HeadWeights", "Program", "Recipe", "formulas", "get", "register"]
