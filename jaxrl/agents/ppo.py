"""Proximal policy optimisation, Schulman et al. (2017, https://arxiv.org/abs/1707.06347).

Maximises, eq. 7 and 9 there, with r = pi / pi_old,

    L(theta) = E[ min(r A, clip(r, 1 - eps, 1 + eps) A) - c_v (V - V_target)^2 + c_e H ],

with advantages by GAE (jaxrl.returns.gae) and the details that Huang et al. (2022, "The 37
implementation details of PPO") found to matter. Where we differ, on purpose: an episode cut by a
time limit is bootstrapped from the observation before the reset; the gradient is clipped by its
*global* norm; rollout and loss normalise with the same statistics, which are saved with the policy.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from jaxrl import apart, draws, normalize, rollout, spaces
from jaxrl.checks import check_choice, check_count, check_flags, check_real, check_widths
from jaxrl.networks import ACTIVATIONS, PolicyNet, ValueNet
from jaxrl.normalize import RunningStats
from jaxrl.returns import gae
from jaxrl.types import Env, Metrics, Policy, Train


@struct.dataclass
class Config:
    """Settings of PPO. Reals are leaves, so `vmap` sweeps them; the rest is static."""

    total_steps: int = struct.field(pytree_node=False, default=1_000_000)
    """Environment steps of the whole run, all environments together."""
    num_envs: int = struct.field(pytree_node=False, default=64)
    """Environments stepped in parallel."""
    num_steps: int = struct.field(pytree_node=False, default=128)
    """Steps of each environment between two updates."""
    num_epochs: int = struct.field(pytree_node=False, default=4)
    """Passes over the collected steps in one update."""
    num_minibatches: int = struct.field(pytree_node=False, default=4)
    """Gradient steps in one pass."""
    learning_rate: float = 3e-4
    """Step size of Adam, at the start."""
    anneal_learning_rate: bool = struct.field(pytree_node=False, default=True)
    """Let the learning rate fall linearly to 0 over the run."""
    gamma: float = 0.99
    """Discount."""
    gae_lambda: float = 0.95
    """Decay of the advantage estimate: 0 is one-step TD, 1 is Monte Carlo."""
    clip_eps: float = 0.2
    """How far the probability ratio may leave 1."""
    clip_value: bool = struct.field(pytree_node=False, default=False)
    """Clip the value's change by clip_eps as well."""
    vf_coef: float = 0.5
    """Weight of the value loss."""
    ent_coef: float = 0.0
    """Weight of the entropy bonus."""
    max_grad_norm: float = 0.5
    """Bound on the global norm of the gradient."""
    learn_apart: bool = struct.field(pytree_node=False, default=False)
    """Bound the norms of the policy's and the value network's gradients each for itself: then the
    two do not wait for each other, and learn at once where each has a device of its own."""
    adam_eps: float = 1e-5
    """Adam's epsilon."""
    normalize_advantage: bool = struct.field(pytree_node=False, default=True)
    """Give the advantages of each minibatch mean 0 and standard deviation 1."""
    normalize_obs: bool = struct.field(pytree_node=False, default=True)
    """Give observations running mean 0 and standard deviation 1."""
    normalize_reward: bool = struct.field(pytree_node=False, default=True)
    """Divide rewards by the running standard deviation of the discounted return."""
    hidden: tuple[int, ...] = struct.field(pytree_node=False, default=(64, 64))
    """Hidden layer widths of the policy and of the value network."""
    activation: str = struct.field(pytree_node=False, default="tanh")
    """Activation of the hidden layers."""
    squash: str = struct.field(pytree_node=False, default="tanh")
    """Real actions: "tanh" squashes the Gaussian into the bounds, "clip" cuts it."""
    state_dependent_std: bool = struct.field(pytree_node=False, default=False)
    """Real actions: let the standard deviation depend on the observation."""
    initial_log_std: float = 0.0
    """Real actions: log standard deviation at the start, in half-widths of the bounds."""


