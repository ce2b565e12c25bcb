"""DDPG: its losses and noises by hand, its promises as a pure program, and what it must learn."""

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from jaxrl.agents import ddpg
from jaxrl.networks import ActorNet, CriticNet
from jaxrl.replay import Batch
from tests.agents import off_policy_checks as checks

# the losses and noises, by hand -------------------------------------------------------------------


def test_target_stops_at_an_end():
    obs = jnp.zeros((2, 1))
    batch = Batch(obs, obs, jnp.array([1.0, 2.0]), jnp.array([0.9, 0.0]), obs)
    assert ddpg.td_target(batch, jnp.array([10.0, 7.0])) == pytest.approx([10.0, 2.0])


def test_critic_loss_by_hand():
    loss = ddpg.critic_loss(jnp.array([1.0, 4.0]), jnp.array([1.0, 0.5]))
    assert loss == pytest.approx(0.5 * (1.0 + 8.0) / 2)


def test_ornstein_uhlenbeck_noise_by_hand():
    noise, key = jnp.array([[1.0], [1.0]]), jax.random.key(0)
    still = ddpg.ou_step(noise, jnp.array([False, True]), key, 0.15, 0.0)
    assert still[:, 0] == pytest.approx([0.85, 0.0])  # an episode begins without the last one's

    def step(noise, key):
        noise = ddpg.ou_step(noise, jnp.zeros(64, bool), key, 0.15, 0.2)
        return noise, noise

    _, path = jax.lax.scan(step, jnp.zeros((64, 1)), jax.random.split(key, 2_000))
    path = np.asarray(path[100:, :, 0])
    assert path.std() == pytest.approx(0.2 / np.sqrt(1 - 0.85**2), rel=0.05)
    correlation = (path[1:] * path[:-1]).mean() / (path**2).mean()
    assert correlation == pytest.approx(0.85, abs=0.02)


def test_noise_on_parameters_leaves_layer_norms_alone():
    net = ActorNet((4, 4), 2, layer_norm=True)
    params = net.init(jax.random.key(0), jnp.zeros(3))
    mask = ddpg.perturbable(params)
    moved = ddpg.perturb(params, mask * jnp.ones(mask.size), jnp.float32(0.5))
    difference = jax.tree.map(lambda a, b: a - b, moved, params)["params"]["MLP_0"]
    for name, layer in difference.items():
        expected = 0.0 if "LayerNorm" in name else 0.5
        for leaf in layer.values():
            np.testing.assert_allclose(leaf, expected, atol=1e-6)
    assert sum("LayerNorm" in name for name in difference) == 2
    assert mask.sum() == mask.size - 2 * 2 * 4


def test_sigma_adapts_to_what_the_noise_does():
    assert ddpg.adapt(jnp.float32(1.0), jnp.float32(0.1), 0.2, 1.01) == pytest.approx(1.01)
    assert ddpg.adapt(jnp.float32(1.0), jnp.float32(0.3), 0.2, 1.01) == pytest.approx(1 / 1.01)


# promises -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("noise", ["ou", "parameter"])
def test_chunks_equal_one_program_bit_for_bit(noise):
    checks.check_chunks(ddpg, noise=noise, layer_norm=noise == "parameter")


def test_noise_on_parameters_lasts_an_episode_in_each_environment():
    """Pendulum's episodes have 200 steps: the noise changes there, everywhere, and only there."""
    train = checks.pendulum(
        ddpg, noise="parameter", num_steps=40, total_steps=4 * 40 * 6, num_gradient_steps=1
    )
    state = jax.jit(train.init)(jax.random.key(0))
    update, noises = jax.jit(train.update), [state.noise]
    for _ in range(6):
        state, metrics = update(state)
        noises.append(state.noise)
    num_params = ravel_pytree(state.learner.policy)[0].size
    assert noises[0].shape == (4, num_params)
    assert not np.allclose(noises[0][0], noises[0][1])
    for i in range(1, 5):
        np.testing.assert_array_equal(noises[i], noises[0])
    assert (np.asarray(noises[5]) != np.asarray(noises[0])).all()  # after 200 steps
    np.testing.assert_array_equal(noises[6], noises[5])
    assert metrics["noise_distance"] > 0


