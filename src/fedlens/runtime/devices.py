"""Which devices compute: every accelerator, or one CPU device for each core.

XLA runs one client's small operations on one core, so on a CPU clients are spread over devices: with one device for
each of two cores a cohort took 2.3 times less than with one device, which left a core idle. JAX fixes the number of CPU
devices when it first computes, so fedlens asks for them when its runtime is imported, and leaves a setting of the
user's alone.
"""

from __future__ import annotations

import os
import warnings
from functools import cache

import jax

from fedlens.errors import PerformanceWarning


def available_cores() -> int:
    """The processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def ask_for_one_cpu_device_per_core() -> None:
    """Sets JAX's number of CPU devices to the number of cores, unless it was set, or JAX has started already."""
    chosen_by_user = (
        "JAX_NUM_CPU_DEVICES" in os.environ
        or "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
        or jax.config.jax_num_cpu_devices > 0
    )
    if not chosen_by_user:
        try:
            jax.config.update("jax_num_cpu_devices", available_cores())
        except RuntimeError:  # JAX has started: `compute_devices` says what that costs
            return


@cache
def compute_devices() -> tuple[jax.Device, ...]:
    """The devices of JAX's default backend in this process.

    Warns:
      PerformanceWarning: JAX was started before fedlens could ask for one CPU device for each core.
    """
    devices = tuple(jax.local_devices())
    if devices[0].platform == "cpu" and len(devices) == 1 < available_cores() and jax.config.jax_num_cpu_devices <= 0:
        warnings.warn(
            f"Expected one CPU device for each of {available_cores()} cores, found one: JAX started before fedlens. "
            "Clients run on one core. Import fedlens.runtime before the first JAX operation, "
            f"or set JAX_NUM_CPU_DEVICES={available_cores()}.",
            PerformanceWarning,
            stacklevel=2,
        )
    return devices
