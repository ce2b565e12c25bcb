"""Tabular Q-learning, SARSA and expected SARSA.

Watkins & Dayan (1992, https://doi.org/10.1007/BF00992698); Sutton & Barto (2018, section 6.4 to
6.6). After each step, with the table as it was before it,

    Q(s, a) += alpha (r + gamma (1 - terminated) V - Q(s, a)),

    Q-learning      V = max_a' Q(s', a')                 (their eq. 6.8)
    SARSA           V = Q(s', a'), a' the next action    (eq. 6.7)
    expected SARSA  V = sum_a' pi(a' | s') Q(s', a')     (eq. 6.9)

where pi is the epsilon-greedy policy that acts, ties shared equally. Q-learning finds the optimal
Q, the other two that of the epsilon-greedy policy. An episode cut by its time limit goes on in V,
from the observation before the reset; SARSA's a' is then the one that would have been drawn there.

The step size is alpha = learning_rate / n^learning_rate_power, n the updates of (s, a) so far: a
power of 0 is a constant, right for deterministic problems; between 1/2 and 1 the table converges in
stochastic ones (Even-Dar & Mansour 2003, https://www.jmlr.org/papers/v5/evendar03a.html).

Environments are stepped side by side. If several take the same action in the same state, the pair
is updated once, by the mean of their increments.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxrl import planning, rollout, spaces
from jaxrl.checks import check_choice, check_count, check_real
from jaxrl.types import Env, Metrics, Policy, Train

METHODS = ("q_learning", "sarsa", "expected_sarsa")


@struct.dataclass
class Config:
    """Settings of tabular learning. Reals are leaves, so `vmap` sweeps them; the rest is static."""

    total_steps: int = struct.field(pytree_node=False, default=200_000)
    """Environment steps of the whole run, all environments together."""
    num_envs: int = struct.field(pytree_node=False, default=8)
    """Environments stepped in parallel."""
    num_steps: int = struct.field(pytree_node=False, default=50)
    """Steps of each environment in one update, a row of the metrics; each step is learnt from."""
    method: str = struct.field(pytree_node=False, default="q_learning")
    """What follows a step: "q_learning", "sarsa" or "expected_sarsa"."""
    learning_rate: float = 1.0
    """Step size of the first update of each state and action."""
    learning_rate_power: float = 0.8
    """Divide the step size by this power of the number of updates; 0: constant."""
    gamma: float = 0.99
    """Discount."""
    epsilon_start: float = 1.0
    """Share of random actions at the start."""
    epsilon_end: float = 0.1
    """Share of random actions at the end."""
    epsilon_fraction: float = 0.5
    """Share of the run in which epsilon falls linearly from its start to its end."""
    initial_q: float = 0.0
    """What all entries of the table are before they are learnt."""


@struct.dataclass
class TrainState:
    """Everything that changes during training: saving it is a checkpoint."""

    q: jax.Array  # (num_states, num_actions)
    num_visits: jax.Array  # (num_states, num_actions) float32 updates of each entry
    actors: rollout.Actors
    action: jax.Array  # (num_envs,) int32 SARSA's next action; not used by the others
    key: jax.Array
    num_updates: jax.Array  # () int32

    @property
    def params(self) -> jax.Array:
        """What is trained."""
        return self.q


def next_value(
    method: str, next_q: jax.Array, next_action: jax.Array, epsilon: float | jax.Array
) -> jax.Array:
    """V of the next state, see the module: next_q (..., A), next_action (...) -> (...)."""
    if method == "q_learning":
        return next_q.max(axis=-1)
    if method == "sarsa":
        return jnp.take_along_axis(next_q, next_action[..., None], axis=-1)[..., 0]
    return (planning.epsilon_greedy(next_q, epsilon) * next_q).sum(axis=-1)


def update_table(
    q: jax.Array,
    num_visits: jax.Array,
    state: jax.Array,
    action: jax.Array,
    target: jax.Array,
    learning_rate: float | jax.Array,
    learning_rate_power: float | jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Move the entries of (state, action) toward their targets, each by the mean of its increments.

    q, num_visits (S, A); state, action, target (N,) -> new q, new num_visits, TD errors (N,).
    """
    td_error = target - q[state, action]
    count = jnp.zeros_like(q).at[state, action].add(1.0)
    total = jnp.zeros_like(q).at[state, action].add(td_error)
    visited = count > 0
    num_visits = num_visits + visited
    alpha = learning_rate * jnp.maximum(num_visits, 1.0) ** -learning_rate_power
    mean = total / jnp.maximum(count, 1.0)
    return jnp.where(visited, q + alpha * mean, q), num_visits, td_error