@struct.dataclass
class TrainState:
    """Everything that changes during training: saving it is a checkpoint."""

    params: dict[str, Any]  # {"policy": ..., "value": ...}
    opt_state: Any  # of both networks; with learn_apart {"policy": ..., "value": ...}
    obs_stats: RunningStats | None
    return_stats: RunningStats | None  # of the discounted return, for scaling rewards
    discounted_return: jax.Array  # (num_envs,) so far in the running episodes
    actors: rollout.Actors
    key: jax.Array
    num_updates: jax.Array  # () int32


@struct.dataclass
class Batch:
    """What the loss sees, one row a step; leading axes as collected, then (minibatch,)."""

    obs: jax.Array  # normalised, flat
    action: jax.Array  # as drawn
    log_prob: jax.Array  # under the policy that drew it
    value: jax.Array  # under the value network of that time
    advantage: jax.Array
    target: jax.Array


def policy_loss(log_prob: jax.Array, batch: Batch, clip_eps: float | jax.Array) -> jax.Array:
    """Negative clipped surrogate, Schulman et al. (2017) eq. 7; log_prob (B,) of the new policy."""
    ratio = jnp.exp(log_prob - batch.log_prob)
    clipped = jnp.clip(ratio, 1.0 - clip_eps, 1.0 + clip_eps)
    return -jnp.minimum(ratio * batch.advantage, clipped * batch.advantage).mean()


def value_loss(
    value: jax.Array, batch: Batch, clip_eps: float | jax.Array, clip_value: bool
) -> jax.Array:
    """Half the mean squared error to the target; value (B,) of the new network.

    With `clip_value` the worse of it and the error of the value moved by at most clip_eps.
    """
    error = (value - batch.target) ** 2
    if clip_value:
        near = batch.value + jnp.clip(value - batch.value, -clip_eps, clip_eps)
        error = jnp.maximum(error, (near - batch.target) ** 2)
    return 0.5 * error.mean()


def loss(
    params: dict[str, Any],
    policy_net: PolicyNet,
    value_net: ValueNet,
    batch: Batch,
    config: Config,
    key: jax.Array,
) -> tuple[jax.Array, Metrics]:
    """PPO's objective (eq. 9), to be minimised, and what to watch; batch of rows (B, ...).

    Of the networks in `params`: with "policy" or "value" alone, that one's terms.
    """
    total, metrics = jnp.zeros(()), {}
    if "policy" in params:
        if config.normalize_advantage:
            a = batch.advantage
            batch = replace(batch, advantage=(a - a.mean()) / (a.std() + 1e-8))
        pi = policy_net.policy(params["policy"], batch.obs)
        log_prob = pi.log_prob(batch.action)
        pi_loss = policy_loss(log_prob, batch, config.clip_eps)
        entropy = pi.entropy(key).mean()
        total += pi_loss - config.ent_coef * entropy
        log_ratio = log_prob - batch.log_prob
        metrics |= {
            "policy_loss": pi_loss,
            "entropy": entropy,
            # E[r - 1 - log r], an estimate of KL(old, new) that is never negative (Schulman 2020)
            "approx_kl": (jnp.expm1(log_ratio) - log_ratio).mean(),
            "clip_fraction": (jnp.abs(jnp.expm1(log_ratio)) > config.clip_eps).mean(),
        }
    if "value" in params:
        value = value_net.value(params["value"], batch.obs)
        v_loss = value_loss(value, batch, config.clip_eps, config.clip_value)
        total += config.vf_coef * v_loss
        metrics["value_loss"] = v_loss
    return total, metrics


def shuffle(key: jax.Array, num_rows: int) -> jax.Array:
    """Return the row numbers in random order, (num_rows,) int32.

    Sorts one word a row, random bits above and the row's number below: a quarter of the time of
    `jax.random.permutation`, which sorts pairs. Rows with equal random bits stay in order: one in
    64 of 8,192 rows, fewer of fewer; of more rows `jax.random` takes care.
    """
    number_bits = (num_rows - 1).bit_length()
    if number_bits > 13:
        return jax.random.permutation(key, num_rows)
    words = jax.random.bits(key, (num_rows,), jnp.uint32) >> number_bits << number_bits
    words = jnp.sort(words | jnp.arange(num_rows, dtype=jnp.uint32))
    return (words & jnp.uint32((1 << number_bits) - 1)).astype(jnp.int32)


