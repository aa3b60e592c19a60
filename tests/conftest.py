"""Settings and fixtures that all tests share. Importing this starts no JAX backend.

A test marked ``gpu`` skips itself where JAX sees no NVIDIA GPU, one marked ``memory_pressure``
unless ``-m`` asks for it. Type promotion is strict, warnings are errors (pyproject.toml), random
data have fixed seeds, and Hypothesis draws the same examples every time.
"""

import hypothesis
import jax
import pytest

from helpers import arrays_on_cpu, forget_refusals, release_all, why_no_gpu

try:
    import paged_optax._testing  # noqa: F401
except ImportError as error:
    raise pytest.UsageError(
        f"paged_optax has no module for its tests ({error}). Install it from a checkout, which"
        " builds one, and without PAGED_OPTAX_TESTING=OFF."
    ) from error

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_num_cpu_devices", 8)  # most tests use the first; those of meshes use all

for profile, max_examples in {"repeatable": 20, "thorough": 100}.items():
    hypothesis.settings.register_profile(
        profile,
        max_examples=max_examples,
        derandomize=True,
        database=None,
        deadline=None,
        # The fixtures below are values: nothing needs a reset between two examples.
        suppress_health_check=[
            hypothesis.HealthCheck.function_scoped_fixture,
            hypothesis.HealthCheck.too_slow,
        ],
    )
hypothesis.settings.load_profile("repeatable")  # --hypothesis-profile chooses the other


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
    release_all()
    forget_refusals()


@pytest.fixture(params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request):
    """Runs a test on the CPU and, where there is one, on a GPU: new arrays are made there."""
    device = jax.devices(request.param)[0]
    with jax.default_device(device):
        yield device


@pytest.fixture
def on_cpu():
    """New arrays are made on the CPU."""
    with arrays_on_cpu():
        yield


@pytest.fixture
def standard_promotion():
    """Type promotion as users have it: optax itself does not run under the strict one."""
    with jax.numpy_dtype_promotion("standard"):
        yield
