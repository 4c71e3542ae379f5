"""Local training step by step: the order in which a client visits its examples, and what is drawn anew when."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fedlens as fed
from fedlens.data import FederatedData
from fedlens.language.sequence import SequenceLayout
from fedlens.learning import build_weighted_fed_avg
from fedlens.learning.client_work import local_training
from fedlens.runtime.lowering import lowered_for_cpu

CLIENTS, EPOCHS, EXAMPLES = 40, 2, 3
STEPS = EPOCHS * EXAMPLES


@pytest.fixture(scope="module")
def digits():
    """For each client and step the example that was visited and the noise that was drawn, int[clients, steps] each.

    The loss is `-(w[0] * example + w[1] * noise)` and step k has the rate 10**k: the weights spell out the steps.
    """
    example = {"x": np.array([1, 2, 3], np.float32), "y": np.zeros(EXAMPLES, np.float32)}
    data = FederatedData.from_clients({f"client-{number}": example for number in range(CLIENTS)})
    model = fed.models.from_functions(
        init=lambda key: jnp.zeros(2),
        apply=lambda weights, x, key: weights[0] * x + weights[1] * jax.random.randint(key, x.shape, 1, 10),
        inputs=data.element_type,
        loss=lambda outputs, y: -outputs,
    )
    rates = jnp.array([10**step for step in range(STEPS)], jnp.float32)
    optimizer = optax.sgd(lambda step: rates[step])
    process = build_weighted_fed_avg(model, optimizer, batch_size=1, epochs=EPOCHS).with_local_models()
    spelled = process.next(process.initialize(0), data.cohort(0))[2].stacked.astype(np.int64)  # exact below 2**24
    return np.moveaxis(spelled[..., None] // 10 ** np.arange(STEPS) % 10, 1, 0)


def test_every_epoch_visits_every_example_once(digits):
    visited, _ = digits
    for epoch in (visited[:, :EXAMPLES], visited[:, EXAMPLES:]):
        np.testing.assert_array_equal(np.sort(epoch, axis=1), np.tile([1, 2, 3], (CLIENTS, 1)))


def test_every_order_occurs_and_every_epoch_draws_another(digits):
    visited, _ = digits
    first, second = visited[:, :EXAMPLES], visited[:, EXAMPLES:]
    assert {tuple(order) for order in first} == set(itertools.permutations([1, 2, 3]))
    same = (first == second).all(axis=1).mean()
    assert 0 < same < 0.5  # one in six


def test_every_step_draws_its_own_noise(digits):
    _, noise = digits
    assert len(np.unique(noise, axis=0)) == CLIENTS
    for earlier, later in itertools.combinations(range(STEPS), 2):
        assert (noise[:, earlier] == noise[:, later]).mean() < 0.5  # one in nine


@pytest.mark.parametrize(("examples", "products"), [(8, 1), (16, 2)])
def test_over_few_examples_the_gradient_of_a_kernel_is_no_product(logistic, examples, products):
    layout = SequenceLayout(fed.batch_type(logistic.inputs, examples), examples, masked=True, max_rows=32)

    def trained(weights, key, x, y):
        batches = fed.Sequence((x, y), 0, np.int32(32), None, layout)
        return local_training(logistic, optax.sgd(0.1), epochs=1, shuffle=False)(weights, key, batches).weights

    weights = logistic.init(jax.random.key(0))
    arguments = weights, jnp.zeros(2, jnp.uint32), jnp.zeros((32, 4)), jnp.zeros(32, jnp.int32)
    with lowered_for_cpu():
        text = str(jax.make_jaxpr(trained)(*arguments))
    assert text.count("dot_general") == products  # forwards; and the gradient, if it is one
