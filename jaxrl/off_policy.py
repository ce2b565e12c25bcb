"""The loop that all learners from replay share: act, store, sample, learn.

One update is `num_steps` steps of all environments. After every `train_every` of them the learner
takes `num_gradient_steps` steps, each on a batch of its own:

    for num_steps / train_every times:
        repeat train_every times:  action = explore(learner, obs);  step;  store
        repeat num_gradient_steps times:  learner = learn(learner, sample(replay))

So there are num_gradient_steps / (train_every * num_envs) gradient steps to an environment step.
Nothing is learnt before `learning_starts` environment steps are stored. An agent brings what is its
own: the networks (`init`), its way to act (`explore`), its losses (`learn`).

An agent may make something for a batch before its turn (`Agent.prepare`): then the batches of a
round are sampled in the round before, and are a round old when they are learnt from.

What is random is drawn for many rounds at once: a handful of numbers costs almost as much.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from flax import struct

from jaxrl import draws, normalize, prioritized, replay, rollout, spaces
from jaxrl.checks import check_count, check_flags, check_real
from jaxrl.normalize import RunningStats
from jaxrl.prioritized import Priorities
from jaxrl.replay import Batch, Replay
from jaxrl.types import Env, Metrics, Train

MAX_DRAWN_BYTES = 2**20  # of random numbers drawn ahead; what is read soon stays in the cache


class Settings(Protocol):
    """The fields of an agent's Config that the loop reads."""

    @property
    def total_steps(self) -> int: ...  # noqa: D102
    @property
    def num_envs(self) -> int: ...  # noqa: D102
    @property
    def num_steps(self) -> int: ...  # noqa: D102
    @property
    def train_every(self) -> int: ...  # noqa: D102
    @property
    def num_gradient_steps(self) -> int: ...  # noqa: D102
    @property
    def batch_size(self) -> int: ...  # noqa: D102
    @property
    def buffer_size(self) -> int: ...  # noqa: D102
    @property
    def learning_starts(self) -> int: ...  # noqa: D102
    @property
    def gamma(self) -> Any: ...  # noqa: D102
    @property
    def n_step(self) -> int: ...  # noqa: D102
    @property
    def normalize_obs(self) -> bool: ...  # noqa: D102


@struct.dataclass
class TrainState:
    """Everything that changes during training: saving it is a checkpoint."""

    learner: Any  # the agent's: `params`, targets, optimisers
    obs_stats: RunningStats | None
    replay: Replay
    priorities: Priorities | None
    actors: rollout.Actors
    key: jax.Array
    num_updates: jax.Array  # () int32
    noise: Any = None  # the agent's, see `Noise`
    batches: Batch | None = None  # of the next round (num_gradient_steps, ...), see `Agent.prepare`

    @property
    def params(self) -> Any:
        """What is trained, targets apart."""
        return self.learner.params


@dataclass(frozen=True)
class Priority:
    """Sample by priority (jaxrl.prioritized) instead of uniformly."""

    alpha: Any  # how much the error counts, 0 is uniform
    beta: Any  # how much of the bias is corrected at the start; 1 at the end of the run


@dataclass(frozen=True)
class Noise:
    """Exploration that remembers: a value, one part for each environment, from step to step."""

    init: Callable[[jax.Array, int], Any]
    """`init(key, num_envs) -> noise` of the first step."""
    next: Callable[[Any, jax.Array, jax.Array], Any]
    """`next(noise, done, key) -> noise` of the next step; done (num_envs,) where it begins an
    episode."""


@struct.dataclass
class StepDraws:
    """What is random in one step of all environments; more leading axes for more."""

    explore: Any  # the agent's, see `Agent.draw_explore`
    noise: jax.Array | None  # () key of `Noise.next`
    env: rollout.Draws


@struct.dataclass
class LearnDraws:
    """What is random in one gradient step; more leading axes for more."""

    sample: jax.Array  # (batch,) uint32, of which places are made; by priority a key ()
    learn: Any  # the agent's, see `Agent.draw_learn`


