"""Race drivers of MicroRacer: `python -m train.race runs/a runs/b --tracks 100 --seed 7`.

Drivers are run folders, policy files (runs/a/policies/seed_2.msgpack) and Python functions
(module:function, which takes the 5 numbers of the observation as a NumPy array and returns
[acceleration, turn]). All of them drive every track once, from the same start. The championship
table is printed, and one race is drawn with all cars.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from jaxrl.checks import check_count
from train import _cli, _folder, _run

if TYPE_CHECKING:
    from train import _race

FORMAT = "jaxrl race 1"
MAX_TRACKS = 10_000  # 0.44 MB each, twice while they are drawn


@dataclass(frozen=True)
class Options:
    """Who races, and on what."""

    drivers: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Run folders (their best policy), policy files, or functions as module:function."""
    labels: tuple[str, ...] = ()
    """Names of the drivers in the same order; by default those of the runs."""
    tracks: int = 100
    """Tracks to race on, one lap each."""
    seed: int = 1
    """Decides the tracks and initial speeds; 0 gives the tracks that training was evaluated on."""
    obstacles: bool = True
    """Six obstacles on every track."""
    chicanes: bool = True
    """A chicane on every track."""
    turn_limit: bool = True
    """Whether the grip limits the turn."""
    low_speed_termination: bool = True
    """Whether a car that is too slow is out."""
    show_track: int = 0
    """Track whose race is drawn, counted from 0."""
    out: Path | None = None
    """Animation file, .gif or .mp4; by default race_seed<seed>_track<show-track>.gif here."""
    size: int = 720
    """Side of the animation in pixels."""
    json: Path | None = None
    """File for the table and the result of every lap."""
    overwrite: bool = False
    """Replace the animation and the JSON file if they exist."""
    animate: bool = True
    """Write the animation."""


def main(argv: Sequence[str] | None = None) -> int:
    """Race as the command line says; return the exit code (2: wrong input, or a driver's fault)."""
    return _cli.exit_code(lambda: prepare(sys.argv[1:] if argv is None else argv))


def prepare(argv: Sequence[str]) -> Callable[[], int]:
    """Check everything that can be wrong before anything is compiled.

    Raises:
        ValueError, OSError: wrong input, in one sentence.
    """
    title = (__doc__ or "").partition(":")[0] + "."
    options = _cli.read(Options, argv, prog="python -m train.race", description=title)
    check_count("tracks", options.tracks)
    check_count("seed", options.seed, minimum=0)
    check_count("show_track", options.show_track, minimum=0)
    check_count("size", options.size, minimum=200)
    if options.tracks > MAX_TRACKS or options.seed >= 2**31:
        raise ValueError(
            f"tracks = {options.tracks} must be <= {MAX_TRACKS} and seed = {options.seed} below "
            "2**31"
        )
    if options.show_track >= options.tracks:
        raise ValueError(
            f"show_track = {options.show_track} must be below tracks = {options.tracks}: they are "
            "counted from 0"
        )
    name = f"race_seed{options.seed}_track{options.show_track}.gif"
    out = (options.out or Path(name)) if options.animate else None
    if out is not None and out.suffix not in (".gif", ".mp4"):
        raise ValueError(f"out = {out} must end in .gif or .mp4")
    for option, path in (("out", out), ("json", options.json)):
        if path is None:
            continue
        if path.is_dir() or (path.exists() and not options.overwrite):
            raise FileExistsError(f"{path} exists: choose another --{option}, or give --overwrite")
        if not path.parent.is_dir():
            raise FileNotFoundError(
                f"{option} = {path}: there is no folder {path.parent}, make it first"
            )
    from train import _race  # takes seconds (gymnax): wrong options are refused before

    drivers = _race.read_drivers(options.drivers, options.labels)
    for driver in drivers:
        if driver.policy is None:
            _race.check_function(driver)
    return lambda: execute(options, drivers, out)


