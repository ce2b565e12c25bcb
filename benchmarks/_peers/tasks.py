"""The tasks: who runs what, with settings matched and every difference in words.

A task is one piece of work (environment, network, steps, minibatches, epochs, updates) that several
libraries do. Libraries that no package index has are quoted: their figure of another machine times
what a library of this run took here over what it took there.
"""

from dataclasses import dataclass
from typing import Any

OURS = "jaxrl"
ONE_DEVICE = f"{OURS}, one device"


def is_ours(who: str) -> bool:
    """Whether a row is of our own library."""
    return who in (OURS, ONE_DEVICE)


@dataclass(frozen=True)
class Entry:
    """One library at one task."""

    who: str
    worker: str
    """Module of this package, without its `run_`."""
    settings: dict[str, Any]
    """What the worker takes."""
    environment: str | None = None
    """Of `install`; None is our own interpreter."""
    differences: str = ""
    """From our run, in words."""
    max_repeats: int | None = None
    """Processes at most: it is slow."""
    seconds: float = 900.0
    """Time limit of a process."""


@dataclass(frozen=True)
class Quoted:
    """A library that cannot be installed: measured elsewhere beside one that can."""

    who: str
    figure: float  # seconds
    reference: str  # an entry's `who`
    reference_figure: float  # seconds, same machine as `figure`
    note: str = ""


@dataclass(frozen=True)
class Task:
    """One piece of work."""

    id: str
    title: str
    about: str
    """What all do, in words."""
    entries: tuple[Entry, ...]
    quoted: tuple[Quoted, ...] = ()
    bar: float | None = None
    """Mean return over all seeds that an evaluation after training must reach; None: stepping."""
    wanted: float | None = None
    """How many times as fast as the fastest other we want to be."""
    num_runs: int = 2
    """Runs of each process of a compiled program, of which the best counts."""
    num_seeds: int = 1
    """Agents trained side by side."""
    steps: int = 0
    """Environment steps of a seed."""


def _ours(agent: str, env: str, config: dict[str, Any]) -> list[Entry]:
    return [Entry(OURS, "jaxrl", {"agent": agent, "env": env, "config": config})]


def _ours_apart(agent: str, env: str, config: dict[str, Any]) -> list[Entry]:
    """Ours with networks that learn apart, on two devices; and on one, as by default."""
    whole = Entry(
        ONE_DEVICE,
        "jaxrl",
        {"agent": agent, "env": env, "config": config},
        differences="the networks learn one after the other, on one device (without --learn-apart)",
    )
    return [*_ours(agent, env, {**config, "learn_apart": True}), whole]


# proximal policy optimisation -------------------------------------------------------------------

REJAX_PPO = (
    "actor's and critic's gradients are two backward passes, each element clipped (ours: the "
    "global norm, with --learn-apart of each network's); a time limit counts as a death; the value "
    "network is evaluated once a step (ours: on the next observations too); no losses are reported"
)
GYM = "environment in Python, NumPy (Gymnasium); one agent, no vmap"


