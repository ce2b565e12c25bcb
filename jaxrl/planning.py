"""Exact planning in finite Markov decision processes given as arrays, and environments as such.

The convention, in all functions, with S states and A actions:

    transition  (S, A, S)  P[s, a, s'], the probability of going on in s'. A row may sum to less
                           than 1: with the rest the episode ends, and nothing follows.
    reward      (S,)       R[s], paid for any step taken in s, or
                (S, A)     R[s, a], the expected reward of taking a in s
    terminal    (S,) bool  the step taken in s is the last one; its row of P is not looked at
    gamma       ()         discount, in [0, 1]

so that Bellman's optimality equation (Sutton & Barto 2018, eq. 3.20) reads

    Q(s, a) = R(s, a) + gamma [s not terminal] sum_s' P[s, a, s'] max_a' Q(s', a').

A terminal state is worth what its own step pays. Where the reward comes with the arrival instead,
as in Frozen Lake, terminal states pay 0 and the step into them has it as R[s, a]; both fit.

All but `tabulate` and `check_mdp` are pure functions of arrays: jit them, and vmap them over gamma,
rewards and transitions, so that one call sweeps a grid. In float32, values are good to a relative
1e-6 or so; with gamma close to 1 that grows like 1e-7 / (1 - gamma).

With gamma = 1 values exist only if episodes end. `policy_evaluation` then needs a policy that ends
with probability 1 from every state (else its equations are singular, and inf or NaN comes out);
`policy_iteration` needs it of the uniformly random policy and of the policies that it meets; for
`value_iteration` it is enough that rewards are not negative and values finite (Puterman 1994,
section 7.2). Where no time limit would end an episode, none is assumed here.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxrl.checks import check_count, check_real

Real = float | jax.Array
EXACT = jax.lax.Precision.HIGHEST  # accelerators round products of float32 otherwise
TIE = 1e-6  # relative to the largest |Q|: differences below are rounding


@struct.dataclass
class Solution:
    """Optimal values, and how sure they are."""

    value: jax.Array  # (S,) max_a Q(s, a)
    q: jax.Array  # (S, A)
    action: jax.Array  # (S,) int32 greedy; among equals the lowest
    num_iterations: jax.Array  # () int32 sweeps, or policies evaluated
    residual: jax.Array  # () largest change of a value by the last backup
    error_bound: jax.Array
    """() gamma / (1 - gamma) * residual, no value is further off; inf for gamma = 1."""


def backup(
    transition: jax.Array, reward: jax.Array, terminal: jax.Array, gamma: Real, value: jax.Array
) -> jax.Array:
    """Q(s, a) = R(s, a) + gamma sum_s' P[s, a, s'] V(s'), without the sum in terminal states.

    value (S,) -> (S, A).
    """
    transition, reward, terminal = _read(transition, reward, terminal)
    check_real("gamma", gamma, 0.0, 1.0)
    following = jnp.einsum("san,n->sa", transition, value, precision=EXACT)
    return reward + gamma * jnp.where(terminal[:, None], 0.0, following)


def greedy(q: jax.Array, tolerance: float = 1e-5) -> jax.Array:
    """The best actions, ties included: q (..., A) -> (..., A) bool.

    An action counts as best if it lacks at most `tolerance` times the largest |Q| of its state.
    """
    best = q.max(axis=-1, keepdims=True)
    return q >= best - tolerance * jnp.abs(q).max(axis=-1, keepdims=True)


def epsilon_greedy(q: jax.Array, epsilon: Real, tolerance: float = 0.0) -> jax.Array:
    """Probabilities of the epsilon-greedy policy: q (..., A) -> (..., A).

    With epsilon any action, else any of the best ones (see `greedy`), each with equal chance.
    """
    best = greedy(q, tolerance).astype(q.dtype)
    return epsilon / q.shape[-1] + (1.0 - epsilon) * best / best.sum(axis=-1, keepdims=True)


def policy_evaluation(
    transition: jax.Array, reward: jax.Array, terminal: jax.Array, gamma: Real, policy: jax.Array
) -> jax.Array:
    """The values (S,) of a policy, by solving V = R_pi + gamma P_pi V (Sutton & Barto eq. 4.4).

    policy: (S, A) probabilities of the actions, or (S,) integer actions. For its Q take `backup` of
    the values. With gamma = 1 the policy must end every episode, see the module.

    Raises:
        ValueError: a shape or gamma is wrong.
    """
    transition, reward, terminal = _read(transition, reward, terminal)
    check_real("gamma", gamma, 0.0, 1.0)
    num_states, num_actions, _ = transition.shape
    policy = jnp.asarray(policy)
    if policy.shape == (num_states,) and jnp.issubdtype(policy.dtype, jnp.integer):
        policy = jax.nn.one_hot(policy, num_actions, dtype=transition.dtype)
    if policy.shape != (num_states, num_actions):
        raise ValueError(
            f"policy of shape {policy.shape} and type {policy.dtype} must be ({num_states}, "
            f"{num_actions}) probabilities or ({num_states},) integer actions"
        )
    p = jnp.einsum("sa,san->sn", policy, transition, precision=EXACT)
    r = (policy * reward).sum(axis=-1)
    matrix = jnp.eye(num_states, dtype=p.dtype) - gamma * jnp.where(terminal[:, None], 0.0, p)
    return jnp.linalg.solve(matrix, r[:, None])[:, 0]


def value_iteration(
    transition: jax.Array,
    reward: jax.Array,
    terminal: jax.Array,
    gamma: Real,
    *,
    tolerance: float = 1e-6,
    max_iterations: int = 10_000,
) -> Solution:
    """Back up values from 0 until none changes by more than `tolerance` (Sutton & Barto sec. 4.4).

    Under `vmap` the loop runs until the slowest problem ends; `policy_iteration` needs a handful of
    iterations whatever gamma is.

    Args:
        transition, reward, terminal, gamma: see the module.
        tolerance: [unit of the rewards] the error is at most gamma / (1 - gamma) times this.
        max_iterations: the end in any case; the residual tells.

    Raises:
        ValueError: a shape, gamma, or one of the limits is wrong.
    """
    check_real("tolerance", tolerance, 0.0, float("inf"))
    check_count("max_iterations", max_iterations)
    transition, reward, terminal = _read(transition, reward, terminal)

    def sweep(carry):
        value, _, iteration = carry
        new = backup(transition, reward, terminal, gamma, value).max(axis=-1)
        return new, jnp.abs(new - value).max(), iteration + 1

    def goes_on(carry):
        _, residual, iteration = carry
        return (residual > tolerance) & (iteration < max_iterations)

    dtype = jnp.result_type(transition, reward, gamma)
    start = (jnp.zeros(len(transition), dtype), jnp.array(jnp.inf, dtype), jnp.int32(0))
    value, _, num_iterations = jax.lax.while_loop(goes_on, sweep, start)
    return _solution(transition, reward, terminal, gamma, value, num_iterations)


def policy_iteration(
    transition: jax.Array,
    reward: jax.Array,
    terminal: jax.Array,
    gamma: Real,
    *,
    max_iterations: int = 100,
) -> Solution:
    """Evaluate exactly, improve, until nothing is left to improve (Sutton & Barto sec. 4.3).

    Begins with the uniformly random policy. An action is replaced only by one that is better by
    more than rounding, and the loop ends as well when no value has risen by more than that: ties
    do not keep it going.

    Raises:
        ValueError: a shape, gamma or max_iterations is wrong.
    """
    check_count("max_iterations", max_iterations)
    transition, reward, terminal = _read(transition, reward, terminal)
    num_states, num_actions, _ = transition.shape

    def evaluate(policy):
        return policy_evaluation(transition, reward, terminal, gamma, policy)

    def improve(carry):
        action, value, _, iteration = carry
        q = backup(transition, reward, terminal, gamma, value)
        rounding = TIE * jnp.abs(q).max()
        kept = jnp.take_along_axis(q, action[:, None], axis=-1)[:, 0]
        better = jnp.argmax(q, axis=-1).astype(jnp.int32)
        new_action = jnp.where(q.max(axis=-1) > kept + rounding, better, action)
        new = evaluate(new_action)
        # written so that NaN ends the loop
        rises = (new_action != action).any() & (new > value + rounding).any()
        return new_action, new, rises, iteration + 1

    def goes_on(carry):
        _, _, rises, iteration = carry
        return rises & (iteration < max_iterations)

    random = jnp.full((num_states, num_actions), 1.0 / num_actions, transition.dtype)
    value = evaluate(random)
    action = jnp.argmax(backup(transition, reward, terminal, gamma, value), axis=-1)
    action = action.astype(jnp.int32)
    start = (action, evaluate(action), jnp.bool_(True), jnp.int32(2))
    _, value, _, num_iterations = jax.lax.while_loop(goes_on, improve, start)
    return _solution(transition, reward, terminal, gamma, value, num_iterations)


def optimal_q(
    transition: jax.Array, reward: jax.Array, terminal: jax.Array, gamma: Real
) -> jax.Array:
    """The optimal Q (S, A), by `policy_iteration`: what a learner must find."""
    return policy_iteration(transition, reward, terminal, gamma).q


def check_mdp(transition: Any, reward: Any, terminal: Any) -> None:
    """Raise ValueError, in words, unless the arrays are a decision process; not under jit."""
    transition, reward, terminal = (np.asarray(x) for x in (transition, reward, terminal))
    _check_shapes(transition, reward, terminal)
    if not np.isfinite(reward).all():
        raise ValueError("reward holds numbers that are not finite")
    if terminal.dtype != bool:
        raise ValueError(f"terminal has type {terminal.dtype}, it must be bool")
    sums = transition.sum(axis=-1)
    wrong = ~((transition >= 0).all(axis=-1) & (sums <= 1 + 1e-5)) & ~terminal[:, None]
    if wrong.any():
        state, action = np.argwhere(wrong)[0]
        raise ValueError(
            f"transition[{state}, {action}] = {transition[state, action].tolist()} must hold "
            "probabilities whose sum is at most 1"
        )


class Table(NamedTuple):
    """An environment as arrays; `policy_iteration(*table.mdp, gamma)`."""

    mdp: tuple[jax.Array, jax.Array, jax.Array]  # transition (S, A, S), reward (S, A), terminal
    num_draws: int
    """Different outcomes of the environment's randomness that were seen; 1: deterministic."""
    standard_error: float
    """Of the worst probability; 0 where probabilities are the environment's own."""


def tabulate(
    key: jax.Array,
    env: Any,
    env_params: Any,
    states: Any,
    index: Callable[[Any], jax.Array],
    *,
    num_keys: int = 1000,
    probability: str | None = None,
) -> Table:
    """Turn a small discrete gymnax environment into arrays, by its own `step_env`.

    Every action is tried in every state with each of `num_keys` keys. Keys that do the same
    everywhere (equal next states, rewards and endings in all states) are one *draw* of the
    environment's randomness. A deterministic environment has one, and its table is exact, or what
    was not seen has a probability below about 3 / num_keys (at 95 %). Otherwise the probability of
    a draw is

    - how often it was drawn: an estimate, whose standard error is returned; or
    - what the environment says: `probability` names an entry of `info` that holds it, as gymnax's
      Frozen Lake does with "p". The table is then exact, and this is checked: in every state and
      for every action the draws seen must have the sum 1.

    Randomness that differs from state to state and key to key without end (noise on top of the
    reward, say) makes every key its own draw, and probabilities mere frequencies. Time limits are
    no part of the result. States in which `env.is_terminated` holds are over: they pay 0. A step
    that ends the episode in a state that is not over (as the Mars rover's) leads nowhere.

    Args:
        key: decides the keys.
        env, env_params: the environment; actions 0 .. n - 1.
        states: its states, stacked: every leaf (S, ...). E.g. for Frozen Lake
            `frozen_lake.EnvState(time=jnp.zeros(16, int), position=jnp.arange(16))`.
        index: `index(state) -> ()`, the row of a state in `states`, e.g. `lambda s: s.position`.
        num_keys: keys to try.
        probability: see above.

    Raises:
        ValueError: the actions are not discrete; `index` and `states` disagree; a step leads out of
            `states`; there is no such entry of info, or its probabilities do not sum to 1.
    """
    check_count("num_keys", num_keys)
    with jax.ensure_compile_time_eval():
        space = env.action_space(env_params)
    if not hasattr(space, "n"):
        raise ValueError(f"action space {space!r} must be discrete")
    rows = np.asarray(jax.vmap(index)(states))
    num_states, actions = len(rows), jnp.arange(int(space.n))
    if not np.array_equal(rows, np.arange(num_states)):
        raise ValueError(
            f"index gives {rows.tolist()} for the states, it must give 0 .. {num_states - 1}"
        )

    def one(key, state, action):
        _, state, reward, terminated, info = env.step_env(key, state, action, env_params)
        if probability is not None and probability not in info:
            raise ValueError(
                f"probability = {probability!r} is not in info, which has {sorted(info)}"
            )
        p = info[probability] if probability is not None else jnp.zeros(())
        return index(state), reward, terminated, p

    over_actions = jax.vmap(one, in_axes=(None, None, 0))
    over_states = jax.vmap(over_actions, in_axes=(None, 0, None))
    over_keys = jax.jit(jax.vmap(over_states, in_axes=(0, None, None)))
    keys = jax.random.split(key, num_keys)
    following, reward, terminated, p = (np.asarray(x) for x in over_keys(keys, states, actions))

    # (K, everything a key does) -> one row for each draw (D, ...)
    what = [x.reshape(num_keys, -1).astype(np.float64) for x in (following, reward, terminated)]
    _, first, count = np.unique(
        np.concatenate(what, axis=1), axis=0, return_index=True, return_counts=True
    )
    following, reward, terminated, p = (x[first] for x in (following, reward, terminated, p))
    share = count / num_keys
    weight = p.astype(np.float64)
    if probability is None:
        weight = np.broadcast_to(share[:, None, None], following.shape)
    elif not np.allclose(weight.sum(axis=0), 1.0, atol=1e-5):
        raise ValueError(
            f"probability = {probability!r}: the {len(first)} draws seen in num_keys = {num_keys} "
            f"keys sum to {weight.sum(axis=0).min():.4g} .. {weight.sum(axis=0).max():.4g}, not to "
            "1: try more keys, or leave it out and take frequencies"
        )

    over = _is_over(env, env_params, states, num_states)
    inside = (following >= 0) & (following < num_states)
    leads = ~terminated & ~over[:, None]  # (D, S, A)
    if (leads & ~inside).any():
        _, state, action = np.argwhere(leads & ~inside)[0]
        raise ValueError(f"action {action} in state {state} leads to a state outside of `states`")
    leads |= terminated & inside & over[np.where(inside, following, 0)] & ~over[:, None]
    transition = np.zeros((num_states, len(actions), num_states))
    _, s, a = np.nonzero(leads)
    np.add.at(transition, (s, a, following[leads]), weight[leads])
    terminal = over | terminated.all(axis=(0, 2))
    transition[terminal] = np.eye(num_states)[terminal][:, None]
    expected = np.where(over[:, None], 0.0, (weight * reward).sum(axis=0))
    error = 0.0 if probability is not None else float(np.sqrt(share * (1 - share) / num_keys).max())
    mdp = (
        jnp.asarray(transition, jnp.float32),
        jnp.asarray(expected, jnp.float32),
        jnp.asarray(terminal),
    )
    return Table(mdp, len(first), error)


def _is_over(env: Any, env_params: Any, states: Any, num_states: int) -> np.ndarray:
    """(S,) bool: states after an end; none where the environment does not tell."""
    try:
        return np.asarray(jax.vmap(env.is_terminated, in_axes=(0, None))(states, env_params))
    except (AttributeError, NotImplementedError):  # gymnax calls it an optional helper
        return np.zeros(num_states, bool)


def _solution(
    transition: jax.Array,
    reward: jax.Array,
    terminal: jax.Array,
    gamma: Real,
    value: jax.Array,
    num_iterations: jax.Array,
) -> Solution:
    """One more backup, and what it says of the values."""
    q = backup(transition, reward, terminal, gamma, value)
    residual = jnp.abs(q.max(axis=-1) - value).max()
    gamma = jnp.asarray(gamma, residual.dtype)
    bound = gamma * residual / jnp.where(gamma < 1, 1 - gamma, 1)
    bound = jnp.where(gamma < 1, bound, jnp.inf)
    action = jnp.argmax(q, axis=-1).astype(jnp.int32)
    return Solution(q.max(axis=-1), q, action, num_iterations, residual, bound)


def _read(transition: Any, reward: Any, terminal: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Check the shapes; return arrays, the rewards as R[s, a]."""
    _check_shapes(transition, reward, terminal)
    transition, reward, terminal = (jnp.asarray(x) for x in (transition, reward, terminal))
    if reward.ndim == 1:
        reward = jnp.broadcast_to(reward[:, None], transition.shape[:2])
    return transition, reward, terminal


def _check_shapes(transition: Any, reward: Any, terminal: Any) -> None:
    shape = np.shape(transition)
    if len(shape) != 3 or shape[0] != shape[2]:
        raise ValueError(f"transition of shape {shape} must have shape (S, A, S)")
    if np.shape(reward) not in (shape[:1], shape[:2]):
        raise ValueError(
            f"reward of shape {np.shape(reward)} must have shape {shape[:1]} or {shape[:2]}"
        )
    if np.shape(terminal) != shape[:1]:
        raise ValueError(f"terminal of shape {np.shape(terminal)} must have shape {shape[:1]}")
