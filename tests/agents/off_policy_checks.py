"""What the tests of all learners from replay share: training on probes, scores, promises."""

import dataclasses
from typing import Any

import gymnax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

import jaxrl
from jaxrl import policy, rollout, spaces
from tests import probes

SMALL: dict[str, Any] = dict(
    total_steps=4 * 8 * 6,
    num_envs=4,
    num_steps=8,
    train_every=2,
    num_gradient_steps=3,
    batch_size=16,
    buffer_size=100,
    learning_starts=40,
    hidden=(8, 8),
)
PROBE: dict[str, Any] = dict(
    total_steps=16 * 3_000,
    num_envs=16,
    num_steps=100,
    batch_size=64,
    num_gradient_steps=1,
    buffer_size=2_000,
    learning_starts=500,
    learning_rate=3e-3,
    gamma=0.9,
    tau=0.05,
    hidden=(32, 32),
)


def assert_same(a: Any, b: Any) -> None:
    """Bit for bit: NaN equals NaN, keys are compared by their data."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(x, y)


def pendulum(agent: Any, **settings: Any) -> Any:
    """The small run on Pendulum."""
    env, params = gymnax.make("Pendulum-v1")
    return agent.make_train(agent.Config(**(SMALL | settings)), env, params)


def check_chunks(agent: Any, **settings: Any) -> None:
    """Chunks equal one program bit for bit."""
    train = pendulum(agent, **settings)
    whole_state, whole = jax.jit(train)(jax.random.key(3))
    chunk = jax.jit(train.run, static_argnums=1)
    state, parts = jax.jit(train.init)(jax.random.key(3)), []
    for _ in range(3):
        state, metrics = chunk(state, 2)
        parts.append(metrics)
    assert_same(state, whole_state)
    assert_same(jax.tree.map(lambda *m: jnp.concatenate(m), *parts), whole)
    learnt = np.asarray(whole["num_gradient_steps"])
    assert learnt.sum() == (24 - 4) * 3  # 24 rounds of 8 steps; 40 steps are there after the fifth
    for name in whole:
        if name not in ("episode_return", "episode_length"):  # NaN: no episode of 200 has ended
            assert np.isfinite(whole[name]).all(), name


def check_seeds_differ(agent: Any, nets: tuple[str, ...]) -> None:
    """A shared key would show: networks, starts and the loop's key all differ."""
    init = jax.jit(pendulum(agent).init)
    a, b = (init(jax.random.key(i)) for i in (0, 1))
    for net in nets:
        x, y = (getattr(s.learner, net)["params"]["MLP_0"]["Dense_0"]["kernel"] for s in (a, b))
        assert not np.allclose(x, y), net
    assert not np.allclose(a.actors.obs, b.actors.obs)
    assert not np.array_equal(jax.random.key_data(a.key), jax.random.key_data(b.key))


def check_sweep(agent: Any, **settings: Any) -> None:
    """`vmap` over every real field at once, each with two values, equals single runs."""
    env, params = gymnax.make("Pendulum-v1")
    config = agent.Config(**(SMALL | settings))
    factors = jnp.array([1.0, 0.9])
    configs = jax.tree.map(lambda x: x * factors, config)
    key = jax.random.key(0)

    def run(config: Any) -> Any:
        return agent.make_train(config, env, params)(key)[1]

    many = jax.jit(jax.vmap(run))(configs)
    for i in range(2):
        one = jax.jit(run)(jax.tree.map(lambda x, i=i: float(x[i]), configs))
        for name in ("critic_loss", "policy_loss", "q"):
            np.testing.assert_allclose(many[name][i], one[name], rtol=2e-2, atol=1e-3)
    assert not np.allclose(many["critic_loss"][0], many["critic_loss"][1])


def check_leaves(agent: Any) -> None:
    """All reals are leaves, and sizes are not."""
    config = agent.Config()
    names = {f.name for f in dataclasses.fields(config)}
    static = {f.name for f in dataclasses.fields(config) if f.metadata.get("pytree_node") is False}
    reals = {n for n in names if isinstance(getattr(config, n), float)}
    assert reals == names - static
    assert len(jax.tree.leaves(config)) == len(reals)


def check_refused(agent: Any, env_id: str, change: dict[str, Any], words: str) -> None:
    """The setting is refused before anything is compiled."""
    env, params = gymnax.make(env_id)
    with pytest.raises(ValueError, match=words):
        agent.make_train(agent.Config(**(SMALL | change)), env, params)


def check_saved(agent: Any, path: Any, env_id: str = "Pendulum-v1", **settings: Any) -> None:
    """A saved policy acts as the one in memory, normaliser included."""
    env, params = gymnax.make(env_id)
    config = agent.Config(**(SMALL | dict(normalize_obs=True) | settings))
    state, _ = jax.jit(agent.make_train(config, env, params))(jax.random.key(0))
    assert state.obs_stats.count == SMALL["total_steps"]
    action, shape = spaces.read(env, params)
    saved = policy.SavedPolicy(
        agent=agent.__name__.rpartition(".")[2],
        config=config,
        action=action,
        obs_shape=shape,
        env=env_id,
        env_kwargs={},
        seed=0,
        policy=agent.get_policy(state),
    )
    policy.save_policy(path / "policy.msgpack", saved)
    obs = jax.random.normal(jax.random.key(1), (5, *shape))
    act = jaxrl.load_policy(path)
    expected = agent.make_act(config, action, shape)(agent.get_policy(state), obs)
    np.testing.assert_allclose(act(obs), expected, rtol=1e-5)
    assert act(obs).shape == expected.shape
    drawn = act(np.tile(np.asarray(obs[:1]), (64, *(1,) * len(shape))), seed=3)
    assert len(np.unique(drawn)) > 1
    if isinstance(action, spaces.Box):
        assert (drawn >= np.asarray(action.low)).all()
        assert (drawn <= np.asarray(action.high)).all()