def _ppo_cartpole(num_seeds: int, steps: int, wanted: float | None) -> Task:
    """purejaxrl's settings: what the published comparisons of compiled PPO use."""
    updates = steps // 512
    steps = updates * 512
    shared = {"num_envs": 4, "num_steps": 128, "num_epochs": 4, "num_minibatches": 4}
    ours = {
        **shared,
        "total_steps": steps,
        "learning_rate": 2.5e-4,
        "anneal_learning_rate": False,
        "clip_value": True,
        "ent_coef": 0.01,
        "normalize_obs": False,
        "normalize_reward": False,
    }
    rejax = {
        **shared,
        "env": "CartPole-v1",
        "agent_kwargs": {"activation": "tanh"},
        "total_timesteps": steps,
        "learning_rate": 2.5e-4,
        "gamma": 0.99,
        "gae_lambda": 0.95,
        "clip_eps": 0.2,
        "ent_coef": 0.01,
        "vf_coef": 0.5,
        "max_grad_norm": 0.5,
    }
    entries = [
        *(_ours_apart if num_seeds == 1 else _ours)("ppo", "CartPole-v1", ours),
        Entry("rejax 0.1.3", "rejax", {"algorithm": "PPO", "config": rejax}, "rejax", REJAX_PPO),
    ]
    quoted = []
    if num_seeds == 1:
        kwargs = {
            "n_steps": 128,
            "batch_size": 128,
            "n_epochs": 4,
            "learning_rate": 2.5e-4,
            "ent_coef": 0.01,
            "clip_range_vf": 0.2,
        }
        for library, name in (("sb3", "Stable-Baselines3 2.9.2"), ("sbx", "SBX 0.28.0")):
            given = dict(kwargs)
            if library == "sbx":
                del given["clip_range_vf"]
            settings = {
                "library": library,
                "algorithm": "PPO",
                "env": "CartPole-v1",
                "num_envs": 4,
                "hidden": [64, 64],
                "activation": "tanh",
                "normalize_obs": False,
                "total_steps": steps,
                "stop_at": 51_200,
                "kwargs": given,
            }
            more = "; its value loss is not clipped" if library == "sbx" else ""
            entries.append(Entry(name, "sb3", settings, "sb3", GYM + more, max_repeats=5))
        quoted = [
            Quoted("purejaxrl", 1.94, "rejax 0.1.3", 1.85),
            Quoted("Stoix", 3.5, "rejax 0.1.3", 1.85),
            Quoted("CleanRL", 58.0, "rejax 0.1.3", 1.85, "its own values"),
        ]
    elif (num_seeds, steps) == (16, 99_840):
        quoted = [Quoted("purejaxrl", 4.9, "rejax 0.1.3", 4.4)]
    thousands = "500k" if steps > 400_000 else "100k"
    seeds = "1 seed" if num_seeds == 1 else f"{num_seeds} seeds"
    return Task(
        id=f"ppo_cartpole_{thousands}_{num_seeds}",
        title=f"PPO, CartPole-v1, {thousands} steps, {seeds}",
        about=(
            f"{updates} updates of 4 environments x 128 steps, 4 epochs of 4 minibatches, two "
            "networks of (64, 64) tanh, Adam at 2.5e-4 throughout, clipped value loss, entropy 0.01"
        ),
        entries=tuple(entries),
        quoted=tuple(quoted),
        bar=475.0 if steps > 400_000 else 300.0,
        wanted=wanted,
        num_runs=3 if num_seeds <= 4 else 1,
        num_seeds=num_seeds,
        steps=steps,
    )


def _ppo_pendulum() -> Task:
    """RL Baselines3 Zoo's settings (hyperparams/ppo.yml), without its exploration by state.

    Rewards are normalised, as rejax always clips the value's change, and by 0.2. Its own settings
    for Pendulum (configs/gymnax/pendulum.yaml, 150k steps) do not, and ended below -700 there and
    here.
    """
    steps = 24 * 4096
    shared = {"num_envs": 4, "num_steps": 1024, "num_epochs": 10, "num_minibatches": 64}
    ours = {
        **shared,
        "total_steps": steps,
        "learning_rate": 1e-3,
        "anneal_learning_rate": False,
        "gamma": 0.9,
        "clip_value": True,
        "squash": "clip",
    }
    rejax = {
        **shared,
        "env": "Pendulum-v1",
        "agent_kwargs": {"activation": "tanh"},
        "total_timesteps": steps,
        "normalize_observations": True,
        "normalize_rewards": True,
        "reward_normalization_discount": 0.9,
        "learning_rate": 1e-3,
        "gamma": 0.9,
        "gae_lambda": 0.95,
        "clip_eps": 0.2,
        "ent_coef": 0.0,
        "vf_coef": 0.5,
        "max_grad_norm": 0.5,
    }
    host = {
        "library": "sb3",
        "algorithm": "PPO",
        "env": "Pendulum-v1",
        "num_envs": 4,
        "hidden": [64, 64],
        "activation": "tanh",
        "normalize_obs": True,
        "normalize_reward": True,
        "total_steps": steps,
        "stop_at": 2 * 4096,
        "kwargs": {
            "n_steps": 1024,
            "batch_size": 64,
            "n_epochs": 10,
            "learning_rate": 1e-3,
            "gamma": 0.9,
            "clip_range_vf": 0.2,
        },
    }
    return Task(
        id="ppo_pendulum",
        title="PPO, Pendulum-v1, 98k steps, 1 seed",
        about=(
            "RL Baselines3 Zoo's settings without its exploration by state: 24 updates of 4 "
            "environments x 1,024 steps, 10 epochs of 64 minibatches, two networks of (64, 64) "
            "tanh, Adam at 1e-3, discount 0.9, clipped value loss, observations and rewards "
            "normalised"
        ),
        entries=(
            *_ours_apart("ppo", "Pendulum-v1", ours),
            Entry(
                "rejax 0.1.3",
                "rejax",
                {"algorithm": "PPO", "config": rejax},
                "rejax",
                REJAX_PPO + "; real actions are in the environment's units (ours: in half-widths "
                "of the bounds)",
            ),
            Entry("Stable-Baselines3 2.9.2", "sb3", host, "sb3", GYM, max_repeats=5),
        ),
        bar=-300.0,
        wanted=1.5,
        num_runs=3,
        steps=steps,
    )


