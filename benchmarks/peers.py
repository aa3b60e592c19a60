"""AdamW as several libraries have it, each as something that takes steps and can be timed."""

import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from paged_optax import (
    Paging,
    Quantization,
    apply_gradients,
    clip_by_global_norm,
    paged_adamw8bit,
    release,
)

RATE, DECAY = 1e-3, 1e-2


class Peer(NamedTuple):
    """A row of the table."""

    name: str
    start: Callable[[list[jax.Array], list[jax.Array]], Any]  # parameters, gradients -> a run
    # Bytes that a step moves for each parameter, by the bytes of a parameter; None if not known.
    nbytes: Callable[[int], float] | None = None


class JaxRun:
    """Steps of a JAX program, of which everything is donated: nothing is copied."""

    can_loop = True

    def __init__(self, step: Callable[..., Any], state: Any, params: Any, grads: Any):
        self._carry = grads, state, params
        self._step = jax.jit(step, donate_argnums=(0, 1, 2))
        self._loop = jax.jit(
            lambda num_steps, *carry: jax.lax.fori_loop(
                0, num_steps, lambda _, carry: step(*carry), carry
            ),
            static_argnums=0,
            donate_argnums=(1, 2, 3),
        )

    def take(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self._carry = self._step(*self._carry)

    def loop(self, num_steps: int) -> None:
        self._carry = self._loop(num_steps, *self._carry)

    def wait(self) -> None:
        jax.block_until_ready(self._carry)

    def sample(self) -> np.ndarray:
        return np.asarray(self._carry[2][0].ravel()[:64], np.float32)

    def close(self) -> None:
        try:
            release(self._carry[1])
        except ValueError:  # no paged state
            pass
        for leaf in jax.tree.leaves(self._carry):
            leaf.delete()


def _clipped(tx: Any, clip: Any, params: Any) -> Any:
    """After a clipping that halves gradients of a normal distribution."""
    size = sum(param.size for param in params)
    return optax.chain(clip(0.5 * size**0.5), tx) if clip else tx


def _optax(clip: Any = None):
    def start(params, grads):
        tx = _clipped(optax.adamw(RATE, weight_decay=DECAY), clip, params)

        def step(grads, state, params):
            updates, state = tx.update(grads, state, params)
            return grads, state, optax.apply_updates(params, updates)

        return JaxRun(step, jax.jit(tx.init)(params), params, grads)

    return start


def _paged(in_place: bool, clip: Any = None, **options):
    def start(params, grads):
        tx = _clipped(paged_adamw8bit(RATE, weight_decay=DECAY, **options), clip, params)

        def separate(grads, state, params):
            updates, state = tx.update(grads, state, params)
            # An update has its gradient's memory, so it is the next gradient.
            return updates, state, optax.apply_updates(params, updates)

        def together(grads, state, params):
            params, state = apply_gradients(tx, grads, state, params)
            return grads, state, params

        return JaxRun(together if in_place else separate, tx.init(params), params, grads)

    return start


def _flashoptim_jax(params, grads):
    from flashoptim_jax import adamw  # pyright: ignore[reportMissingImports]

    bits = None if params[0].dtype == jnp.float32 else 24
    tx = adamw.flash_adamw(RATE, weight_decay=DECAY, master_weight_bits=bits)

    def step(grads, state, params):
        params, state = tx.step(params, state, grads)
        return grads, state, params

    return JaxRun(step, tx.init(params), params, grads)


class TorchRun:
    """Steps of a torch optimizer."""

    can_loop = False

    def __init__(self, make: Callable[[list[Any]], Any], params: Any, grads: Any):
        import torch  # pyright: ignore[reportMissingImports]

        self._torch = torch
        self._params = [self._copy(param).requires_grad_() for param in params]
        for param, grad in zip(self._params, grads, strict=True):
            param.grad = self._copy(grad)
        for leaf in [*params, *grads]:
            leaf.delete()
        self._optimizer: Any = make(self._params)

    def _copy(self, array: jax.Array) -> Any:
        torch = self._torch
        dtype = getattr(torch, str(array.dtype))
        device = "cuda" if jax.default_backend() == "gpu" else "cpu"
        host = torch.from_numpy(np.array(array.astype(jnp.float32)))
        return host.to(device).to(dtype)

    def take(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self._optimizer.step()

    def wait(self) -> None:
        if jax.default_backend() == "gpu":
            self._torch.cuda.synchronize()

    def sample(self) -> np.ndarray:
        return self._params[0].detach().flatten()[:64].float().cpu().numpy()

    def close(self) -> None:
        self._params.clear()
        self._optimizer = None
        if jax.default_backend() == "gpu":
            self._torch.cuda.empty_cache()


def _torch(library: str, name: str, **options):
    def start(params, grads):
        cls = getattr(importlib.import_module(library), name)
        return TorchRun(
            lambda leaves: cls(leaves, lr=RATE, weight_decay=DECAY, **options), params, grads
        )

    return start


def peers(dtype: str, codec: str) -> list[Peer]:
    """Those that are installed."""
    halves = dtype != "float32"
    quantization = Quantization(codec)
    options: dict[str, Any] = {"quantization": quantization}
    rows = [
        Peer("optax.adamw", _optax(), lambda size: 7 * size),
        Peer("paged, update and apply", _paged(False, **options)),
        Peer("paged, in place", _paged(True, **options), lambda size: 3 * size + 4),
    ]
    if jax.default_backend() == "gpu":
        rows.append(
            Peer("paged, in place, on host", _paged(True, paging=Paging(device_bytes=0), **options))
        )
    if halves:
        options["param_rounding"] = "compensated"
        rows.append(
            Peer("paged, in place, compensated", _paged(True, **options), lambda size: 3 * size + 6)
        )
    others = [
        ("torch", "torch.optim.AdamW, fused", _torch("torch.optim", "AdamW", fused=True)),
        ("bitsandbytes", "bitsandbytes AdamW8bit", _torch("bitsandbytes.optim", "AdamW8bit")),
        ("torchao", "torchao AdamW8bit", _torch("torchao.optim", "AdamW8bit")),
        ("flashoptim_jax", "flashoptim-jax flash_adamw", _flashoptim_jax),
    ]
    if halves:
        others.append(("flashoptim", "FlashAdamW", _torch("flashoptim", "FlashAdamW")))
    installed = [Peer(name, start) for module, name, start in others if _is_installed(module)]
    return rows + installed


def clipping_peers(codec: str) -> list[Peer]:
    """Steps of gradients that are clipped by their global norm."""
    options = {"quantization": Quantization(codec)}
    optax_clip = optax.clip_by_global_norm
    return [
        Peer("optax.adamw, clipped by optax", _optax(optax_clip)),
        Peer("paged, in place, clipped by optax", _paged(True, optax_clip, **options)),
        Peer(
            "paged, in place, clipped as it steps",
            _paged(True, clip_by_global_norm, **options),
            lambda size: 4 * size + 4,
        ),
    ]


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
