"""Training and stepping beside other libraries: same work, same machine, in alternation.

    python -m benchmarks.peers                                  # everything
    python -m benchmarks.peers --tasks ppo_cartpole_500k_1 sac  # some, by the begin of their names
    python -m benchmarks.peers --resume --minutes 20            # go on with what is missing
    python -m benchmarks.peers --report                         # only table and plot anew

Installs the peers apart, by uv, in exact versions (network needed the first time; torch takes
several GB, with UV_TORCH_BACKEND=cpu less). Every measurement is a process of its own with a time
limit; a round takes every library once, so that all share the machine's moods, and rounds are
repeated. Given are the median over the processes (of a process's runs the fastest), how long the
other takes as a multiple of ours (the median over the rounds, each with its own two processes),
compiling apart (from the Python function to the executable, no cache), and peak memory. Nobody
evaluates while training; afterwards all are evaluated, untimed, and the mean return must reach the
task's bar. Slow libraries run once, and stop early: the rest is extrapolated by their pace, and
marked (`--whole` lets them finish). Libraries that no package index has are quoted and marked.

Rows measured before are kept unless their task is measured again; with `--resume` runs of the same
settings are kept as well, and only those that lack are added.
"""

import dataclasses
import datetime
import hashlib
import json
import os
import platform
import re
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from benchmarks._peers import install, process, tasks
from benchmarks._peers.tasks import OURS, Entry, Quoted, Task, is_ours

ANOTHER_TIME = "not measured in alternation with ours, but before or after"
RESULTS = Path(__file__).parent / "results"
PLOT = Path(__file__).parents[1] / "docs" / "peers.png"


@dataclass
class Options:
    """Command line."""

    tasks: tuple[str, ...] = ()
    """Begins of names of tasks; by default all."""
    repeats: int = 5
    """Rounds."""
    quick: bool = False
    """One round of one run each, without the slow libraries: does everything work? Written to a
    temporary file unless --json says where."""
    resume: bool = False
    """Keep runs of the chosen tasks whose settings have not changed, add what lacks."""
    whole: bool = False
    """Let slow libraries run to the end; they are evaluated then."""
    skip: tuple[str, ...] = ()
    """Begins of names of libraries to leave out."""
    minutes: float = 180.0
    """Time for everything; what is not done then is left out."""
    report: bool = False
    """Measure nothing: write the table and the plot from the file."""
    jax_extra: str = ""
    """Extra of JAX in the peers' environments, "cuda13" on a machine with such a GPU."""
    peers: Path = install.CACHE
    """Folder for the environments of other libraries."""
    json: Path | None = None
    """File of the numbers, by default benchmarks/results/peers.json; the table is put beside it."""
    plot: Path | None = None
    """PNG to draw; by default docs/peers.png for the default file."""

    def __post_init__(self) -> None:
        if self.json is None and self.quick:
            self.json = Path(tempfile.mkdtemp(prefix="jaxrl-peers-")) / "peers.json"
        elif self.json is None:
            self.json, self.plot = RESULTS / "peers.json", self.plot or PLOT

    @property
    def file(self) -> Path:
        """Of the numbers."""
        assert self.json is not None
        return self.json


# measuring ----------------------------------------------------------------------------------------


