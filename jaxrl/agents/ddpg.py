"""Deep deterministic policy gradient, Lillicrap et al. (2016, https://arxiv.org/abs/1509.02971).

With a critic Q, a deterministic policy mu, and slowly following copies Q' and mu' of them,

    y     = r + gamma Q'(s', mu'(s'))                     (algorithm 1; eq. 5 with the copies)
    J(Q)  = E[ 1/2 (Q(s, a_replay) - y)^2 ]               (eq. 4)
    J(mu) = E[ -Q(s, mu(s)) ]                             (eq. 6)

It explores by noise on the action, Gaussian or that of Ornstein and Uhlenbeck (sec. 3 there), or on
the policy's parameters, whose size adapts to what it does to the actions (Plappert et al. 2018,
https://arxiv.org/abs/1706.01905). The loop around it is jaxrl.off_policy's. Where we differ from
most: a time limit is not an end, its last observation is bootstrapped from; gradients are clipped
by their *global* norm. The paper's weight decay and batch normalisation are left out, as in
MicroRacer's programs.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.flatten_util import ravel_pytree

from jaxrl import draws, normalize, off_policy, spaces
from jaxrl.checks import check_choice, check_real, check_widths
from jaxrl.networks import ACTIVATIONS, ActorNet, CriticNet
from jaxrl.off_policy import TrainState
from jaxrl.replay import Batch
from jaxrl.types import Env, Metrics, Policy, Train


@struct.dataclass
class Config:
    """Settings of DDPG. Reals are leaves, so `vmap` sweeps them; the rest is static.

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
    noise: str = struct.field(pytree_node=False, default="gaussian")
    """Exploration: "gaussian" or "ou" noise on actions, or noise on the policy's "parameter"s."""
    exploration_noise: float = 0.1
    """Standard deviation of the noise, with the bounds of actions at -1 and 1: of its increments
    for "ou"; of what it does to the actions for "parameter"."""
    ou_theta: float = 0.15
    """Noise "ou": part of the way back to 0 that the noise goes in a step."""
    sigma_start: float = 0.05
    """Noise "parameter": standard deviation of the noise on parameters, at the start."""
    sigma_factor: float = 1.01
    """Noise "parameter": what that is multiplied with or divided by in a gradient step."""
    layer_norm: bool = struct.field(pytree_node=False, default=False)
    """Normalise the policy's hidden layers, so that noise on parameters does alike in each."""
    n_step: int = struct.field(pytree_node=False, default=1)
    """Rewards summed before the bootstrap."""
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
    policy_opt: optax.OptState
    critic_opt: optax.OptState
    sigma: jax.Array  # () standard deviation of the noise on parameters
    num_gradient_steps: jax.Array  # () int32

    @property
    def params(self) -> Any:
        """What is trained, targets apart."""
        return {"policy": self.policy, "critic": self.critic}


def td_target(batch: Batch, next_q: jax.Array) -> jax.Array:
    """Return y (B,): r + discount * Q'(s', mu'(s')); next_q (B,) of the target networks."""
    return batch.reward + batch.discount * next_q


def critic_loss(td_error: jax.Array, weight: jax.Array) -> jax.Array:
    """Half the weighted mean square, eq. 4: td_error (B,), weight (B,)."""
    return 0.5 * (td_error**2).dot(weight) / weight.shape[0]


def noisy(action: jax.Array, normals: jax.Array, std: float | jax.Array) -> jax.Array:
    """Return actions (*batch, size) in [-1, 1] with Gaussian noise, of standard `normals`."""
    return jnp.clip(action + std * normals, -1.0, 1.0)


def ou_step(
    noise: jax.Array, done: jax.Array, key: jax.Array, theta: Any, std: float | jax.Array
) -> jax.Array:
    """Next noise (N, size) of Ornstein and Uhlenbeck, x' = (1 - theta) x + std normal.

    Where an episode begins (done (N,)), x is 0.
    """
    left = jnp.where(done[:, None], 0.0, (1.0 - theta) * noise)
    return left + std * jax.random.normal(key, noise.shape)


def perturbable(params: Any) -> jax.Array:
    """Mark the parameters, in the order of `ravel_pytree`, that take noise: 1, or 0 in layer norms.

    Plappert et al. (2018) sec. 3: a layer norm stays as it is.
    """

    def mark(path: Any, leaf: jax.Array) -> jax.Array:
        inside = any("LayerNorm" in jax.tree_util.keystr((part,)) for part in path)
        return jnp.zeros(leaf.shape) if inside else jnp.ones(leaf.shape)

    return ravel_pytree(jax.tree_util.tree_map_with_path(mark, params))[0]


def perturb(params: Any, normals: jax.Array, sigma: jax.Array) -> Any:
    """Return params + sigma * normals, Plappert et al. (2018) sec. 3; normals (num_params,)."""
    flat, unravel = ravel_pytree(params)
    return unravel(flat + sigma * normals)


