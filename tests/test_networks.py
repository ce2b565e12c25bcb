"""Networks: shapes, parameter counts, what their options mean."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.distributions import Categorical, Normal, TanhNormal
from jaxrl.networks import MAX_LOG_STD, MLP, PolicyNet, ValueNet
from jaxrl.spaces import Box, Discrete

OBS = jnp.ones((7, 5))
BOX = Box((2,), (-1.0, -1.0), (1.0, 1.0))


def count(params) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def test_mlp_shape_and_parameter_count():
    net = MLP((8, 4), 3)
    params = net.init(jax.random.key(0), OBS)
    assert net.apply(params, OBS).shape == (7, 3)
    assert count(params) == (5 * 8 + 8) + (8 * 4 + 4) + (4 * 3 + 3)


def test_hidden_weights_are_orthogonal_with_gain_sqrt_two():
    kernel = MLP((5,), 1).init(jax.random.key(0), OBS)["params"]["Dense_0"]["kernel"]
    np.testing.assert_allclose(kernel @ kernel.T, 2.0 * np.eye(5), atol=1e-5)


def test_value_has_no_trailing_axis_and_takes_one_or_many():
    net = ValueNet((8,))
    params = net.init(jax.random.key(0), OBS)
    assert net.apply(params, OBS).shape == (7,)
    assert net.apply(params, OBS[0]).shape == ()


def test_policy_of_discrete_actions():
    net = PolicyNet((8,), Discrete(3))
    pi = net.apply(net.init(jax.random.key(0), OBS), OBS)
    assert isinstance(pi, Categorical)
    assert pi.logits.shape == (7, 3)
    # the small last layer makes the first policy nearly uniform
    np.testing.assert_allclose(jax.nn.softmax(pi.logits), 1 / 3, atol=0.02)


@pytest.mark.parametrize(("squash", "kind"), [("tanh", TanhNormal), ("clip", Normal)])
@pytest.mark.parametrize("dependent", [False, True])
def test_policy_of_real_actions(squash, kind, dependent):
    net = PolicyNet((8,), BOX, "tanh", squash, dependent, -0.5)
    params = net.init(jax.random.key(0), OBS)
    pi = net.apply(params, OBS)
    assert type(pi) is kind
    assert pi.mean.shape == pi.log_std.shape == (7, 2)
    np.testing.assert_allclose(pi.log_std, -0.5, atol=0.05)
    hidden = 5 * 8 + 8
    assert count(params) == hidden + ((8 * 4 + 4) if dependent else (8 * 2 + 2) + 2)


def test_log_std_is_bounded():
    net = PolicyNet((8,), BOX, initial_log_std=100.0)
    pi = net.apply(net.init(jax.random.key(0), OBS), OBS)
    np.testing.assert_array_equal(pi.log_std, MAX_LOG_STD)