# learners from replay ---------------------------------------------------------------------------

MENDED = "its replay draws indices (as it is, it draws without replacement over the whole buffer)"
AS_IT_IS = "as it is installed: draws without replacement over the whole buffer"
REJAX_DQN = (
    "first 5,000 actions uniform (ours: as epsilon says); each element of the gradient clipped "
    "(ours: global norm); a time limit counts as a death"
)


def _dqn_rejax() -> Task:
    """rejax's settings of its CartPole, configs/gymnax/cartpole.yaml."""
    ours = {
        "total_steps": 100_000,
        "num_envs": 10,
        "num_steps": 250,
        "num_gradient_steps": 5,
        "batch_size": 100,
        "buffer_size": 50_000,
        "learning_starts": 5_000,
        "learning_rate": 1e-3,
        "epsilon_end": 0.05,
        "epsilon_fraction": 0.5,
        "tau": 0.02,
        "target_every": 5,
        "double": True,
        "dueling": True,
        "activation": "silu",
    }
    config = {
        "env": "CartPole-v1",
        "agent": "DuelingQNetwork",
        "agent_kwargs": {"activation": "swish"},
        "num_envs": 10,
        "buffer_size": 50_000,
        "fill_buffer": 5_000,
        "batch_size": 100,
        "max_grad_norm": 10,
        "learning_rate": 0.001,
        "num_epochs": 5,
        "total_timesteps": 100_000,
        "polyak": 0.98,
        "eps_start": 1,
        "eps_end": 0.05,
        "exploration_fraction": 0.5,
        "gamma": 0.99,
        "ddqn": True,
    }
    rejax = {"algorithm": "DQN", "config": config}
    host = {
        "algorithm": "DQN",
        "env": "CartPole-v1",
        "num_envs": 10,
        "hidden": [64, 64],
        "activation": "silu",
        "normalize_obs": False,
        "total_steps": 100_000,
        "stop_at": 20_000,
        "kwargs": {
            "learning_rate": 1e-3,
            "buffer_size": 50_000,
            "learning_starts": 5_000,
            "batch_size": 100,
            "tau": 0.02,
            "train_freq": 1,
            "gradient_steps": 5,
            "target_update_interval": 1,
            "exploration_fraction": 0.5,
            "exploration_final_eps": 0.05,
        },
    }
    return Task(
        id="dqn_cartpole_rejax",
        title="DQN, CartPole-v1, 100k steps, 1 seed, rejax's settings",
        about=(
            "10 environments, after each step of all 5 gradient steps on batches of 100, double, "
            "dueling network of (64, 64) silu, soft target, buffer of 50,000, learning from 5,000"
        ),
        entries=(
            *_ours("dqn", "CartPole-v1", ours),
            Entry(
                "rejax 0.1.3, mended",
                "rejax",
                {**rejax, "mended": True},
                "rejax",
                f"{MENDED}; {REJAX_DQN}",
            ),
            Entry(
                "rejax 0.1.3, as it is",
                "rejax",
                {**rejax, "num_runs": 1},
                "rejax",
                f"{AS_IT_IS}; {REJAX_DQN}",
                max_repeats=1,
            ),
            Entry(
                "Stable-Baselines3 2.9.2",
                "sb3",
                {**host, "library": "sb3"},
                "sb3",
                f"{GYM}; neither double nor dueling, so less work",
                max_repeats=1,
            ),
        ),
        bar=400.0,
        wanted=1.5,
        steps=100_000,
    )


