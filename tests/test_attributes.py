"""The attributes of the custom call: Python and C++ mean the same by them."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from paged_optax import Moments, Paging, Quantization, _ext, _step
from paged_optax._options import make_options
from paged_optax._rule import Rule
from paged_optax._step import Step, make_step
from paged_optax._tables import FORMAT_NAMES, OUTPUTS, PARAM_ROUNDINGS, RULES

pytestmark = pytest.mark.fast

ADAM = {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "eps_root": 0.0, "nesterov": False}


def test_names_and_types():
    attributes = _ext.update_attrs()
    assert _step.attribute_types() == attributes == sorted(attributes)


def make(
    rule=None, decays=(), skip_elements=False, output="direction", sizes=(10, 5000), **options
):
    options = dict(replay=False, non_finite="propagate", quantization=None, paging=None) | options
    tree = {f"w{i}": jnp.ones(size) for i, size in enumerate(sizes)}
    paths = tuple(f"['{name}']" for name in tree)
    return make_step(
        rule or Rule("adam", **ADAM),
        make_options(**options),
        list(tree.values()),
        paths,
        jax.tree.structure(tree),
        output=output,
        decays=decays,
        skip_elements=skip_elements,
    )


def test_a_direction():
    step = make(replay=True, quantization=Quantization("dynamic"))
    assert [FORMAT_NAMES[i] for i in step.formats] == ["float32", "dynamic"]
    assert RULES[step.rule]["name"] == "adam" and step.flags == 0
    assert OUTPUTS[step.output] == "direction" and not step.takes_params
    assert step.decays == step.keys == () and step.param_rounding == 0
    assert step.names == "['w0']\n['w1']"
    assert step.replay and not step.skip_elements
    assert (step.device_bytes, step.directory, step.pinned) == (-1, "", False)


def test_an_update(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paging = Paging(device_bytes=5, headroom_bytes=7, memory="pinned", directory="moments")
    step = make(
        Rule("adam", **ADAM | {"nesterov": True}),
        output="update",
        decays=(True, False),
        skip_elements=True,
        param_rounding="compensated",
        paging=paging,
    )
    assert step.flags == 1 and step.skip_elements
    assert OUTPUTS[step.output] == "update" and step.takes_params
    assert PARAM_ROUNDINGS[step.param_rounding] == "compensated"
    assert step.attributes()["decays"].tolist() == [1, 0]
    assert step.attributes()["keys"].dtype == "int64" and len(set(step.keys)) == 2
    assert (step.device_bytes, step.headroom_bytes, step.pinned) == (5, 7, True)
    assert step.directory == str(tmp_path / "moments")


def test_all_in_float32():
    """Whatever the size, in as many bytes as leaves that are too small for another format."""
    step = make(quantization=Quantization("float32"))
    assert [FORMAT_NAMES[i] for i in step.formats] == ["float32", "float32"] and step.keys == ()


def test_equal_steps_are_one():
    """They are keys of caches; a program is compiled once for all that are equal."""
    assert make() == make() and hash(make()) == hash(make())
    other = dataclasses.replace(make(), num_devices=8)
    assert isinstance(other, Step) and other != make()


@pytest.mark.parametrize("change", [{"b3": 0.5}, {"b2": None}], ids=["another", "missing"])
def test_a_rule_has_its_hyperparameters(change):
    values = {k: v for k, v in (ADAM | change).items() if v is not None}
    with pytest.raises(TypeError, match=next(iter(change))):
        Rule("adam", **values)


def test_hyperparameters_are_in_the_order_of_the_operand():
    shuffled = dict(reversed(ADAM.items()))
    assert Rule("adam", **shuffled).hyperparams(jnp.int32(0)) == (0.9, 0.999, 1e-8, 0.0)


def test_moments_have_a_field_for_each_state():
    """`moments` would leave out a state of another name."""
    assert {name for rule in RULES for name, _ in rule["states"]} == set(Moments._fields)