@dataclass(frozen=True)
class Agent:
    """What an agent brings to the loop. Observations are normalised and flat: (*batch, size)."""

    init: Callable[[jax.Array, jax.Array], Any]
    """`init(key, obs) -> learner`, for observations of that shape."""
    draw_explore: Callable[[jax.Array, tuple[int, ...]], Any]
    """`draw_explore(key, (*num, num_envs))`: what is random in acting in `num` steps, leaves of
    that shape and more axes."""
    explore: Callable[..., tuple[jax.Array, jax.Array]]
    """`explore(learner, obs, drawn, env_steps) -> (env_action, action)`: to step with, to store;
    drawn is one step's. Where there is `noise`, it comes as a fifth argument."""
    draw_learn: Callable[[jax.Array, tuple[int, ...]], Any]
    """`draw_learn(key, num)`: what is random in `num` gradient steps, leaves (*num, ...)."""
    learn: Callable[[Any, Batch, jax.Array, Any], tuple[Any, Metrics, jax.Array]]
    """`learn(learner, batch, weight, drawn) -> (learner, metrics, td_error (batch,))`: one gradient
    step; weight (batch,) is 1 without priorities; drawn is its own."""
    noise: Noise | None = None
    """Exploration that remembers."""
    prepare: Callable[[Any, Batch, Any], Any] | None = None
    """`prepare(learner, batch, drawn) -> learner`: make what `learn` needs of the batch that is
    next. It is called before the first gradient step; afterwards `learn`, which then gets the
    following batch as a fifth argument, does it on its way. Not with priorities."""


def check_config(config: Settings) -> None:
    """Raise ValueError, naming field, value and remedy, if the loop can't work so."""
    for name in ("total_steps", "num_envs", "num_steps", "train_every", "num_gradient_steps"):
        check_count(name, getattr(config, name))
    for name in ("batch_size", "buffer_size", "n_step"):
        check_count(name, getattr(config, name))
    check_count("learning_starts", config.learning_starts, minimum=0)
    check_real("gamma", config.gamma, 0.0, 1.0)
    check_flags(config)
    if config.total_steps >= 2**31:
        raise ValueError(f"total_steps = {config.total_steps} must be below 2**31 = {2**31}")
    if config.num_steps % config.train_every:
        raise ValueError(
            f"train_every = {config.train_every} must divide num_steps = {config.num_steps}"
        )
    if config.buffer_size < config.train_every * config.num_envs:
        raise ValueError(
            f"buffer_size = {config.buffer_size} must be at least train_every * num_envs = "
            f"{config.train_every * config.num_envs}, what is stored at once"
        )
    if config.learning_starts >= config.total_steps:
        raise ValueError(
            f"learning_starts = {config.learning_starts} must be below total_steps = "
            f"{config.total_steps}: nothing would be learnt"
        )


