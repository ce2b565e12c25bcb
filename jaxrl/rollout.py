"""Environments stepped in parallel, and policies evaluated over whole episodes."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxrl.types import Env, Transition


@struct.dataclass
class Actors:
    """`num_envs` environments in the middle of their episodes; every leaf has that leading axis."""

    obs: Any  # (num_envs, *obs_shape) what the policy sees next
    env_state: Any
    episode_return: jax.Array  # (num_envs,) float32 undiscounted, of the running episode
    episode_length: jax.Array  # (num_envs,) int32


@struct.dataclass
class EndedEpisodes:
    """Sums over the episodes that ended in one step; sum over steps to join them."""

    count: jax.Array  # () float32
    total_return: jax.Array  # ()
    total_length: jax.Array  # ()
    num_successes: jax.Array | None  # () None where the environment has no info["success"]

    def metrics(self) -> dict[str, jax.Array]:
        """Means over the episodes; NaN, meaning "nothing ended", where there were none."""
        n = jnp.where(self.count > 0, self.count, jnp.nan)
        means = {
            "num_episodes": self.count,
            "episode_return": self.total_return / n,
            "episode_length": self.total_length / n,
        }
        if self.num_successes is not None:
            means["success_rate"] = self.num_successes / n
        return means


def reset(env: Env, env_params: Any, key: jax.Array, num_envs: int) -> Actors:
    """Start `num_envs` episodes."""
    keys = jax.random.split(key, num_envs)
    obs, env_state = jax.vmap(env.reset, in_axes=(0, None))(keys, env_params)
    return Actors(obs, env_state, jnp.zeros(num_envs), jnp.zeros(num_envs, jnp.int32))


def step(
    env: Env, env_params: Any, actors: Actors, env_action: jax.Array, key: jax.Array
) -> tuple[Actors, Transition, EndedEpisodes]:
    """Step every environment once, auto-reset included.

    `env_action` (num_envs, ...) is in the environment's own units; the transition holds it too
    (replace it if the learner needs the drawn value).
    """
    num_envs = actors.episode_length.shape[0]
    keys = jax.random.split(key, num_envs)
    obs, env_state, reward, terminated, truncated, info = jax.vmap(
        env.step, in_axes=(0, 0, 0, None)
    )(keys, actors.env_state, env_action, env_params)
    done = terminated | truncated
    reward = reward.astype(jnp.float32)
    episode_return = actors.episode_return + reward
    episode_length = actors.episode_length + 1
    success = info.get("success")
    ended = EndedEpisodes(
        count=done.sum(dtype=jnp.float32),
        total_return=jnp.where(done, episode_return, 0.0).sum(),
        total_length=jnp.where(done, episode_length, 0).sum(dtype=jnp.float32),
        num_successes=None if success is None else (success & done).sum(dtype=jnp.float32),
    )
    transition = Transition(
        actors.obs, env_action, reward, terminated, truncated, info["final_observation"]
    )
    actors = Actors(
        obs,
        env_state,
        jnp.where(done, 0.0, episode_return),
        jnp.where(done, 0, episode_length),
    )
    return actors, transition, ended


@struct.dataclass
class Episodes:
    """Whole episodes, one per row; every leaf has the leading axis (num_episodes,)."""

    returns: jax.Array  # float32 undiscounted
    discounted_returns: jax.Array  # float32
    lengths: jax.Array  # int32 steps
    terminated: jax.Array  # bool
    truncated: jax.Array  # bool
    info: dict[str, Any]  # the last step's info, without final_observation


def evaluate(
    env: Env,
    env_params: Any,
    act: Callable[[jax.Array, jax.Array], jax.Array],
    key: jax.Array,
    num_episodes: int,
    gamma: float = 0.99,
) -> Episodes:
    """Run one episode in each of `num_episodes` fresh environments, all at once.

    Args:
        env, env_params: any gymnax environment; it must end every episode (by its time limit).
        act: `act(obs, key) -> action` for one observation, action in the environment's units.
        key: decides starts, the environment's noise and the policy's.
        num_episodes: how many.
        gamma: discount of `discounted_returns`.

    The loop runs until the longest episode ends; an ended environment is left alone.
    """

    def one_step(carry):
        key, obs, env_state, done, discount, episodes = carry
        key, key_act, key_env = jax.random.split(key, 3)
        action = jax.vmap(act)(obs, jax.random.split(key_act, num_episodes))
        obs, env_state, reward, terminated, truncated, info = jax.vmap(
            env.step, in_axes=(0, 0, 0, None)
        )(jax.random.split(key_env, num_episodes), env_state, action, env_params)
        info = {k: v for k, v in info.items() if k != "final_observation"}

        def keep(new, old):
            """Take `new` where the episode still runs."""
            return jnp.where(done.reshape(done.shape + (1,) * (new.ndim - 1)), old, new)

        episodes = Episodes(
            returns=keep(episodes.returns + reward, episodes.returns),
            discounted_returns=keep(
                episodes.discounted_returns + discount * reward, episodes.discounted_returns
            ),
            lengths=keep(episodes.lengths + 1, episodes.lengths),
            terminated=keep(terminated, episodes.terminated),
            truncated=keep(truncated & ~terminated, episodes.truncated),
            info=jax.tree.map(keep, info, episodes.info),
        )
        return key, obs, env_state, done | terminated | truncated, discount * gamma, episodes

    key, key_reset = jax.random.split(key)
    obs, env_state = jax.vmap(env.reset, in_axes=(0, None))(
        jax.random.split(key_reset, num_episodes), env_params
    )
    no, zero = jnp.zeros(num_episodes, bool), jnp.zeros(num_episodes)
    # the info's structure is known only by tracing one step
    info = jax.eval_shape(
        lambda k, s, o: jax.vmap(env.step, in_axes=(0, 0, 0, None))(
            jax.random.split(k, num_episodes),
            s,
            jax.vmap(act)(o, jax.random.split(k, num_episodes)),
            env_params,
        )[5],
        key,
        env_state,
        obs,
    )
    info = {
        k: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), v)
        for k, v in info.items()
        if k != "final_observation"
    }
    episodes = Episodes(zero, zero, jnp.zeros(num_episodes, jnp.int32), no, no, info)
    carry = (key, obs, env_state, no, jnp.ones(()), episodes)
    return jax.lax.while_loop(lambda c: ~c[3].all(), one_step, carry)[-1]