def _dqn_purejaxrl() -> Task:
    """purejaxrl's dqn.py; rejax with its replay mended and a network of these widths beside it."""
    ours = {
        "total_steps": 500_000,
        "num_envs": 10,
        "num_steps": 500,
        "batch_size": 128,
        "buffer_size": 10_000,
        "learning_starts": 10_000,
        "learning_rate": 2.5e-4,
        "epsilon_end": 0.05,
        "epsilon_fraction": 0.5,
        "tau": 1.0,
        "target_every": 50,
        "double": False,
        "hidden": [120, 84],
        "max_grad_norm": 1e9,  # it has no bound
    }
    config = {
        "env": "CartPole-v1",
        "agent": "QNetwork",
        "num_envs": 10,
        "buffer_size": 10_000,
        "fill_buffer": 10_000,
        "batch_size": 128,
        "learning_rate": 2.5e-4,
        "num_epochs": 1,
        "total_timesteps": 500_000,
        "polyak": 0.0,
        "target_update_freq": 500,
        "eps_start": 1,
        "eps_end": 0.05,
        "exploration_fraction": 0.5,
        "gamma": 0.99,
        "ddqn": False,
    }
    settings = {"algorithm": "DQN", "config": config, "mended": True, "hidden": [120, 84]}
    return Task(
        id="dqn_cartpole_purejaxrl",
        title="DQN, CartPole-v1, 500k steps, 1 seed, purejaxrl's settings",
        about=(
            "10 environments, after each step of all one gradient step on a batch of 128, network "
            "of (120, 84) relu, target copied every 500 environment steps, buffer and start 10,000"
        ),
        entries=(
            *_ours("dqn", "CartPole-v1", ours),
            Entry(
                "rejax 0.1.3, mended",
                "rejax",
                settings,
                "rejax",
                f"{MENDED}; its network given these widths; the first 10,000 actions uniform; a "
                "time limit counts as a death",
            ),
        ),
        quoted=(Quoted("purejaxrl", 5.9, "dqn_cartpole_rejax/rejax 0.1.3, mended", 3.5),),
        bar=400.0,
        wanted=1.5,
        steps=500_000,
    )


