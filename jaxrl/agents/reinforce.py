"""REINFORCE, Williams (1992, https://doi.org/10.1007/BF00992696), with Monte-Carlo rollouts.

Follows the policy gradient theorem, Sutton et al. (2000, "Policy gradient methods for reinforcement
learning with function approximation", theorem 1),

    grad J = E[ grad log pi(a | s) (Q(s, a) - b(s)) ],

where Q(s, a) is the mean return of several rollouts of the current policy that start in the visited
state s with the visited action a (jaxrl.rollout.monte_carlo_return): an environment's state is a
value, so that it can be gone on from as often as one likes. The classical estimate, the return of
the visited trajectory itself (Williams 1992, section 6), is the option `returns = "episode"`; what
a trajectory lacks when the update comes is made up by rollouts from where it stands. The baseline
b(s) (Williams 1992, eq. 11) is a learned value, the mean return of the batch, or none.

Where we differ, on purpose: visited states weigh the same, not gamma^t, as in nearly every
implementation: the update follows the discounted advantage under the states the policy visits,
which is no exact gradient of the discounted return (Nota and Thomas 2020, arXiv 1906.07073) but
does not forget late states. With the learned baseline, an episode cut by its time limit is
bootstrapped from the observation before the reset, and so is a rollout cut by its length; without
it, what comes after a cut counts as 0. Adam takes the place of plain ascent.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from jaxrl import normalize, rollout, spaces
from jaxrl.checks import check_choice, check_count, check_flags, check_real, check_widths
from jaxrl.networks import ACTIVATIONS, PolicyNet, ValueNet
from jaxrl.normalize import RunningStats
from jaxrl.returns import gae
from jaxrl.types import Env, Metrics, Policy, Train


@struct.dataclass
class Config:
    """Settings of REINFORCE. Reals are leaves, so `vmap` sweeps them; the rest is static."""

    total_steps: int = struct.field(pytree_node=False, default=102_400)
    """Environment steps of the whole run, all environments together; the steps simulated by
    rollouts come on top (metric rollout_steps, for each update)."""
    num_envs: int = struct.field(pytree_node=False, default=16)
    """Environments stepped in parallel."""
    num_steps: int = struct.field(pytree_node=False, default=32)
    """Steps of each environment between two updates; an update is one gradient step."""
    returns: str = struct.field(pytree_node=False, default="rollouts")
    """Return of a visited state and action: "rollouts" from there, or that of its own "episode"."""
    num_states: int = struct.field(pytree_node=False, default=128)
    """returns = "rollouts": visited states, drawn from all of an update, to start rollouts from."""
    num_rollouts: int = struct.field(pytree_node=False, default=2)
    """Rollouts from each such state; with returns = "episode", from each unfinished episode."""
    max_rollout_steps: int = struct.field(pytree_node=False, default=100)
    """Length at which a rollout is broken off; the learned baseline stands for what is beyond."""
    baseline: str = struct.field(pytree_node=False, default="value")
    """What is subtracted from returns: a learned "value", the "mean" of the others, or "none"."""
    normalize_returns: bool = struct.field(pytree_node=False, default=True)
    """Divide returns, less the baseline, by the running standard deviation of the returns."""
    learning_rate: float = 5e-3
    """Step size of the policy's Adam, at the start."""
    anneal_learning_rate: bool = struct.field(pytree_node=False, default=True)
    """Let the policy's learning rate fall linearly to 0 over the run."""
    value_learning_rate: float = 1e-2
    """Step size of the baseline's Adam."""
    num_value_steps: int = struct.field(pytree_node=False, default=10)
    """Gradient steps of the baseline in one update."""
    gamma: float = 0.99
    """Discount."""
    ent_coef: float = 0.0
    """Weight of the entropy bonus."""
    max_grad_norm: float = 0.5
    """Bound on the global norm of the gradient, of the policy's and of the baseline's."""
    adam_eps: float = 1e-5
    """Adam's epsilon."""
    normalize_obs: bool = struct.field(pytree_node=False, default=True)
    """Give observations running mean 0 and standard deviation 1."""
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

    params: dict[str, Any]  # {"policy": ..., and with the learned baseline "value": ...}
    opt_state: dict[str, optax.OptState]  # the same names
    obs_stats: RunningStats | None
    return_stats: RunningStats | None  # of the returns; the value network's unit
    actors: rollout.Actors
    key: jax.Array
    num_updates: jax.Array  # () int32


@struct.dataclass
class Visited:
    """Steps of the acting environments; leading axes (num_steps, num_envs), later (rows,)."""

    obs: jax.Array  # raw
    env_state: Any  # the action was taken in it
    action: jax.Array  # as drawn
    env_action: jax.Array  # in the environment's units


