"""Rules and fixtures that all tests share. Importing this starts no JAX backend.

A test marked ``gpu`` skips itself where JAX sees no NVIDIA GPU, one marked ``memory_pressure``
unless ``-m`` asks for it. Type promotion is strict, warnings are errors (pyproject.toml), random
data have fixed seeds, and Hypothesis draws the same examples every time.
"""

import functools

import hypothesis
import jax
import numpy as np
import pytest

from paged_optax import _ext

try:
    import paged_optax._testing  # noqa: F401
except ImportError as error:
    raise pytest.UsageError(
        f"paged_optax has no module for its tests ({error}). Install it from a checkout, which"
        " builds one, and without PAGED_OPTAX_TESTING=OFF."
    ) from error

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_num_cpu_devices", 8)  # most tests use the first; those of meshes use all

hypothesis.settings.register_profile(
    "repeatable",
    derandomize=True,
    database=None,
    deadline=None,
    # The fixtures below are values: nothing needs a reset between two examples.
    suppress_health_check=[
        hypothesis.HealthCheck.function_scoped_fixture,
        hypothesis.HealthCheck.too_slow,
    ],
)
hypothesis.settings.load_profile("repeatable")


@functools.cache
def why_no_gpu() -> str:
    """What keeps tests from a GPU here; empty where nothing does."""
    try:
        jax.devices("gpu")
    except RuntimeError:
        return "JAX sees no NVIDIA GPU"
    return "" if _ext.build_info()["cuda"] else "paged_optax was built without CUDA"


def pytest_runtest_setup(item: pytest.Item) -> None:
    pressure = item.get_closest_marker("memory_pressure")
    if pressure and "memory_pressure" not in item.config.option.markexpr:
        pytest.skip("fills the GPU's memory; run it on its own with -m memory_pressure")
    if (pressure or item.get_closest_marker("gpu")) and why_no_gpu():
        pytest.skip(why_no_gpu())


@pytest.fixture(autouse=True)
def leave_no_states():
    """States that a test drops keep memory, and unused ones make the steps of later tests wait."""
    yield
    _ext.release_all()


@pytest.fixture(params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request):
    """Runs a test on the CPU and, where there is one, on a GPU: new arrays are made there."""
    device = jax.devices(request.param)[0]
    with jax.default_device(device):
        yield device


@pytest.fixture(scope="session")
def stored_moments():
    """Function from a `ScaleByPagedAdam8bitState` on one device to the bytes stored, leaf by leaf.

    A leaf is ``(mu, nu)`` in float32, or ``(mu codes, nu codes, mu scales, nu scales)``; padding
    included.
    """

    def read(state):
        handle, version = jax.device_get(state.token).tolist()
        (report,) = _ext.describe(handle, version)
        return _ext.read_leaves(report["platform"], report["ordinal"], handle, version)

    return read


@pytest.fixture(scope="session")
def same_bits():
    """Function that asserts that two arrays have one dtype, one shape and the same bits.

    All NaNs count as one: IEEE 754 leaves their payload open.
    """

    def check(actual, expected, what=""):
        actual, expected = np.asarray(actual), np.asarray(expected)
        assert actual.dtype == expected.dtype, what
        assert actual.shape == expected.shape, what
        with np.errstate(invalid="ignore"):  # signalling NaNs
            nan, actual_nan = np.isnan(expected), np.isnan(actual)
        bits = [
            np.where(nan, 0, x.reshape(expected.size).view(f"u{x.itemsize}").reshape(x.shape))
            for x in (actual, expected)
        ]
        np.testing.assert_array_equal(actual_nan, nan, what)
        np.testing.assert_array_equal(*bits, what)

    return check
