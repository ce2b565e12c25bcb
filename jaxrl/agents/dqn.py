"""Deep Q-learning, Mnih et al. (2015, https://doi.org/10.1038/nature14236), with what came after.

Minimises over batches from replay (algorithm 1 there), with the target network Q',

    L(theta) = E[ loss( r + gamma max_a Q'(s', a) - Q(s, a) ) ].

Options: double Q-learning (van Hasselt et al. 2016, arXiv 1509.06461), dueling heads (Wang et al.
2016), n-step returns, prioritised replay (Schaul et al. 2016, arXiv 1511.05952), soft or periodic
target updates, Huber or squared loss, a network that takes the action as input. The loop around it
is jaxrl.off_policy's. Where we differ from most: a time limit is not an end, its last observation
is bootstrapped from; the gradient is clipped by its *global* norm.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from jaxrl import draws, normalize, off_policy, spaces
from jaxrl.checks import check_choice, check_count, check_real, check_widths
from jaxrl.networks import ACTIVATIONS, QNet
from jaxrl.off_policy import TrainState
from jaxrl.replay import Batch
from jaxrl.types import Env, Metrics, Policy, Train


@struct.dataclass
class Config:
    """Settings of DQN. Reals are leaves, so `vmap` sweeps them; the rest is static.

    There are num_gradient_steps / (train_every * num_envs) gradient steps to an environment step.
    """

    total_steps: int = struct.field(pytree_node=False, default=200_000)
    """Environment steps of the whole run, all environments together."""
    num_envs: int = struct.field(pytree_node=False, default=8)
    """Environments stepped in parallel."""
    num_steps: int = struct.field(pytree_node=False, default=125)
    """Steps of each environment in one update, the unit of metrics and logs."""
    train_every: int = struct.field(pytree_node=False, default=1)
    """Steps of each environment between two rounds of learning."""
    num_gradient_steps: int = struct.field(pytree_node=False, default=1)
    """Gradient steps in one round of learning."""
    batch_size: int = struct.field(pytree_node=False, default=64)
    """Transitions in one gradient step."""
    buffer_size: int = struct.field(pytree_node=False, default=10_000)
    """Most recent transitions that are kept."""
    learning_starts: int = struct.field(pytree_node=False, default=1_000)
    """Environment steps before the first gradient step."""
    learning_rate: float = 1e-3
    """Step size of Adam, at the start."""
    anneal_learning_rate: bool = struct.field(pytree_node=False, default=False)
    """Let the learning rate fall linearly to 0 over the run."""
    gamma: float = 0.99
    """Discount."""
    epsilon_start: float = 1.0
    """Probability of a random action, at the start."""
    epsilon_end: float = 0.01
    """Probability of a random action, after the decay."""
    epsilon_fraction: float = 0.5
    """Part of the run over which epsilon decays."""
    epsilon_decay: str = struct.field(pytree_node=False, default="linear")
    """Way of the decay: "linear" or "exponential"."""
    tau: float = 0.01
    """Part of the way that the target network moves to the online one; 1 copies it."""
    target_every: int = struct.field(pytree_node=False, default=1)
    """Gradient steps between two moves of the target network."""
    loss: str = struct.field(pytree_node=False, default="squared")
    """Loss of the TD error: "squared", or "huber" (linear beyond 1: for returns of a few units)."""
    double: bool = struct.field(pytree_node=False, default=True)
    """Let the online network choose the action that the target network values."""
    dueling: bool = struct.field(pytree_node=False, default=False)
    """Two heads: value and advantages."""
    action_input: bool = struct.field(pytree_node=False, default=False)
    """Give the action to the network as input (one output) instead of one output per action."""
    n_step: int = struct.field(pytree_node=False, default=1)
    """Rewards summed before the bootstrap."""
    prioritized: bool = struct.field(pytree_node=False, default=False)
    """Sample transitions in proportion to their TD error."""
    priority_alpha: float = 0.6
    """Prioritised: how much the error counts, 0 is uniform."""
    priority_beta: float = 0.4
    """Prioritised: how much of the bias is corrected at the start; it rises to 1."""
    max_grad_norm: float = 10.0
    """Bound on the global norm of the gradient."""
    adam_eps: float = 1e-8
    """Adam's epsilon."""
    normalize_obs: bool = struct.field(pytree_node=False, default=False)
    """Give observations running mean 0 and standard deviation 1."""
    hidden: tuple[int, ...] = struct.field(pytree_node=False, default=(64, 64))
    """Hidden layer widths."""
    activation: str = struct.field(pytree_node=False, default="relu")
    """Activation of the hidden layers."""