@struct.dataclass
class Batch:
    """What the policy's loss sees, one row a visited state and action: (B, ...)."""

    obs: jax.Array  # normalised, flat
    action: jax.Array  # as drawn
    weight: jax.Array  # return less baseline


def policy_loss(log_prob: jax.Array, weight: jax.Array) -> jax.Array:
    """Negative mean of weight * log pi(a | s), both (B,): its gradient is minus theorem 1's sum."""
    return -(jax.lax.stop_gradient(weight) * log_prob).mean()


def loss(
    params: Any, policy_net: PolicyNet, batch: Batch, ent_coef: float | jax.Array, key: jax.Array
) -> tuple[jax.Array, Metrics]:
    """The policy's objective, entropy bonus included, to be minimised, and what to watch."""
    pi = policy_net.policy(params, batch.obs)
    pi_loss = policy_loss(pi.log_prob(batch.action), batch.weight)
    entropy = pi.entropy(key).mean()
    return pi_loss - ent_coef * entropy, {"policy_loss": pi_loss, "entropy": entropy}


def value_loss(params: Any, value_net: ValueNet, obs: jax.Array, target: jax.Array) -> jax.Array:
    """Half the mean squared error of the value network (obs (B, in)) to target (B,)."""
    return 0.5 * ((value_net.value(params, obs) - target) ** 2).mean()


def state_value(value_net: ValueNet, params: Any, stats: RunningStats, obs: jax.Array) -> jax.Array:
    """V(obs) in units of the return: obs (..., in) normalised -> (...).

    The network's own output is in standard deviations of the returns seen so far, from their mean.
    """
    return stats.mean + jnp.sqrt(stats.var) * value_net.value(params, obs)


def trajectory_returns(
    reward: jax.Array,
    terminated: jax.Array,
    truncated: jax.Array,
    beyond_cut: jax.Array,
    rest: jax.Array,
    gamma: float | jax.Array,
) -> jax.Array:
    """Return of each step of trajectories, from itself on, to the end of its episode: (T, B).

    reward, terminated, truncated: (T, B), the last two bool. beyond_cut (T, B) or (): the value
    after a step whose episode the time limit cut. rest (B,): the return after row T - 1 of the
    episodes that go on there.
    """
    done = terminated | truncated
    beyond = jnp.where(truncated, beyond_cut, 0.0)
    beyond = beyond.at[-1].set(jnp.where(done[-1], beyond[-1], rest))
    # with lambda = 1 and V = 0 an advantage is the return; terminated wins over truncated there
    return gae(reward, jnp.zeros_like(reward), beyond, terminated, truncated, gamma, 1.0)[0]


def mean_of_others(returns: jax.Array) -> jax.Array:
    """The baseline "mean": for each of B returns the mean of the other B - 1; (B,) -> (B,).

    A row's own return is left out, so that it does not depend on the row's own action; on later
    rows of the same episode it still does, a bias of order 1 / B.
    """
    return (returns.sum() - returns) / (returns.shape[0] - 1)


def weights(
    returns: jax.Array, baseline: jax.Array, return_stats: RunningStats | None
) -> jax.Array:
    """Return less baseline, (B,) each; with statistics of the returns, in their deviations.

    Not in the batch's own deviations: where all actions are as good the weights stay small.
    """
    weight = returns - baseline
    return weight if return_stats is None else weight * jax.lax.rsqrt(return_stats.var + 1e-8)


def check_config(config: Config, env: Env, env_params: Any) -> None:
    """Raise ValueError, naming field, value and remedy, if the settings can't work with `env`."""
    for name in (
        "total_steps",
        "num_envs",
        "num_steps",
        "num_states",
        "num_rollouts",
        "max_rollout_steps",
        "num_value_steps",
    ):
        check_count(name, getattr(config, name))
    check_choice("returns", config.returns, ("rollouts", "episode"))
    check_choice("baseline", config.baseline, ("value", "mean", "none"))
    steps = config.num_envs * config.num_steps
    if config.returns == "rollouts" and config.num_states > steps:
        raise ValueError(
            f"num_states = {config.num_states} must be at most num_envs * num_steps = "
            f"{config.num_envs} * {config.num_steps} = {steps}"
        )
    if config.baseline == "mean" and batch_size(config) < 2:
        raise ValueError(
            'baseline = "mean" needs two returns an update or more, but num_states = '
            f"{config.num_states}, num_envs * num_steps = {steps}: raise them"
        )
    check_flags(config)
    check_real("learning_rate", config.learning_rate, 0.0, math.inf, above=True)
    check_real("value_learning_rate", config.value_learning_rate, 0.0, math.inf, above=True)
    check_real("gamma", config.gamma, 0.0, 1.0)
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


