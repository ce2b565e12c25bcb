"""Soft actor-critic, Haarnoja et al. (2018, https://arxiv.org/abs/1812.05905).

Maximises reward plus entropy, E[ sum_t gamma^t (r + alpha H(pi(. | s))) ]. With two critics Q_i,
their slowly following copies Q'_i, and actions a ~ pi(. | s), a' ~ pi(. | s'),

    y        = r + gamma (min_i Q'_i(s', a') - alpha log pi(a' | s'))    (eq. 3 with eq. 5)
    J(Q_i)   = E[ 1/2 (Q_i(s, a_replay) - y)^2 ]                         (eq. 5)
    J(pi)    = E[ alpha log pi(a | s) - min_i Q_i(s, a) ]                (eq. 9)
    J(alpha) = E[ -alpha (log pi(a | s) + H_target) ]                    (eq. 18)

Real actions are a tanh of a Gaussian (appendix C). For discrete actions the expectations over a
and a' are sums (Christodoulou 2019, https://arxiv.org/abs/1910.07207, eq. 10 to 12). The loop
around it is jaxrl.off_policy's. Where we differ from most: a time limit is not an end, its last
observation is bootstrapped from; gradients are clipped by their *global* norm; the temperature
follows the gradient of eq. 18 with log alpha in alpha's place, as the authors' own program.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from flax import struct

from jaxrl import apart, draws, normalize, off_policy, spaces
from jaxrl.checks import check_choice, check_real, check_widths
from jaxrl.distributions import Categorical, TanhNormal, entropy_of
from jaxrl.networks import ACTIVATIONS, CriticNet, PolicyNet, QNet, init_two, two_values
from jaxrl.off_policy import TrainState
from jaxrl.replay import Batch
from jaxrl.types import Env, Policy, Train

Act = tuple[jax.Array, ...]  # actions (B, size), log-probabilities (B,); discrete: all (B, n)


@struct.dataclass
class Config:
    """Settings of SAC. Reals are leaves, so `vmap` sweeps them; the rest is static.

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
    """Part of the way that the target critics move to the online ones in a gradient step."""
    learn_alpha: bool = struct.field(pytree_node=False, default=True)
    """Let the temperature follow the target entropy; otherwise it stays at initial_alpha."""
    initial_alpha: float = 1.0
    """Temperature, the weight of the entropy, at the start."""
    target_entropy: float = -1.0
    """Real actions: target entropy of one component, in nats, with the bounds at -1 and 1."""
    target_entropy_ratio: float = 0.5
    """Discrete actions: target entropy as a part of log(number of actions), the most there is."""
    n_step: int = struct.field(pytree_node=False, default=1)
    """Rewards summed before the bootstrap; the entropy of the steps between is left out."""
    max_grad_norm: float = 10.0
    """Bound on the global norm of the gradient, of the policy's and of the critics' each."""
    adam_eps: float = 1e-8
    """Adam's epsilon."""
    normalize_obs: bool = struct.field(pytree_node=False, default=False)
    """Give observations running mean 0 and standard deviation 1."""
    learn_apart: bool = struct.field(pytree_node=False, default=False)
    """Let policy and temperature learn from the critics as they are before their gradient step, not
    after it, and the new policy act for the critics' next batch, which is sampled a round before
    it is learnt from: then neither waits, and they learn at once where each has a device of its
    own, with equally much to do."""
    hidden: tuple[int, ...] = struct.field(pytree_node=False, default=(64, 64))
    """Hidden layer widths of the policy and of each critic."""
    activation: str = struct.field(pytree_node=False, default="relu")
    """Activation of the hidden layers."""


@struct.dataclass
class Learner:
    """What learns: part of the train state."""

    policy: Any
    critics: Any  # of both, leading axis (2,)
    target_critics: Any
    log_alpha: jax.Array  # ()
    policy_opt: optax.OptState
    critic_opt: optax.OptState
    alpha_opt: optax.OptState
    num_gradient_steps: jax.Array  # () int32
    next_act: Any = None  # with learn_apart: the policy's actions for the batch that is next

    @property
    def params(self) -> Any:
        """What is trained, targets apart."""
        return {"policy": self.policy, "critics": self.critics}


def soft_value(q: jax.Array, log_prob: jax.Array, alpha: float | jax.Array) -> jax.Array:
    """Return V (B,) from one drawn action, eq. 3: q (2, B) of both critics, log_prob (B,)."""
    return q.min(0) - alpha * log_prob


