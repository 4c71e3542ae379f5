"""Small computations whose outputs are at known levels, and what `fed.disclosure` says of them in short."""

from __future__ import annotations

import numpy as np

import fedlens as fed

F = np.float32
VECTOR = fed.TensorType(F, (3,))
KEY = fed.TensorType(np.uint32, (2,))
AT_CLIENTS = fed.FederatedType(VECTOR, fed.CLIENTS)
AT_SERVER = fed.FederatedType(VECTOR, fed.SERVER)
SERVER_KEY = fed.FederatedType(KEY, fed.SERVER)
CLIENT_KEYS = fed.FederatedType(KEY, fed.CLIENTS)


@fed.jax_computation(VECTOR)
def double(x):
    return 2 * x


@fed.jax_computation(VECTOR, VECTOR)
def plus(x, y):
    return x + y


@fed.jax_computation(VECTOR, VECTOR)
def subtract(x, y):
    return x - y


def levels_of(computation):
    return {
        output.name: " and ".join(level.value for level in (output.level, *output.also))
        for output in fed.disclosure(computation).outputs
    }


def reasons_of(computation, name=""):
    return next(output.reasons for output in fed.disclosure(computation).outputs if output.name == name)


def aggregate(accumulate, merge=plus):
    @fed.federated_computation(AT_CLIENTS)
    def computation(x):
        return fed.federated_aggregate(x, np.zeros(3, F), accumulate, merge, double)

    return computation


def noised(norm=1.0, sensitivity=1.0, reduce=None, before=None, key_of=None):
    """Noise on what `reduce` makes of clipped values, with hooks for what can go wrong."""
    reduce = reduce or fed.federated_sum

    @fed.federated_computation(AT_CLIENTS, SERVER_KEY, CLIENT_KEYS)
    def computation(x, key, keys):
        clipped = fed.federated_map(fed.privacy.clip(norm), x)
        total = reduce(clipped if before is None else fed.federated_map(before, clipped))
        noise = fed.privacy.gaussian_noise(2.0, sensitivity=sensitivity)
        return fed.federated_map(noise, (total, key if key_of is None else key_of(key, keys)))

    return computation


def local_noise(key_of=None):
    @fed.federated_computation(AT_CLIENTS, CLIENT_KEYS, SERVER_KEY)
    def computation(x, keys, key):
        of_client = keys if key_of is None else key_of(keys, key)
        private = fed.federated_map(
            fed.privacy.local_gaussian(4.0, norm=1.0), (fed.federated_map(double, x), of_client)
        )
        return private, fed.federated_mean(private), fed.federated_map(double, private)

    return computation