def draw(q: jax.Array, epsilon: float | jax.Array, key: jax.Array) -> jax.Array:
    """Draw from the epsilon-greedy policy: q (..., A) -> (...) int32."""
    log_prob = jnp.log(planning.epsilon_greedy(q, epsilon))
    return jax.random.categorical(key, log_prob, axis=-1).astype(jnp.int32)


def num_states(env: Env, env_params: Any) -> int:
    """The number of different observations, indices or one-hot vectors.

    Raises:
        ValueError: the observation is neither.
    """
    with jax.ensure_compile_time_eval():
        space: Any = env.observation_space(env_params)
        if hasattr(space, "n"):
            return int(space.n)
        shape = spaces.obs_shape(space)
        if len(shape) == 1 and hasattr(space, "low"):
            low, high = np.asarray(space.low), np.asarray(space.high)
            if (low == 0).all() and (high == 1).all():
                return shape[0]
    raise ValueError(
        f"observation space {space!r} is not supported by a table: it must be Discrete, or Box "
        "with shape (n,) and bounds 0 and 1 that holds one-hot vectors"
    )


def read_obs(obs: jax.Array, obs_shape: tuple[int, ...], num_states: int):
    """Return (index int32, whether the observation is an index or one-hot): (*batch, *obs_shape)
    -> (*batch).
    """
    if obs_shape == ():
        index = obs.astype(jnp.int32)
        return jnp.clip(index, 0, num_states - 1), (index >= 0) & (index < num_states)
    is_one_hot = ((obs == 0) | (obs == 1)).all(axis=-1) & (obs.sum(axis=-1) == 1)
    return jnp.argmax(obs, axis=-1).astype(jnp.int32), is_one_hot


def check_config(config: Config, env: Env, env_params: Any) -> None:
    """Raise ValueError, naming field, value and remedy, if the settings can't work with `env`."""
    for name in ("total_steps", "num_envs", "num_steps"):
        check_count(name, getattr(config, name))
    check_choice("method", config.method, METHODS)
    check_real("learning_rate", config.learning_rate, 0.0, 1.0, above=True)
    check_real("learning_rate_power", config.learning_rate_power, 0.0, 1.0)
    for name in ("gamma", "epsilon_start", "epsilon_end", "epsilon_fraction"):
        check_real(name, getattr(config, name), 0.0, 1.0)
    check_real("initial_q", config.initial_q, -math.inf, math.inf)
    num_states(env, env_params)
    action, _ = spaces.read(env, env_params)
    if not isinstance(action, spaces.Discrete):
        raise ValueError(f"a table needs discrete actions, but this environment has {action}")


def make_act(
    config: Config, action: spaces.ActionSpec, obs_shape: tuple[int, ...]
) -> Callable[..., jax.Array]:
    """Return `act(policy, obs, key=None) -> action`, pure; obs (*batch, *obs_shape).

    The action is the best one, the lowest of equals; given a key, one drawn with epsilon_end.
    """
    del action

    def act(policy: Policy, obs: jax.Array, key: jax.Array | None = None) -> jax.Array:
        table = jnp.asarray(policy.params["q"])  # as saved: NumPy
        index, _ = read_obs(jnp.asarray(obs), obs_shape, table.shape[0])
        q = table[index]
        return q.argmax(axis=-1) if key is None else draw(q, config.epsilon_end, key)

    return act


def get_policy(state: TrainState) -> Policy:
    """Take what acting needs out of a train state: the table."""
    return Policy({"q": state.q}, None)