def soft_value_discrete(q: jax.Array, log_probs: jax.Array, alpha: float | jax.Array) -> jax.Array:
    """Return V (B,), Christodoulou (2019) eq. 10: q (2, B, n) of both critics, log_probs (B, n)."""
    each = q.min(0) - alpha * log_probs
    # a probability of 0 has the log -inf: 0 * inf is not a number
    return jnp.where(log_probs > -jnp.inf, jnp.exp(log_probs) * each, 0.0).sum(-1)


def critic_loss(td_error: jax.Array, weight: jax.Array) -> jax.Array:
    """Sum over the critics of half the weighted mean square (eq. 5): td_error (2, B), weight (B,).

    The sum lets each critic learn as if it were alone.
    """
    return 0.5 * (td_error**2).sum(0).dot(weight) / weight.shape[0]


def alpha_loss(log_alpha: jax.Array, entropy: jax.Array, target_entropy: Any) -> jax.Array:
    """Eq. 18 with log alpha in alpha's place; entropy (B,) of the policy, estimated or exact."""
    return log_alpha * (entropy - target_entropy).mean()


def check_config(config: Config, env: Env, env_params: Any) -> None:
    """Raise ValueError, naming field, value and remedy, if the settings can't work with `env`."""
    off_policy.check_config(config)
    check_real("learning_rate", config.learning_rate, 0.0, math.inf, above=True)
    check_real("actor_rate_factor", config.actor_rate_factor, 0.0, math.inf, above=True)
    check_real("alpha_rate_factor", config.alpha_rate_factor, 0.0, math.inf, above=True)
    check_real("tau", config.tau, 0.0, 1.0, above=True)
    check_real("initial_alpha", config.initial_alpha, 0.0, math.inf, above=True)
    # a squashed action in [-1, 1] has at most the entropy of the uniform one, log 2
    check_real("target_entropy", config.target_entropy, -math.inf, math.log(2.0))
    check_real("target_entropy_ratio", config.target_entropy_ratio, 0.0, 1.0)
    check_real("max_grad_norm", config.max_grad_norm, 0.0, math.inf, above=True)
    check_real("adam_eps", config.adam_eps, 0.0, math.inf, above=True)
    check_widths("hidden", config.hidden)
    check_choice("activation", config.activation, ACTIVATIONS)
    spaces.read(env, env_params)


def policy_net(config: Config, action: spaces.ActionSpec) -> PolicyNet:
    """Build the policy network that `config` describes."""
    real = isinstance(action, spaces.Box)
    return PolicyNet(config.hidden, action, config.activation, "tanh", state_dependent_std=real)


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
        if isinstance(action, spaces.Discrete):
            return drawn
        assert isinstance(pi, TanhNormal)
        return action.scale(pi.squash(drawn))

    return act


def get_policy(state: TrainState) -> Policy:
    """Take what acting needs out of a train state."""
    return Policy(state.learner.policy, state.obs_stats)