def test_the_noise_moves_actions_as_much_as_asked():
    """From a sigma far too small and one far too large, for a policy that hardly changes."""
    env, params = gymnax.make("Pendulum-v1")
    settings = dict(noise="parameter", exploration_noise=0.2, total_steps=4 * 100 * 20)
    config = ddpg.Config(**(checks.SMALL | settings | dict(num_steps=100, learning_rate=1e-7)))

    def distance(sigma_start):
        train = ddpg.make_train(config.replace(sigma_start=sigma_start), env, params)
        return train(jax.random.key(0))[1]["noise_distance"]

    small, large = np.asarray(jax.jit(jax.vmap(distance))(jnp.array([1e-3, 2.0])))
    assert small[0] < 0.1
    assert large[0] > 0.3
    # half of the draws move less than 0.2; few move much more, so that the mean lies above
    assert 0.2 < small[-5:].mean() < 0.28
    assert 0.2 < large[-5:].mean() < 0.28


def test_two_seeds_differ_from_the_start():
    checks.check_seeds_differ(ddpg, ("policy", "critic"))


@pytest.mark.slow
@pytest.mark.parametrize("noise", ["ou", "parameter"])
def test_vmap_over_the_real_settings_equals_single_runs(noise):
    # 0.9 of the default factor 1.01 would be no factor
    checks.check_sweep(ddpg, noise=noise, sigma_factor=1.2)


def test_all_real_settings_are_leaves_and_sizes_are_not():
    checks.check_leaves(ddpg)


def test_a_saved_policy_acts_as_the_trained_one(tmp_path):
    checks.check_saved(ddpg, tmp_path, layer_norm=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(num_envs=0), "num_envs = 0 must be an integer >= 1"),
        (dict(noise="pink"), "noise = 'pink' must be one of 'gaussian', 'ou', 'parameter'"),
        (dict(tau=0.0), r"tau = 0.0 must lie in \(0.0, 1.0\]"),
        (dict(learning_rate=0.0), "learning_rate = 0.0 must lie in"),
        (dict(exploration_noise=-0.1), "exploration_noise = -0.1 must lie in"),
        (dict(ou_theta=1.5), "ou_theta = 1.5 must lie in"),
        (dict(sigma_start=0.0), "sigma_start = 0.0 must lie in"),
        (dict(sigma_factor=1.0), "sigma_factor = 1.0 must lie in"),
        (dict(hidden=(64, 0)), r"hidden = \(64, 0\)"),
    ],
)
def test_bad_settings_are_refused_in_words(change, words):
    checks.check_refused(ddpg, "Pendulum-v1", change, words)


def test_discrete_actions_are_refused():
    checks.check_refused(ddpg, "CartPole-v1", {}, "DDPG needs real actions, .* 2 discrete ones")


# what it learns -----------------------------------------------------------------------------------

PROBE = ddpg.Config(**checks.PROBE, exploration_noise=0.3)


@pytest.fixture(scope="module")
def learnt():
    return checks.Learnt(ddpg, PROBE)


def test_probe_values(learnt):
    net = CriticNet(PROBE.hidden, PROBE.activation)

    def q(learner, obs, action):
        return net.values(learner.critic, obs, action)

    checks.check_values(learnt, q)


def test_probe_real_actions(learnt):
    checks.check_real_actions(learnt)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        dict(noise="gaussian"),
        dict(noise="parameter", exploration_noise=0.2, layer_norm=True, hidden=(32, 32)),
    ],
    ids=lambda settings: settings["noise"],
)
def test_learns_pendulum(settings):
    """>= -170 mean return over 8 seeds within 30k steps."""
    config = ddpg.Config(**(checks.PENDULUM | settings))
    score = checks.scores(ddpg, "Pendulum-v1", config)
    assert score.mean() >= -170.0, score
