"""``python -m paged_optax``: what was built, what this machine has, and whether the two fit.

``python -m paged_optax plan`` says whether a training step fits on a GPU.
"""

import argparse
import importlib.metadata
import os
import platform
import sys

_LABEL_WIDTH = 22


def main() -> int:
    """Runs the command that the arguments name; without one, prints the report.

    Returns:
      The exit status.
    """
    try:
        from paged_optax._plan_cli import add_parser
    except ImportError:  # the report says why
        return report()
    parser = argparse.ArgumentParser(
        "python -m paged_optax",
        description="Without a command: what was built, what this machine offers, and whether a"
        " step works on each device.",
    )
    add_parser(parser.add_subparsers(title="commands"))
    arguments = parser.parse_args()
    return arguments.run(arguments) if "run" in arguments else report()


def report() -> int:
    """Prints the report.

    Returns:
      The exit status: 0 if paged optimizers work here, 1 if not.
    """
    print(f"paged_optax on Python {platform.python_version()}, {platform.platform()}\n")
    try:
        import paged_optax
        from paged_optax import _ext
        from paged_optax._bytes import format_bytes
    except ImportError as error:
        print(f"paged_optax cannot be imported: {error}")
        print("Install it with: pip install . (in a checkout; jax 0.10.2 or newer is needed)")
        return 1

    build = _ext.build_info()
    _line("version", paged_optax.__version__)
    for package in ("jax", "jaxlib", "optax", "flax", "jax-cuda13-plugin", "jax-cuda12-plugin"):
        try:
            _line(package, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            _line(package, "not installed")
    major, minor = build["ffi_api"]
    _line("XLA FFI API", f"{major}.{minor} (this build needs a jax with this or a newer one)")
    _line("CUDA code", f"{build['cuda_archs']} (nvcc {build['nvcc']})" if build["cuda"] else "none")
    _line("host memory free", format_bytes(_ext.available_host_bytes()))

    cuda = _ext.cuda_info()
    if "devices" in cuda:
        major, minor = divmod(cuda["driver"], 1000)
        _line("NVIDIA driver", f"for CUDA up to {major}.{minor // 10}")
    else:
        _line("NVIDIA driver", cuda["error"])
        _line("managed memory", "not used: moments lie in the CPU's ordinary memory here")
    print()
    problems = _check(cuda.get("devices", []), build, format_bytes)
    for problem in problems:
        print(f"- {problem}")
    print("Paged optimizers do not work here." if problems else "Paged optimizers work here.")
    return 1 if problems else 0


def _check(gpus: list[dict], build: dict, format_bytes) -> list[str]:
    """Describes the devices and takes a step on each; returns the problems found."""
    import jax

    from paged_optax import _ext

    try:
        devices = jax.local_devices()
    except (AssertionError, RuntimeError) as error:  # jax asserts that a platform's plugin is here
        reason = str(error) or f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS')} is not here"
        return [f"JAX finds no device: {reason}"]
    problems = []
    for index, gpu in enumerate(gpus):
        major, minor = gpu["compute_capability"]
        _line(f"GPU {index}", f"{gpu['name']}, compute capability {major}.{minor}")
        free, total = _ext.free_device_bytes(index), gpu["total_bytes"]
        _line("  memory", f"{format_bytes(free)} of {format_bytes(total)} outside of JAX's pool")
        _line("  link", _link(gpu["pci_bus_id"]))
        if gpu["concurrent_managed"]:
            _line("  managed memory", "yes: the CPU and the GPU can use it together")
        else:
            _line("  managed memory", "no: this GPU and driver cannot share memory with the CPU")
    backend = jax.default_backend()
    if gpus and backend == "cpu":
        print(
            "JAX uses the CPU although there is a GPU. To use the GPU install paged-optax[cuda13]"
            " and unset JAX_PLATFORMS.\n"
        )
    if backend not in ("cpu", "gpu"):
        return [f"JAX runs on {backend}, which is neither a CPU nor an NVIDIA GPU."]
    if backend == "gpu" and not build["cuda"]:
        return [
            "JAX uses a GPU but paged_optax was built without CUDA. Reinstall it with"
            " PAGED_OPTAX_CUDA=ON, or run on CPU with JAX_PLATFORMS=cpu."
        ]
    for device in devices:
        error = _try_step(device)
        _line(f"step on {device}", error or "works")
        if error:
            problems.append(f"a step on {device} failed: {error}")
    print()
    return problems


def _try_step(device) -> str:
    """Takes one optimizer step on a device and reads its moments; returns what went wrong, or
    ''."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from paged_optax import moments, release, scale_by_paged_adam8bit

    try:
        with jax.default_device(device):
            tx = scale_by_paged_adam8bit()
            grads = jnp.ones((64, 64))
            updates, state = tx.update(grads, tx.init(grads))
            update, mu = np.mean(np.asarray(updates)), np.mean(moments(state).mu)
            release(state)
            if abs(update - 1) > 1e-5 or abs(mu - 0.1) > 1e-6:
                return f"wrong result: update {update} for 1, first moment {mu} for 0.1"
    except Exception as error:  # whatever it is, the report must go on
        return str(error).splitlines()[0]
    return ""


def _link(pci_bus_id: str) -> str:
    """Speed and width of a GPU's link to the host, which limit a step on moments in host memory."""
    folder = f"/sys/bus/pci/devices/{pci_bus_id.lower()}"
    try:
        with open(f"{folder}/max_link_speed") as speed, open(f"{folder}/max_link_width") as width:
            return f"PCIe {speed.read().strip()} x{width.read().strip()} at most"
    except OSError:
        return f"unknown ({pci_bus_id})"


def _line(label: str, text: str) -> None:
    print(f"{label:<{_LABEL_WIDTH}}{text}")


if __name__ == "__main__":
    sys.exit(main())
