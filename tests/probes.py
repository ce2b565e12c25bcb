"""Probe environments, after Andy Jones ("Debugging RL, without the agonizing pain").

Each isolates one part of a learner, has an answer known by hand, and is learnt in seconds. What
must come out stands in each docstring.
"""

import jax
import jax.numpy as jnp
from flax import struct
from gymnax.environments import environment, spaces


@struct.dataclass
class State(environment.EnvState):
    x: jax.Array  # () what the observation shows


@struct.dataclass
class Params(environment.EnvParams):
    max_steps_in_episode: int = 1_000_000


class Probe(environment.Environment):
    """Base: observation (1,) float32, two discrete actions or one real action in [-1, 1]."""

    def __init__(self, continuous: bool = False):
        super().__init__()
        self.continuous = continuous

    @property
    def default_params(self):
        return Params()

    def reset_env(self, key, params):
        state = State(time=0, x=self.start(key))
        return self.observe(key, state, None, params), state

    def observe(self, key, state, action, params):
        return state.x[None]

    def start(self, key):
        return jnp.zeros(())

    def action_space(self, params):
        return spaces.Box(-1.0, 1.0, (1,)) if self.continuous else spaces.Discrete(2)

    def observation_space(self, params):
        return spaces.Box(-1.0, 1.0, (1,))

    def end(self, state, x, reward, terminated):
        """Pack one step: the next state shows x."""
        state = State(time=state.time + 1, x=jnp.asarray(x, jnp.float32))
        reward = jnp.asarray(reward, jnp.float32)
        return state.x[None], state, reward, jnp.asarray(terminated), {}


class ConstantReward(Probe):
    """One step, reward 1 whatever happens. V = 1: the value loss works."""

    def step_env(self, key, state, action, params):
        return self.end(state, 0.0, 1.0, True)


class RewardIsObs(Probe):
    """One step, observation -1 or 1, reward equal to it. V(o) = o: the value sees the input."""

    def start(self, key):
        return jax.random.rademacher(key, ()).astype(jnp.float32)

    def step_env(self, key, state, action, params):
        return self.end(state, 0.0, state.x, True)


class TwoSteps(Probe):
    """Observation 0, then 1; reward 1 after the second. V(0) = gamma, V(1) = 1: discounting."""

    def step_env(self, key, state, action, params):
        last = state.x > 0.5
        return self.end(state, 1.0, jnp.where(last, 1.0, 0.0), last)


class ActionDecides(Probe):
    """One step; reward 1 for action 1, -1 for action 0 (real: the action). pi = 1: advantage."""

    def step_env(self, key, state, action, params):
        reward = action[0] if self.continuous else 2.0 * action - 1.0
        return self.end(state, 0.0, reward, True)


class CopyObs(Probe):
    """One step; the action must repeat the observation (-1 or 1; real: -0.5 or 0.5).

    Discrete reward: 1 if action = (observation > 0), else -1. Real: -(action - observation)^2, so
    the best return is 0. pi(o) = o: advantage and observation reach the policy together.
    """

    def start(self, key):
        sign = jax.random.rademacher(key, ()).astype(jnp.float32)
        return sign * 0.5 if self.continuous else sign

    def step_env(self, key, state, action, params):
        if self.continuous:
            reward = -((action[0] - state.x) ** 2)
        else:
            reward = jnp.where(action == (state.x > 0), 1.0, -1.0)
        return self.end(state, 0.0, reward, True)


class NeverEnds(Probe):
    """Reward 1 for ever, cut every 5 steps by the time limit. V = 1 / (1 - gamma): truncation.

    A learner that takes the cut for an end finds 1 + ... + gamma^4 at most; one that bootstraps
    from the observation after the reset (which here is -1, never seen otherwise) is told apart by
    `ResetIsWorthless`.
    """

    @property
    def default_params(self):
        return Params(max_steps_in_episode=5)

    def step_env(self, key, state, action, params):
        return self.end(state, 0.0, 1.0, False)


class ResetIsWorthless(Probe):
    """Starts at -1 with reward 0 once, then 0 with reward 1 for ever, cut after 4 steps.

    V(0) = 1 / (1 - gamma) and V(-1) = gamma V(0): a learner that bootstraps a cut episode from the
    observation *after* the reset gets a smaller V(0).
    """

    @property
    def default_params(self):
        return Params(max_steps_in_episode=4)

    def start(self, key):
        return -jnp.ones(())

    def step_env(self, key, state, action, params):
        return self.end(state, 0.0, jnp.where(state.x < -0.5, 0.0, 1.0), False)
