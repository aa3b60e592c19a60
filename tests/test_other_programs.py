"""Programs on the site's pages that need other packages run, with stand-ins for these packages.

They are the blocks of ``py``. `tests/test_doctest.py` runs the blocks of ``python``.
"""

import ast
import dataclasses
import re
import sys
import types
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import optax
import pytest

import paged_optax
from paged_optax import Quantization, paged_adamw8bit

DOCS = Path(__file__).parent.parent / "docs"
PARAMS = {"w": jnp.ones((64, 128)), "b": jnp.ones(128)}

pytestmark = pytest.mark.skipif(not DOCS.exists(), reason="tests without the source tree")


def blocks(page, kind):
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{kind}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def block_with(page, words):
    (block,) = [block for block in blocks(page, "py") if words in block]
    return block


def is_paged(tx):
    return bool(paged_optax.memory_report(tx.update(PARAMS, tx.init(PARAMS), PARAMS)[1]).total)


@pytest.fixture
def equinox(monkeypatch):
    """Of a model that is a tree of arrays alone; `tests/test_trainers.py` has the real one."""
    files = {}
    package = types.ModuleType("equinox")
    package.is_inexact_array = None
    package.filter = lambda tree, _: tree
    package.filter_jit = lambda donate: jax.jit
    package.filter_value_and_grad = jax.value_and_grad
    package.apply_updates = optax.apply_updates
    package.tree_serialise_leaves = files.__setitem__
    package.tree_deserialise_leaves = lambda path, like: files[path]
    monkeypatch.setitem(sys.modules, "equinox", package)
    return package


def test_equinox_in_trainers(equinox, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    names = {"model": PARAMS, "compute_loss": lambda model, x: jnp.mean((x @ model["w"]) ** 2)}
    exec(block_with("trainers", "eqx.filter_jit"), names)
    model, _, loss = names["step"](jnp.ones((8, 64)), names["model"], names["opt_state"])
    assert loss > 0 and jnp.all(model["w"] < 1)


def test_equinox_in_checkpoints(equinox, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    tx = paged_adamw8bit(1e-3)
    _, state = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    names = {"eqx": equinox, "paged_optax": paged_optax, "tx": tx}
    names |= {"model": PARAMS, "params": PARAMS, "opt_state": state}
    exec(block_with("checkpoints", "eqx."), names)
    _, state = tx.update(PARAMS, names["opt_state"], PARAMS)
    assert state[0].count == 2


def test_tunix(monkeypatch):
    package, sft, trainer = (mock.MagicMock() for _ in range(3))
    package.sft, sft.peft_trainer = sft, trainer
    monkeypatch.setitem(sys.modules, "tunix", package)
    monkeypatch.setitem(sys.modules, "tunix.sft", sft)
    names = {"optax": optax, "paged_adamw8bit": paged_adamw8bit, "model": None, "config": None}
    exec(block_with("trainers", "PeftTrainer("), names)
    ((_, tx, _), _) = trainer.PeftTrainer.call_args
    assert is_paged(tx)


def test_names_of_tunix(monkeypatch):
    monkeypatch.setattr(optax, "paged_adamw8bit", None, raising=False)  # goes with the test
    exec(block_with("trainers", "opt_type:"), {})
    assert is_paged(optax.inject_hyperparams(optax.paged_adamw8bit)(1e-3))


def test_maxtext(monkeypatch):
    monkeypatch.setattr(optax, "adamw", optax.adamw)  # goes with the test
    exec(block_with("trainers", "optax.adamw = adamw"), {})
    tx = optax.adamw(1e-3, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, mu_dtype=jnp.bfloat16)
    assert is_paged(tx)


def test_easydel(monkeypatch):
    config = dataclasses.make_dataclass(
        "AdamWConfig", [("b1", float, 0.9), ("b2", float, 0.999), ("eps", float, 1e-8)]
    )
    package = types.ModuleType("eformer.optimizers")
    package.AdamWConfig, package.OptimizerBuilder = config, object
    found = {}
    package.register_optimizer = lambda name: lambda cls: found.setdefault(name, cls)
    monkeypatch.setitem(sys.modules, "eformer", types.ModuleType("eformer"))
    monkeypatch.setitem(sys.modules, "eformer.optimizers", package)
    exec(block_with("trainers", "register_optimizer"), {"__name__": "block"})
    assert is_paged(found["paged_adamw8bit"](config()).build(optax.constant_schedule(1e-3)))


def test_from_bitsandbytes():
    """The file of an optimizer, and the names of its parameters in their order."""
    tx = paged_adamw8bit(1e-3, quantization=Quantization("dynamic"))
    _, state = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    order = ["['b']", "['w']"]
    theirs = paged_optax.to_bitsandbytes(state, order, transposed=["['w']"])
    torch = mock.Mock(**{"load.return_value": theirs})
    names = {"torch": torch, "from_bitsandbytes": paged_optax.from_bitsandbytes, "tx": tx}
    names |= {"params": PARAMS, "names": order, "kernels": ["['w']"]}
    exec(block_with("from_bitsandbytes", "torch.load"), names)
    _, state = tx.update(PARAMS, names["opt_state"], PARAMS)
    assert state[0].count == 2

    weight, bias = object(), object()
    trainer = mock.Mock()
    trainer.model.named_parameters.return_value = [("dense.weight", weight), ("dense.bias", bias)]
    trainer.optimizer.param_groups = [{"params": [weight]}, {"params": [bias]}]
    names = {"trainer": trainer}
    exec(block_with("from_bitsandbytes", "named_parameters"), names)
    assert names["order"] == ["dense.weight", "dense.bias"]


def test_loggers():
    """`Monitor` of the block before, with W&B and with TensorBoard."""
    tx = paged_adamw8bit(1e-3)
    _, state = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    source = next(block for block in blocks("monitoring", "python") if "class Monitor" in block)
    (cls,) = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    names = {"optax": optax, "memory_report": paged_optax.memory_report}
    names |= {"wandb": mock.Mock(), "tensorboardX": mock.Mock()}
    exec(ast.unparse(cls), names)

    ours, theirs = block_with("monitoring", "wandb").split("\n\n")
    exec(ours, names)
    names["monitor"](100, state, loss=2.0)
    (numbers,), options = names["wandb"].log.call_args
    assert options == {"step": 100} and numbers["loss"] == 2 and numbers["moments/total"] > 0

    exec(theirs, names)
    names["monitor"](100, state, loss=2.0)
    calls = names["writer"].add_scalar.call_args_list
    assert mock.call("loss", 2.0, 100) in calls and len(calls) == len(numbers)


def test_no_block_is_left_out():
    here = Path(__file__).read_text(encoding="utf-8")
    words = re.findall(r'block_with\("(\w+)", "([^"]+)"\)', here)
    for page in DOCS.glob("*.md"):
        for block in blocks(page.stem, "py"):
            assert any(page.stem == name and word in block for name, word in words), block
