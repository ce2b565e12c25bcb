"""Environments stepped in parallel, policies evaluated over episodes and from any one state."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxrl import draws
from jaxrl.checks import check_count, check_real
from jaxrl.types import Env, Transition

GYMNAX_STEP = "gymnax.environments.environment.Environment.step"  # named: importing gymnax is slow
MAX_START_BYTES = 2**20  # of episodes drawn before they may begin; beyond, memory costs more


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
    keys = draws.split(key, num_envs)
    obs, env_state = jax.vmap(env.reset, in_axes=(0, None))(keys, env_params)
    return Actors(obs, env_state, jnp.zeros(num_envs), jnp.zeros(num_envs, jnp.int32))


@struct.dataclass
class Draws:
    """What is random in one step of all environments, each leaf (num_envs, ...); see `draw`."""

    key: jax.Array  # of the environment's step
    start: tuple[Any, Any] | None  # (obs, state) of the episode that begins if this step ends one


def draw(env: Env, env_params: Any, key: jax.Array, num_steps: int, num_envs: int) -> Draws:
    """Draw ahead what is random in `num_steps` steps of `num_envs` environments, for `lax.scan`.

    Leaves are (num_steps, num_envs, ...). Random numbers cost least when many are drawn at once: in
    a step of a few small environments they are most of the work. Episodes are begun ahead only
    where they are no larger than MAX_START_BYTES together and the environment's `step` is gymnax's
    own, whose auto-reset `step` then does in its place.
    """
    own = getattr(type(env), "step", None)
    if own is not None and f"{own.__module__}.{own.__qualname__}" == GYMNAX_STEP:
        any_env: Any = env  # has all methods of gymnax's environments
        one = jax.eval_shape(any_env.reset_env, key, env_params)
        size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(one))
        if size * num_steps * num_envs <= MAX_START_BYTES:
            keys = draws.draw(jax.random.split, key, (2, num_steps * num_envs))
            start = jax.vmap(any_env.reset_env, (0, None))(keys[1], env_params)
            return jax.tree.map(
                lambda x: x.reshape(num_steps, num_envs, *x.shape[1:]), Draws(keys[0], start)
            )
    return Draws(draws.draw(jax.random.split, key, (num_steps, num_envs)), None)


def step(
    env: Env, env_params: Any, actors: Actors, env_action: jax.Array, key: jax.Array | Draws
) -> tuple[Actors, Transition, EndedEpisodes]:
    """Step every environment once, auto-reset included.

    `env_action` (num_envs, ...) is in the environment's own units; the transition holds it too
    (replace it if the learner needs the drawn value). `key`, or what was drawn ahead with it.
    """
    if not isinstance(key, Draws):
        key = Draws(jax.random.split(key, actors.episode_length.shape[0]), None)
    if key.start is None:
        obs, env_state, reward, terminated, truncated, info = jax.vmap(
            env.step, in_axes=(0, 0, 0, None)
        )(key.key, actors.env_state, env_action, env_params)
    else:
        obs, env_state, reward, terminated, truncated, info = jax.vmap(
            _step_and_start, in_axes=(None, 0, 0, 0, 0, None)
        )(env, key.key, key.start, actors.env_state, env_action, env_params)
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


def _step_and_start(env: Any, key, start, env_state, env_action, env_params):
    """What gymnax's `Environment.step` does, with the next episode's start given."""
    last_obs, env_state, reward, terminated, info = env.step_env(
        key, env_state, env_action, env_params
    )
    truncated = env.is_truncated(env_state, env_params)
    done = terminated | truncated
    obs, env_state = jax.tree.map(
        lambda new, old: jax.lax.select(done, new, old), start, (last_obs, env_state)
    )
    return obs, env_state, reward, terminated, truncated, {**info, "final_observation": last_obs}


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


@struct.dataclass
class ReturnEstimate:
    """The mean return of rollouts from one state, and what it rests on."""

    mean: jax.Array  # () float32 discounted
    standard_error: jax.Array  # () float32 of the mean; NaN of a single rollout, which has none
    num_terminated: jax.Array  # () int32 rollouts that came to an end of their own
    num_truncated: jax.Array  # () int32 rollouts that the time limit cut; the rest met max_steps
    num_steps: jax.Array  # () int32 environment steps, all rollouts together


@struct.dataclass
class _Rollouts:
    """Rollouts under way; every leaf has the leading axis (num_rollouts,)."""

    obs: Any
    env_state: Any
    last_obs: Any  # before auto-reset, of the last step that counted; () where it is not needed
    discount: jax.Array  # gamma^lengths
    returns: jax.Array
    lengths: jax.Array
    terminated: jax.Array
    truncated: jax.Array


def monte_carlo_return(
    env: Env,
    env_params: Any,
    env_state: Any,
    act: Callable[[jax.Array, jax.Array], jax.Array],
    key: jax.Array,
    num_rollouts: int,
    gamma: float | jax.Array = 0.99,
    *,
    max_steps: int = 1000,
    obs: Any = None,
    first_action: Any = None,
    value: Callable[[jax.Array], jax.Array] | None = None,
) -> ReturnEstimate:
    """Estimate the value of any one state, V(s) or Q(s, a), by rollouts of a policy from there.

    The mean of G = r_0 + gamma r_1 + gamma^2 r_2 + ... over independent rollouts (Sutton and Barto
    2018, section 5.1 and, for rollouts from the present state, 8.10); an environment's state is a
    value, so that it may come from the middle of an episode, which itself is not touched.

    A rollout ends where its episode does, or after `max_steps`. Beyond a terminal state nothing is
    earned. Beyond a time limit or `max_steps` something may be: `value` of the observation there is
    added, discounted; without `value` that tail counts as 0, and the estimate is of the return
    *until then* (of |r| <= 1, max_steps alone leaves out at most gamma^max_steps / (1 - gamma)).

    Args:
        env, env_params: any gymnax environment.
        env_state: one state, as `reset` and `step` return it; `vmap` for many.
        act: `act(obs, key) -> action` for one observation, action in the environment's units.
        key: decides the environment's noise and the policy's.
        num_rollouts: how many.
        gamma: discount, () in [0, 1].
        max_steps: length at which a rollout is broken off, 1 or more.
        obs: the observation of `env_state`, as `reset` or `step` returned it with the state; by
            default it is made, by the `observe(key, state, None, params)` of gymnax 1.0's classes.
        first_action: taken in place of the policy's first one: the estimate is of Q(s, a).
        value: `value(obs) -> ()` of one observation, see above.

    The compiled loop stops as soon as all rollouts have ended; under `vmap`, all of all states.

    Raises:
        ValueError: num_rollouts or max_steps is not an integer >= 1.
    """
    check_count("num_rollouts", num_rollouts)
    check_real("gamma", gamma, 0.0, 1.0)
    check_count("max_steps", max_steps)
    gamma = jnp.asarray(gamma, jnp.float32)
    key, key_obs = jax.random.split(key)
    if obs is None:
        obs = env.observe(key_obs, env_state, None, env_params)  # pyright: ignore[reportAttributeAccessIssue]

    def many(tree):
        """Repeat one value for every rollout: (...) -> (num_rollouts, ...)."""
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (num_rollouts, *jnp.shape(x))), tree)

    def one_step(carry):
        key, t, last = carry
        key, key_act, key_env = jax.random.split(key, 3)
        action = jax.vmap(act)(last.obs, jax.random.split(key_act, num_rollouts))
        if first_action is not None:
            action = jax.tree.map(
                lambda a, first: jnp.where(t == 0, first.astype(a.dtype), a),
                action,
                many(first_action),
            )
        obs, env_state, reward, terminated, truncated, info = jax.vmap(
            env.step, in_axes=(0, 0, 0, None)
        )(jax.random.split(key_env, num_rollouts), last.env_state, action, env_params)
        running = ~(last.terminated | last.truncated)

        def keep(new, old):
            """Take `new` where the rollout still runs; an ended one goes on stepping, unseen."""
            return jnp.where(running.reshape(running.shape + (1,) * (new.ndim - 1)), new, old)

        last_obs = ()
        if value is not None:
            last_obs = jax.tree.map(keep, info["final_observation"], last.last_obs)
        rollouts = _Rollouts(
            obs=obs,
            env_state=env_state,
            last_obs=last_obs,
            discount=keep(last.discount * gamma, last.discount),
            returns=keep(last.returns + last.discount * reward.astype(jnp.float32), last.returns),
            lengths=last.lengths + running,
            terminated=keep(terminated, last.terminated),
            truncated=keep(truncated & ~terminated, last.truncated),
        )
        return key, t + 1, rollouts

    def unfinished(carry):
        _, t, rollouts = carry
        return (t < max_steps) & ~(rollouts.terminated | rollouts.truncated).all()

    start = _Rollouts(
        obs=many(obs),
        env_state=many(env_state),
        last_obs=many(obs) if value is not None else (),
        discount=jnp.ones(num_rollouts, jnp.float32),
        returns=jnp.zeros(num_rollouts, jnp.float32),
        lengths=jnp.zeros(num_rollouts, jnp.int32),
        terminated=jnp.zeros(num_rollouts, bool),
        truncated=jnp.zeros(num_rollouts, bool),
    )
    t = jnp.zeros((), jnp.int32)
    rollouts = jax.lax.while_loop(unfinished, one_step, (key, t, start))[2]
    returns = rollouts.returns
    if value is not None:
        beyond = rollouts.discount * jax.vmap(value)(rollouts.last_obs)
        returns = returns + jnp.where(rollouts.terminated, 0.0, beyond)
    if num_rollouts == 1:
        standard_error = jnp.full((), jnp.nan, jnp.float32)
    else:
        standard_error = returns.std(ddof=1) / num_rollouts**0.5
    return ReturnEstimate(
        mean=returns.mean(),
        standard_error=standard_error,
        num_terminated=rollouts.terminated.sum(dtype=jnp.int32),
        num_truncated=rollouts.truncated.sum(dtype=jnp.int32),
        num_steps=rollouts.lengths.sum(dtype=jnp.int32),
    )
