"""Twin delayed deep deterministic policy gradient, Fujimoto et al. (2018, arXiv 1802.09477).

With two critics Q_i, a deterministic policy pi, and slowly following copies Q'_i and pi' of them,

    a'     = clip(pi'(s') + clip(noise, -c, c), -1, 1)          (eq. 14: target policy smoothing)
    y      = r + gamma min_i Q'_i(s', a')                       (eq. 10: clipped double Q-learning)
    J(Q_i) = E[ 1/2 (Q_i(s, a_replay) - y)^2 ]
    J(pi)  = E[ -Q_1(s, pi(s)) ],   every policy_delay gradient steps, and the copies with it

(algorithm 1 there). The loop around it is jaxrl.off_policy's. Where we differ from most: a time
limit is not an end, its last observation is bootstrapped from; gradients are clipped by their
*global* norm.
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
from jaxrl.networks import ACTIVATIONS, ActorNet, CriticNet, init_two, two_values
from jaxrl.off_policy import TrainState
from jaxrl.replay import Batch
from jaxrl.types import Env, Metrics, Policy, Train


@struct.dataclass
class Config:
    """Settings of TD3. Reals are leaves, so `vmap` sweeps them; the rest is static.

    There are num_gradient_steps / (train_every * num_envs) gradient steps to an environment step.
    """

    total_steps: int = struct.field(pytree_node=False, default=100_000)
    """Environment steps of the whole run, all environments together."""
    num_envs: int = struct.field(pytree_node=False, default=8)
    """Environments stepped in parallel."""
    num_steps: int = struct.field(pytree_node=False, default=125)
    """Steps of each environment in one update, the unit of metrics and logs."""
    train_every: int = struct.field(pytree_node=False, default=1)
    """Steps of each environment between two rounds of learning."""
    num_gradient_steps: int = struct.field(pytree_node=False, default=4)
    """Gradient steps in one round of learning."""
    batch_size: int = struct.field(pytree_node=False, default=256)
    """Transitions in one gradient step."""
    buffer_size: int = struct.field(pytree_node=False, default=100_000)
    """Most recent transitions that are kept."""
    learning_starts: int = struct.field(pytree_node=False, default=1_000)
    """Environment steps before the first gradient step; until then actions are uniform."""
    learning_rate: float = 1e-3
    """Step size of Adam, at the start."""
    actor_rate_factor: float = 1.0
    """Learning rate of the policy as a multiple of learning_rate."""
    anneal_learning_rate: bool = struct.field(pytree_node=False, default=False)
    """Let the learning rates fall linearly to 0 over the run."""
    gamma: float = 0.99
    """Discount."""
    tau: float = 0.005
    """Part of the way that the target networks move to the online ones."""
    exploration_noise: float = 0.1
    """Standard deviation of the noise on actions, with the bounds at -1 and 1."""
    target_noise: float = 0.2
    """Standard deviation of the noise on the target policy's actions."""
    target_noise_clip: float = 0.5
    """Bound on that noise."""
    policy_delay: int = struct.field(pytree_node=False, default=2)
    """Gradient steps of the critics for one of the policy and of the target networks."""
    n_step: int = struct.field(pytree_node=False, default=1)
    """Rewards summed before the bootstrap."""
    max_grad_norm: float = 10.0
    """Bound on the global norm of the gradient, of the policy's and of the critics' each."""
    adam_eps: float = 1e-8
    """Adam's epsilon."""
    normalize_obs: bool = struct.field(pytree_node=False, default=False)
    """Give observations running mean 0 and standard deviation 1."""
    hidden: tuple[int, ...] = struct.field(pytree_node=False, default=(64, 64))
    """Hidden layer widths of the policy and of each critic."""
    activation: str = struct.field(pytree_node=False, default="relu")
    """Activation of the hidden layers."""


@struct.dataclass
class Learner:
    """What learns: part of the train state."""

    policy: Any
    critics: Any  # of both, leading axis (2,)
    target_policy: Any
    target_critics: Any
    policy_opt: optax.OptState
    critic_opt: optax.OptState
    num_gradient_steps: jax.Array  # () int32

    @property
    def params(self) -> Any:
        """What is trained, targets apart."""
        return {"policy": self.policy, "critics": self.critics}