def adapt(
    sigma: jax.Array, distance: jax.Array, wanted: float | jax.Array, factor: float | jax.Array
) -> jax.Array:
    """Return the next sigma: larger while the noise moves actions too little (Plappert eq. 4)."""
    return jnp.where(distance <= wanted, sigma * factor, sigma / factor)


def check_config(config: Config, env: Env, env_params: Any) -> None:
    """Raise ValueError, naming field, value and remedy, if the settings can't work with `env`."""
    off_policy.check_config(config)
    check_real("learning_rate", config.learning_rate, 0.0, math.inf, above=True)
    check_real("actor_rate_factor", config.actor_rate_factor, 0.0, math.inf, above=True)
    check_real("tau", config.tau, 0.0, 1.0, above=True)
    check_real("exploration_noise", config.exploration_noise, 0.0, math.inf)
    check_choice("noise", config.noise, ("gaussian", "ou", "parameter"))
    check_real("ou_theta", config.ou_theta, 0.0, 1.0)
    check_real("sigma_start", config.sigma_start, 0.0, math.inf, above=True)
    check_real("sigma_factor", config.sigma_factor, 1.0, math.inf, above=True)
    check_real("max_grad_norm", config.max_grad_norm, 0.0, math.inf, above=True)
    check_real("adam_eps", config.adam_eps, 0.0, math.inf, above=True)
    check_widths("hidden", config.hidden)
    check_choice("activation", config.activation, ACTIVATIONS)
    action, _ = spaces.read(env, env_params)
    if isinstance(action, spaces.Discrete):
        raise ValueError(
            f"DDPG needs real actions, but this environment has {action.n} discrete ones: use dqn, "
            "sac or ppo"
        )


def policy_net(config: Config, action: spaces.ActionSpec) -> ActorNet:
    """Build the policy network that `config` describes."""
    assert isinstance(action, spaces.Box)
    return ActorNet(config.hidden, action.size, config.activation, config.layer_norm)


