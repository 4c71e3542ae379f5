"""What every aggregator promises, whatever it does to the updates; and what clipping promises on top."""

import federated_language as fl
import jax
import numpy as np
import pytest

import fedlens as fed
from fedlens import Cohort
from fedlens.errors import ConfigError, NonFiniteError
from fedlens.learning.aggregators import clip_by_norm, mean, weighted_mean
from fedlens.runtime import current_context

AGGREGATORS = {
    "weighted_mean": weighted_mean,
    "mean": mean,
    "clip_by_norm(1.0)": clip_by_norm(1.0),
    "clip_by_norm(1.0, mean)": clip_by_norm(1.0, mean),
    "clip_by_norm(2.0, clip_by_norm(1.0))": clip_by_norm(2.0, clip_by_norm(1.0)),
}
WEIGHTS = {"ann": 3, "bob": 0, "cay": 1, "dora": 7, "nil": 0, "eve": 2}


def random_updates(seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    return {
        client_id: {
            "w": (scale * rng.normal(size=(3, 2))).astype(np.float32),
            "b": (scale * rng.normal(size=2)).astype(np.float32),
        }
        for client_id in WEIGHTS
    }


def flat(update):
    return np.concatenate([np.ravel(update[name]).astype(np.float64) for name in ("w", "b")])


def assert_close(found, expected):
    assert np.linalg.norm(flat(found) - flat(expected)) <= 1e-6 * np.linalg.norm(flat(expected))


def computation(aggregator):
    update_type = fed.type_of(random_updates()["ann"])

    @fl.federated_computation(fl.FederatedType(update_type, fl.CLIENTS), fl.FederatedType(np.int32, fl.CLIENTS))
    def aggregate(update, weight):
        return aggregator(update, weight)

    return aggregate


@pytest.fixture(scope="module", params=AGGREGATORS)
def aggregate(request):
    """One aggregator as a function of updates and weights by client id."""
    aggregate = computation(AGGREGATORS[request.param])

    def run(updates, weights=WEIGHTS):
        return aggregate(Cohort(updates), Cohort({client_id: np.int32(weights[client_id]) for client_id in updates}))

    return run


def test_clients_of_weight_zero_change_nothing(aggregate):
    updates = random_updates()
    others = random_updates(seed=1, scale=100.0)
    changed = {client_id: (updates if WEIGHTS[client_id] else others)[client_id] for client_id in WEIGHTS}
    assert_close(aggregate(changed), aggregate(updates))
    assert_close(aggregate({name: updates[name] for name in updates if WEIGHTS[name]}), aggregate(updates))


def test_the_order_of_clients_does_not_matter(aggregate):
    updates = random_updates()
    assert_close(aggregate(dict(reversed(updates.items()))), aggregate(updates))


def test_engines_agree(aggregate):
    updates = random_updates()
    with fed.use("debug"):
        expected = aggregate(updates)
    assert_close(aggregate(updates), expected)


def test_what_all_clients_agree_on_stays(aggregate):
    update = {name: leaf / 10 for name, leaf in random_updates()["ann"].items()}  # of a norm below 1
    assert_close(aggregate(dict.fromkeys(WEIGHTS, update)), update)


def test_only_the_proportions_of_weights_matter(aggregate):
    updates = random_updates()
    assert_close(aggregate(updates, {name: 1000 * weight for name, weight in WEIGHTS.items()}), aggregate(updates))


def test_the_means_are_those_of_numpy():
    updates = random_updates()
    vectors = np.stack([flat(update) for update in updates.values()])
    weights = np.array(list(WEIGHTS.values()))
    for aggregator, shares in ((weighted_mean, weights), (mean, weights > 0)):
        found = computation(aggregator)(Cohort(updates), Cohort({name: np.int32(WEIGHTS[name]) for name in updates}))
        np.testing.assert_allclose(flat(found), np.average(vectors, axis=0, weights=shares), rtol=1e-5, atol=1e-7)


@pytest.fixture(scope="module")
def clipped():
    """One client's update after clipping to norm 1."""
    aggregate = computation(clip_by_norm(1.0))
    return lambda update: aggregate(Cohort({"a": update}), Cohort({"a": np.int32(1)}))


@pytest.mark.parametrize("scale", [3.0, 1e-25, 1e18, 1e30])
def test_clipping_keeps_the_direction_and_bounds_the_norm(clipped, scale):
    # The squares of 1e30 overflow, those of 1e-25 vanish in float32; the norm of neither does.
    update = random_updates(scale=scale)["ann"]
    norm = np.linalg.norm(flat(update))
    assert_close(clipped(update), {name: leaf.astype(np.float64) * min(1, 1 / norm) for name, leaf in update.items()})


def test_clipping_a_short_update_changes_no_bit(clipped):
    update = {name: leaf / 10 for name, leaf in random_updates()["ann"].items()}
    for name, leaf in clipped(update).items():
        assert np.asarray(leaf).tobytes() == update[name].tobytes()
    nothing = {name: np.zeros_like(leaf) for name, leaf in update.items()}
    np.testing.assert_array_equal(flat(clipped(nothing)), 0)


def test_clipping_again_changes_nothing(clipped):
    once = jax.tree.map(np.asarray, clipped(random_updates(scale=5.0)["ann"]))
    assert_close(clipped(once), once)


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_clipping_leaves_what_is_not_finite_to_be_found(value):
    updates = random_updates()
    updates["dora"]["b"][1] = value
    weights = Cohort({name: np.int32(WEIGHTS[name]) for name in updates})
    with pytest.raises(NonFiniteError, match="client 'dora', leaf 'b', "):
        current_context().run(computation(clip_by_norm(1.0)), (Cohort(updates), weights), on_nonfinite="raise")


@pytest.mark.parametrize("max_norm", [0.0, -1.0, float("nan")])
def test_a_norm_to_clip_to_is_positive(max_norm):
    with pytest.raises(ConfigError, match=f"Expected a norm above 0 to clip to, found {max_norm}"):
        clip_by_norm(max_norm)
