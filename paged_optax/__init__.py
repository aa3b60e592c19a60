"""Paged 8-bit optimizers for JAX: moments that never take XLA's memory.

>>> import jax, jax.numpy as jnp, optax
>>> from paged_optax import memory_report, paged_adamw8bit
>>> tx = optax.chain(optax.clip_by_global_norm(1.0), paged_adamw8bit(2e-4, weight_decay=0.01))
>>> params = {"w": jnp.ones((1024, 1024))}
>>> opt_state = tx.init(params)
>>> @jax.jit
... def step(params, opt_state):
...   grads = jax.grad(lambda p: jnp.mean(p["w"] ** 2))(params)
...   updates, opt_state = tx.update(grads, opt_state, params)
...   return optax.apply_updates(params, updates), opt_state
>>> params, opt_state = step(params, opt_state)
>>> print(memory_report(opt_state))  # doctest: +ELLIPSIS
moments          total    resident     on host
...
"""

try:
    from . import _ext as _ext
except ImportError as error:
    raise ImportError(
        f"paged_optax has no usable extension in {__path__[0]} ({error}). If that is the source"
        " folder, run Python from another folder or with -P, which leaves the current one out; or"
        " install with: pip install -e ."
    ) from error

from . import _carriers as _carriers  # pickle, deepcopy and flax carry moments
from . import _process as _process  # sets the hooks
from ._accumulate import MultiSteps
from ._adam import (
    ScaleByPagedAdam8bitState,
    paged_adam8bit,
    paged_adamw8bit,
    scale_by_paged_adam8bit,
)
from ._ademamix import (
    ScaleByPagedAdemamix8bitState,
    paged_ademamix8bit,
    scale_by_paged_ademamix8bit,
)
from ._any import PagedArraysState, PagedTransformationState, paged
from ._bitsandbytes import from_bitsandbytes
from ._check import check_last
from ._checkpoint import export_moments, import_moments, load_moments, save_moments
from ._clip import clip_by_global_norm
from ._composed import paged_lamb8bit, paged_lars8bit, paged_nadamw8bit
from ._convert import from_optax, to_optax
from ._ema import (
    ScaleByPagedEma8bitState,
    paged_signum8bit,
    scale_by_paged_ema8bit,
    scale_by_paged_signum8bit,
)
from ._in_place import apply_gradients
from ._lion import ScaleByPagedLion8bitState, paged_lion8bit, scale_by_paged_lion8bit
from ._memory import evict, prefetch, release, release_all
from ._moments import Moments, moments
from ._muon import ScaleByPagedMuon8bitState, paged_muon8bit
from ._newest import newest
from ._norm import global_norm
from ._options import Paging, Quantization
from ._orbax import use_orbax_hook
from ._plan import Plan, plan
from ._plan_room import PlannedUsage
from ._refused import StateRefused
from ._report import DeviceMemory, LeafGroup, MemoryReport, memory_report
from ._reset import reset
from ._rmsprop import (
    ScaleByPagedRms8bitState,
    ScaleByPagedRss8bitState,
    ScaleByPagedStddev8bitState,
    paged_adagrad8bit,
    paged_rmsprop8bit,
    scale_by_paged_rms8bit,
    scale_by_paged_rss8bit,
    scale_by_paged_stddev8bit,
)
from ._sgd import ScaleByPagedTrace8bitState, paged_sgd8bit, scale_by_paged_trace8bit
from ._skip import SkipNonFiniteState, skip_non_finite
from ._states import StateInfo, states
from ._to_bitsandbytes import to_bitsandbytes

__version__ = "0.2.0.dev0"

__all__ = [
    "DeviceMemory",
    "LeafGroup",
    "MemoryReport",
    "Moments",
    "MultiSteps",
    "PagedArraysState",
    "PagedTransformationState",
    "Paging",
    "Plan",
    "PlannedUsage",
    "Quantization",
    "ScaleByPagedAdam8bitState",
    "ScaleByPagedAdemamix8bitState",
    "ScaleByPagedEma8bitState",
    "ScaleByPagedLion8bitState",
    "ScaleByPagedMuon8bitState",
    "ScaleByPagedRms8bitState",
    "ScaleByPagedRss8bitState",
    "ScaleByPagedStddev8bitState",
    "ScaleByPagedTrace8bitState",
    "SkipNonFiniteState",
    "StateInfo",
    "StateRefused",
    "apply_gradients",
    "check_last",
    "clip_by_global_norm",
    "evict",
    "export_moments",
    "from_bitsandbytes",
    "from_optax",
    "global_norm",
    "import_moments",
    "load_moments",
    "memory_report",
    "moments",
    "newest",
    "paged",
    "paged_adagrad8bit",
    "paged_adam8bit",
    "paged_adamw8bit",
    "paged_ademamix8bit",
    "paged_lamb8bit",
    "paged_lars8bit",
    "paged_lion8bit",
    "paged_muon8bit",
    "paged_nadamw8bit",
    "paged_rmsprop8bit",
    "paged_sgd8bit",
    "paged_signum8bit",
    "plan",
    "prefetch",
    "release",
    "release_all",
    "reset",
    "save_moments",
    "scale_by_paged_adam8bit",
    "scale_by_paged_ademamix8bit",
    "scale_by_paged_ema8bit",
    "scale_by_paged_lion8bit",
    "scale_by_paged_rms8bit",
    "scale_by_paged_rss8bit",
    "scale_by_paged_signum8bit",
    "scale_by_paged_stddev8bit",
    "scale_by_paged_trace8bit",
    "skip_non_finite",
    "states",
    "to_bitsandbytes",
    "to_optax",
    "use_orbax_hook",
]
