"""DQN on CartPole side by side with rejax, at rejax's settings and at purejaxrl's.

    python -m benchmarks.dqn_speed --json benchmarks/results/dqn_speed.json

rejax 0.1.3 is installed into an environment of its own (network needed the first time) and runs in
alternation with ours, each in a fresh process: as it is, and with its replay sampling mended (it
draws without replacement over the whole buffer). Its evaluations during training are left out, as
ours are. purejaxrl cannot be installed: its row is the 5.9 s that it was measured with where the
mended rejax took 3.5 s, scaled by the mended rejax of this run, and marked so.

Differences at rejax's settings: ours draws its first 5,000 actions as epsilon says (rejax:
uniformly), moves the target after every fifth gradient step as rejax does, bootstraps at the time
limit (rejax: not), and bounds the gradient by its norm (rejax: each element).

Where the time goes is printed as well: what the matrix products of the run would take at the rate
of one such product alone on this machine.
"""

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from jaxrl import rollout, spaces
from jaxrl.agents import dqn
from jaxrl.cost import flops
from train._envs import make_env
from train._run import machine

REJAX = ("rejax==0.1.3", "gymnax==0.0.9", "six")
REJAX_SETTINGS = {  # its configs/gymnax/cartpole.yaml
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
    "eval_freq": 100_000,
    "skip_initial_evaluation": True,
    "polyak": 0.98,
    "eps_start": 1,
    "eps_end": 0.05,
    "exploration_fraction": 0.5,
    "gamma": 0.99,
    "ddqn": True,
}
OURS = {
    "rejax": dqn.Config(
        total_steps=100_000,
        num_envs=10,
        num_steps=250,
        num_gradient_steps=5,
        batch_size=100,
        buffer_size=50_000,
        learning_starts=5_000,
        learning_rate=1e-3,
        epsilon_end=0.05,
        epsilon_fraction=0.5,
        tau=0.02,
        target_every=5,
        double=True,
        dueling=True,
        activation="silu",
    ),
    "purejaxrl": dqn.Config(
        total_steps=500_000,
        num_envs=10,
        num_steps=500,
        batch_size=128,
        buffer_size=10_000,
        learning_starts=10_000,
        learning_rate=2.5e-4,
        epsilon_end=0.05,
        epsilon_fraction=0.5,
        tau=1.0,
        target_every=50,
        double=False,
        hidden=(120, 84),
        max_grad_norm=1e9,  # it has no bound
    ),
}
PUREJAXRL_OVER_REJAX = 5.9 / 3.5  # its run over the mended rejax's, measured on one machine


@dataclass
class Options:
    """Command line."""

    num_repeats: int = 5
    """Processes of each kind, in alternation; the median of their best runs is given."""
    num_runs: int = 2
    """Runs in each process."""
    as_it_is: bool = True
    """Run rejax without its replay mended, too (once: it is slow)."""
    peers: Path = Path.home() / ".cache" / "jaxrl-peers"
    """Folder for the environments of other libraries."""
    json: Path | None = None
    """Where to write the numbers."""
    child: str | None = None
    """For this script's own use: run our side of one setting and print JSON."""


def run_ours(name: str, num_runs: int) -> dict[str, Any]:
    """Compile once, train with the seeds 0, 1, ...; the returns are of greedy evaluations."""
    setup = make_env("CartPole-v1")
    env, params = setup.env, setup.params
    config = OURS[name]
    train = dqn.make_train(config, env, params)
    started = time.perf_counter()
    compiled = jax.jit(train).lower(jax.random.key(0)).compile()
    compile_s = time.perf_counter() - started
    act = dqn.make_act(config, spaces.Discrete(2), (4,))

    @jax.jit
    def score(state, key):
        policy = dqn.get_policy(state)
        episodes = rollout.evaluate(env, params, lambda o, _: act(policy, o), key, 128)
        return episodes.returns.mean()

    run_s, returns = [], []
    for seed in range(num_runs):
        started = time.perf_counter()
        state, _ = jax.block_until_ready(compiled(jax.random.key(seed)))
        run_s.append(time.perf_counter() - started)
        returns.append(float(score(state, jax.random.key(seed))))
    return {"compile_s": compile_s, "run_s": run_s, "returns": returns}


