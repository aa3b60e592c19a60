"""The specification of formats, rules, rounded parameters and the step, in NumPy.

An independent path to the same bits as the C++ code: the CPU and the GPU implementation must
agree with it exactly. Written to be read, and never on a hot path.
"""

from .formats import (
    BLOCK_SIZE,
    Quantized,
    RatioState,
    Squares,
    decode,
    dequantize,
    dequantize_ratio,
    dynamic_map,
    encode,
    from_arrays,
    quantize,
    quantize_ratio,
    quantize_squares,
    ratio_random,
    ratio_unit,
)
from .rounding import (
    ZERO_RESIDUAL,
    ParamHyperparams,
    aligned_bits,
    dropped_bits,
    from_aligned_bits,
    join_master,
    random_bits,
    random_bits_from,
    round_stochastically,
    split_master,
    update_params,
)
from .rules import RULES, Hyperparams, LeafState, LionHyperparams, LionState, Rule, adam, lion
from .step import directions, init_leaf, step_leaf

__all__ = [
    "BLOCK_SIZE",
    "RULES",
    "ZERO_RESIDUAL",
    "Hyperparams",
    "LeafState",
    "LionHyperparams",
    "LionState",
    "ParamHyperparams",
    "Quantized",
    "RatioState",
    "Rule",
    "Squares",
    "adam",
    "aligned_bits",
    "decode",
    "dequantize",
    "dequantize_ratio",
    "directions",
    "dropped_bits",
    "dynamic_map",
    "encode",
    "from_aligned_bits",
    "from_arrays",
    "init_leaf",
    "join_master",
    "lion",
    "quantize",
    "quantize_ratio",
    "quantize_squares",
    "random_bits",
    "random_bits_from",
    "ratio_random",
    "ratio_unit",
    "round_stochastically",
    "split_master",
    "step_leaf",
    "update_params",
]