def execute(options: Options, drivers: "list[_race.Driver]", out: Path | None) -> int:
    """Race, print the table, write, draw."""
    from train import _race

    console = Console()
    tracks = {"obstacles": options.obstacles, "chicanes": options.chicanes}
    rules = {
        "turn_limit": options.turn_limit,
        "low_speed_termination": options.low_speed_termination,
    }
    params, start = _race.line_up(tracks, rules, options.tracks, options.seed)
    try:
        race = _race.race(drivers, params, start, options.show_track)
    except _race.DriverError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    labels = [driver.label for driver in drivers]
    rows = _race.standings(labels, race.ending, race.steps, float(params.dt))
    off = [name for name in (*tracks, *rules) if not getattr(options, name)]
    title = f"{options.tracks} tracks of seed {options.seed}"
    console.print(table(title + "".join(f", no {name}" for name in off), rows))
    console.print(remarks(rows, race, float(params.dt)), highlight=False, soft_wrap=True)
    if options.json is not None:
        options.json.unlink(missing_ok=True)
        _folder.write_json(options.json, content(options, drivers, rows, race))
        console.print(f"{options.json}", highlight=False, soft_wrap=True)
    if out is not None:
        from jaxrl.envs.render import micro_racer as pictures

        frames = pictures.render_race(race.shown, labels, params, size=options.size)
        pictures.save_animation(frames, out)
        told = f"{out}: the race on track {options.show_track}, {len(race.shown.time) - 1} steps"
        console.print(told, highlight=False, soft_wrap=True)
    return 0


def table(title: str, rows: Sequence[dict[str, Any]]) -> Table:
    """The championship for people."""
    result = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    result.add_column("", justify="right")
    result.add_column("driver", overflow="fold")
    for head in ["wins", "completed", "lap", "time", "best lap"]:
        result.add_column(head, justify="right", no_wrap=True)
    for row in rows:
        laps = sum(row["endings"].values()) + row["completed"]
        result.add_row(
            str(row["place"]),
            row["driver"],
            str(row["wins"]) + (f" ({row['shared_wins']} shared)" if row["shared_wins"] else ""),
            f"{row['completed']} ({100 * row['completed'] / laps:.0f} %)",
            _number(row["lap_steps_mean"], 1),
            _number(row["lap_time_mean"], 2),
            _number(row["lap_steps_best"], 0),
        )
    return result


def remarks(rows: Sequence[dict[str, Any]], race: "_race.Race", dt: float) -> str:
    """What the table's figures mean, how the other laps ended, and the laps that all completed."""
    finished = race.ending == 1  # Ending.COMPLETED
    common, nobody = int(finished.all(axis=0).sum()), int((~finished.any(axis=0)).sum())
    lines = [
        "won: the fewest steps to a completed lap, equal ones share the win; lap: mean steps of "
        f"completed laps, time: the same in the environment's units ({dt:g} a step)"
    ]
    for row in rows:
        ended = [f"{n} {name}" for name, n in row["endings"].items() if n]
        if ended:
            lines.append(f"{row['driver']} did not arrive: {', '.join(ended)}")
    if nobody:
        lines.append(f"{nobody} of {finished.shape[1]} tracks without a winner")
    if len(rows) > 1 and common:
        laps = ", ".join(f"{row['driver']} {row['common_lap_steps_mean']:.1f}" for row in rows)
        lines.append(f"mean steps on the {common} tracks that all completed: {laps}")
    return "\n".join(lines)


def content(
    options: Options, drivers: "Sequence[_race.Driver]", rows: Any, race: "_race.Race"
) -> dict[str, Any]:
    """What --json writes: the rules, the table, and ending and steps of every lap."""
    from train import _race

    names = {int(e): name for e, name in _race.ENDINGS.items()} | {1: "completed"}
    return {
        "format": FORMAT,
        "tracks": options.tracks,
        "seed": options.seed,
        "obstacles": options.obstacles,
        "chicanes": options.chicanes,
        "turn_limit": options.turn_limit,
        "low_speed_termination": options.low_speed_termination,
        "standings": rows,
        "laps": [
            {
                "driver": driver.label,
                "source": driver.source,
                "agent": driver.agent,
                "steps": race.steps[d].tolist(),
                "ending": [names[int(e)] for e in race.ending[d]],
            }
            for d, driver in enumerate(drivers)
        ],
        **_run.machine(),
    }


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


if __name__ == "__main__":
    sys.exit(main())