def smoothed(
    action: jax.Array, normals: jax.Array, std: float | jax.Array, bound: float | jax.Array
) -> jax.Array:
    """Return actions in [-1, 1] with clipped noise: Fujimoto et al. (2018) eq. 14; all (B, size).

    `normals` are standard normal.
    """
    return jnp.clip(action + jnp.clip(std * normals, -bound, bound), -1.0, 1.0)


def td_target(batch: Batch, next_q: jax.Array) -> jax.Array:
    """Return y (B,) of clipped double Q-learning, eq. 10; next_q (2, B) of both target critics."""
    return batch.reward + batch.discount * next_q.min(0)


def critic_loss(td_error: jax.Array, weight: jax.Array) -> jax.Array:
    """Sum over the critics of half the weighted mean square: td_error (2, B), weight (B,).

    The sum lets each critic learn as if it were alone.
    """
    return 0.5 * (td_error**2).sum(0).dot(weight) / weight.shape[0]


def check_config(config: Config, env: Env, env_params: Any) -> None:
    """Raise ValueError, naming field, value and remedy, if the settings can't work with `env`."""
    off_policy.check_config(config)
    check_real("learning_rate", config.learning_rate, 0.0, math.inf, above=True)
    check_real("actor_rate_factor", config.actor_rate_factor, 0.0, math.inf, above=True)
    check_real("tau", config.tau, 0.0, 1.0, above=True)
    check_real("exploration_noise", config.exploration_noise, 0.0, math.inf)
    check_real("target_noise", config.target_noise, 0.0, math.inf)
    check_real("target_noise_clip", config.target_noise_clip, 0.0, math.inf)
    check_count("policy_delay", config.policy_delay)
    check_real("max_grad_norm", config.max_grad_norm, 0.0, math.inf, above=True)
    check_real("adam_eps", config.adam_eps, 0.0, math.inf, above=True)
    check_widths("hidden", config.hidden)
    check_choice("activation", config.activation, ACTIVATIONS)
    action, _ = spaces.read(env, env_params)
    if isinstance(action, spaces.Discrete):
        raise ValueError(
            f"TD3 needs real actions, but this environment has {action.n} discrete ones: use dqn, "
            "sac or ppo"
        )


def policy_net(config: Config, action: spaces.ActionSpec) -> ActorNet:
    """Build the policy network that `config` describes."""
    assert isinstance(action, spaces.Box)
    return ActorNet(config.hidden, action.size, config.activation)


def make_act(
    config: Config, action: spaces.ActionSpec, obs_shape: tuple[int, ...]
) -> Callable[..., jax.Array]:
    """Return `act(policy, obs, key=None) -> action`, pure; obs (*batch, *obs_shape).

    The policy's action in the environment's units, or, given a key, one with exploration noise.
    """
    assert isinstance(action, spaces.Box)
    net = policy_net(config, action)

    def act(policy: Policy, obs: jax.Array, key: jax.Array | None = None) -> jax.Array:
        if policy.obs_stats is not None:
            obs = normalize.normalize(policy.obs_stats, obs)
        unit = net.action(policy.params, spaces.flat(obs, obs_shape))
        if key is not None:
            normals = jax.random.normal(key, unit.shape)
            unit = smoothed(unit, normals, config.exploration_noise, math.inf)
        return action.scale(unit)

    return act


