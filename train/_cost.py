"""What a run costs, before it (counted, predicted) and after it (counted, measured or estimated).

The columns are the same everywhere; units are in their names and every number has its method:

  parameters, policy_parameters       numbers in the trained networks, and in the acting one
  flops_per_action                    one observation through the policy, its preparation included
  flops_per_update                    one update of one seed
  flops                               the whole run, all seeds, what initialises it included
    flops_network                     dense layers and convolutions of acting and learning
    flops_environment                 the environment's steps, resets included
    flops_other                       activations, losses, advantages, optimiser
  alpha_flops                         index of the layers' FLOPs by shape (jaxrl.cost.alpha_flops)
  loop_steps                          iterations of all loops: what cannot run side by side
  energy_J, J_per_1M_steps, ...       see jaxrl.cost.energy
"""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
from rich import box
from rich.markup import escape
from rich.table import Table

from jaxrl import rollout, spaces
from jaxrl.cost import alpha_flops, energy, flops
from jaxrl.cost.energy import Energy, EnergyMeter
from jaxrl.cost.flops import Cost
from jaxrl.sinks import Chunk
from jaxrl.types import Train
from train import _report

FLOPS_METHOD = "counted from the jaxpr"
ALPHA_METHOD = "index, constants of the Quadro T2000 in the paper: compares networks, not devices"


@dataclass(frozen=True)
class RunCost:
    """One seed's run, counted and not run."""

    parameters: int | None
    policy_parameters: int
    action: Cost
    init: Cost
    update: Cost
    environment: Cost  # of one update
    num_updates: int
    steps_per_update: int

    def features(self, num_updates: int, num_seeds: int) -> dict[str, float]:
        """What predicts time and energy of so many updates of seeds side by side."""
        return {
            "flops": float(self.update.flops * num_updates * num_seeds),
            "env_steps": float(self.steps_per_update * num_updates * num_seeds),
            "loop_steps": float(self.update.loop_steps * num_updates),
        }

    def columns(self, num_seeds: int = 1, num_updates: int | None = None) -> dict[str, Any]:
        """The counted columns; those of the run are of all seeds and the updates done."""
        num_updates = self.num_updates if num_updates is None else num_updates
        total = (self.init + self.update * num_updates) * num_seeds
        environment = self.environment * (num_updates * num_seeds)
        network = total.layer_flops - environment.layer_flops
        steps = self.steps_per_update * num_updates * num_seeds
        return {
            "parameters": self.parameters,
            "policy_parameters": self.policy_parameters,
            "flops_per_action": self.action.flops,
            "flops_per_update": self.update.flops,
            "flops_per_env_step": self.update.flops / self.steps_per_update,
            "flops": total.flops,
            "flops_network": network,
            "flops_environment": environment.flops,
            "flops_other": total.flops - network - environment.flops,
            "macs_network": network // 2,
            "flops_per_s": None,
            "flops_method": FLOPS_METHOD,
            "flops_warnings": list(total.warnings),
            "flops_not_counted": sorted(total.not_counted),
            "alpha_flops": alpha_flops.of_cost(total) - alpha_flops.of_cost(environment),
            "alpha_flops_method": ALPHA_METHOD,
            "loop_steps": (self.init + self.update * num_updates).loop_steps,
            "env_steps_counted": steps,
        }