def check_config(config: Config, env: Env, env_params: Any) -> None:
    """Raise ValueError, naming field, value and remedy, if the settings can't work with `env`."""
    for name in ("total_steps", "num_envs", "num_steps", "num_epochs", "num_minibatches"):
        check_count(name, getattr(config, name))
    steps = config.num_envs * config.num_steps
    if steps % config.num_minibatches:
        raise ValueError(
            f"num_minibatches = {config.num_minibatches} must divide num_envs * num_steps = "
            f"{config.num_envs} * {config.num_steps} = {steps}"
        )
    if config.normalize_advantage and steps // config.num_minibatches < 2:
        raise ValueError(
            f"num_minibatches = {config.num_minibatches} leaves minibatches of one step, whose "
            "advantage cannot be normalised: lower it or set normalize_advantage = False"
        )
    check_flags(config)
    check_real("learning_rate", config.learning_rate, 0.0, math.inf, above=True)
    check_real("gamma", config.gamma, 0.0, 1.0)
    check_real("gae_lambda", config.gae_lambda, 0.0, 1.0)
    check_real("clip_eps", config.clip_eps, 0.0, math.inf, above=True)
    check_real("vf_coef", config.vf_coef, 0.0, math.inf)
    check_real("ent_coef", config.ent_coef, 0.0, math.inf)
    check_real("max_grad_norm", config.max_grad_norm, 0.0, math.inf, above=True)
    check_real("adam_eps", config.adam_eps, 0.0, math.inf, above=True)
    check_real("initial_log_std", config.initial_log_std, -10.0, 2.0)
    check_widths("hidden", config.hidden)
    check_choice("activation", config.activation, ACTIVATIONS)
    check_choice("squash", config.squash, ("tanh", "clip"))
    action, _ = spaces.read(env, env_params)
    if isinstance(action, spaces.Discrete) and config.state_dependent_std:
        raise ValueError(
            "state_dependent_std = True needs real actions, but this environment has "
            f"{action.n} discrete ones: set it to False"
        )


def policy_net(config: Config, action: spaces.ActionSpec) -> PolicyNet:
    """Build the policy network that `config` describes."""
    return PolicyNet(
        config.hidden,
        action,
        config.activation,
        config.squash,
        config.state_dependent_std,
        config.initial_log_std,
    )


def make_act(
    config: Config, action: spaces.ActionSpec, obs_shape: tuple[int, ...]
) -> Callable[..., jax.Array]:
    """Return `act(policy, obs, key=None) -> action`, pure; obs (*batch, *obs_shape).

    The action is in the environment's units: the most likely one, or, given a key, a drawn one.
    """
    net = policy_net(config, action)

    def act(policy: Policy, obs: jax.Array, key: jax.Array | None = None) -> jax.Array:
        if policy.obs_stats is not None:
            obs = normalize.normalize(policy.obs_stats, obs)
        pi = net.policy(policy.params, spaces.flat(obs, obs_shape))
        drawn = pi.mode() if key is None else pi.sample(key)
        return to_env(pi, action, drawn)

    return act


def to_env(pi: Any, action: spaces.ActionSpec, drawn: jax.Array) -> jax.Array:
    """Turn a drawn action into the environment's units."""
    return drawn if isinstance(action, spaces.Discrete) else action.scale(pi.squash(drawn))


def get_policy(state: TrainState) -> Policy:
    """Take what acting needs out of a train state."""
    return Policy(state.params["policy"], state.obs_stats)


