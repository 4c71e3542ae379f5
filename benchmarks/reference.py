"""How fast a round can be: each workload as a JAX program written by hand for it alone, without fedlens or a framework.

    python benchmarks/reference.py --workload W1 [--capture]
    python benchmarks/reference.py --workload W3 [--form naive]    # see reference_text.py

The floor that fedlens's general engine is measured against. One program a round: `shard_map` over one CPU device per
core, a scan over the clients of a device (groups of them at a time where the model is tiny), convolutions as products
of one image's patches, the weighted mean as a running sum. The pool lies at addresses where the devices read it in
place; drawing the cohort and gathering its data are part of a round. With `--capture` every client's local model is
written to disk too, one file per leaf and device, and synced.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from measuring import arguments, chosen, cores, measure, report
from workloads import WORKLOADS, TextWorkload, Workload, cohort, data

Parameters = dict[str, jax.Array]
CHUNKS = {"W5": 100}  # clients that are on the devices at once; their local models are when these are written
CHUNK = 10_000
GROUPS = {"W4": 50}  # clients that a step of the scan trains side by side


def patches(image: jax.Array, height: int, width: int) -> jax.Array:
    """`[h, w, c] -> [(h - 2) * (w - 2), 9 * c]`, one row for each position of a 3x3 kernel."""
    columns = jnp.concatenate([image[:, j : j + width] for j in range(3)], axis=-1)
    rows = jnp.concatenate([columns[i : i + height] for i in range(3)], axis=-1)
    return rows.reshape(height * width, -1)


@jax.custom_vjp
def convolve(images: jax.Array, kernel: jax.Array) -> jax.Array:
    """A 3x3 convolution without padding, image by image, so that one image's patches stay in the L2 cache."""
    height, width = images.shape[1] - 2, images.shape[2] - 2
    flat = kernel.reshape(-1, kernel.shape[-1])
    return lax.map(lambda image: (patches(image, height, width) @ flat).reshape(height, width, -1), images)