def num_steps_run(config: Settings) -> int:
    """Environment steps of the whole run: total_steps, rounded up to whole updates."""
    steps_per_update = config.num_envs * config.num_steps
    return -(-config.total_steps // steps_per_update) * steps_per_update


def num_gradient_steps(config: Settings, prepares: bool = False) -> int:
    """Gradient steps of the whole run, of an agent that has `Agent.prepare` or has not."""
    steps_per_round = config.train_every * config.num_envs
    rounds = num_steps_run(config) // steps_per_round - _first_round(config, prepares)
    return max(0, rounds) * config.num_gradient_steps


def _first_round(config: Settings, prepares: bool) -> int:
    """Index of the first round that learns: after it learning_starts steps are stored."""
    steps_per_round = config.train_every * config.num_envs
    # a batch that is prepared was sampled in the round before
    return max(int(prepares), -(-config.learning_starts // steps_per_round) - 1)


def adam(max_grad_norm: Any, eps: Any) -> optax.GradientTransformation:
    """Adam's direction after clipping by the global norm; the step size is multiplied in by hand.

    Flat: one array to work on instead of one for each layer, which is faster on CPU.
    """
    return optax.flatten(
        optax.chain(optax.clip_by_global_norm(max_grad_norm), optax.scale_by_adam(eps=eps))
    )


def make_train(
    config: Settings, env: Env, env_params: Any, agent: Agent, priority: Priority | None = None
) -> Train[TrainState]:
    """Return the whole run of `agent`, `train(key) -> (state, metrics)`: pure, jit it, vmap it.

    Metrics have a leading axis (num_updates,): means over the gradient steps of an update, 0 where
    none was made, and their number; those of episodes are NaN where none ended.

    Raises:
        ValueError: `config` cannot work (see `check_config`), or the buffer does not fit.

    Warns:
        UserWarning: `total_steps` is not a whole number of updates and is rounded up.
    """
    check_config(config)
    steps_per_update = config.num_envs * config.num_steps
    total_steps = num_steps_run(config)
    num_updates = total_steps // steps_per_update
    if total_steps != config.total_steps:
        warnings.warn(
            f"total_steps = {config.total_steps} is not a multiple of num_envs * num_steps = "
            f"{steps_per_update}: {total_steps} steps will be run",
            stacklevel=3,
        )
    num_rounds = config.num_steps // config.train_every
    steps_per_round = config.train_every * config.num_envs
    _, obs_shape = spaces.read(env, env_params)

    def see(obs_stats: RunningStats | None, obs: jax.Array) -> jax.Array:
        """Turn raw observations into what the networks take."""
        if obs_stats is not None:
            obs = normalize.normalize(obs_stats, obs)
        return spaces.flat(obs, obs_shape)

    def draw(key: jax.Array, num: int) -> tuple[StepDraws, LearnDraws]:
        """Draw for `num` rounds: leaves (num, train_every, ...), (num, num_gradient_steps, ...)."""
        key_explore, key_noise, key_env, key_sample, key_learn = draws.split(key, 5)
        steps, learning = (num, config.train_every), (num, config.num_gradient_steps)
        env_draws = rollout.draw(env, env_params, key_env, math.prod(steps), config.num_envs)
        if priority is None:
            shape = (*learning, config.batch_size)
            sample = draws.draw(jax.random.bits, key_sample, shape, jnp.uint32)
        else:
            sample = draws.draw(jax.random.split, key_sample, learning)
        for_steps = StepDraws(
            explore=agent.draw_explore(key_explore, (*steps, config.num_envs)),
            noise=None if agent.noise is None else draws.draw(jax.random.split, key_noise, steps),
            env=jax.tree.map(lambda x: x.reshape(*steps, *x.shape[1:]), env_draws),
        )
        return for_steps, LearnDraws(sample, agent.draw_learn(key_learn, learning))

    drawn = jax.eval_shape(lambda key: draw(key, 1), jax.random.key(0))
    bytes_of_round = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(drawn))
    # rounds to draw for at once
    block = max(
        n
        for n in range(1, num_rounds + 1)
        if n == 1 or (num_rounds % n == 0 and n * bytes_of_round <= MAX_DRAWN_BYTES)
    )

    def act_and_step(learner, obs_stats, actors, noise, env_steps, drawn: StepDraws):
        """Step all environments once: actors, noise, (transition, episodes ended)."""
        remembered = () if agent.noise is None else (noise,)
        env_action, action = agent.explore(
            learner, see(obs_stats, actors.obs), drawn.explore, env_steps, *remembered
        )
        actors, transition, ended = rollout.step(env, env_params, actors, env_action, drawn.env)
        if agent.noise is not None:
            assert drawn.noise is not None
            done = transition.terminated | transition.truncated
            noise = agent.noise.next(noise, done, drawn.noise)
        return actors, noise, (replace(transition, action=action), ended)

    def init(key: jax.Array) -> TrainState:
        key, key_learner, key_env = draws.split(key, 3)
        actors = rollout.reset(env, env_params, key_env, config.num_envs)
        obs_stats = normalize.init(obs_shape) if config.normalize_obs else None
        learner, noise = agent.init(key_learner, see(obs_stats, actors.obs)), None
        if agent.noise is not None:
            key, key_noise = draws.split(key)
            noise = agent.noise.init(key_noise, config.num_envs)

        def first_step():
            drawn, _ = jax.tree.map(lambda x: x[0, 0], draw(key, 1))
            return act_and_step(learner, obs_stats, actors, noise, jnp.int32(0), drawn)

        _, _, (transition, _) = jax.eval_shape(first_step)
        buffer = replay.init(transition, config.buffer_size)
        state = TrainState(
            learner=learner,
            obs_stats=obs_stats,
            replay=buffer,
            priorities=None if priority is None else prioritized.init(buffer),
            actors=actors,
            key=key,
            num_updates=jnp.zeros((), jnp.int32),
            noise=noise,
        )
        if agent.prepare is None:
            return state
        place = jax.ShapeDtypeStruct((config.num_gradient_steps, config.batch_size), jnp.int32)
        shapes = jax.eval_shape(batch_at, state, place)
        none_yet = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return replace(state, batches=none_yet)

    def batch_at(state: TrainState, place: jax.Array) -> Batch:
        batch = replay.take(state.replay, place, config.gamma, config.n_step)
        obs, next_obs = see(state.obs_stats, batch.obs), see(state.obs_stats, batch.next_obs)
        return replace(batch, obs=obs, next_obs=next_obs)

    def learn_uniform(state: TrainState, drawn: LearnDraws, num_gradient_steps: jax.Array):
        """Take the gradient steps of one round: learner, and metrics summed over them."""
        weight = jnp.ones(config.batch_size, jnp.float32)

        def one(learner, inputs):
            batch, drawn, *following = inputs
            learner, metrics, _ = agent.learn(learner, batch, weight, drawn, *following)
            return learner, metrics

        # nothing is written meanwhile: take all batches at once
        def take():
            return batch_at(state, replay.places(state.replay, drawn.sample))

        batches, following = state.batches, ()
        if agent.prepare is not None:
            new = take()
            state = replace(state, batches=new)
            following = (jax.tree.map(lambda x, y: jnp.concatenate([x[1:], y[:1]]), batches, new),)

        def learn():
            inputs = (take() if batches is None else batches, drawn.learn, *following)
            learner, metrics = jax.lax.scan(one, state.learner, inputs)
            return learner, jax.tree.map(lambda x: x.sum(0), metrics)

        _, shapes = jax.eval_shape(learn)

        def wait():
            learner = state.learner
            if agent.prepare is not None:
                last = jax.tree.map(lambda x: x[-1], (*following, drawn.learn))
                learner = agent.prepare(learner, *last)
            return learner, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

        # the cond gives only the learner: under vmap it may become a select
        learner, metrics = jax.lax.cond(num_gradient_steps > 0, learn, wait)
        return replace(state, learner=learner), metrics

    def learn_by_priority(
        state: TrainState,
        drawn: LearnDraws,
        num_gradient_steps: jax.Array,
        progress: jax.Array,
    ):
        """Do the same, where each gradient step changes the priorities for the next."""
        assert priority is not None
        alpha, beta = priority.alpha, priority.beta + (1.0 - priority.beta) * progress
        count = state.replay.size * config.num_envs

        def one(learner, priorities, drawn: LearnDraws):
            key, batch_size = drawn.sample, config.batch_size
            place, weight = prioritized.draw(priorities, count, key, batch_size, beta)
            batch = batch_at(state, place)
            learner, metrics, error = agent.learn(learner, batch, weight, drawn.learn)
            return learner, prioritized.update(priorities, place, error, alpha), metrics

        def body(i, carry):
            learner, priorities, total = carry
            mine = jax.tree.map(lambda x: x[i], drawn)
            learner, priorities, metrics = one(learner, priorities, mine)
            return learner, priorities, jax.tree.map(jnp.add, total, metrics)

        first = jax.tree.map(lambda x: x[0], drawn)
        shapes = jax.eval_shape(one, state.learner, state.priorities, first)[2]
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        learner, priorities, metrics = jax.lax.fori_loop(
            0, num_gradient_steps, body, (state.learner, state.priorities, zeros)
        )
        return replace(state, learner=learner, priorities=priorities), metrics

    def one_round(state: TrainState, inputs: tuple[jax.Array, tuple[StepDraws, LearnDraws]]):
        """Collect, then learn."""
        index, (for_steps, for_learning) = inputs  # index: rounds since the start of the run
        env_steps = index * steps_per_round

        def one_step(carry, drawn):
            actors, noise = carry
            actors, noise, step = act_and_step(
                state.learner, state.obs_stats, actors, noise, env_steps, drawn
            )
            return (actors, noise), step

        (actors, noise), (transitions, ended) = jax.lax.scan(
            one_step, (state.actors, state.noise), for_steps
        )
        if state.priorities is not None:
            priorities = prioritized.add(state.priorities, state.replay, config.train_every)
            state = replace(state, priorities=priorities)
        buffer = replay.add(state.replay, transitions)
        state = replace(state, replay=buffer, actors=actors, noise=noise)
        if state.obs_stats is not None:
            state = replace(state, obs_stats=normalize.update(state.obs_stats, transitions.obs))

        starts = index >= _first_round(config, agent.prepare is not None)
        num_gradient_steps = jnp.where(starts, config.num_gradient_steps, 0)
        if priority is None:
            state, metrics = learn_uniform(state, for_learning, num_gradient_steps)
        else:
            progress = (env_steps + steps_per_round).astype(jnp.float32) / total_steps
            state, metrics = learn_by_priority(state, for_learning, num_gradient_steps, progress)
        return state, (metrics, num_gradient_steps, jax.tree.map(lambda x: x.sum(0), ended))

    def one_block(state: TrainState, inputs: tuple[jax.Array, jax.Array]):
        """Draw for some rounds, then go through them."""
        first, key = inputs
        state, sums = jax.lax.scan(one_round, state, (first + jnp.arange(block), draw(key, block)))
        return state, jax.tree.map(lambda x: x.sum(0), sums)

    def update(state: TrainState) -> tuple[TrainState, Metrics]:
        key, *keys = draws.split(state.key, 1 + num_rounds // block)
        first = state.num_updates * num_rounds + jnp.arange(0, num_rounds, block)
        state, sums = jax.lax.scan(one_block, state, (first, jnp.stack(keys)))
        metrics, num_gradient_steps, ended = jax.tree.map(lambda x: x.sum(0), sums)
        metrics = jax.tree.map(lambda x: x / jnp.maximum(num_gradient_steps, 1), metrics)
        metrics["num_gradient_steps"] = num_gradient_steps.astype(jnp.float32)
        metrics.update(ended.metrics())
        return replace(state, key=key, num_updates=state.num_updates + 1), metrics

    jax.eval_shape(init, jax.random.key(0))  # refuses a buffer that cannot fit
    return Train(init, update, num_updates, steps_per_update)
