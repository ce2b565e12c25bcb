"""Distributional soft actor-critic, Duan et al. (2021, https://arxiv.org/abs/2001.02811).

Maximises reward plus entropy as SAC does, but its critic is a distribution of the return, a
Gaussian with mean Q(s, a) and deviation sigma(s, a): where the return is uncertain the mean learns
slowly, which takes the place of SAC's second critic. With copies Z' and pi' that follow slowly,

    y        = r + gamma (z' - alpha log pi'(a' | s')),   a' ~ pi'(. | s'),   z' ~ Z'(s', a')
    J(Z)     = E[ -log N(y; Q, sigma) ],   the negative log-likelihood of the sampled return
    J(pi)    = E[ alpha log pi(a | s) - Q(s, a) ],   every policy_delay gradient steps
    J(alpha) = E[ -alpha (log pi(a | s) + H_target) ],   with it

(sec. IV and V and algorithm 1 there). Against exploding gradients sigma is at least min_std, and
the gradient of sigma, not that of Q, sees y cut to Q +- td_bound: see `critic_loss`. The loop
around it is jaxrl.off_policy's. Where we differ from most: a time limit is not an end, its last
observation is bootstrapped from; gradients are clipped by their *global* norm.

MicroRacer's program (asperti/MicroRacer, DSAC.py) differs from the paper and from us: it cuts y for
Q's gradient too, improves the policy by a sampled return instead of Q, and subtracts the logarithm
of tanh's slope once for each component of the action, so twice on the race track.
"""

import math
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from flax import struct

from jaxrl import draws, normalize, off_policy, spaces
from jaxrl.checks import check_choice, check_count, check_real, check_widths
from jaxrl.distributions import TanhNormal
from jaxrl.networks import ACTIVATIONS, CriticNet, PolicyNet
from jaxrl.off_policy import TrainState
from jaxrl.replay import Batch
from jaxrl.types import Env, Metrics, Policy, Train


@struct.dataclass
class Config:
    """Settings of DSAC. Reals are leaves, so `vmap` sweeps them; the rest is static.

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
    alpha_rate_factor: float = 1.0
    """Learning rate of the temperature as a multiple of learning_rate."""
    anneal_learning_rate: bool = struct.field(pytree_node=False, default=False)
    """Let the learning rates fall linearly to 0 over the run."""
    gamma: float = 0.99
    """Discount."""
    tau: float = 0.005
    """Part of the way that the target networks move to the online ones."""
    policy_delay: int = struct.field(pytree_node=False, default=2)
    """Gradient steps of the critic for one of policy, temperature and target networks."""
    min_std: float = 1.0
    """Lower bound of the return's standard deviation, in units of the return."""
    td_bound: float = 10.0
    """How far the sampled return may lie from its mean for the gradient of the deviation."""
    learn_alpha: bool = struct.field(pytree_node=False, default=True)
    """Let the temperature follow the target entropy; otherwise it stays at initial_alpha."""
    initial_alpha: float = 1.0
    """Temperature, the weight of the entropy, at the start."""
    target_entropy: float = -1.0
    """Target entropy of one component of the action, in nats, with the bounds at -1 and 1."""
    n_step: int = struct.field(pytree_node=False, default=1)
    """Rewards summed before the bootstrap; the entropy of the steps between is left out."""
    max_grad_norm: float = 10.0
    """Bound on the global norm of the gradient, of the policy's and of the critic's each."""
    adam_eps: float = 1e-8
    """Adam's epsilon."""
    normalize_obs: bool = struct.field(pytree_node=False, default=False)
    """Give observations running mean 0 and standard deviation 1."""
    hidden: tuple[int, ...] = struct.field(pytree_node=False, default=(64, 64))
    """Hidden layer widths of the policy and of the critic."""
    activation: str = struct.field(pytree_node=False, default="relu")
    """Activation of the hidden layers."""


