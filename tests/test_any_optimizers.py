"""`paged(tx)` over the optimizers of optax: with states in float32 it changes no update.

What is not equal to the bit is said: two programs may contract a multiplication and an addition in
other places.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

from helpers import f32, make_tree, to_jax
from paged_optax import Quantization, paged

pytestmark = pytest.mark.usefixtures("standard_promotion")

SHAPES = {"a": (24, 40), "b": (70, 8), "c": (300,)}
PARAMS = make_tree(100, SHAPES)
GRADS = [make_tree(step, SHAPES) for step in range(3)]
FLOAT32 = Quantization("float32")
RATE = 1e-2

CLIPPED = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(RATE))
LABELS = {"a": "adam", "b": "sgd", "c": "adam"}
TWO = {"adam": optax.adam(RATE), "sgd": optax.sgd(RATE, momentum=0.9)}

# Those that the default suite runs: one, two and four arrays a parameter, initial values,
# jax.lax.cond over the whole tree, and a clip before.
FEW = {
    "adan": optax.adan(RATE),
    "novograd": optax.novograd(RATE),
    "adagrad": optax.adagrad(RATE),
    "clip and adamw": CLIPPED,
}
MANY = {
    "adabelief": optax.adabelief(RATE),
    "adadelta": optax.adadelta(RATE),
    "adafactor": optax.adafactor(RATE, momentum=0.9, min_dim_size_to_factor=8),
    "adam in bfloat16": optax.adam(RATE, mu_dtype=jnp.bfloat16),
    "adamax": optax.adamax(RATE),
    "adamaxw": optax.adamaxw(RATE),
    "amsgrad": optax.amsgrad(RATE),
    "apply_if_finite": optax.apply_if_finite(optax.adam(RATE), 3),
    "ema": optax.ema(0.9),
    "inject_hyperparams": optax.inject_hyperparams(optax.adam)(RATE),
    "lamb": optax.lamb(RATE),
    "lars": optax.lars(RATE),
    "lion": optax.lion(RATE),
    "masked": optax.masked(optax.adam(RATE), {"a": True, "b": False, "c": True}),
    "MultiSteps": optax.MultiSteps(optax.adam(RATE), 2).gradient_transformation(),
    "muon": contrib.muon(RATE),
    "nadamw": optax.nadamw(RATE),
    "optimistic": optax.optimistic_gradient_descent(RATE),
    "optimistic_adam": optax.optimistic_adam_v2(RATE),
    "partition": optax.partition(TWO, LABELS),
    "radam": optax.radam(RATE),
    "rmsprop": optax.rmsprop(RATE, centered=True, momentum=0.9),
    "rprop": optax.rprop(RATE),
    "schedule": optax.adam(optax.cosine_decay_schedule(RATE, 10)),
    "scale_by_rss": optax.scale_by_rss(),
    "sgd": optax.sgd(RATE, momentum=0.9, nesterov=True),
    "sm3": optax.sm3(RATE),
    "yogi": optax.yogi(RATE),
    "acprop": contrib.acprop(RATE),
    "ademamix": contrib.ademamix(RATE),
    "adopt": contrib.adopt(RATE),
    "cocob": contrib.cocob(),
    "galore": contrib.galore(RATE, rank=4),
    "madgrad": contrib.madgrad(RATE),
    "sam": contrib.sam(optax.adam(RATE), optax.sgd(0.1)),
    "schedule_free_adamw": contrib.schedule_free_adamw(RATE),
    "schedule_free_sgd": contrib.schedule_free_sgd(RATE),
    "simplified_ademamix": contrib.simplified_ademamix(RATE),
    "sophia": contrib.sophia(RATE),
}
OPTIMIZERS = [pytest.param(name, tx, id=name) for name, tx in FEW.items()] + [
    pytest.param(name, tx, id=name, marks=pytest.mark.slow) for name, tx in MANY.items()
]
# Where XLA contracts other operations: relative to the largest update.
INEXACT = {
    "adafactor": 1e-5,
    "galore": 1e-5,
    "muon": 1e-5,
    "novograd": 1e-6,
    "sam": 1e-6,
    "schedule_free_adamw": 1e-4,
    "schedule_free_sgd": 1e-4,
    "sm3": 1e-6,
    "sophia": 1e-5,
    "yogi": 1e-6,  # with jax 0.10
}
ON_GPU = 1e-5  # there XLA contracts more


def extra_of(name):
    """Further arguments of the update."""
    if name != "sophia":
        return {}
    return {"obj_fn": lambda params: sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))}


@pytest.mark.parametrize("name, tx", OPTIMIZERS)
def test_updates_are_those_of_optax(name, tx, device):
    bound = INEXACT.get(name, 0.0 if device.platform == "cpu" else ON_GPU)
    tx = optax.with_extra_args_support(tx)
    extra = extra_of(name)
    paged_tx = paged(tx, quantization=FLOAT32)
    params = to_jax(PARAMS)
    alone, state = tx.init(params), paged_tx.init(params)
    update, paged_update = (
        jax.jit(lambda g, s, p, tx=each: tx.update(g, s, p, **extra)) for each in (tx, paged_tx)
    )
    for grads in GRADS:
        expected, alone = update(grads, alone, params)
        found, state = paged_update(grads, state, params)
        for key, wanted in expected.items():
            wanted, actual = np.asarray(wanted, f32), np.asarray(found[key], f32)
            scale = np.max(np.abs(wanted), initial=0)
            np.testing.assert_allclose(actual, wanted, rtol=0, atol=bound * scale, err_msg=key)
        params = optax.apply_updates(params, expected)
    largest = max(leaf.size for leaf in jax.tree.leaves(state))
    assert largest < 300 or name in ("sm3", "galore", "adafactor"), "an array was not paged"


MIXING = {
    "adam and a clip": optax.chain(optax.scale_by_adam(), optax.clip_by_global_norm(1.0)),
    "dadapt_adamw": contrib.dadapt_adamw(),
    "dog": contrib.dog(),
    "lbfgs": optax.lbfgs(RATE, linesearch=None),
    "mechanize": contrib.mechanize(optax.adam(RATE)),
    "momo_adam": contrib.momo_adam(RATE),
    "prodigy": contrib.prodigy(),
}


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("tx", [pytest.param(tx, id=name) for name, tx in MIXING.items()])
def test_what_mixes_leaves_is_refused(tx):
    paged_tx = paged(tx)
    extra = {"value": jnp.float32(1.0)}
    with pytest.raises(ValueError, match=r"states of \['a'\] and \['[bc]'\] meet"):
        jax.eval_shape(lambda p: paged_tx.update(p, paged_tx.init(p), p, **extra), PARAMS)