@struct.dataclass
class Learner:
    """What learns: part of the train state."""

    params: Any
    target_params: Any
    opt_state: optax.OptState
    num_gradient_steps: jax.Array  # () int32


def td_target(batch: Batch, next_q: jax.Array, next_q_target: jax.Array, double: bool) -> jax.Array:
    """Return y (B,) of the bootstrapped target; next_q, next_q_target (B, num_actions).

    y = r + discount * Q'(s', argmax_a Q(s', a)) if `double` (van Hasselt et al. 2016 eq. 4), else
    y = r + discount * max_a Q'(s', a).
    """
    next_value = take(next_q_target, next_q.argmax(-1)) if double else next_q_target.max(-1)
    return batch.reward + batch.discount * next_value


def td_loss(td_error: jax.Array, weight: jax.Array, kind: str) -> jax.Array:
    """Weighted mean of the loss of TD errors (B,): "huber" with delta 1, or half the "squared"."""
    each = optax.losses.huber_loss(td_error) if kind == "huber" else 0.5 * td_error**2
    return (weight * each).mean()


def take(values: jax.Array, action: jax.Array) -> jax.Array:
    """Pick one of `values` (..., num_actions) by `action` (...) int."""
    # a sum over one-hot: a gather is many times slower on CPU, and so is its gradient
    return (values * jax.nn.one_hot(action, values.shape[-1], dtype=values.dtype)).sum(-1)


def epsilon(config: Config, env_steps: jax.Array, total_steps: int) -> jax.Array:
    """Probability of a random action after `env_steps` () of the run."""
    start, end = jnp.float32(config.epsilon_start), jnp.float32(config.epsilon_end)
    gone = env_steps.astype(jnp.float32) / (config.epsilon_fraction * total_steps)
    gone = jnp.clip(gone, 0.0, 1.0)
    if config.epsilon_decay == "linear":
        return start + (end - start) * gone
    return start * (end / start) ** gone


def epsilon_greedy(q: jax.Array, u: jax.Array, epsilon: float | jax.Array) -> jax.Array:
    """Draw actions (*batch,) int32: the best of q (*batch, num_actions), or any with `epsilon`.

    u (*batch,) is uniform in [0, 1) and decides both: where u < epsilon, u / epsilon is uniform.
    """
    is_random = u < epsilon
    u = jnp.where(is_random, u / jnp.maximum(epsilon, 1e-6), 0.0)
    random = jnp.minimum((u * q.shape[-1]).astype(jnp.int32), q.shape[-1] - 1)
    return jnp.where(is_random, random, q.argmax(-1).astype(jnp.int32))


def check_config(config: Config, env: Env, env_params: Any) -> None:
    """Raise ValueError, naming field, value and remedy, if the settings can't work with `env`."""
    off_policy.check_config(config)
    check_count("target_every", config.target_every)
    check_real("learning_rate", config.learning_rate, 0.0, math.inf, above=True)
    check_choice("epsilon_decay", config.epsilon_decay, ("linear", "exponential"))
    lowest = 0.0 if config.epsilon_decay == "linear" else 1e-6
    check_real("epsilon_start", config.epsilon_start, lowest, 1.0)
    check_real("epsilon_end", config.epsilon_end, lowest, 1.0)
    check_real("epsilon_fraction", config.epsilon_fraction, 0.0, 1.0, above=True)
    check_real("tau", config.tau, 0.0, 1.0, above=True)
    check_real("priority_alpha", config.priority_alpha, 0.0, 1.0)
    check_real("priority_beta", config.priority_beta, 0.0, 1.0)
    check_real("max_grad_norm", config.max_grad_norm, 0.0, math.inf, above=True)
    check_real("adam_eps", config.adam_eps, 0.0, math.inf, above=True)
    check_choice("loss", config.loss, ("huber", "squared"))
    check_widths("hidden", config.hidden)
    check_choice("activation", config.activation, ACTIVATIONS)
    if config.dueling and config.action_input:
        raise ValueError(
            "dueling = True cannot go with action_input = True: heads need one output per action"
        )
    action, _ = spaces.read(env, env_params)
    if not isinstance(action, spaces.Discrete):
        raise ValueError(
            f"DQN needs discrete actions, but this environment has {action.size} real one(s): use "
            "an agent that takes those, ppo for one"
        )


def q_net(config: Config, action: spaces.ActionSpec) -> QNet:
    """Build the network that `config` describes."""
    assert isinstance(action, spaces.Discrete)
    return QNet(config.hidden, action.n, config.activation, config.dueling, config.action_input)