def make_train(
    config: Config, env: Env, env_params: Any, net_axis: str | None = None
) -> Train[TrainState]:
    """Return the whole training run, `train(key) -> (state, metrics)`: pure, jit it, vmap it.

    `vmap` over keys trains many seeds; over real fields of `config` it sweeps them (see
    `jaxrl.agents.ppo.make_train`). `net_axis`: as there.

    Raises:
        ValueError: `config` cannot work (see `check_config`), the buffer does not fit, or the
            networks cannot learn apart.

    Warns:
        UserWarning: `total_steps` is not a whole number of updates and is rounded up.
    """
    check_config(config, env, env_params)
    apart.check(config.learn_apart, net_axis)
    # swept reals may come as float64 where x64 is on; the loop's carry is float32
    config = jax.tree.map(
        lambda x: x.astype(jnp.float32) if isinstance(x, jax.Array) else x, config
    )
    action_spec, _ = spaces.read(env, env_params)
    pi_net = policy_net(config, action_spec)
    optimizer = off_policy.adam(config.max_grad_norm, config.adam_eps)
    alpha_optimizer = optax.scale_by_adam(eps=config.adam_eps)
    all_gradient_steps = off_policy.num_gradient_steps(config, prepares=config.learn_apart)

    if isinstance(action_spec, spaces.Discrete):
        target_entropy = config.target_entropy_ratio * math.log(action_spec.n)
        q_net = QNet(config.hidden, action_spec.n, config.activation)
    else:
        target_entropy = config.target_entropy * action_spec.size
        q_net = CriticNet(config.hidden, config.activation)

    def init(key: jax.Array, obs: jax.Array) -> Learner:
        key_policy, key_critics = draws.split(key)
        policy = pi_net.init(key_policy, obs)
        inputs = [obs]
        if isinstance(action_spec, spaces.Box):
            inputs.append(jnp.zeros((*obs.shape[:-1], action_spec.size)))
        critics = init_two(q_net, key_critics, *inputs)
        log_alpha = jnp.log(jnp.float32(config.initial_alpha))
        next_act = None
        if config.learn_apart:  # zeros until there is a batch
            many = config.batch_size
            if isinstance(action_spec, spaces.Discrete):
                next_act = (jnp.zeros((many, action_spec.n)),)
            else:
                next_act = jnp.zeros((many, action_spec.size)), jnp.zeros(many)
        return Learner(
            policy=policy,
            critics=critics,
            target_critics=critics,
            log_alpha=log_alpha,
            policy_opt=optimizer.init(policy),
            critic_opt=optimizer.init(critics),
            alpha_opt=alpha_optimizer.init(log_alpha),
            num_gradient_steps=jnp.zeros((), jnp.int32),
            next_act=next_act,
        )

    def draw_explore(key: jax.Array, num: tuple[int, ...]):
        """Noise for the policy's actions, and actions to begin with."""
        key_policy, key_random = draws.split(key)
        if isinstance(action_spec, spaces.Discrete):
            noise = draws.draw(jax.random.gumbel, key_policy, (*num, action_spec.n))
            return noise, draws.draw(jax.random.randint, key_random, num, 0, action_spec.n)
        shape = (*num, action_spec.size)
        random = draws.draw(jax.random.uniform, key_random, shape, jnp.float32, -1.0, 1.0)
        return draws.draw(jax.random.normal, key_policy, shape), random

    def explore(learner: Learner, obs: jax.Array, drawn: Any, env_steps: jax.Array):
        noise, random = drawn
        pi = pi_net.policy(learner.policy, obs)
        action = pi.place(noise)
        if isinstance(pi, TanhNormal):
            action = pi.squash(action)
        action = jnp.where(env_steps < config.learning_starts, random, action)
        if isinstance(action_spec, spaces.Discrete):
            return action, action
        return action_spec.scale(action), action

    def draw_learn(key: jax.Array, num: tuple[int, ...]):
        """Noise of the actions at the next and at this observation."""
        if isinstance(action_spec, spaces.Discrete):  # nothing is drawn: means are exact
            return None, None
        noise = draws.draw(jax.random.normal, key, (*num, 2, config.batch_size, action_spec.size))
        return noise[..., 0, :, :], noise[..., 1, :, :]

    def act_for(policy: Any, obs: jax.Array, noise: Any) -> Act:
        """Act on a batch: once for each observation, or with all actions' log-probabilities."""
        pi = pi_net.policy(policy, obs)
        if isinstance(pi, Categorical):
            return (jax.nn.log_softmax(pi.logits),)
        assert isinstance(pi, TanhNormal)
        drawn = pi.place(noise)
        log_prob = pi.log_prob(drawn)
        return pi.squash(drawn), log_prob

    def value(act: Act, critics: Any, alpha: jax.Array, obs: jax.Array):
        """Return the soft value V (B,) and the policy's entropy (B,)."""
        *action, log_prob = act
        q = two_values(q_net, critics, obs, *action)
        if action:
            return soft_value(q, log_prob, alpha), -log_prob
        return soft_value_discrete(q, log_prob, alpha), entropy_of(log_prob)

    def loss_of_critics(critics: Any, batch: Batch, target: jax.Array, weight: jax.Array):
        if isinstance(action_spec, spaces.Discrete):
            one_hot = jax.nn.one_hot(batch.action, action_spec.n)  # a gather is slow on CPU
            q = (two_values(q_net, critics, batch.obs) * one_hot[None]).sum(-1)
        else:
            q = two_values(q_net, critics, batch.obs, batch.action)
        td_error = q - target[None]
        return critic_loss(td_error, weight), (td_error, q)

    def loss_of_policy(policy: Any, critics: Any, alpha: jax.Array, batch: Batch, noise: Any):
        soft, entropy = value(act_for(policy, batch.obs, noise), critics, alpha, batch.obs)
        return -soft.mean(), entropy

    def step(params: Any, grads: Any, opt_state: optax.OptState, rate: Any):
        updates, opt_state = optimizer.update(grads, opt_state)
        params = jax.tree.map(lambda p, u: (p - rate * u).astype(p.dtype), params, updates)
        return params, opt_state

    def prepare(learner: Learner, batch: Batch, drawn: Any) -> Learner:
        return replace(learner, next_act=act_for(learner.policy, batch.next_obs, drawn[0]))

    def learn(
        learner: Learner,
        batch: Batch,
        weight: jax.Array,
        drawn: Any,
        following: Batch | None = None,
    ):
        noise_next, noise = drawn
        alpha = jnp.exp(learner.log_alpha)
        left = 1.0
        if config.anneal_learning_rate:
            left = 1.0 - learner.num_gradient_steps.astype(jnp.float32) / all_gradient_steps
        rate = config.learning_rate * left

        def gradient_of_critics():
            # outside the loss: what is not differentiated must not pass through the backward pass
            next_act = learner.next_act
            if next_act is None:
                next_act = act_for(learner.policy, batch.next_obs, noise_next)
            next_value, _ = value(next_act, learner.target_critics, alpha, batch.next_obs)
            target = batch.reward + batch.discount * next_value
            (loss, (td_error, q)), grads = jax.value_and_grad(loss_of_critics, has_aux=True)(
                learner.critics, batch, target, weight
            )
            metrics = {
                "critic_loss": loss,
                "q": q.mean(),
                "td_error": jnp.abs(td_error).mean(),
                "critic_grad_norm": optax.tree.norm(grads),
            }
            return grads, metrics, td_error.mean(0)

        def gradients_of_policy_and_alpha(critics: Any):
            (loss, entropy), grads = jax.value_and_grad(loss_of_policy, has_aux=True)(
                learner.policy, critics, alpha, batch, noise
            )
            metrics = {
                "policy_loss": loss,
                "entropy": entropy.mean(),
                "alpha": alpha,
                "policy_grad_norm": optax.tree.norm(grads),
            }
            alpha_grad = jax.grad(alpha_loss)(learner.log_alpha, entropy, target_entropy)
            next_act = None
            if following is not None:
                policy, _ = step_of_policy(grads)
                next_act = act_for(policy, following.next_obs, noise_next)
            return (grads, alpha_grad, next_act), metrics, None

        def step_of_policy(grads: Any):
            policy_rate = rate * config.actor_rate_factor
            return step(learner.policy, grads, learner.policy_opt, policy_rate)

        if config.learn_apart:
            of_critics, of_policy = apart.call(
                [gradient_of_critics, lambda: gradients_of_policy_and_alpha(learner.critics)],
                net_axis,
            )
            critics, critic_opt = step(learner.critics, of_critics[0], learner.critic_opt, rate)
        else:
            of_critics = gradient_of_critics()
            critics, critic_opt = step(learner.critics, of_critics[0], learner.critic_opt, rate)
            of_policy = gradients_of_policy_and_alpha(critics)
        _, metrics, td_error = of_critics
        (policy_grads, alpha_grad, next_act), more_metrics, _ = of_policy

        target_critics = optax.incremental_update(critics, learner.target_critics, config.tau)
        policy, policy_opt = step_of_policy(policy_grads)
        log_alpha, alpha_opt = learner.log_alpha, learner.alpha_opt
        if config.learn_alpha:
            update, alpha_opt = alpha_optimizer.update(alpha_grad, alpha_opt)
            log_alpha = log_alpha - rate * config.alpha_rate_factor * cast(jax.Array, update)
        learner = Learner(
            policy=policy,
            critics=critics,
            target_critics=target_critics,
            log_alpha=log_alpha,
            policy_opt=policy_opt,
            critic_opt=critic_opt,
            alpha_opt=alpha_opt,
            num_gradient_steps=learner.num_gradient_steps + 1,
            next_act=next_act,
        )
        return learner, metrics | more_metrics, td_error

    agent = off_policy.Agent(
        init,
        draw_explore,
        explore,
        draw_learn,
        learn,
        prepare=prepare if config.learn_apart else None,
    )
    return off_policy.make_train(config, env, env_params, agent)