def _convolve_forward(images: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return convolve(images, kernel), (images, kernel)


def _convolve_backward(operands: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    images, kernel = operands
    channels, height, width = images.shape[3], gradient.shape[1], gradient.shape[2]
    flat = kernel.reshape(-1, kernel.shape[-1])

    def one_image(total: jax.Array, pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        image, of_output = pair[0], pair[1].reshape(height * width, -1)
        total = total + patches(image, height, width).T @ of_output
        if channels == 1:  # the first layer: nobody asks for the gradient of the data
            return total, jnp.zeros_like(image)
        of_patches = (of_output @ flat.T).reshape(height, width, 3, 3, channels)
        shifted = [
            jnp.pad(of_patches[:, :, i, j], ((i, 2 - i), (j, 2 - j), (0, 0))) for i in range(3) for j in range(3)
        ]
        return total, sum(shifted[1:], shifted[0])

    of_kernel, of_images = lax.scan(one_image, jnp.zeros_like(flat), (images, gradient))
    return of_images, of_kernel.reshape(kernel.shape)


convolve.defvjp(_convolve_forward, _convolve_backward)


def initialize(workload: Workload) -> Parameters:
    """Kernels by He et al. (2015), biases zero."""
    generator = np.random.default_rng(0)
    parameters = {}
    for name, shape in workload.layers().items():
        scale = np.sqrt(2 / np.prod(shape[:-1]))
        parameters[name] = jnp.asarray(generator.standard_normal(shape, np.float32) * np.float32(scale))
        parameters[name + "_bias"] = jnp.zeros(shape[-1])
    return parameters


def drop(key: jax.Array, values: jax.Array, rate: float) -> jax.Array:
    """Dropout; no rate, no work."""
    if not rate:
        return values
    return jnp.where(jax.random.bernoulli(key, 1 - rate, values.shape), values / (1 - rate), 0)


def apply(workload: Workload, parameters: Parameters, features: jax.Array, key: jax.Array) -> jax.Array:
    """Logits of a batch."""
    keys = jax.random.split(key)
    dense = [name for name in workload.layers() if name.startswith("dense")]
    for number in range(len(workload.convolutions)):
        features = convolve(features, parameters[f"conv{number}"]) + parameters[f"conv{number}_bias"]
        features = jax.nn.relu(features)
    if workload.convolutions:
        batch, height, width, channels = features.shape
        features = features.reshape(batch, height // 2, 2, width // 2, 2, channels).max(axis=(2, 4))
        features = drop(keys[0], features, workload.dropout[0]).reshape(batch, -1)
    for name in dense[:-1]:
        features = jax.nn.relu(features @ parameters[name] + parameters[name + "_bias"])
        features = drop(keys[1], features, workload.dropout[1])
    return features @ parameters[dense[-1]] + parameters[dense[-1] + "_bias"]


def train(
    workload: Workload, parameters: Parameters, features: jax.Array, labels: jax.Array, key: jax.Array
) -> Parameters:
    """One client: its examples shuffled by its key, one step of SGD a batch."""

    def loss(parameters: Parameters, features: jax.Array, labels: jax.Array, key: jax.Array) -> jax.Array:
        scores = jax.nn.log_softmax(apply(workload, parameters, features, key))
        return -jnp.mean(jnp.take_along_axis(scores, labels[:, None], axis=1))

    def step(parameters: Parameters, batch: tuple[jax.Array, jax.Array]) -> tuple[Parameters, None]:
        chosen, key = batch
        gradient = jax.grad(loss)(parameters, features[chosen], labels[chosen], key)
        return jax.tree.map(lambda p, g: p - workload.learning_rate * g, parameters, gradient), None

    shuffle, keys = jax.random.split(key)
    steps = workload.examples // workload.batch
    order = jax.random.permutation(shuffle, workload.examples).reshape(steps, workload.batch)
    return lax.scan(step, parameters, (order, jax.random.split(keys, steps)), unroll=steps <= 2)[0]


def build_chunk(workload: Workload, mesh: Mesh, capture: bool) -> Callable[..., Any]:
    """The program for a chunk of clients: sums of weighted local models and of weights; `capture` adds each model."""
    group = GROUPS.get(workload.name, 1)

    def one_device(
        parameters: Parameters, key: jax.Array, features: jax.Array, labels: jax.Array, clients: jax.Array
    ) -> Any:
        def one_group(total: Any, members: Any) -> Any:
            keys = jax.vmap(partial(jax.random.fold_in, key))(members)
            if group == 1:  # products of one client's own size run faster than batches of them
                local = train(workload, parameters, features[members[0]], labels[members[0]], keys[0])
                local = jax.tree.map(lambda leaf: leaf[None], local)
            else:
                local = jax.vmap(partial(train, workload, parameters))(features[members], labels[members], keys)
            weight = float(workload.examples)
            total = jax.tree.map(lambda s, leaf: s + weight * leaf.sum(0), total, local)
            return total, local if capture else None

        total, local = lax.scan(one_group, jax.tree.map(jnp.zeros_like, parameters), clients.reshape(-1, group))
        total = lax.psum((total, jnp.float32(workload.examples * len(clients))), "clients")
        return total, jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), local)

    everywhere, by_client = PartitionSpec(), PartitionSpec("clients")
    return jax.jit(
        jax.shard_map(
            one_device,
            mesh=mesh,
            in_specs=(everywhere, everywhere, everywhere, everywhere, by_client),
            out_specs=(everywhere, by_client),
            check_vma=False,
        )
    )


def write(local: Parameters, folder: Path, chunk: int) -> None:
    """One file per leaf and device: its clients' arrays one after the other, without a header."""
    for name, leaf in local.items():
        for shard in leaf.addressable_shards:
            with (folder / f"{name}-{chunk}-{shard.device.id}.f32").open("wb") as file:
                np.asarray(shard.data).tofile(file)
                os.fsync(file.fileno())


def in_place(array: np.ndarray, everywhere: NamedSharding) -> jax.Array:
    """An array that all CPU devices read where it lies: XLA takes memory at multiples of 64 bytes without a copy."""
    memory = np.empty(array.nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    aligned = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    aligned[...] = array
    on_each = [jax.device_put(aligned, device) for device in everywhere.mesh.devices.flat]
    return jax.make_array_from_single_device_arrays(array.shape, everywhere, on_each)


def rounds(workload: Workload, capture: Path | None) -> Callable[[int], None]:
    """The function that runs one round, from the drawing of its cohort to the new global model."""
    mesh = Mesh(np.array(jax.devices()), ("clients",))
    by_client, everywhere = (NamedSharding(mesh, spec) for spec in (PartitionSpec("clients"), PartitionSpec()))
    features, labels = (in_place(array, everywhere) for array in data(workload))
    run_chunk = build_chunk(workload, mesh, capture is not None)
    finish = jax.jit(lambda total, weight: jax.tree.map(lambda leaf: leaf / weight, total))
    parameters = jax.device_put(initialize(workload), everywhere)
    run_key = jax.random.key(1)

    def chunks(number: int) -> Iterator[Any]:
        clients = cohort(workload, number)
        key = jax.device_put(jax.random.fold_in(run_key, number), everywhere)
        size = CHUNKS.get(workload.name, CHUNK)
        for start in range(0, workload.clients, size):
            members = jax.device_put(clients[start : start + size].astype(np.int32), by_client)
            yield run_chunk(parameters, key, features, labels, members)

    def run_round(number: int) -> None:
        nonlocal parameters
        total: Any = None
        pending: list[Any] = []
        for chunk, (of_chunk, local) in enumerate(chunks(number)):
            total = of_chunk if total is None else jax.tree.map(jnp.add, total, of_chunk)
            if capture is not None:
                pending.append((local, capture / str(number % 2), chunk))
                if len(pending) == 2:  # a chunk is written while the next one computes
                    write(*pending.pop(0))
        for last in pending:
            write(*last)
        parameters = jax.block_until_ready(finish(*total))

    if capture is not None:
        for folder in "01":  # two rounds are kept, overwritten in turn
            (capture / folder).mkdir(parents=True)
    return run_round


def main() -> None:
    parser = arguments(__doc__, sorted(WORKLOADS))
    parser.add_argument("--form", choices=("fast", "naive"), default="fast", help="W3: how the LSTM is written")
    options = parser.parse_args()
    workload = chosen(options)
    jax.config.update("jax_num_cpu_devices", cores())
    with tempfile.TemporaryDirectory(prefix="reference-") as folder:
        capture = Path(folder) if options.capture else None
        if isinstance(workload, TextWorkload):
            import reference_text

            run_round = reference_text.rounds(workload, capture, options.form)
        else:
            run_round = rounds(workload, capture)
        seconds = measure(run_round, options.rounds, options.warmup)
    more = {"form": options.form} if isinstance(workload, TextWorkload) else {}
    packages = ["jax", "jaxlib", "numpy"]
    report(workload, "reference", seconds, capture=options.capture, packages=packages, **more)


if __name__ == "__main__":
    main()