def make_act(
    config: Config, action: spaces.ActionSpec, obs_shape: tuple[int, ...]
) -> Callable[..., jax.Array]:
    """Return `act(policy, obs, key=None) -> action`, pure; obs (*batch, *obs_shape).

    The policy's action in the environment's units, or, given a key, one with Gaussian noise of
    exploration_noise.
    """
    assert isinstance(action, spaces.Box)
    net = policy_net(config, action)

    def act(policy: Policy, obs: jax.Array, key: jax.Array | None = None) -> jax.Array:
        if policy.obs_stats is not None:
            obs = normalize.normalize(policy.obs_stats, obs)
        unit = net.action(policy.params, spaces.flat(obs, obs_shape))
        if key is not None:
            unit = noisy(unit, jax.random.normal(key, unit.shape), config.exploration_noise)
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
    action_spec, obs_shape = spaces.read(env, env_params)
    assert isinstance(action_spec, spaces.Box)
    pi_net = policy_net(config, action_spec)
    q_net = CriticNet(config.hidden, config.activation)
    optimizer = off_policy.adam(config.max_grad_norm, config.adam_eps)
    all_gradient_steps = off_policy.num_gradient_steps(config)

    num_inputs = math.prod(obs_shape)
    mask = perturbable(jax.eval_shape(pi_net.init, jax.random.key(0), jnp.zeros(num_inputs)))

    def init(key: jax.Array, obs: jax.Array) -> Learner:
        key_policy, key_critic = draws.split(key)
        policy = pi_net.init(key_policy, obs)
        critic = q_net.init(key_critic, obs, jnp.zeros((*obs.shape[:-1], action_spec.size)))
        return Learner(
            policy=policy,
            critic=critic,
            target_policy=policy,
            target_critic=critic,
            policy_opt=optimizer.init(policy),
            critic_opt=optimizer.init(critic),
            sigma=jnp.float32(config.sigma_start),
            num_gradient_steps=jnp.zeros((), jnp.int32),
        )

    def draw_explore(key: jax.Array, num: tuple[int, ...]):
        """Noise for the policy's actions (unless it is remembered), and actions to begin with."""
        key_noise, key_random = draws.split(key)
        shape = (*num, action_spec.size)
        random = draws.draw(jax.random.uniform, key_random, shape, jnp.float32, -1.0, 1.0)
        normals = None
        if config.noise == "gaussian":
            normals = draws.draw(jax.random.normal, key_noise, shape)
        return normals, random

    def explore(
        learner: Learner,
        obs: jax.Array,
        drawn: Any,
        env_steps: jax.Array,
        noise: jax.Array | None = None,
    ):
        normals, random = drawn
        if config.noise == "parameter":  # each environment has a perturbed policy of its own
            action = jax.vmap(
                lambda each, o: pi_net.action(perturb(learner.policy, each, learner.sigma), o)
            )(noise, obs)
        elif noise is not None:  # of Ornstein and Uhlenbeck
            action = jnp.clip(pi_net.action(learner.policy, obs) + noise, -1.0, 1.0)
        else:
            action = pi_net.action(learner.policy, obs)
            action = noisy(action, normals, config.exploration_noise)
        action = jnp.where(env_steps < config.learning_starts, random, action)
        return action_spec.scale(action), action

    def loss_of_critic(critic: Any, batch: Batch, target: jax.Array, weight: jax.Array):
        q = q_net.values(critic, batch.obs, batch.action)
        td_error = q - target
        return critic_loss(td_error, weight), (td_error, q)

    def loss_of_policy(policy: Any, critic: Any, batch: Batch):
        action = pi_net.action(policy, batch.obs)
        return -q_net.values(critic, batch.obs, action).mean(), action

    def draw_learn(key: jax.Array, num: tuple[int, ...]) -> jax.Array | None:
        """Keys of the noise that measures distance: the numbers, one a weight, are too many."""
        return draws.draw(jax.random.split, key, num) if config.noise == "parameter" else None

    def learn(learner: Learner, batch: Batch, weight: jax.Array, key: jax.Array | None):
        left = 1.0
        if config.anneal_learning_rate:
            left = 1.0 - learner.num_gradient_steps.astype(jnp.float32) / all_gradient_steps
        rate = config.learning_rate * left

        # outside the loss: what is not differentiated must not pass through the backward pass
        next_action = pi_net.action(learner.target_policy, batch.next_obs)
        target = td_target(batch, q_net.values(learner.target_critic, batch.next_obs, next_action))
        (loss, (td_error, q)), critic_grads = jax.value_and_grad(loss_of_critic, has_aux=True)(
            learner.critic, batch, target, weight
        )
        updates, critic_opt = optimizer.update(critic_grads, learner.critic_opt)
        critic = jax.tree.map(lambda p, u: (p - rate * u).astype(p.dtype), learner.critic, updates)

        (policy_loss, action), policy_grads = jax.value_and_grad(loss_of_policy, has_aux=True)(
            learner.policy, critic, batch
        )
        updates, policy_opt = optimizer.update(policy_grads, learner.policy_opt)
        policy_rate = rate * config.actor_rate_factor
        policy = jax.tree.map(
            lambda p, u: (p - policy_rate * u).astype(p.dtype), learner.policy, updates
        )
        metrics: Metrics = {
            "critic_loss": loss,
            "policy_loss": policy_loss,
            "q": q.mean(),
            "td_error": jnp.abs(td_error).mean(),
            "critic_grad_norm": optax.tree.norm(critic_grads),
            "policy_grad_norm": optax.tree.norm(policy_grads),
        }

        sigma = learner.sigma
        if key is not None:  # parameter noise
            normals = mask * jax.random.normal(key, mask.shape)
            moved = pi_net.action(perturb(learner.policy, normals, sigma), batch.obs)
            distance = jnp.sqrt(((moved - action) ** 2).mean())  # Plappert et al. appendix C
            sigma = adapt(sigma, distance, config.exploration_noise, config.sigma_factor)
            metrics.update(sigma=sigma, noise_distance=distance)
        learner = Learner(
            policy=policy,
            critic=critic,
            target_policy=optax.incremental_update(policy, learner.target_policy, config.tau),
            target_critic=optax.incremental_update(critic, learner.target_critic, config.tau),
            policy_opt=policy_opt,
            critic_opt=critic_opt,
            sigma=sigma,
            num_gradient_steps=learner.num_gradient_steps + 1,
        )
        return learner, metrics, td_error

    def next_ou(noise: jax.Array, done: jax.Array, key: jax.Array) -> jax.Array:
        return ou_step(noise, done, key, config.ou_theta, config.exploration_noise)

    def first_ou(key: jax.Array, num_envs: int) -> jax.Array:
        nothing = jnp.zeros((num_envs, action_spec.size))
        return next_ou(nothing, jnp.ones(num_envs, bool), key)

    def first_normals(key: jax.Array, num_envs: int) -> jax.Array:
        return mask[None] * jax.random.normal(key, (num_envs, mask.size))

    def next_normals(normals: jax.Array, done: jax.Array, key: jax.Array) -> jax.Array:
        """Draw anew where an episode begins: the noise stays for a whole episode."""
        return jax.lax.cond(
            done.any(),
            lambda: jnp.where(done[:, None], first_normals(key, done.size), normals),
            lambda: normals,
        )

    noise = None
    if config.noise == "ou":
        noise = off_policy.Noise(first_ou, next_ou)
    elif config.noise == "parameter":
        noise = off_policy.Noise(first_normals, next_normals)
    agent = off_policy.Agent(init, draw_explore, explore, draw_learn, learn, noise)
    return off_policy.make_train(config, env, env_params, agent)