def make_train(config: Config, env: Env, env_params: Any) -> Train[TrainState]:
    """Return the whole training run, `train(key) -> (state, metrics)`: pure, jit it, vmap it.

    `vmap` over keys trains many seeds; `vmap` over real fields of `config` sweeps them, as in
    `ppo.make_train`. Metrics have a leading axis (num_updates,); those of episodes are NaN where
    none ended. An observation that is no index and not one-hot turns the table into NaN: it cannot
    be refused while the program runs.

    Raises:
        ValueError: `config` cannot work (see `check_config`).

    Warns:
        UserWarning: `total_steps` is not a whole number of updates and is rounded up.
    """
    check_config(config, env, env_params)
    # swept reals may come as float64 where x64 is on; the loop's carry is float32
    config = jax.tree.map(
        lambda x: x.astype(jnp.float32) if isinstance(x, jax.Array) else x, config
    )
    steps_per_update = config.num_envs * config.num_steps
    num_updates = -(-config.total_steps // steps_per_update)
    if num_updates * steps_per_update != config.total_steps:
        warnings.warn(
            f"total_steps = {config.total_steps} is not a multiple of num_envs * num_steps = "
            f"{steps_per_update}: {num_updates * steps_per_update} steps will be run",
            stacklevel=2,
        )
    action_spec, obs_shape = spaces.read(env, env_params)
    assert isinstance(action_spec, spaces.Discrete)  # see check_config
    size = num_states(env, env_params)

    def see(obs: jax.Array) -> tuple[jax.Array, jax.Array]:
        return read_obs(obs, obs_shape, size)

    def epsilon_at(step: jax.Array) -> jax.Array:
        """Step: of each environment, counted from 0."""
        fall = config.epsilon_fraction * num_updates * config.num_steps
        done = jnp.clip(jnp.float32(step) / jnp.maximum(fall, 1e-6), 0.0, 1.0)
        epsilon = config.epsilon_start + done * (config.epsilon_end - config.epsilon_start)
        return epsilon.astype(jnp.float32)  # with x64 too

    def init(key: jax.Array) -> TrainState:
        key, key_env, key_act = jax.random.split(key, 3)
        actors = rollout.reset(env, env_params, key_env, config.num_envs)
        q = jnp.full((size, action_spec.n), config.initial_q, jnp.float32)
        index, _ = see(actors.obs)
        return TrainState(
            q=q,
            num_visits=jnp.zeros_like(q),
            actors=actors,
            action=draw(q[index], epsilon_at(jnp.zeros(())), key_act),
            key=key,
            num_updates=jnp.zeros((), jnp.int32),
        )

    def one_step(state: TrainState, inputs):
        step, key = inputs
        key_act, key_env, key_next, key_reset = jax.random.split(key, 4)
        epsilon = epsilon_at(step)
        index, known = see(state.actors.obs)
        action = state.action
        if config.method != "sarsa":  # SARSA has chosen it already
            action = draw(state.q[index], epsilon, key_act)
        actors, transition, ended = rollout.step(env, env_params, state.actors, action, key_env)

        next_index, next_known = see(transition.next_obs)
        next_q = state.q[next_index]
        next_action = state.action
        if config.method == "sarsa":
            next_action = draw(next_q, epsilon, key_next)
        value = next_value(config.method, next_q, next_action, epsilon)
        target = transition.reward + config.gamma * jnp.where(transition.terminated, 0.0, value)
        target = jnp.where(known & (next_known | transition.terminated), target, jnp.nan)
        q, num_visits, td_error = update_table(
            state.q,
            state.num_visits,
            index,
            action,
            target,
            config.learning_rate,
            config.learning_rate_power,
        )
        if config.method == "sarsa":
            # after the end of an episode the next action is one for the next episode's start
            done = transition.terminated | transition.truncated
            first_index, _ = see(actors.obs)
            first_action = draw(state.q[first_index], epsilon, key_reset)
            next_action = jnp.where(done, first_action, next_action)
        state = replace(state, q=q, num_visits=num_visits, actors=actors, action=next_action)
        return state, (jnp.abs(td_error).mean(), epsilon, ended)

    def update(state: TrainState) -> tuple[TrainState, Metrics]:
        key, key_steps = jax.random.split(state.key)
        steps = state.num_updates * config.num_steps + jnp.arange(config.num_steps)
        keys = jax.random.split(key_steps, config.num_steps)
        state, (td_error, epsilon, ended) = jax.lax.scan(one_step, state, (steps, keys))
        visited = state.num_visits > 0
        metrics = {
            "td_error": td_error.mean(),
            "epsilon": epsilon[-1],
            "visited": visited.mean(),  # share of the table
            "q_mean": jnp.where(visited, state.q, 0.0).sum() / jnp.maximum(visited.sum(), 1),
            **jax.tree.map(jnp.sum, ended).metrics(),
        }
        return replace(state, key=key, num_updates=state.num_updates + 1), metrics

    return Train(init, update, num_updates, steps_per_update)