class Bench:
    """Measures tasks, round by round, into `result`, which is written after every process."""

    def __init__(self, options: Options, result: dict[str, Any]):
        self.options = options
        self.result = result
        self.series = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self.deadline = time.monotonic() + 60.0 * options.minutes
        self.not_installed: dict[str, str] = {}

    def task(self, task: Task) -> None:
        """Measure one task."""
        skipped = [e for e in task.entries if e.who.startswith(self.options.skip or ("\0",))]
        entries = [e for e in task.entries if e not in skipped]
        if self.options.quick:
            entries = [e for e in entries if e.max_repeats is None]
        rounds = 1 if self.options.quick else self.options.repeats
        before = self.result["tasks"].get(task.id, {}).get("runs", {})
        runs: dict[str, list[dict[str, Any]]] = {}
        for entry in task.entries:  # what is left out stays as it was
            kept = before.get(entry.who, []) if self.options.resume or entry in skipped else []
            same = [r for r in kept if r["settings"] == self.hash(task, entry)]
            runs[entry.who] = [r for r in same if "failed" not in r]
        print(f"\n{task.title}", flush=True)
        for number in range(rounds):
            for entry in entries:
                wanted = min(number + 1, entry.max_repeats or rounds)
                have = [r["round"] for r in runs[entry.who]]
                if number in have or len(have) >= wanted:
                    continue
                if any("failed" in run for run in runs[entry.who]):
                    continue  # once is enough: it may have cost its whole time limit
                if time.monotonic() > self.deadline:
                    return
                if (run := self.one(task, entry, number)) is None:
                    return
                runs[entry.who].append(run)
                self.result["tasks"][task.id] = {**about(task), "runs": runs}
                self.write()

    def settings(self, task: Task, entry: Entry) -> dict[str, Any]:
        """What the worker of an entry is given, but for the seed."""
        settings = dict(entry.settings)
        if entry.worker in ("jaxrl", "rejax") and task.bar is not None:
            runs = 1 if self.options.quick else task.num_runs
            settings = {"num_runs": runs, **settings, "num_seeds": task.num_seeds}
        if settings.get("threads") == 0:
            settings["threads"] = os.cpu_count()
        if self.options.whole:
            settings.pop("stop_at", None)
        return settings

    def hash(self, task: Task, entry: Entry) -> str:
        """Tell whether a run is of the same work."""
        text = json.dumps([entry.worker, self.settings(task, entry)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def one(self, task: Task, entry: Entry, number: int) -> dict[str, Any] | None:
        """One process; a failure is a run that says why, the end of the time is none."""
        settings = self.settings(task, entry)
        if task.bar is not None:
            settings["first_seed"] = number * 10
        run: dict[str, Any] = {"round": number, "settings": self.hash(task, entry)}
        started = time.monotonic()
        left = max(self.deadline - started, 1.0)
        try:
            interpreter = self.interpreter(entry)
            module = f"benchmarks._peers.run_{entry.worker}"
            run |= process.run(interpreter, module, settings, min(entry.seconds, left))
            run.pop("machine", None)
        except process.RunError as error:
            if time.monotonic() >= self.deadline:
                return None  # it might have worked
            run["failed"] = str(error)
        except install.InstallError as error:
            run["failed"] = str(error)
        run["load"] = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
        run["date"], run["series"] = datetime.date.today().isoformat(), self.series
        said = (
            run.get("failed") or f"{figure(run):,.4g} {'s' if task.bar is not None else 'steps/s'}"
        )
        print(
            f"  {number + 1}: {entry.who}: {said} ({time.monotonic() - started:.0f} s)", flush=True
        )
        return run

    def interpreter(self, entry: Entry) -> str:
        """Python with the entry's library."""
        name = entry.environment
        if name is None:
            return sys.executable
        if name in self.not_installed:
            raise install.InstallError(self.not_installed[name])
        try:
            return str(install.python(name, self.options.peers, self.options.jax_extra))
        except install.InstallError as error:
            self.not_installed[name] = str(error)
            raise

    def write(self) -> None:
        """Write the file, whole or not at all."""
        write(self.options.file, self.result)


def figure(run: dict[str, Any]) -> float:
    """The number of a process: seconds of its fastest run, or most steps per second."""
    return max(run["rates"].values()) if "rates" in run else min(run["run_s"])


def about(task: Task) -> dict[str, Any]:
    """What the file tells of a task, runs apart."""
    names = ("title", "about", "bar", "wanted", "num_seeds", "steps")
    return {name: getattr(task, name) for name in names} | {
        "entries": [{"who": e.who, "differences": e.differences} for e in task.entries],
        "quoted": [dataclasses.asdict(quoted) for quoted in task.quoted],
    }


def machine(python: str) -> dict[str, Any]:
    """What runs: as our own process says, and the processor's name."""
    found = process.run(python, "benchmarks._peers.run_jaxrl", {"about": "machine"}, 120.0)
    return {**found["machine"], "processor": processor()}


def processor() -> str:
    """Name of the processor, or its kind where no name is to be found."""
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1].strip() if found else platform.machine()


def write(path: Path, result: dict[str, Any]) -> None:
    """Write JSON: rows first, a run a line."""
    result = {
        "machine": result["machine"],
        "rows": {name: rows(task, result["tasks"]) for name, task in result["tasks"].items()},
        "tasks": result["tasks"],
    }
    text = json.dumps(shortened(result), indent=1)
    # lists of numbers and runs on one line: a diff of two measurements can be read
    text = re.sub(r"\[\s[^\[\]{}]*\]", lambda found: " ".join(found[0].split()), text)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(text + "\n")
    part.replace(path)


def shortened(value: Any) -> Any:
    """Floats to six digits, in any structure."""
    if isinstance(value, dict):
        return {name: shortened(v) for name, v in value.items()}
    if isinstance(value, list | tuple):
        return [shortened(v) for v in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


# summing up ---------------------------------------------------------------------------------------


def rows(task: dict[str, Any], all_tasks: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each library that was run or is quoted; see `row`."""
    ours = good(task["runs"].get(OURS, []))
    found = []
    if task["bar"] is None:
        first = task["entries"][0]["who"]
        for entry in task["entries"]:
            if runs := task["runs"].get(entry["who"]):
                found.append(stepping_row(entry, runs, task["runs"].get(first, [])))
        return found
    for entry in task["entries"]:
        if runs := task["runs"].get(entry["who"]):
            found.append(row(task, entry, runs, ours))
    for quoted in task["quoted"]:
        found += quoted_row(Quoted(**quoted), task, all_tasks)
    return found


def good(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Runs that did not fail."""
    return [run for run in runs if "failed" not in run]


def median(values: list[float]) -> float | None:
    """Median, None of nothing."""
    return float(np.median(values)) if values else None


def per_round(runs: list[dict[str, Any]], others: list[dict[str, Any]], name: str) -> list[float]:
    """Fastest run of `runs` over that of `others`, for each round that has both."""
    by_round = {run["round"]: min(run[name]) for run in others}
    return [min(run[name]) / by_round[run["round"]] for run in runs if run["round"] in by_round]


def row(
    task: dict[str, Any],
    entry: dict[str, str],
    runs: list[dict[str, Any]],
    ours: list[dict[str, Any]],
) -> dict[str, Any]:
    """Sum up the processes of one library at one training task."""
    done = good(runs)
    if not done:
        return {"who": entry["who"], "kind": "failed", "note": runs[-1]["failed"]}
    best = [min(run["run_s"]) for run in done]
    returns = [r for run in done for each in run["returns"] for r in each]
    ratios = per_round(done, ours, "run_s")
    whole = all(run.get("steps_run", task["steps"]) >= task["steps"] for run in done)
    mean = float(np.mean(returns)) if returns else None
    compiling = [run["compile_s"] for run in done if "compile_s" in run]
    note = entry["differences"]
    if {run.get("series") for run in done} - {run.get("series") for run in ours}:
        note += "; " * bool(note) + ANOTHER_TIME
    return {
        "who": entry["who"],
        "kind": "measured" if whole else "extrapolated",
        "processes": len(done),
        "run_s": median(best),
        "run_s_lowest": min(best),
        "run_s_highest": max(best),
        "times_ours": median(ratios),
        "times_ours_lowest": min(ratios, default=None),
        "times_ours_highest": max(ratios, default=None),
        "times_ours_cpu": median(per_round(done, ours, "run_cpu_s")),
        "run_cpu_s": median([min(run["run_cpu_s"]) for run in done]),
        "compile_s": median(compiling),
        "compile_cpu_s": median([r["compile_cpu_s"] for r in done if "compile_cpu_s" in r]),
        "peak_mb": median([run["peak_mb"] for run in done]),
        "return": mean,
        "learned": None if mean is None else mean >= task["bar"],
        "note": note,
    }


def quoted_row(
    quoted: Quoted, task: dict[str, Any], all_tasks: dict[str, Any]
) -> list[dict[str, Any]]:
    """The row of a library that cannot be installed; none while its reference is not measured."""
    *other, who = quoted.reference.split("/", 1)
    reference = all_tasks.get(other[0], {}) if other else task
    runs = good(reference.get("runs", {}).get(who, []))
    ours = good(task["runs"].get(OURS, []))
    if not runs or not ours:
        return []
    run_s = median([min(run["run_s"]) for run in runs])
    ours_s = median([min(run["run_s"]) for run in ours])
    assert run_s is not None
    assert ours_s is not None
    run_s *= quoted.figure / quoted.reference_figure
    note = (
        f"not run here: {quoted.figure:g} s elsewhere, where {who} took "
        f"{quoted.reference_figure:g} s, times what that took here"
    )
    return [
        {
            "who": quoted.who,
            "kind": "quoted",
            "run_s": run_s,
            "times_ours": run_s / ours_s,
            "note": "; ".join(filter(None, (note, quoted.note))),
        }
    ]


def stepping_row(
    entry: dict[str, str], runs: list[dict[str, Any]], reference: list[dict[str, Any]]
) -> dict[str, Any]:
    """Sum up one library's steps per second: medians, and its best beside the first entry's."""
    done = good(runs)
    if not done:
        return {"who": entry["who"], "kind": "failed", "note": runs[-1]["failed"]}
    best = {run["round"]: figure(run) for run in good(reference)}
    ratios = [best[run["round"]] / figure(run) for run in done if run["round"] in best]
    return {
        "who": entry["who"],
        "kind": "measured",
        "processes": len(done),
        "rates": {name: median([run["rates"][name] for run in done]) for name in done[0]["rates"]},
        "times_ours": median(ratios),
        "peak_mb": median([run["peak_mb"] for run in done]),
        "note": entry["differences"],
    }


def verdict(task: dict[str, Any], found: list[dict[str, Any]], cores: int) -> str | None:
    """Where we stand: against the fastest other that reaches the bar; None if nothing is known.

    On a busy machine (`cores` processors) only CPU seconds are compared, and nothing is decided.
    """
    others = [r for r in found if not is_ours(r["who"]) and r.get("times_ours")]
    others = [r for r in others if r.get("learned") is not False]
    if task["bar"] is None or not others:
        return None
    nearest = min(others, key=lambda r: r["times_ours"])
    load = busy(task, cores)
    if load is not None:
        measured = [r for r in others if r.get("times_ours_cpu") is not None]
        if not measured:
            return None
        nearest = min(measured, key=lambda r: r["times_ours_cpu"])
        return (
            f"The machine was busy (median load {load:.1f} on {cores} processors): only the CPU "
            f"seconds say something, {nearest['who']} takes {nearest['times_ours_cpu']:.2f} times "
            "ours; to be measured again"
        )
    text = f"{nearest['who']} takes {nearest['times_ours']:.2f} times as long as ours"
    if task["wanted"] is None:
        return text
    said = "met" if nearest["times_ours"] >= task["wanted"] else "not met"
    return f"{text}; wanted {task['wanted']:g}: {said}"


def busy(task: dict[str, Any], cores: int) -> float | None:
    """Median load while a task was measured, if that is more than our own work makes."""
    loads = [run["load"] for runs in task["runs"].values() for run in good(runs)]
    load = median([load for load in loads if load is not None])
    # our own: a thread for each core, and now and then the compiler beside them
    return load if load is not None and load > cores + 1 else None


# showing ------------------------------------------------------------------------------------------


def number(value: float | None, digits: int = 2) -> str:
    """Format a number, an empty string of None."""
    return "" if value is None else f"{value:,.{digits}f}"


def task_table(task: dict[str, Any], found: list[dict[str, Any]]) -> str:
    """Markdown of one task's rows."""
    if task["bar"] is None:
        return stepping_table(found)
    lines = [
        "| who | run [s] | lowest .. highest | CPU [s] | times ours | in CPU seconds | compile [s]"
        " | memory [MB] | return |",
        "|---" * 9 + "|",
    ]
    for r in found:
        if r["kind"] == "failed":
            lines.append(f"| {r['who']} | did not run: {r['note']} |" + " |" * 7)
            continue
        mark = {"measured": "", "extrapolated": " (extrapolated)", "quoted": " (quoted, scaled)"}
        spread = ""
        if r["kind"] != "quoted" and r["processes"] > 1:
            spread = f"{number(r['run_s_lowest'])} .. {number(r['run_s_highest'])}"
        lines.append(
            f"| {r['who']}{mark[r['kind']]} | {number(r['run_s'])} | {spread} |"
            f" {number(r.get('run_cpu_s'))} | {number(r.get('times_ours'))} |"
            f" {number(r.get('times_ours_cpu'))} | {number(r.get('compile_s'), 1)} |"
            f" {number(r.get('peak_mb'), 0)} | {number(r.get('return'), 0)} |"
        )
    return "\n".join(lines)


def stepping_table(found: list[dict[str, Any]]) -> str:
    """Markdown of steps per second, a column for each number of environments."""
    names = list(dict.fromkeys(n for r in found for n in r.get("rates", {})))
    lines = [
        f"| who | {' | '.join(names)} | best of the first row over best |",
        "|---" * (len(names) + 2) + "|",
    ]
    for r in found:
        if r["kind"] == "failed":
            lines.append(f"| {r['who']} | did not run: {r['note']} |{' |' * len(names)}")
            continue
        cells = " | ".join(number(r["rates"].get(name), 0) for name in names)
        lines.append(f"| {r['who']} | {cells} | {number(r['times_ours'])} |")
    return "\n".join(lines)


def markdown(result: dict[str, Any]) -> str:
    """The whole page."""
    about_machine = result["machine"]
    parts = [
        "# Beside other libraries\n\nWritten by `python -m benchmarks.peers`, whose help says how "
        'it is measured; "times ours" is the median over rounds of alternating processes.\n\n'
        "Ours runs as our scripts do: XLA's CPU programs on one thread each, several seeds over as "
        "many CPU devices as there are cores (`--seed-devices`), in chunks of updates; malloc "
        "hands back what compiling leaves. The others run as installed.\n\n"
        f"{about_machine['processor']}, {about_machine['cpu_count']} processors, "
        f"JAX {about_machine['jax']} on {', '.join(about_machine['devices'])}, "
        f"Python {about_machine['python']}."
    ]
    for task in tasks.TASKS:
        if task.id not in result["tasks"]:
            continue
        stored = result["tasks"][task.id]
        found = rows(stored, result["tasks"])
        text = f"## {stored['title']}\n\n{stored['about'][0].upper()}{stored['about'][1:]}."
        if stored["bar"] is not None:
            text += f" Mean return wanted: {stored['bar']:g}."
        text += f"\n\n{task_table(stored, found)}\n"
        if said := verdict(stored, found, about_machine["cpu_count"]):
            text += f"\n{said}.\n"
        missed = [r["who"] for r in found if r.get("learned") is False]
        if missed:
            text += f"\nBelow the bar: {', '.join(missed)}.\n"
        notes = [f"- {r['who']}: {r['note']}." for r in found if r["note"]]
        if notes:
            text += "\nDifferences and sources:\n\n" + "\n".join(notes) + "\n"
        parts.append(text)
    return "\n\n".join(part.strip() for part in parts) + "\n"


def draw(result: dict[str, Any], path: Path) -> None:
    """Run time of every library as a multiple of ours, task by task, where the machine was quiet.

    No picture is left if that is none of them.
    """
    from matplotlib.figure import Figure

    shown = []
    for task in tasks.TASKS:
        stored = result["tasks"].get(task.id)
        if stored is None or stored["bar"] is None:
            continue
        if busy(stored, result["machine"]["cpu_count"]) is not None:
            continue
        found = [r for r in rows(stored, result["tasks"]) if r.get("times_ours")]
        if len(found) > 1:
            shown.append((stored["title"], sorted(found, key=lambda r: r["times_ours"])))
    if not shown:
        path.unlink(missing_ok=True)  # what it showed is no more so
        return
    heights = [len(found) + 1 for _, found in shown]
    fig = Figure(figsize=(8, 0.3 * sum(heights) + 0.5), layout="constrained")
    axes = fig.subplots(len(shown), 1, sharex=True, height_ratios=heights, squeeze=False)[:, 0]
    colors = {"measured": "#4c72b0", "extrapolated": "#9fb4d6", "quoted": "#cccccc"}
    for ax, (title, found) in zip(axes, shown, strict=True):
        for i, r in enumerate(found):
            color = "#c44e52" if is_ours(r["who"]) else colors[r["kind"]]
            ax.barh(i, r["times_ours"], color=color, log=True)
            ax.text(r["times_ours"] * 1.05, i, f"{r['times_ours']:.2f}", va="center", fontsize=8)
        ax.set_yticks(range(len(found)), [r["who"] for r in found], fontsize=8)
        ax.invert_yaxis()
        ax.set_title(title, fontsize=9, loc="left")
        ax.axvline(1.0, color="black", linewidth=0.6)
        ax.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel(
        "run time as a multiple of jaxrl's (light blue: extrapolated, grey: quoted and scaled)",
        fontsize=8,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=120)


# command line -------------------------------------------------------------------------------------


def choose(names: tuple[str, ...]) -> list[Task]:
    """Tasks of these names, or whose names begin so.

    Raises:
        ValueError: a name fits none.
    """
    known = [task.id for task in tasks.TASKS]
    wanted: set[str] = set()
    for name in names or ("",):
        fitting = {name} & set(known) or {task for task in known if task.startswith(name)}
        if not fitting:
            raise ValueError(f"tasks: {name!r} must be the begin of one of {', '.join(known)}")
        wanted |= fitting
    return [task for task in tasks.TASKS if task.id in wanted]


def load(path: Path) -> dict[str, Any]:
    """Return what was measured before, or nothing yet."""
    if not path.exists():
        return {"machine": None, "tasks": {}}
    found = json.loads(path.read_text())
    return {"machine": found["machine"], "tasks": found["tasks"]}


def main(options: Options) -> int:
    """Measure and write; return the exit code (2: wrong input)."""
    try:
        chosen = choose(options.tasks)
        if options.repeats < 1:
            raise ValueError(f"repeats = {options.repeats} must be at least 1")
        result = load(options.file)
        if options.report and not result["tasks"]:
            raise ValueError(f"json = {options.file} has nothing to report")
        if not options.report:
            here = machine(sys.executable)
            if result["tasks"] and result["machine"] != here:
                raise ValueError(
                    f"json = {options.file} is of another machine or other versions than this "
                    "one: give another file"
                )
            result["machine"] = here
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if not options.report:
        bench = Bench(options, result)
        for task in chosen:
            bench.task(task)
    page = markdown(result)
    options.file.with_suffix(".md").write_text(page)
    if options.plot:
        draw(result, options.plot)
    print(f"\n{page}")
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, description=__doc__)))