def make_train(
    config: Config, env: Env, env_params: Any, net_axis: str | None = None
) -> Train[TrainState]:
    """Return the whole training run, `train(key) -> (state, metrics)`: pure, jit it, vmap it.

    `vmap` over keys trains many seeds; `vmap` over real fields of `config` sweeps them:

        configs = config.replace(learning_rate=jnp.array([1e-4, 1e-3]))
        axes = jax.tree.map(lambda _: None, config).replace(learning_rate=0)
        run = lambda config, key: make_train(config, env, env_params)(key)
        jax.vmap(run, in_axes=(axes, None))(configs, key)

    Metrics have a leading axis (num_updates,); those of episodes are NaN where none ended.

    `net_axis` names a mesh axis of two devices, inside of `jax.shard_map`, over which the networks
    learn apart; it needs config.learn_apart (see `jaxrl.apart.NETS`).

    Raises:
        ValueError: `config` cannot work (see `check_config`), or the networks cannot learn apart.

    Warns:
        UserWarning: `total_steps` is not a whole number of updates and is rounded up.
    """
    check_config(config, env, env_params)
    apart.check(config.learn_apart, net_axis)
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
    pi_net = policy_net(config, action_spec)
    v_net = ValueNet(config.hidden, config.activation)
    # the learning rate is multiplied in by hand: as a leaf it may be traced, and it is annealed
    # and flat: one array to work on instead of one for each layer, which is faster on CPU
    optimizer = optax.flatten(
        optax.chain(
            optax.clip_by_global_norm(config.max_grad_norm),
            optax.scale_by_adam(eps=config.adam_eps),
        )
    )

    def see(obs_stats: RunningStats | None, obs: jax.Array) -> jax.Array:
        """Turn raw observations into what the networks take."""
        if obs_stats is not None:
            obs = normalize.normalize(obs_stats, obs)
        return spaces.flat(obs, obs_shape)

    def init_optimizer(params: dict[str, Any]) -> Any:
        if config.learn_apart:
            return {name: optimizer.init({name: net}) for name, net in params.items()}
        return optimizer.init(params)

    def init(key: jax.Array) -> TrainState:
        key, key_policy, key_value, key_env = draws.split(key, 4)
        actors = rollout.reset(env, env_params, key_env, config.num_envs)
        obs_stats = normalize.init(obs_shape) if config.normalize_obs else None
        obs = see(obs_stats, actors.obs)
        params = {
            "policy": pi_net.init(key_policy, obs),
            "value": v_net.init(key_value, obs),
        }
        return TrainState(
            params=params,
            opt_state=init_optimizer(params),
            obs_stats=obs_stats,
            return_stats=normalize.init(()) if config.normalize_reward else None,
            discounted_return=jnp.zeros(config.num_envs),
            actors=actors,
            key=key,
            num_updates=jnp.zeros((), jnp.int32),
        )

    def collect(state: TrainState, key: jax.Array):
        """Step all environments num_steps times: Transition, log_prob (T, N), episodes ended."""

        def policy(actors):
            return pi_net.policy(state.params["policy"], see(state.obs_stats, actors.obs))

        # all that is random is drawn before the loop: see rollout.draw
        key_act, key_env = draws.split(key)
        noise = jax.eval_shape(policy, state.actors).noise(key_act, (config.num_steps,))
        env_draws = rollout.draw(env, env_params, key_env, config.num_steps, config.num_envs)

        def one_step(actors, inputs):
            noise, env_drawn = inputs
            pi = policy(actors)
            drawn = pi.place(noise)
            actors, transition, ended = rollout.step(
                env, env_params, actors, to_env(pi, action_spec, drawn), env_drawn
            )
            return actors, (replace(transition, action=drawn), pi.log_prob(drawn), ended)

        actors, (transitions, log_prob, ended) = jax.lax.scan(
            one_step, state.actors, (noise, env_draws)
        )
        return actors, transitions, log_prob, jax.tree.map(jnp.sum, ended)

    def scale_rewards(state: TrainState, transitions):
        """Divide rewards by the running deviation of the discounted return, updated first."""
        if state.return_stats is None:
            return state, transitions.reward

        def forward(discounted, step):
            reward, done = step
            discounted = config.gamma * discounted + reward
            return jnp.where(done, 0.0, discounted), discounted

        done = transitions.terminated | transitions.truncated
        last, discounted = jax.lax.scan(
            forward, state.discounted_return, (transitions.reward, done)
        )
        stats = normalize.update(state.return_stats, discounted)
        reward = transitions.reward * jax.lax.rsqrt(stats.var + 1e-8)
        return replace(state, return_stats=stats, discounted_return=last), reward

    def minibatch_step(learner, inputs):
        params, opt_state = learner
        batch, learning_rate, key = inputs
        grads, metrics = jax.grad(loss, has_aux=True)(params, pi_net, v_net, batch, config, key)
        metrics["grad_norm"] = optax.tree.norm(grads)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = jax.tree.map(lambda p, u: p - learning_rate * u, params, updates)
        return (params, opt_state), metrics

    def update(state: TrainState) -> tuple[TrainState, Metrics]:
        key, key_collect, key_shuffle, key_loss = draws.split(state.key, 4)
        actors, transitions, log_prob, ended = collect(state, key_collect)
        state, reward = scale_rewards(state, transitions)

        obs = see(state.obs_stats, transitions.obs)
        value = v_net.value(state.params["value"], obs)
        next_value = v_net.value(state.params["value"], see(state.obs_stats, transitions.next_obs))
        advantage, target = gae(
            reward,
            value,
            next_value,
            transitions.terminated,
            transitions.truncated,
            config.gamma,
            config.gae_lambda,
        )
        batch = Batch(obs, transitions.action, log_prob, value, advantage, target)
        rows = jax.tree.map(lambda x: x.reshape(steps_per_update, *x.shape[2:]), batch)

        left = 1.0 - state.num_updates / num_updates if config.anneal_learning_rate else 1.0
        learning_rate = config.learning_rate * left

        keys = (
            draws.split(key_shuffle, config.num_epochs),
            draws.split(key_loss, config.num_epochs),
        )

        def epoch(learner, keys):
            key_shuffle, key_loss = keys
            order = shuffle(key_shuffle, steps_per_update)
            order = order.reshape(config.num_minibatches, -1)

            def one_minibatch(learner, inputs):
                index, key = inputs
                minibatch = jax.tree.map(lambda x: x[index], rows)
                return minibatch_step(learner, (minibatch, learning_rate, key))

            return jax.lax.scan(
                one_minibatch, learner, (order, draws.split(key_loss, config.num_minibatches))
            )

        def learn(params, opt_state):
            learner, metrics = jax.lax.scan(epoch, (params, opt_state), keys)
            return *learner, jax.tree.map(jnp.mean, metrics)

        def learn_one(name):
            params, opt_state, metrics = learn({name: state.params[name]}, state.opt_state[name])
            metrics[f"{name}_grad_norm"] = metrics.pop("grad_norm")
            return (params, {name: opt_state}), metrics

        if config.learn_apart:
            nets = [partial(learn_one, name) for name in state.params]
            (mine, metrics), (others, more_metrics) = apart.call(nets, net_axis)
            params, opt_state = (a | b for a, b in zip(mine, others, strict=True))
            metrics |= more_metrics
        else:
            params, opt_state, metrics = learn(state.params, state.opt_state)
        metrics["learning_rate"] = jnp.asarray(learning_rate, jnp.float32)
        metrics["explained_variance"] = 1.0 - jnp.var(target - value) / (jnp.var(target) + 1e-8)
        metrics.update(ended.metrics())

        # only now: rollout and loss of one update see the same statistics
        obs_stats = state.obs_stats
        if obs_stats is not None:
            obs_stats = normalize.update(obs_stats, transitions.obs)
        state = replace(
            state,
            params=params,
            opt_state=opt_state,
            obs_stats=obs_stats,
            actors=actors,
            key=key,
            num_updates=state.num_updates + 1,
        )
        return state, metrics

    return Train(init, update, num_updates, steps_per_update)