def _sac_pendulum() -> Task:
    """rejax's settings of its Pendulum, configs/gymnax/pendulum.yaml, 20k steps."""
    ours = {
        "total_steps": 20_000,
        "num_envs": 1,
        "num_steps": 250,
        "num_gradient_steps": 1,
        "batch_size": 256,
        "buffer_size": 10_000,
        "learning_starts": 256,
        "learning_rate": 1e-2,
        "tau": 0.02,
        "max_grad_norm": 1e9,  # it has no bound
        "normalize_obs": True,
        "activation": "silu",
    }
    config = {
        "env": "Pendulum-v1",
        "agent_kwargs": {"activation": "swish"},
        "num_envs": 1,
        "buffer_size": 10_000,
        "fill_buffer": 256,
        "batch_size": 256,
        "learning_rate": 0.01,
        "num_epochs": 1,
        "total_timesteps": 20_000,
        "gamma": 0.99,
        "polyak": 0.98,
        "normalize_observations": True,
    }
    rejax = {"algorithm": "SAC", "config": config}
    host = {
        "algorithm": "SAC",
        "env": "Pendulum-v1",
        "num_envs": 1,
        "hidden": [64, 64],
        "activation": "silu",
        "normalize_obs": True,
        "total_steps": 20_000,
        "stop_at": 3_000,
        "kwargs": {
            "learning_rate": 1e-2,
            "buffer_size": 10_000,
            "learning_starts": 256,
            "batch_size": 256,
            "tau": 0.02,
            "train_freq": 1,
            "gradient_steps": 1,
        },
    }
    differences = (
        "first 256 actions drawn from the policy (ours: uniform); a time limit is a death; the "
        "critics learn from the new policy (ours: the policy from the new critics, with "
        "--learn-apart each from the other before its step, on batches sampled a step before)"
    )
    hosts = [
        Entry(name, "sb3", {**host, "library": library}, "sb3", GYM, max_repeats=1)
        for library, name in (("sbx", "SBX 0.28.0"), ("sb3", "Stable-Baselines3 2.9.2"))
    ]
    return Task(
        id="sac_pendulum",
        title="SAC, Pendulum-v1, 20k steps, 1 seed, rejax's settings",
        about=(
            "1 environment, after each step one gradient step of policy, two critics and the "
            "temperature on a batch of 256, networks of (64, 64) silu, Adam at 0.01, observations "
            "normalised, buffer of 10,000, learning from 256"
        ),
        entries=(
            *_ours_apart("sac", "Pendulum-v1", ours),
            Entry(
                "rejax 0.1.3, mended",
                "rejax",
                {**rejax, "mended": True},
                "rejax",
                f"{MENDED}; {differences}",
            ),
            Entry(
                "rejax 0.1.3, as it is",
                "rejax",
                {**rejax, "num_runs": 1},
                "rejax",
                f"{AS_IT_IS}; {differences}",
                max_repeats=1,
            ),
            *hosts,
        ),
        bar=-250.0,
        wanted=1.5,
        steps=20_000,
    )


# environments -----------------------------------------------------------------------------------


def _stepping(env: str) -> Task:
    """Environment steps per second, random actions."""
    many = [1, 64, 1024, 16384]
    settings = {"env": env, "num_envs": many, "seconds": 1.0}
    pool = [1, 64, 1024, [1024, 256]]
    host = {"env": env, "seconds": 1.0, "threads": 0}
    plain = "a scan over vmap(env.step)"
    return Task(
        id=f"steps_{env.split('-')[0].lower()}",
        title=f"Steps per second, {env}, random actions, automatic resets",
        about="each measured for a second at each number of environments side by side",
        entries=(
            Entry(
                "jaxrl.rollout on gymnax 1.0",
                "jaxrl",
                settings,
                differences=(
                    "keeps transitions, returns and lengths of episodes as well; what is random in "
                    "the environments is drawn 64 steps ahead, as the learners do"
                ),
            ),
            Entry("gymnax 1.0.1", "gymnax", settings, differences=plain),
            Entry("gymnax 0.0.9", "gymnax", settings, "rejax", f"{plain}; one flag for both ends"),
            Entry(
                "envpool 1.2.5",
                "stepping",
                {**host, "library": "envpool", "num_envs": pool},
                "envpool",
                "C++, a thread a core; actions are ready beforehand",
            ),
            Entry(
                "Gymnasium 1.3.0",
                "stepping",
                {**host, "library": "gymnasium", "num_envs": [1, 64]},
                "envpool",
                "Python; actions are ready beforehand; more than one: a vector in one process",
            ),
        ),
    )


TASKS = (
    _ppo_cartpole(1, 500_000, 1.5),
    _ppo_cartpole(4, 500_000, None),
    _ppo_cartpole(16, 100_000, 2.0),
    _ppo_cartpole(16, 500_000, 2.0),
    _ppo_cartpole(64, 500_000, None),
    _ppo_pendulum(),
    _dqn_rejax(),
    _dqn_purejaxrl(),
    _sac_pendulum(),
    _stepping("CartPole-v1"),
    _stepping("Pendulum-v1"),
)