@struct.dataclass
class Learner:
    """What learns: part of the train state."""

    policy: Any
    critic: Any
    target_policy: Any
    target_critic: Any
    log_alpha: jax.Array  # ()
    policy_opt: optax.OptState
    critic_opt: optax.OptState
    alpha_opt: optax.OptState
    num_gradient_steps: jax.Array  # () int32

    @property
    def params(self) -> Any:
        """What is trained, targets apart."""
        return {"policy": self.policy, "critic": self.critic}


def return_distribution(
    outputs: jax.Array, min_std: float | jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return mean and standard deviation (B,) of the return from a critic's outputs (B, 2).

    The deviation is softplus of the second one, at least min_std.
    """
    return outputs[..., 0], jnp.maximum(jax.nn.softplus(outputs[..., 1]), min_std)


def critic_loss(
    mean: jax.Array,
    std: jax.Array,
    target: jax.Array,
    td_bound: float | jax.Array,
    weight: jax.Array,
) -> jax.Array:
    """Negative log-likelihood of sampled returns, all (B,), with the cut of Duan et al. sec. V.

    Its gradients are -(y - Q) / sigma^2 in Q, and -((y_cut - Q)^2 - sigma^2) / sigma^3 in sigma,
    with y_cut = clip(y, Q - td_bound, Q + td_bound).
    """
    near = jnp.clip(jax.lax.stop_gradient(target - mean), -td_bound, td_bound)
    for_mean = (target - mean) ** 2 / (2.0 * jax.lax.stop_gradient(std) ** 2)
    for_std = near**2 / (2.0 * std**2) + jnp.log(std)
    return (for_mean + for_std).dot(weight) / weight.shape[0]


def alpha_loss(log_alpha: jax.Array, entropy: jax.Array, target_entropy: Any) -> jax.Array:
    """J(alpha) with log alpha in alpha's place; entropy (B,) of the policy, estimated."""
    return log_alpha * (entropy - target_entropy).mean()


def check_config(config: Config, env: Env, env_params: Any) -> None:
    """Raise ValueError, naming field, value and remedy, if the settings can't work with `env`."""
    off_policy.check_config(config)
    check_real("learning_rate", config.learning_rate, 0.0, math.inf, above=True)
    check_real("actor_rate_factor", config.actor_rate_factor, 0.0, math.inf, above=True)
    check_real("alpha_rate_factor", config.alpha_rate_factor, 0.0, math.inf, above=True)
    check_real("tau", config.tau, 0.0, 1.0, above=True)
    check_count("policy_delay", config.policy_delay)
    check_real("min_std", config.min_std, 0.0, math.inf, above=True)
    check_real("td_bound", config.td_bound, 0.0, math.inf, above=True)
    check_real("initial_alpha", config.initial_alpha, 0.0, math.inf, above=True)
    # a squashed action in [-1, 1] has at most the entropy of the uniform one, log 2
    check_real("target_entropy", config.target_entropy, -math.inf, math.log(2.0))
    check_real("max_grad_norm", config.max_grad_norm, 0.0, math.inf, above=True)
    check_real("adam_eps", config.adam_eps, 0.0, math.inf, above=True)
    check_widths("hidden", config.hidden)
    check_choice("activation", config.activation, ACTIVATIONS)
    action, _ = spaces.read(env, env_params)
    if isinstance(action, spaces.Discrete):
        raise ValueError(
            f"DSAC needs real actions, but this environment has {action.n} discrete ones: use dqn, "
            "sac or ppo"
        )


def policy_net(config: Config, action: spaces.ActionSpec) -> PolicyNet:
    """Build the policy network that `config` describes."""
    assert isinstance(action, spaces.Box)
    return PolicyNet(config.hidden, action, config.activation, "tanh", state_dependent_std=True)


def make_act(
    config: Config, action: spaces.ActionSpec, obs_shape: tuple[int, ...]
) -> Callable[..., jax.Array]:
    """Return `act(policy, obs, key=None) -> action`, pure; obs (*batch, *obs_shape).

    The action is in the environment's units: the most likely one, or, given a key, a drawn one.
    """
    assert isinstance(action, spaces.Box)
    net = policy_net(config, action)

    def act(policy: Policy, obs: jax.Array, key: jax.Array | None = None) -> jax.Array:
        if policy.obs_stats is not None:
            obs = normalize.normalize(policy.obs_stats, obs)
        pi = net.policy(policy.params, spaces.flat(obs, obs_shape))
        drawn = pi.mode() if key is None else pi.sample(key)
        assert isinstance(pi, TanhNormal)
        return action.scale(pi.squash(drawn))

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
    z_net = CriticNet(config.hidden, config.activation, num_outputs=2)
    target_entropy = config.target_entropy * action_spec.size
    optimizer = off_policy.adam(config.max_grad_norm, config.adam_eps)
    alpha_optimizer = optax.scale_by_adam(eps=config.adam_eps)
    all_gradient_steps = off_policy.num_gradient_steps(config)

    def init(key: jax.Array, obs: jax.Array) -> Learner:
        key_policy, key_critic = draws.split(key)
        policy = pi_net.init(key_policy, obs)
        critic = z_net.init(key_critic, obs, jnp.zeros((*obs.shape[:-1], action_spec.size)))
        log_alpha = jnp.log(jnp.float32(config.initial_alpha))
        return Learner(
            policy=policy,
            critic=critic,
            target_policy=policy,
            target_critic=critic,
            log_alpha=log_alpha,
            policy_opt=optimizer.init(policy),
            critic_opt=optimizer.init(critic),
            alpha_opt=alpha_optimizer.init(log_alpha),
            num_gradient_steps=jnp.zeros((), jnp.int32),
        )

    def draw(policy: Any, obs: jax.Array, noise: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Draw actions (B, size) in (-1, 1) with their log-densities (B,); noise (B, size)."""
        pi = pi_net.policy(policy, obs)
        assert isinstance(pi, TanhNormal)
        drawn = pi.place(noise)
        return pi.squash(drawn), pi.log_prob(drawn)

    def draw_explore(key: jax.Array, num: tuple[int, ...]):
        """Noise for the policy's actions, and actions to begin with."""
        key_policy, key_random = draws.split(key)
        shape = (*num, action_spec.size)
        random = draws.draw(jax.random.uniform, key_random, shape, jnp.float32, -1.0, 1.0)
        return draws.draw(jax.random.normal, key_policy, shape), random

    def explore(learner: Learner, obs: jax.Array, drawn: Any, env_steps: jax.Array):
        noise, random = drawn
        action, _ = draw(learner.policy, obs, noise)
        action = jnp.where(env_steps < config.learning_starts, random, action)
        return action_spec.scale(action), action

    def returns(critic: Any, obs: jax.Array, action: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Mean and deviation (B,) of the return."""
        return return_distribution(z_net.outputs(critic, obs, action), config.min_std)

    def loss_of_critic(critic: Any, batch: Batch, target: jax.Array, weight: jax.Array):
        mean, std = returns(critic, batch.obs, batch.action)
        return critic_loss(mean, std, target, config.td_bound, weight), (mean, std)

    def loss_of_policy(policy: Any, critic: Any, alpha: jax.Array, batch: Batch, noise: jax.Array):
        action, log_prob = draw(policy, batch.obs, noise)
        mean, _ = returns(critic, batch.obs, action)
        return (alpha * log_prob - mean).mean(), -log_prob

    def draw_learn(key: jax.Array, num: tuple[int, ...]):
        """Noise of the actions at the next and at this observation, and of the next return."""
        key_actions, key_return = draws.split(key)
        noise = draws.draw(
            jax.random.normal, key_actions, (*num, 2, config.batch_size, action_spec.size)
        )
        noise_return = draws.draw(jax.random.normal, key_return, (*num, config.batch_size))
        return noise[..., 0, :, :], noise[..., 1, :, :], noise_return

    def learn(learner: Learner, batch: Batch, weight: jax.Array, drawn: Any):
        noise_next, noise, noise_return = drawn
        num_gradient_steps = learner.num_gradient_steps + 1
        alpha = jnp.exp(learner.log_alpha)
        left = 1.0
        if config.anneal_learning_rate:
            left = 1.0 - learner.num_gradient_steps.astype(jnp.float32) / all_gradient_steps
        rate = config.learning_rate * left

        # outside the loss: what is not differentiated must not pass through the backward pass
        next_action, next_log_prob = draw(learner.target_policy, batch.next_obs, noise_next)
        next_mean, next_std = returns(learner.target_critic, batch.next_obs, next_action)
        next_return = next_mean + next_std * noise_return
        target = batch.reward + batch.discount * (next_return - alpha * next_log_prob)
        (loss, (mean, std)), critic_grads = jax.value_and_grad(loss_of_critic, has_aux=True)(
            learner.critic, batch, target, weight
        )
        updates, critic_opt = optimizer.update(critic_grads, learner.critic_opt)
        critic = jax.tree.map(lambda p, u: (p - rate * u).astype(p.dtype), learner.critic, updates)

        def improve():
            """Take a step of policy and temperature, and of the target networks."""
            (policy_loss, entropy), grads = jax.value_and_grad(loss_of_policy, has_aux=True)(
                learner.policy, critic, alpha, batch, noise
            )
            updates, policy_opt = optimizer.update(grads, learner.policy_opt)
            policy_rate = rate * config.actor_rate_factor
            policy = jax.tree.map(
                lambda p, u: (p - policy_rate * u).astype(p.dtype), learner.policy, updates
            )
            log_alpha, alpha_opt = learner.log_alpha, learner.alpha_opt
            if config.learn_alpha:
                alpha_grad = jax.grad(alpha_loss)(log_alpha, entropy, target_entropy)
                update, alpha_opt = alpha_optimizer.update(alpha_grad, alpha_opt)
                log_alpha = log_alpha - rate * config.alpha_rate_factor * cast(jax.Array, update)
            target_policy = optax.incremental_update(policy, learner.target_policy, config.tau)
            target_critic = optax.incremental_update(critic, learner.target_critic, config.tau)
            changed = (policy, policy_opt, log_alpha, alpha_opt, target_policy, target_critic)
            return changed, (policy_loss, entropy.mean(), optax.tree.norm(grads))

        def wait():
            """Leave them; metrics of 0, and those of the other steps count for all."""
            kept = (
                learner.policy,
                learner.policy_opt,
                learner.log_alpha,
                learner.alpha_opt,
                learner.target_policy,
                learner.target_critic,
            )
            return kept, (jnp.zeros(()), jnp.zeros(()), jnp.zeros(()))

        due = num_gradient_steps % config.policy_delay == 0
        changed, (policy_loss, entropy, policy_grad_norm) = (
            improve() if config.policy_delay == 1 else jax.lax.cond(due, improve, wait)
        )
        policy, policy_opt, log_alpha, alpha_opt, target_policy, target_critic = changed
        td_error = mean - target
        metrics: Metrics = {
            "critic_loss": loss,
            "policy_loss": config.policy_delay * policy_loss,
            "q": mean.mean(),
            "return_std": std.mean(),
            "td_error": jnp.abs(td_error).mean(),
            "entropy": config.policy_delay * entropy,
            "alpha": alpha,
            "critic_grad_norm": optax.tree.norm(critic_grads),
            "policy_grad_norm": config.policy_delay * policy_grad_norm,
        }
        learner = Learner(
            policy=policy,
            critic=critic,
            target_policy=target_policy,
            target_critic=target_critic,
            log_alpha=log_alpha,
            policy_opt=policy_opt,
            critic_opt=critic_opt,
            alpha_opt=alpha_opt,
            num_gradient_steps=num_gradient_steps,
        )
        return learner, metrics, td_error

    agent = off_policy.Agent(init, draw_explore, explore, draw_learn, learn)
    return off_policy.make_train(config, env, env_params, agent)