def where_it_goes(name: str) -> dict[str, float]:
    """FLOPs of the run's matrix products, and their time [s] at the rate of one alone."""
    config = OURS[name]
    setup = make_env("CartPole-v1")
    train = dqn.make_train(config, setup.env, setup.params)
    network = flops.count(train, jax.random.key(0)).layer_flops
    width = config.hidden[-2]
    x = jax.random.normal(jax.random.key(0), (config.batch_size, width))
    w = jnp.eye(width)

    def repeat(x):
        return jax.lax.fori_loop(0, 2000, lambda _, x: x @ w, x)

    product = jax.jit(repeat).lower(x).compile()
    seconds = []
    for _ in range(7):
        started = time.perf_counter()
        jax.block_until_ready(product(x))
        seconds.append((time.perf_counter() - started) / 2000)
    rate = 2 * config.batch_size * width**2 / min(seconds)
    return {"flops_network": network, "flops_per_s_product": rate, "floor_s": network / rate}


def peer_python(folder: Path) -> Path:
    """Make the environment of rejax, with our version of JAX; return its interpreter."""
    python = folder / "rejax" / "bin" / "python"
    if not python.exists():
        print("installing rejax ...", flush=True)
        venv = [sys.executable, "-m", "venv", str(folder / "rejax")]
        subprocess.run(venv, check=True)
        packages = [*REJAX, f"jax=={jax.__version__}"]
        subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
    return python


def child(command: list[str]) -> dict[str, Any]:
    """Run a process; its last line is JSON."""
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:3])} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main(options: Options) -> None:
    """Run all in alternation; print a Markdown table, write JSON if asked."""
    if options.child is not None:
        print(json.dumps(run_ours(options.child, options.num_runs)))
        return
    python, script = peer_python(options.peers), str(Path(__file__).with_name("_rejax.py"))

    def rejax(mended: bool, num_runs: int) -> dict[str, Any]:
        settings = {"settings": REJAX_SETTINGS, "num_runs": num_runs, "mended": mended}
        return child([str(python), script, json.dumps(settings)])

    def ours(name: str) -> dict[str, Any]:
        base = [sys.executable, "-m", "benchmarks.dqn_speed", "--child", name]
        return child([*base, "--num-runs", str(options.num_runs)])

    kinds = {
        "jaxrl, rejax's settings": lambda: ours("rejax"),
        "rejax, mended": lambda: rejax(True, options.num_runs),
        "jaxrl, purejaxrl's settings": lambda: ours("purejaxrl"),
    }
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
    for _ in range(options.num_repeats):
        for kind, run in kinds.items():
            found[kind].append(run())
    if options.as_it_is:
        found["rejax, as it is"] = [rejax(False, 1)]

    rows: dict[str, dict[str, float]] = {}
    for kind, runs in found.items():
        rows[kind] = {
            "run_s": float(np.median([min(r["run_s"]) for r in runs])),
            "slowest_s": max(max(r["run_s"]) for r in runs),
            "compile_s": float(np.median([r["compile_s"] for r in runs])),
            "return": float(np.mean([r["returns"] for r in runs])),
        }
    mended = rows["rejax, mended"]["run_s"]
    scaled = mended * PUREJAXRL_OVER_REJAX
    print("\n| | run [s], median | slowest | compile [s] | return |\n|---|---|---|---|---|")
    for kind, row in rows.items():
        print(
            f"| {kind} | {row['run_s']:.2f} | {row['slowest_s']:.2f} | {row['compile_s']:.1f} |"
            f" {row['return']:.0f} |"
        )
    print(f"| purejaxrl, scaled from another run | {scaled:.2f} | | | |\n")
    ratios = {
        "rejax, mended": mended / rows["jaxrl, rejax's settings"]["run_s"],
        "purejaxrl, scaled": scaled / rows["jaxrl, purejaxrl's settings"]["run_s"],
    }
    for peer, ratio in ratios.items():
        print(f"{peer}: takes {ratio:.2f} times as long as ours")
    floors = {name: where_it_goes(name) for name in OURS}
    for name, floor in floors.items():
        run_s = rows[f"jaxrl, {name}'s settings"]["run_s"]
        print(
            f"{name}'s settings: {floor['flops_network'] / 1e9:.0f} GFLOP in matrix products, "
            f"which alone take {floor['floor_s']:.2f} s, {floor['floor_s'] / run_s:.0%} of it, at "
            f"{floor['flops_per_s_product'] / 1e9:.0f} GFLOP/s"
        )
    if options.json:
        result = {
            "machine": machine(),
            "rows": rows,
            "purejaxrl_scaled_s": scaled,
            "ratios": ratios,
            "floors": floors,
            "runs": found,
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