def batch_size(config: Config) -> int:
    """States and actions in one gradient step."""
    steps = config.num_envs * config.num_steps
    return config.num_states if config.returns == "rollouts" else steps


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


def make_train(config: Config, env: Env, env_params: Any) -> Train[TrainState]:
    """Return the whole training run, `train(key) -> (state, metrics)`: pure, jit it, vmap it.

    `vmap` over keys trains many seeds; `vmap` over real fields of `config` sweeps them (see
    jaxrl.agents.ppo.make_train). Metrics have a leading axis (num_updates,); those of episodes are
    NaN where none ended. `steps_per_update`, and with it `total_steps`, counts the steps of the
    acting environments, num_envs * num_steps; the metric `rollout_steps` counts those simulated
    beside them, which can be hundreds of times more. `return_error` is the mean standard error of
    the returns (only with returns = "rollouts" and num_rollouts >= 2).

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
    pi_net = policy_net(config, action_spec)
    v_net = ValueNet(config.hidden, config.activation)
    act_in_env = make_act(config, action_spec, obs_shape)
    learned = config.baseline == "value"
    # the learning rates are multiplied in by hand: as leaves they may be traced
    optimizer = optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm), optax.scale_by_adam(eps=config.adam_eps)
    )

    def see(obs_stats: RunningStats | None, obs: jax.Array) -> jax.Array:
        """Turn raw observations into what the networks take."""
        if obs_stats is not None:
            obs = normalize.normalize(obs_stats, obs)
        return spaces.flat(obs, obs_shape)

    def init(key: jax.Array) -> TrainState:
        key, key_policy, key_value, key_env = jax.random.split(key, 4)
        actors = rollout.reset(env, env_params, key_env, config.num_envs)
        obs_stats = normalize.init(obs_shape) if config.normalize_obs else None
        obs = see(obs_stats, actors.obs)
        params = {"policy": pi_net.init(key_policy, obs)}
        if learned:
            params["value"] = v_net.init(key_value, obs)
        return TrainState(
            params=params,
            opt_state={name: optimizer.init(p) for name, p in params.items()},
            obs_stats=obs_stats,
            return_stats=normalize.init(()) if learned or config.normalize_returns else None,
            actors=actors,
            key=key,
            num_updates=jnp.zeros((), jnp.int32),
        )

    def value_of(state: TrainState, obs: jax.Array) -> jax.Array:
        """V of raw observations (..., *obs_shape) -> (...), by the learned baseline."""
        assert state.return_stats is not None
        seen = see(state.obs_stats, obs)
        return state_value(v_net, state.params["value"], state.return_stats, seen)

    def collect(state: TrainState, key: jax.Array):
        """Step all environments num_steps times: Visited, Transition (T, N), episodes ended."""

        def one_step(actors, key):
            key_act, key_env = jax.random.split(key)
            pi = pi_net.policy(state.params["policy"], see(state.obs_stats, actors.obs))
            drawn = pi.sample(key_act)
            env_action = to_env(pi, action_spec, drawn)
            visited = Visited(actors.obs, actors.env_state, drawn, env_action)
            actors, transition, ended = rollout.step(env, env_params, actors, env_action, key_env)
            return actors, (visited, transition, ended)

        keys = jax.random.split(key, config.num_steps)
        actors, (visited, transitions, ended) = jax.lax.scan(one_step, state.actors, keys)
        return actors, visited, transitions, jax.tree.map(jnp.sum, ended)

    def roll_out(state: TrainState, env_state, obs, first_action, key) -> rollout.ReturnEstimate:
        """Return from each of n states on, under the policy of `state`; leading axes (n,)."""
        policy = get_policy(state)

        def one(env_state, obs, first_action, key):
            return rollout.monte_carlo_return(
                env,
                env_params,
                env_state,
                lambda obs, key: act_in_env(policy, obs, key),
                key,
                config.num_rollouts,
                config.gamma,
                max_steps=config.max_rollout_steps,
                obs=obs,
                first_action=first_action,
                value=(lambda obs: value_of(state, obs)) if learned else None,
            )

        keys = jax.random.split(key, jax.tree.leaves(obs)[0].shape[0])
        return jax.vmap(one)(env_state, obs, first_action, keys)

    def by_rollouts(state: TrainState, visited: Visited, key: jax.Array):
        """Draw num_states of the visited states; Q of state and action by rollouts: rows, (B,)."""
        key_draw, key_rollouts = jax.random.split(key)
        rows = jax.tree.map(lambda x: x.reshape(steps_per_update, *x.shape[2:]), visited)
        drawn = jax.random.permutation(key_draw, steps_per_update)[: config.num_states]
        rows = jax.tree.map(lambda x: x[drawn], rows)
        q = roll_out(state, rows.env_state, rows.obs, rows.env_action, key_rollouts)
        metrics = {"rollout_steps": q.num_steps.sum(dtype=jnp.float32)}
        if config.num_rollouts > 1:
            metrics["return_error"] = q.standard_error.mean()
        return rows, q.mean, metrics

    def by_episode(state: TrainState, actors, visited: Visited, transitions, key: jax.Array):
        """The return of the trajectory from each visited state on, completed by rollouts."""
        # also where the last step ended an episode, from the new one's start: counted, not used
        rest = roll_out(state, actors.env_state, actors.obs, None, key)
        returns = trajectory_returns(
            transitions.reward,
            transitions.terminated,
            transitions.truncated,
            value_of(state, transitions.next_obs) if learned else jnp.zeros(()),
            rest.mean,
            config.gamma,
        )
        rows = jax.tree.map(lambda x: x.reshape(steps_per_update, *x.shape[2:]), visited)
        metrics = {"rollout_steps": rest.num_steps.sum(dtype=jnp.float32)}
        return rows, returns.reshape(-1), metrics

    def descend(params, opt_state, grads, learning_rate):
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return jax.tree.map(lambda p, u: p - learning_rate * u, params, updates), opt_state

    def fit_value(params, opt_state, obs, target):
        """Take num_value_steps gradient steps towards the returns; target in the network's unit."""

        def one_step(learner, _):
            params, opt_state = learner
            error, grads = jax.value_and_grad(value_loss)(params, v_net, obs, target)
            return descend(params, opt_state, grads, config.value_learning_rate), error

        return jax.lax.scan(one_step, (params, opt_state), length=config.num_value_steps)

    def update(state: TrainState) -> tuple[TrainState, Metrics]:
        key, key_collect, key_returns, key_loss = jax.random.split(state.key, 4)
        actors, visited, transitions, ended = collect(state, key_collect)
        if config.returns == "rollouts":
            rows, returns, metrics = by_rollouts(state, visited, key_returns)
        else:
            rows, returns, metrics = by_episode(state, actors, visited, transitions, key_returns)
        if learned:
            baseline = value_of(state, rows.obs)
        elif config.baseline == "mean":
            baseline = mean_of_others(returns)
        else:
            baseline = jnp.zeros_like(returns)
        return_stats = state.return_stats
        if return_stats is not None:
            return_stats = normalize.update(return_stats, returns)
        weight = weights(returns, baseline, return_stats if config.normalize_returns else None)

        obs = see(state.obs_stats, rows.obs)
        left = 1.0 - state.num_updates / num_updates if config.anneal_learning_rate else 1.0
        learning_rate = config.learning_rate * left
        grads, watched = jax.grad(loss, has_aux=True)(
            state.params["policy"],
            pi_net,
            Batch(obs, rows.action, weight),
            config.ent_coef,
            key_loss,
        )
        params, opt_state = dict(state.params), dict(state.opt_state)
        params["policy"], opt_state["policy"] = descend(
            state.params["policy"], state.opt_state["policy"], grads, learning_rate
        )
        metrics.update(watched)
        metrics["grad_norm"] = optax.tree.norm(grads)
        metrics["learning_rate"] = jnp.asarray(learning_rate, jnp.float32)
        metrics["return_mean"] = returns.mean()

        # only now: the baseline of an update must not have seen its returns
        if learned:
            assert return_stats is not None
            target = (returns - return_stats.mean) * jax.lax.rsqrt(return_stats.var + 1e-8)
            (params["value"], opt_state["value"]), errors = fit_value(
                state.params["value"], state.opt_state["value"], obs, target
            )
            metrics["value_loss"] = errors[-1]
            spread = jnp.var(returns)
            metrics["explained_variance"] = 1.0 - jnp.var(returns - baseline) / (spread + 1e-8)
        metrics.update(ended.metrics())

        obs_stats = state.obs_stats
        if obs_stats is not None:
            obs_stats = normalize.update(obs_stats, transitions.obs)
        state = replace(
            state,
            params=params,
            opt_state=opt_state,
            obs_stats=obs_stats,
            return_stats=return_stats,
            actors=actors,
            key=key,
            num_updates=state.num_updates + 1,
        )
        return state, metrics

    return Train(init, update, num_updates, steps_per_update)