def make_act(
    config: Config, action: spaces.ActionSpec, obs_shape: tuple[int, ...]
) -> Callable[..., jax.Array]:
    """Return `act(policy, obs, key=None) -> action`, pure; obs (*batch, *obs_shape).

    The best action, or, given a key, a random one with probability epsilon_end.
    """
    net = q_net(config, action)

    def act(policy: Policy, obs: jax.Array, key: jax.Array | None = None) -> jax.Array:
        if policy.obs_stats is not None:
            obs = normalize.normalize(policy.obs_stats, obs)
        q = net.values(policy.params, spaces.flat(obs, obs_shape))
        if key is None:
            return q.argmax(-1).astype(jnp.int32)
        return epsilon_greedy(q, jax.random.uniform(key, q.shape[:-1]), config.epsilon_end)

    return act


def get_policy(state: TrainState) -> Policy:
    """Take what acting needs out of a train state."""
    return Policy(state.learner.params, state.obs_stats)


def make_train(config: Config, env: Env, env_params: Any) -> Train[TrainState]:
    """Return the whole training run, `train(key) -> (state, metrics)`: pure, jit it, vmap it.

    `vmap` over keys trains many seeds; over real fields of `config` it sweeps them (see
    `jaxrl.agents.ppo.make_train`).

    Raises:
        ValueError: `config` cannot work (see `check_config`), or the buffer does not fit.

    Warns:
        UserWarning: `total_steps` is not a whole number of updates and is rounded up.
    """
    check_config(config, env, env_params)
    # swept reals may come as float64 where x64 is on; the loop's carry is float32
    config = jax.tree.map(
        lambda x: x.astype(jnp.float32) if isinstance(x, jax.Array) else x, config
    )
    net = q_net(config, spaces.read(env, env_params)[0])
    optimizer = off_policy.adam(config.max_grad_norm, config.adam_eps)
    total_steps = off_policy.num_steps_run(config)
    all_gradient_steps = off_policy.num_gradient_steps(config)

    def init(key: jax.Array, obs: jax.Array) -> Learner:
        params = net.init(key, obs)
        return Learner(params, params, optimizer.init(params), jnp.zeros((), jnp.int32))

    def explore(learner: Learner, obs: jax.Array, u: jax.Array, env_steps: jax.Array):
        now = epsilon(config, env_steps, total_steps)
        action = epsilon_greedy(net.values(learner.params, obs), u, now)
        return action, action

    def loss(params: Any, batch: Batch, target: jax.Array, weight: jax.Array):
        chosen = take(net.values(params, batch.obs), batch.action)
        td_error = chosen - target
        return td_loss(td_error, weight, config.loss), (td_error, chosen)

    def learn(learner: Learner, batch: Batch, weight: jax.Array, drawn: None):
        del drawn  # nothing is random here
        # outside the loss: what is not differentiated must not pass through the backward pass
        next_q_target = net.values(learner.target_params, batch.next_obs)
        next_q = net.values(learner.params, batch.next_obs) if config.double else next_q_target
        target = td_target(batch, next_q, next_q_target, config.double)
        (value, (td_error, chosen)), grads = jax.value_and_grad(loss, has_aux=True)(
            learner.params, batch, target, weight
        )
        updates, opt_state = optimizer.update(grads, learner.opt_state)
        left = 1.0
        if config.anneal_learning_rate:
            left = 1.0 - learner.num_gradient_steps.astype(jnp.float32) / all_gradient_steps
        rate = config.learning_rate * left
        params = jax.tree.map(lambda p, u: (p - rate * u).astype(p.dtype), learner.params, updates)
        num_gradient_steps = learner.num_gradient_steps + 1

        def move():
            return optax.incremental_update(params, learner.target_params, config.tau)

        if config.target_every == 1:
            target_params = move()
        else:
            due = num_gradient_steps % config.target_every == 0
            target_params = jax.lax.cond(due, move, lambda: learner.target_params)
        metrics: Metrics = {
            "loss": value,
            "learning_rate": jnp.asarray(rate, jnp.float32),
            "q": chosen.mean(),
            "td_error": jnp.abs(td_error).mean(),
            "grad_norm": optax.tree.norm(grads),
        }
        return Learner(params, target_params, opt_state, num_gradient_steps), metrics, td_error

    priority = None
    if config.prioritized:
        priority = off_policy.Priority(config.priority_alpha, config.priority_beta)

    def draw_explore(key: jax.Array, num: tuple[int, ...]) -> jax.Array:
        return draws.draw(jax.random.uniform, key, num)

    agent = off_policy.Agent(init, draw_explore, explore, lambda key, num: None, learn)
    return off_policy.make_train(config, env, env_params, agent, priority)
