"""Saved policies: the same actions come back, and a bad file is refused in words."""

import dataclasses

import flax.serialization
import gymnax
import jax
import numpy as np
import pytest

import jaxrl
from jaxrl import policy as policies
from jaxrl import spaces
from jaxrl.agents import ppo

CONFIG = ppo.Config(total_steps=64, num_envs=4, num_steps=16, hidden=(8,))


def trained(name="Pendulum-v1", config=CONFIG):
    env, params = gymnax.make(name)
    state, _ = jax.jit(ppo.make_train(config, env, params))(jax.random.key(0))
    return policies.SavedPolicy(
        agent="ppo",
        config=config,
        action=spaces.action_spec(env.action_space(params)),
        obs_shape=spaces.obs_shape(env.observation_space(params)),
        env=name,
        env_kwargs={},
        seed=0,
        policy=ppo.get_policy(state),
    )


@pytest.fixture(scope="module")
def saved():
    return trained()


@pytest.fixture
def path(saved, tmp_path):
    policies.save_policy(tmp_path / "policy.msgpack", saved)
    return tmp_path / "policy.msgpack"


def test_loaded_policy_acts_as_the_one_in_memory(saved, path):
    obs = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    act = jaxrl.load_policy(path)
    np.testing.assert_allclose(act(obs), saved.act_fn()(saved.policy, obs), rtol=1e-6)
    assert act(obs).shape == (6, 1)
    assert act(obs[0]).shape == (1,)
    assert isinstance(act(obs), np.ndarray)
    np.testing.assert_array_equal(jaxrl.load_policy(path.parent)(obs), act(obs))  # a run folder


def test_the_normaliser_is_saved_and_applied(saved, path):
    assert saved.policy.obs_stats.count == 64
    obs = np.array([1.0, 0.5, 4.0], np.float32)
    plain = dataclasses.replace(saved, policy=saved.policy.replace(obs_stats=None))
    assert jaxrl.load_policy(path)(obs) != pytest.approx(plain.act_fn()(plain.policy, obs))


def test_drawn_actions_need_a_seed_and_repeat(path):
    act = jaxrl.load_policy(path)
    obs = np.zeros((50, 3))
    assert np.ptp(act(obs)) < 1e-6
    assert len(np.unique(act(obs, seed=1))) == 50
    np.testing.assert_array_equal(act(obs, seed=1), act(obs, seed=1))


def test_everything_comes_back(saved, path):
    read = policies.read_policy(path)
    for field in ("agent", "config", "action", "obs_shape", "env", "env_kwargs", "seed"):
        assert getattr(read, field) == getattr(saved, field), field


def test_discrete_actions_are_integers(tmp_path):
    policies.save_policy(tmp_path / "p", trained("CartPole-v1"))
    action = jaxrl.load_policy(tmp_path / "p")(np.zeros((3, 4)))
    assert action.dtype == np.int32
    assert set(action) <= {0, 1}


def test_nothing_is_overwritten(saved, path):
    before = path.read_bytes()
    with pytest.raises(FileExistsError):
        policies.save_policy(path, saved)
    assert path.read_bytes() == before


def test_nan_params_are_refused_both_ways(saved, path, tmp_path):
    broken = dataclasses.replace(
        saved, policy=jax.tree.map(lambda x: np.full_like(x, np.nan), saved.policy)
    )
    with pytest.raises(ValueError, match=r"seed 0: .*not finite"):
        policies.save_policy(tmp_path / "broken", broken)
    assert not (tmp_path / "broken").exists()
    content = flax.serialization.msgpack_restore(path.read_bytes())
    content["params"]["params"]["log_std"] = np.array([np.nan], np.float32)
    (tmp_path / "nan").write_bytes(flax.serialization.msgpack_serialize(content))
    with pytest.raises(ValueError, match=r"log_std.* not finite"):
        jaxrl.load_policy(tmp_path / "nan")


@pytest.mark.parametrize("damage", ["empty", "cut", "text", "format", "agent"])
def test_damaged_files_are_refused_in_words(path, damage):
    content = path.read_bytes()
    restored = flax.serialization.msgpack_restore(content)
    damaged = {
        "empty": b"",
        "cut": content[: len(content) // 2],
        "text": b"hello",
        "format": flax.serialization.msgpack_serialize(restored | {"format": "other"}),
        "agent": flax.serialization.msgpack_serialize(restored | {"agent": "os"}),
    }[damage]
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"policy.msgpack is not a policy file of this version"):
        jaxrl.load_policy(path)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="give a run folder or a policy file"):
        jaxrl.load_policy(tmp_path)


@pytest.mark.parametrize(
    ("obs", "words"),
    [
        (np.zeros(4), r"obs has shape \(4,\), but the policy takes \(3,\)"),
        (np.full(3, np.nan), "finite"),
    ],
)
def test_bad_observations_are_refused_in_words(path, obs, words):
    with pytest.raises(ValueError, match=words):
        jaxrl.load_policy(path)(obs)
