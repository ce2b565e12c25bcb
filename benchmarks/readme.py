"""The README's section on speed, written from the files in benchmarks/results.

    python -m benchmarks.readme            # rewrite it
    python -m benchmarks.readme --check    # exit code 1 if it is not what the files say

The section lies between two comments in README.md; what stands outside them is not touched. No
number in it is typed by hand.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from benchmarks import growth, peers
from benchmarks._peers.tasks import OURS, TASKS

ROOT = Path(__file__).parents[1]
BEGIN = "<!-- speed: written by python -m benchmarks.readme, do not edit -->"
END = "<!-- speed: end -->"


@dataclass
class Options:
    """Command line."""

    check: bool = False
    """Only tell whether the README is up to date."""
    readme: Path = ROOT / "README.md"
    """File to rewrite."""
    results: Path = peers.RESULTS
    """Folder of the numbers."""


def section(results: Path) -> str:
    """Return the section: what each file that is there has to say."""
    parts = [
        part(json.loads((results / name).read_text()))
        for name, part in PARTS.items()
        if (results / name).exists()
    ]
    return "\n\n".join(part.strip() for part in parts if part)


def replace(text: str, new: str) -> str:
    """Put `new` between the comments.

    Raises:
        ValueError: the comments are not there, once each and in order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"README: there must be one line {BEGIN!r} and after it one {END!r}")
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n\n{new}\n\n{END}{rest.split(END)[1]}"


# what the files say -------------------------------------------------------------------------------


def where(machine: dict[str, Any]) -> str:
    """Hardware and versions, in words."""
    what = machine.get("processor") or f"{machine['cpu_count']} CPU cores"
    cores = f", {machine['cpu_count']} cores" if machine.get("processor") else ""
    return f"{what}{cores}, jax {machine['jax']}"


def training(result: dict[str, Any]) -> str:
    """Table of the training tasks, a row for each library beside ours."""
    lines = []
    stepping = []
    for task in TASKS:
        stored = result["tasks"].get(task.id)
        if stored is None:
            continue
        found = peers.rows(stored, result["tasks"])
        if stored["bar"] is None:
            stepping.append(f"{stored['title']}:\n\n{peers.stepping_table(found)}")
            continue
        title = stored["title"]
        if peers.busy(stored, result["machine"]["cpu_count"]) is not None:
            title += " (machine busy: CPU seconds)"
            found = [in_cpu_seconds(r) for r in found if r["kind"] != "quoted"]
        lines += training_rows(title, found)
    text = ""
    if lines:
        text = (
            "**Beside other libraries** (`python -m benchmarks.peers`; "
            f"{where(result['machine'])}; same work, each run a process of its own, in "
            "alternation; run without compiling, medians; "
            "[differences, spread, memory](benchmarks/results/peers.md)). Times ours above 1: "
            "the other takes longer. Where the machine was busy, only CPU seconds of all threads "
            "are given, until it is measured again.\n\n"
            "| task | who | run [s] | compile [s] | times ours | mean return |\n"
            "|---|---|---|---|---|---|\n" + "\n".join(lines)
        )
        if (ROOT / "docs" / "peers.png").exists():
            text += "\n\n![Run time of other libraries as a multiple of ours](docs/peers.png)"
    return "\n\n".join([text, *stepping])


def in_cpu_seconds(row: dict[str, Any]) -> dict[str, Any]:
    """Put CPU seconds in place of seconds."""
    names = ("run", "compile")
    changed = {f"{name}_s": row.get(f"{name}_cpu_s") for name in names}
    return {**row, **changed, "times_ours": row.get("times_ours_cpu")}


def training_rows(title: str, found: list[dict[str, Any]]) -> list[str]:
    """Rows of one task: ours first."""
    marks = {"measured": "", "extrapolated": ", extrapolated", "quoted": ", quoted and scaled"}
    lines = []
    for i, r in enumerate(found):
        name = title if i == 0 else ""
        if r["kind"] == "failed":
            lines.append(f"| {name} | {r['who']}: did not run | | | | |")
            continue
        who = f"**{r['who']}**" if r["who"] == OURS else f"{r['who']}{marks[r['kind']]}"
        who += ", at another time" if r.get("note", "").endswith(peers.ANOTHER_TIME) else ""
        times = peers.number(r.get("times_ours"))
        low = "" if r.get("learned") is not False else ", below the bar"
        lines.append(
            f"| {name} | {who} | {peers.number(r['run_s'])} | {peers.number(r.get('compile_s'), 1)}"
            f" | {times} | {peers.number(r.get('return'), 0)}{low} |"
        )
    return lines


def micro_racer(result: dict[str, Any]) -> str:
    """Table of MicroRacer's steps per second."""
    rates = {(r["num_envs"], r["driver"]): r for r in result["rows"]}
    lines = []
    for num in dict.fromkeys(num for num, _ in rates):
        random, pilot = rates[num, "random"], rates[num, "pilot"]
        lines.append(
            f"| {num:,} | {random['steps_per_second']:,} | {pilot['steps_per_second']:,} |"
            f" {random['times_original']:,} / {pilot['times_original']:,} |"
        )
    original = result["original_steps_per_second"]
    return (
        "**MicroRacer's steps per second** (`python -m benchmarks.env_steps`; "
        f"{where(result['machine'])}; automatic resets included). The original, as its "
        f"specification says and not in the same run: {original['pilot']:,} with a pilot, "
        f"{original['random']:,} with random actions, whose resets are dear.\n\n"
        "| environments | random actions | hand-written pilot | times the original |\n"
        "|---|---|---|---|\n" + "\n".join(lines)
    )


def lunar_lander(result: dict[str, Any]) -> str:
    """Table of the lander's steps per second beside the originals."""
    lines = []
    for r in result["rows"]:
        compiling = f"{r['compile_seconds']:.0f}" if "compile_seconds" in r else ""
        lines.append(
            f"| {r['who']} | {peers.number(r.get('num_envs'), 0)} | {r['steps_per_second']:,} |"
            f" {peers.number(r.get('per_envpool'))} | {compiling} |"
        )
    return (
        "**LunarLander's steps per second** (`python -m benchmarks.lunar_lander_steps`; "
        f"{where(result['machine'])}; random actions, automatic resets, in turns).\n\n"
        "| who | environments | steps/s | envpool = 1 | compile [s] |\n|---|---|---|---|---|\n"
        + "\n".join(lines)
    )


def limits(result: dict[str, Any]) -> str:
    """Growth and roofline."""
    text = (
        "**How cost grows, and the machine's limit** (`python -m benchmarks.growth`; "
        f"{where(result['machine'])}). Below the knee more costs next to nothing, above it costs "
        f"in proportion.\n\n{growth.markdown(result)}"
    )
    for name, what in (("growth", "Time against size"), ("roofline", "Roofline")):
        if (ROOT / "docs" / f"{name}.png").exists():
            text += f"\n\n![{what}](docs/{name}.png)"
    return text


PARTS = {
    "peers.json": training,
    "env_steps.json": micro_racer,
    "lunar_lander_steps.json": lunar_lander,
    "growth.json": limits,
}


def main(options: Options) -> int:
    """Rewrite or check; return the exit code."""
    text = options.readme.read_text()
    try:
        new = replace(text, section(options.results))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if new == text:
        print(f"{options.readme.name} is up to date")
        return 0
    if options.check:
        print(f"{options.readme.name} is not what the files say: run python -m benchmarks.readme")
        return 1
    options.readme.write_text(new)
    print(f"wrote {options.readme.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, description=__doc__)))