def count_run(agent: ModuleType, config: Any, env: Any, params: Any, train: Train) -> RunCost:
    """Count a run of `train`, which is `agent`'s; nothing is compiled or run."""
    key = jax.random.key(0)
    state = jax.eval_shape(train.init, key)
    policy = jax.eval_shape(agent.get_policy, state)
    act = agent.make_act(config, *spaces.read(env, params))
    obs, _ = jax.eval_shape(env.reset, key, params)
    num_envs = getattr(config, "num_envs", 1)
    step = flops.count(
        lambda actors, action, key: _env_step(env, params, actors, action, key),
        jax.eval_shape(lambda k: rollout.reset(env, params, k, num_envs), key),
        jax.eval_shape(
            lambda k: jax.vmap(lambda k: env.action_space(params).sample(k))(
                jax.random.split(k, num_envs)
            ),
            key,
        ),
        key,
    )
    trained = getattr(state, "params", None)
    return RunCost(
        parameters=None if trained is None else _size(trained),
        policy_parameters=_size(policy.params),
        action=flops.count(act, policy, obs),
        init=flops.count(train.init, key),
        update=flops.count(train.update, state),
        environment=step * (train.steps_per_update // num_envs),
        num_updates=train.num_updates,
        steps_per_update=train.steps_per_update,
    )


def _env_step(env: Any, params: Any, actors: rollout.Actors, action: Any, key: Any) -> Any:
    """The environments' own part of a step, and of its results what learners use."""
    keys = jax.random.split(key, actors.episode_length.shape[0])
    *results, info = jax.vmap(env.step, in_axes=(0, 0, 0, None))(
        keys, actors.env_state, action, params
    )
    return results, info["final_observation"], info.get("success")


def _size(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


# while training -----------------------------------------------------------------------------------


@dataclass
class EnergyLog:
    """A sink that reads the meter at the end of every chunk."""

    meter: EnergyMeter
    points: list[tuple[int, float | None]] = field(default_factory=list)  # (updates done, J)
    before: Energy | None = None  # of the run until it was resumed

    def __call__(self, chunk: Chunk) -> None:
        """Note the energy so far."""
        self.points.append((chunk.last_update, self.so_far().J))

    def so_far(self) -> Energy:
        """The energy of the run, what was lost with a killed process apart."""
        now = self.meter.so_far()
        return now if self.before is None else self.before + now

    def J_after(self, update: int) -> float | None:
        """Energy [J] of the first updates, between two readings by a straight line."""
        points = [(0, 0.0), *((u, J) for u, J in self.points if J is not None)]
        if len(points) < 2 or update > points[-1][0]:
            return None
        updates, joules = zip(*points, strict=True)
        return float(np.interp(update, updates, joules))


@dataclass(frozen=True)
class RunEnergy:
    """Energy of a run's two parts."""

    compile: Energy
    run: Energy
    log: EnergyLog


def summary_columns(
    cost: RunCost,
    used: RunEnergy,
    metrics: dict[str, np.ndarray],
    num_seeds: int,
    num_updates: int,
    *,
    run_s: float,
    threshold: float | None,
    g_per_kwh: float | None,
) -> dict[str, Any]:
    """What a summary says of the cost of a run of which `num_updates` are done."""
    columns = cost.columns(num_seeds, num_updates)
    columns["flops_per_s"] = columns["flops"] / run_s
    columns |= used.run.columns(columns.pop("env_steps_counted"), g_per_kwh)
    columns["compile_energy_J"] = used.compile.J
    columns["compile_energy_low_J"] = used.compile.low_J
    columns["compile_energy_high_J"] = used.compile.high_J
    columns["compile_energy_method"] = used.compile.method
    columns["threshold_return"] = threshold
    names = ("J_to_threshold", "J_to_threshold_low", "J_to_threshold_high")
    columns |= dict.fromkeys(("env_steps_to_threshold", *names))
    update = None if threshold is None else first_update_above(metrics, threshold)
    if update is None:
        return columns
    columns["env_steps_to_threshold"] = update * cost.steps_per_update * num_seeds
    total, J = used.run.J, used.log.J_after(update)
    if J is not None and total:
        for name, end in zip(names, (total, used.run.low_J, used.run.high_J), strict=True):
            share = J * (end or total) / total  # an estimate's range is the same all along
            columns[name] = share if used.run.is_measured else energy.two_digits(share)
    return columns


def first_update_above(metrics: dict[str, np.ndarray], threshold: float) -> int | None:
    """The first update, from 1, after which the mean over seeds of the return is that high.

    The return of a seed is that of its episodes in the last fiftieth of the run, as in the curve;
    every seed must have ended one.
    """
    if "episode_return" not in metrics:
        return None
    window = max(1, metrics["episode_return"].shape[1] // 50)
    curve = _report.smooth(metrics, "episode_return", window).mean(axis=0)
    above = np.flatnonzero(curve >= threshold)  # False for NaN
    return int(above[0]) + 1 if len(above) else None


# for people ---------------------------------------------------------------------------------------


def table(columns: dict[str, Any], title: str = "cost") -> Table:
    """The columns as rows: what, how much, known how."""
    result = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    result.add_column("what", no_wrap=True)
    result.add_column("how much", justify="right", no_wrap=True)
    result.add_column("known how")
    counted = columns["flops_method"]
    bound = counted
    if columns["flops_warnings"]:
        bound = f"{counted}; {len(columns['flops_warnings'])} loops once: a lower bound"
    rows = [
        ("parameters", "parameters (policy)", "counted"),
        ("flops_per_action", "FLOPs of an action", counted),
        ("flops_per_update", "FLOPs of an update, one seed", bound),
        ("flops", "FLOPs of the run, all seeds", bound),
        ("flops_network", "  dense layers, convolutions", counted),
        ("flops_environment", "  environment", bound),
        ("flops_other", "  everything else", counted),
        ("flops_per_s", "FLOP/s", "FLOPs / measured time"),
        ("alpha_flops", "alpha-FLOPs", columns["alpha_flops_method"]),
        ("predicted_s", "time [s]", columns.get("predicted_s_method", "")),
        ("predicted_J", "energy [J]", columns.get("predicted_J_method", "")),
        ("energy_J", "energy [J]", columns.get("energy_method", "")),
        ("J_per_1M_steps", "energy of 1M steps [J]", columns.get("energy_method", "")),
        ("J_to_threshold", "energy to the threshold [J]", columns.get("energy_method", "")),
        ("compile_energy_J", "energy of compiling [J]", columns.get("compile_energy_method", "")),
        ("gCO2e", "emissions [gCO2e]", columns.get("gCO2e_method", "")),
    ]
    last = ""
    for name, label, method in rows:
        if name not in columns or (
            columns[name] is None and name in ("flops_per_s", "J_to_threshold")
        ):
            continue
        value = _text(columns[name])
        if name == "parameters":
            value += f" ({_text(columns['policy_parameters'])})"
        low, high = _range(columns, name)
        if low != high:
            value += f" ({_text(low)} to {_text(high)})"
        # "[s]" would be markup
        result.add_row(escape(label), value, '"' if method == last else escape(method))
        last = method
    return result


def _range(columns: dict[str, Any], name: str) -> tuple[Any, Any]:
    """The ends of a number's range: of x_J in x_low_J and x_high_J, of x in x_low and x_high."""
    stem, unit = (name[:-2], "_J") if name.endswith("_J") else (name, "")
    return columns.get(f"{stem}_low{unit}"), columns.get(f"{stem}_high{unit}")


def _text(value: float | None) -> str:
    if value is None:
        return "not known"
    return f"{value:,}" if isinstance(value, int) and value < 1e7 else f"{value:.4g}"


def read_summary(path: Path) -> dict[str, Any]:
    """Read the summary of a run.

    Raises:
        ValueError: the file is none.
        OSError: it cannot be read.
    """
    try:
        return dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError):
        raise ValueError(f"{path} is no summary of a run") from None


def model_card(summary: dict[str, Any], g_per_kwh: float | None) -> str:
    """The `co2_eq_emissions` block of a run, from its summary.

    Raises:
        ValueError: the summary knows nothing of energy.
    """
    if "energy_method" not in summary:
        raise ValueError("this run's summary.json has no energy: it is of an earlier version")
    part = energy.Reading(
        "run",
        summary["energy_J"],
        summary["energy_method"],
        summary["energy_low_J"],
        summary["energy_high_J"],
    )
    hardware = ", ".join(dict.fromkeys(summary["devices"]))
    return energy.model_card(Energy(summary["run_s"], (part,)), g_per_kwh, hardware)


# calibration --------------------------------------------------------------------------------------

# (seeds, factor of num_envs, hidden width): what differs between the runs of a calibration
VARIANTS = (
    (1, 1.0, None),
    (1, 0.25, None),
    (1, 4.0, None),
    (1, 1.0, 16),
    (1, 1.0, 256),
    (1, 4.0, 256),
    (2, 1.0, None),
    (4, 0.25, 128),
)


def calibration_configs(agent: ModuleType, config: Any, env: Any, params: Any) -> list[Any]:
    """(num_seeds, config) of every variant that the agent accepts, no two the same."""
    found: list[tuple[int, Any]] = []
    fields = {f.name for f in dataclasses.fields(config)}
    for num_seeds, factor, width in VARIANTS:
        changes: dict[str, Any] = {}
        if "num_envs" in fields:
            changes["num_envs"] = max(1, round(config.num_envs * factor))
        if "hidden" in fields and width is not None:
            changes["hidden"] = (width,) * len(config.hidden)
        # learning begins with the first update: what a long run does nearly all the time
        if "learning_starts" in fields:
            changes["learning_starts"] = 0
        variant = dataclasses.replace(config, **changes)
        try:
            agent.check_config(variant, env, params)
        except ValueError:
            continue
        if (num_seeds, variant) not in found:
            found.append((num_seeds, variant))
    return found


def time_run(
    agent: ModuleType, config: Any, env: Any, params: Any, num_seeds: int, seconds: float
) -> dict[str, Any]:
    """Train for about `seconds` and return what it took beside what was counted."""
    train = agent.make_train(config, env, params)
    cost = count_run(agent, config, env, params, train)
    keys = jax.random.split(jax.random.key(0), num_seeds)
    run = jax.jit(jax.vmap(lambda s: train.run(s, 2)), donate_argnums=0)
    state, _ = run(jax.jit(jax.vmap(train.init))(keys))  # compiles
    jax.block_until_ready(state)
    num_updates = 0
    with EnergyMeter() as meter:
        while num_updates == 0 or meter.so_far().seconds < seconds:
            state, _ = run(state)
            meter.wait_for(state)
            num_updates += 2
    used = meter.energy
    return {
        **cost.features(num_updates, num_seeds),
        "num_seeds": num_seeds,
        "seconds": used.seconds,
        "energy_J": used.J,
        "energy_method": used.method,
    }


def calibrate(
    agent: ModuleType, config: Any, env: Any, params: Any, seconds: float, say: Any = print
) -> dict[str, Any]:
    """Train shortly in several sizes and fit time and energy to FLOPs, env steps and loop steps.

    Raises:
        ValueError: the agent accepts too few of the sizes.
    """
    variants = calibration_configs(agent, config, env, params)
    rows = []
    for i, (num_seeds, variant) in enumerate(variants):
        rows.append(time_run(agent, variant, env, params, num_seeds, seconds))
        row = rows[-1]
        say(f"{i + 1} of {len(variants)}: {row['seconds']:.2f} s, {row['flops']:.3g} FLOPs")
    names = ("flops", "env_steps", "loop_steps")
    features = {name: [row[name] for row in rows] for name in names}
    fits = {"seconds": alpha_flops.fit_runs(features, [row["seconds"] for row in rows])}
    joules = [row["energy_J"] for row in rows]
    if all(joules):
        fits["energy_J"] = alpha_flops.fit_runs(features, joules)
    return {
        "format": "jaxrl calibration 1",
        "agent": agent.__name__.rpartition(".")[2],
        "energy_method": rows[0]["energy_method"],
        **{name: dataclasses.asdict(fit) for name, fit in fits.items()},
        "runs": rows,
    }


def predict(calibration: dict[str, Any], cost: RunCost, num_seeds: int) -> dict[str, Any]:
    """Time and energy of the whole run by a calibration, with its cross-validated error."""
    features = cost.features(cost.num_updates, num_seeds)
    columns: dict[str, Any] = {}
    for target, column in (("seconds", "predicted_s"), ("energy_J", "predicted_J")):
        if target not in calibration:
            continue
        fit = alpha_flops.RunFit(
            calibration[target]["coefficients"], alpha_flops.Errors(**calibration[target]["errors"])
        )
        value, errors = fit.predict(**features), fit.errors
        known = "measured times" if target == "seconds" else calibration["energy_method"]
        columns[column] = float(f"{value:.3g}") if target == "seconds" else energy.two_digits(value)
        columns[f"{column}_relative_error"] = errors.cv_median
        columns[f"{column}_method"] = (
            f"predicted from {known} of {errors.num_points} short runs; these predict each other "
            f"to {100 * errors.cv_median:.0f} % in the median, {100 * errors.cv_p90:.0f} % in nine "
            "of ten"
        )
    return columns


def read_calibration(path: Path) -> dict[str, Any]:
    """Read a calibration.

    Raises:
        ValueError: the file is none.
        OSError: it cannot be read.
    """
    try:
        content = json.loads(path.read_text())
        assert content["format"] == "jaxrl calibration 1"
    except (ValueError, KeyError, TypeError, AssertionError):
        raise ValueError(f"{path} is no calibration: write one with --calibrate {path}") from None
    return content