def get_policy(state: TrainState) -> Policy:
    """Take what acting needs out of a train state."""
    return Policy(state.learner.policy, state.obs_stats)


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
    action_spec, _ = spaces.read(env, env_params)
    assert isinstance(action_spec, spaces.Box)
    pi_net = policy_net(config, action_spec)
    q_net = CriticNet(config.hidden, config.activation)
    optimizer = off_policy.adam(config.max_grad_norm, config.adam_eps)
    all_gradient_steps = off_policy.num_gradient_steps(config)

    def init(key: jax.Array, obs: jax.Array) -> Learner:
        key_policy, key_critics = draws.split(key)
        policy = pi_net.init(key_policy, obs)
        action = jnp.zeros((*obs.shape[:-1], action_spec.size))
        critics = init_two(q_net, key_critics, obs, action)
        return Learner(
            policy=policy,
            critics=critics,
            target_policy=policy,
            target_critics=critics,
            policy_opt=optimizer.init(policy),
            critic_opt=optimizer.init(critics),
            num_gradient_steps=jnp.zeros((), jnp.int32),
        )

    def draw_explore(key: jax.Array, num: tuple[int, ...]):
        """Noise for the policy's actions, and actions to begin with."""
        key_noise, key_random = draws.split(key)
        shape = (*num, action_spec.size)
        random = draws.draw(jax.random.uniform, key_random, shape, jnp.float32, -1.0, 1.0)
        return draws.draw(jax.random.normal, key_noise, shape), random

    def explore(learner: Learner, obs: jax.Array, drawn: Any, env_steps: jax.Array):
        normals, random = drawn
        action = pi_net.action(learner.policy, obs)
        action = smoothed(action, normals, config.exploration_noise, math.inf)
        action = jnp.where(env_steps < config.learning_starts, random, action)
        return action_spec.scale(action), action

    def loss_of_critics(critics: Any, batch: Batch, target: jax.Array, weight: jax.Array):
        q = two_values(q_net, critics, batch.obs, batch.action)
        td_error = q - target[None]
        return critic_loss(td_error, weight), (td_error, q)

    def loss_of_policy(policy: Any, critics: Any, batch: Batch) -> jax.Array:
        first = jax.tree.map(lambda x: x[0], critics)
        return -q_net.values(first, batch.obs, pi_net.action(policy, batch.obs)).mean()

    def draw_learn(key: jax.Array, num: tuple[int, ...]) -> jax.Array:
        """Noise of the target policy."""
        return draws.draw(jax.random.normal, key, (*num, config.batch_size, action_spec.size))

    def learn(learner: Learner, batch: Batch, weight: jax.Array, normals: jax.Array):
        num_gradient_steps = learner.num_gradient_steps + 1
        left = 1.0
        if config.anneal_learning_rate:
            left = 1.0 - learner.num_gradient_steps.astype(jnp.float32) / all_gradient_steps
        rate = config.learning_rate * left

        # outside the loss: what is not differentiated must not pass through the backward pass
        next_action = smoothed(
            pi_net.action(learner.target_policy, batch.next_obs),
            normals,
            config.target_noise,
            config.target_noise_clip,
        )
        target = td_target(
            batch, two_values(q_net, learner.target_critics, batch.next_obs, next_action)
        )
        (loss, (td_error, q)), critic_grads = jax.value_and_grad(loss_of_critics, has_aux=True)(
            learner.critics, batch, target, weight
        )
        updates, critic_opt = optimizer.update(critic_grads, learner.critic_opt)
        critics = jax.tree.map(
            lambda p, u: (p - rate * u).astype(p.dtype), learner.critics, updates
        )

        def improve():
            """Take a step of the policy, and of all target networks: algorithm 1, lower part."""
            policy_loss, grads = jax.value_and_grad(loss_of_policy)(learner.policy, critics, batch)
            updates, policy_opt = optimizer.update(grads, learner.policy_opt)
            policy_rate = rate * config.actor_rate_factor
            policy = jax.tree.map(
                lambda p, u: (p - policy_rate * u).astype(p.dtype), learner.policy, updates
            )
            target_policy = optax.incremental_update(policy, learner.target_policy, config.tau)
            target_critics = optax.incremental_update(critics, learner.target_critics, config.tau)
            changed = (policy, policy_opt, target_policy, target_critics)
            return changed, (policy_loss, optax.tree.norm(grads))

        def wait():
            """Leave them; metrics of 0, so that their means are those of all gradient steps."""
            kept = (
                learner.policy,
                learner.policy_opt,
                learner.target_policy,
                learner.target_critics,
            )
            return kept, (jnp.zeros(()), jnp.zeros(()))

        due = num_gradient_steps % config.policy_delay == 0
        (policy, policy_opt, target_policy, target_critics), (policy_loss, policy_grad_norm) = (
            improve() if config.policy_delay == 1 else jax.lax.cond(due, improve, wait)
        )
        metrics: Metrics = {
            "critic_loss": loss,
            "policy_loss": config.policy_delay * policy_loss,
            "q": q.mean(),
            "td_error": jnp.abs(td_error).mean(),
            "critic_grad_norm": optax.tree.norm(critic_grads),
            "policy_grad_norm": config.policy_delay * policy_grad_norm,
        }
        learner = Learner(
            policy=policy,
            critics=critics,
            target_policy=target_policy,
            target_critics=target_critics,
            policy_opt=policy_opt,
            critic_opt=critic_opt,
            num_gradient_steps=num_gradient_steps,
        )
        return learner, metrics, td_error.mean(0)

    agent = off_policy.Agent(init, draw_explore, explore, draw_learn, learn)
    return off_policy.make_train(config, env, env_params, agent)