@struct.dataclass
class WhichProbe(probes.Params):
    which: int | jax.Array = 0


class AnyProbe(probes.Probe):
    """The probe with the number `params.which`: one compiled program learns them all."""

    kinds = (
        probes.ConstantReward,
        probes.RewardIsObs,
        probes.TwoSteps,
        probes.ActionDecides,
        probes.CopyObs,
        probes.NeverEnds,
        probes.ResetIsWorthless,
    )

    @property
    def default_params(self):
        return WhichProbe()

    def reset_env(self, key, params):
        starts = jnp.stack([kind(self.continuous).start(key) for kind in self.kinds])
        state = probes.State(time=0, x=starts[params.which])
        return self.observe(key, state, None, params), state

    def step_env(self, key, state, action, params):
        steps = [kind(self.continuous).step_env(key, state, action, params) for kind in self.kinds]
        return jax.tree.map(lambda *x: jnp.stack(x)[params.which], *steps)


class Learnt:
    """What an agent learnt of each probe, in three seeds each."""

    def __init__(self, agent: Any, config: Any, continuous: bool = True):
        env = AnyProbe(continuous)
        which = jnp.arange(len(env.kinds))
        time_limit = jnp.array(
            [kind(continuous).default_params.max_steps_in_episode for kind in env.kinds]
        )
        every = WhichProbe(which=which, max_steps_in_episode=time_limit)

        def run(params: Any, key: jax.Array) -> Any:
            return agent.make_train(config, env, params)(key)

        state, self.metrics = jax.jit(jax.vmap(jax.vmap(run, (None, 0)), (0, None)))(
            every, jax.random.split(jax.random.key(0), 3)
        )
        self.learner, self.policy = state.learner, jax.vmap(jax.vmap(agent.get_policy))(state)
        self.act = agent.make_act(config, *spaces.read(env, env.default_params))

    def of(self, kind: Any, tree: Any) -> Any:
        """The part of one probe, leading axis seeds."""
        return jax.tree.map(lambda x: x[AnyProbe.kinds.index(kind)], tree)

    def action(self, kind: Any, o: float) -> np.ndarray:
        """Deterministic action of every seed."""
        policies = self.of(kind, self.policy)
        return np.asarray(jax.vmap(lambda p: self.act(p, jnp.array([o])))(policies))

    def value(self, kind: Any, q: Any, o: float) -> np.ndarray:
        """Return `q(learner, obs (1,), action)` of every seed, for the action it would take."""
        learner, action = self.of(kind, self.learner), self.action(kind, o)
        return np.asarray(jax.vmap(lambda p, a: q(p, jnp.array([o]), a))(learner, action))


def check_values(learnt: Learnt, q: Any) -> None:
    """All probes of the value, exact; q as `Learnt.value` takes it, gamma = 0.9."""
    expected = [
        (probes.ConstantReward, 0.0, 1.0),
        (probes.ActionDecides, 0.0, 1.0),
        (probes.RewardIsObs, 1.0, 1.0),
        (probes.RewardIsObs, -1.0, -1.0),
        (probes.TwoSteps, 0.0, 0.9),
        (probes.TwoSteps, 1.0, 1.0),
        (probes.NeverEnds, 0.0, 10.0),  # 1 / (1 - 0.9); 4.1 if a time limit means an end
        (probes.ResetIsWorthless, 0.0, 10.0),  # less if bootstrapped from after the reset
        (probes.ResetIsWorthless, -1.0, 9.0),
    ]
    for kind, o, value in expected:
        got = learnt.value(kind, q, o)
        np.testing.assert_allclose(got, value, rtol=0.03, atol=0.03, err_msg=f"{kind} {o}")


def check_real_actions(learnt: Learnt) -> None:
    """All probes of the policy, for real actions."""
    assert (learnt.action(probes.ActionDecides, 0.0) > 0.95).all()
    for o in (0.5, -0.5):
        np.testing.assert_allclose(learnt.action(probes.CopyObs, o), o, atol=0.1)


def scores(agent: Any, env_id: str, config: Any, num_seeds: int = 8) -> np.ndarray:
    """Mean return of 64 episodes of the deterministic policy, per seed, after training."""
    env, params = gymnax.make(env_id)
    train = agent.make_train(config, env, params)
    state, _ = jax.jit(jax.vmap(train))(jax.random.split(jax.random.key(0), num_seeds))
    act = agent.make_act(config, *spaces.read(env, params))

    def evaluate(policy: Any, key: jax.Array) -> jax.Array:
        episodes = rollout.evaluate(env, params, lambda obs, _: act(policy, obs), key, 64)
        return episodes.returns.mean()

    keys = jax.random.split(jax.random.key(1), num_seeds)
    return np.asarray(jax.jit(jax.vmap(evaluate))(jax.vmap(agent.get_policy)(state), keys))


PENDULUM: dict[str, Any] = dict(
    total_steps=30_000,
    num_envs=4,
    num_steps=250,
    num_gradient_steps=1,
    batch_size=128,
    buffer_size=30_000,
    learning_rate=2e-3,
    gamma=0.98,
    tau=0.02,
)
