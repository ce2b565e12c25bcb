"""The comparison with other libraries: sums by hand, failures that are rows, runs that are kept."""

import dataclasses
import json
import sys

import pytest

from benchmarks import peers
from benchmarks._peers import install, process, tasks
from benchmarks._peers.tasks import OURS, Entry, Quoted, Task

FAST = Entry(OURS, "jaxrl", {"agent": "ppo"})
SLOW = Entry("other", "rejax", {"algorithm": "PPO"}, "rejax", "its differences")
QUOTED = Quoted("elsewhere", 3.0, "other", 2.0)
TASK = Task("a_task", "A task", "what", (FAST, SLOW), (QUOTED,), bar=100.0, wanted=1.5, steps=50)


def run(number, seconds, cpu=1.0, value=120.0, **more):
    return {
        "round": number,
        "settings": "",
        "run_s": seconds,
        "run_cpu_s": [cpu] * len(seconds),
        "returns": [[value]] * len(seconds),
        "peak_mb": 10.0,
        "load": 1.0,
        **more,
    }


def stored(ours, other):
    return {**peers.about(TASK), "runs": {OURS: ours, "other": other}}


def test_rows_by_hand():
    ours = [run(0, [2.0, 1.0]), run(1, [4.0, 4.5]), run(2, [1.5, 1.6])]
    other = [run(0, [3.0, 5.0], cpu=2.0), run(1, [6.0, 7.0], cpu=3.0), run(2, [6.0], value=50.0)]
    task = stored(ours, other)
    mine, theirs, quoted = peers.rows(task, {"a_task": task})
    assert mine["run_s"] == 1.5  # the median of 1, 4 and 1.5, the fastest of each process
    assert mine["times_ours"] == 1.0
    assert theirs["run_s"] == 6.0
    # each round with its own: 3 / 1, 6 / 4, 6 / 1.5; not 6 / 1.5 of the medians
    assert theirs["times_ours"] == 3.0
    assert (theirs["times_ours_lowest"], theirs["times_ours_highest"]) == (1.5, 4.0)
    assert theirs["times_ours_cpu"] == 2.0
    assert theirs["return"] == pytest.approx((4 * 120 + 50) / 5)
    assert theirs["learned"]
    assert quoted["run_s"] == pytest.approx(6.0 * 3 / 2)
    assert quoted["times_ours"] == pytest.approx(9.0 / 1.5)
    assert quoted["kind"] == "quoted"
    assert "3 s elsewhere, where other took 2 s" in quoted["note"]


def verdict(task):
    return peers.verdict(task, peers.rows(task, {}), cores=2) or ""


def test_the_verdict_is_against_the_fastest_that_has_learned():
    ours = [run(0, [1.0])]
    assert "other takes 1.40 times as long as ours" in verdict(stored(ours, [run(0, [1.4])]))
    assert "wanted 1.5: not met" in verdict(stored(ours, [run(0, [1.4])]))
    assert "wanted 1.5: met" in verdict(stored(ours, [run(0, [1.6])]))
    stupid = stored(ours, [run(0, [1.4], value=99.0)])
    assert peers.rows(stupid, {})[1]["learned"] is False
    assert "elsewhere takes 2.10" in verdict(stupid)


def test_on_a_busy_machine_nothing_is_decided():
    busy = stored([run(0, [1.0], load=4.0)], [run(0, [9.0], cpu=1.2, load=6.0)])
    assert "median load 5.0" in verdict(busy)
    assert "other takes 1.20 times ours" in verdict(busy)
    assert "wanted" not in verdict(busy)


def test_a_run_stopped_early_is_marked():
    task = stored([run(0, [1.0])], [run(0, [9.0], steps_run=49, returns=[[]])])
    _, theirs, _ = peers.rows(task, {})
    assert (theirs["kind"], theirs["return"], theirs["learned"]) == ("extrapolated", None, None)
    assert "other (extrapolated) | 9.00 |" in peers.task_table(task, peers.rows(task, {}))


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """A bench whose processes are counted and not started."""
    calls = []

    def start(python, module, settings, seconds):
        calls.append((str(python), module, settings["first_seed"]))
        return {k: v for k, v in run(0, [1.0]).items() if k not in ("round", "settings")}

    monkeypatch.setattr(process, "run", start)
    monkeypatch.setattr(install, "python", lambda name, folder, extra: f"{name}/python")
    options = peers.Options(repeats=2, json=tmp_path / "peers.json")
    return peers.Bench(options, {"machine": {}, "tasks": {}}), calls


def test_rounds_alternate_and_have_seeds_of_their_own(bench):
    measured, calls = bench
    measured.task(TASK)
    ours, other = "benchmarks._peers.run_jaxrl", "benchmarks._peers.run_rejax"
    assert [module for _, module, _ in calls] == [ours, other, ours, other]
    assert [seed for _, _, seed in calls] == [0, 0, 10, 10]
    assert calls[1][0] == "rejax/python"
    written = json.loads(measured.options.file.read_text())
    assert [r["who"] for r in written["rows"]["a_task"]] == [OURS, "other", "elsewhere"]


def test_resume_keeps_what_is_of_the_same_settings(bench):
    measured, calls = bench
    measured.task(TASK)
    measured.options.resume = True
    measured.options.repeats = 3
    calls.clear()
    measured.task(TASK)
    assert [seed for _, _, seed in calls] == [20, 20]  # only the third round
    calls.clear()
    changed = Task(**{**vars(TASK), "entries": (FAST, Entry("other", "rejax", {"new": 1}))})
    measured.task(changed)
    assert [seed for _, _, seed in calls] == [0, 10, 20]  # of the other alone
    assert "run_jaxrl" not in {module for _, module, _ in calls}


def test_what_is_skipped_stays_as_it_was_and_says_so(bench):
    measured, calls = bench
    measured.task(TASK)
    calls.clear()
    again = peers.Bench(dataclasses.replace(measured.options, skip=("oth",)), measured.result)
    again.series = "another"
    again.task(TASK)
    assert {module for _, module, _ in calls} == {"benchmarks._peers.run_jaxrl"}
    mine, theirs, _ = json.loads(measured.options.file.read_text())["rows"]["a_task"]
    assert theirs["processes"] == 2
    assert theirs["note"].endswith("; not measured in alternation with ours, but before or after")
    assert "alternation" not in mine["note"]
    again.options.skip = ()
    again.task(TASK)
    _, theirs, _ = json.loads(measured.options.file.read_text())["rows"]["a_task"]
    assert theirs["note"] == "its differences"


def test_another_row_of_ours_is_no_rival():
    one = run(0, [1.01])
    task = stored([run(0, [1.0])], [run(0, [3.0])])
    task["entries"].append({"who": tasks.ONE_DEVICE, "differences": ""})
    task["runs"][tasks.ONE_DEVICE] = [one]
    assert verdict(task).startswith("other takes 3.00 times as long as ours")


def test_what_cannot_be_installed_is_a_row_that_says_why(bench, monkeypatch):
    measured, calls = bench

    def refuse(name, folder, extra):
        raise install.InstallError("no such version")

    monkeypatch.setattr(install, "python", refuse)
    measured.task(TASK)
    assert len(calls) == 2  # ours alone, twice
    page = peers.markdown(measured.result | {"machine": MACHINE})
    assert page  # a task that is not in the list is not shown
    task = measured.result["tasks"]["a_task"]
    assert "| other | did not run: no such version |" in peers.task_table(
        task, peers.rows(task, measured.result["tasks"])
    )


MACHINE = {"processor": "P", "cpu_count": 2, "jax": "0", "devices": ["cpu"], "python": "3"}


def test_processes_fail_in_words(tmp_path):
    with pytest.raises(process.RunError, match="exit code"):
        process.run(sys.executable, "benchmarks._peers.run_nothing", {}, 60)
    with pytest.raises(process.RunError, match="not done after 0 s"):
        process.run(sys.executable, "benchmarks._peers.measure", {}, 0.001)
    with pytest.raises(process.RunError, match="no JSON"):
        process.run(sys.executable, "benchmarks._peers.measure", {}, 60)


def test_wrong_input_is_refused(tmp_path, monkeypatch, capsys):
    assert peers.main(peers.Options(tasks=("chess",), json=tmp_path / "p.json")) == 2
    assert "tasks: 'chess' must be the begin of one of ppo_cartpole" in capsys.readouterr().err
    path = tmp_path / "peers.json"
    path.write_text(json.dumps({"machine": {"processor": "another"}, "tasks": {"a_task": {}}}))
    monkeypatch.setattr(peers, "machine", lambda python: MACHINE)
    assert peers.main(peers.Options(json=path)) == 2
    assert "is of another machine" in capsys.readouterr().err


def test_a_task_is_chosen_by_its_name_or_the_begin_of_it():
    assert [t.id for t in peers.choose(("ppo_cartpole_500k_1",))] == ["ppo_cartpole_500k_1"]
    assert len(peers.choose(("ppo_cartpole_500k",))) == 4
    assert peers.choose(()) == list(tasks.TASKS)


def test_versions_are_exact():
    for name in install.NAMES:
        for kind in ("in", "txt"):
            text = (install.REQUIREMENTS / f"{name}.{kind}").read_text()
            lines = [line for line in text.splitlines() if line.strip() and line[0] != "#"]
            assert lines
            assert all("==" in line for line in lines)


def test_work_is_matched():
    for task in tasks.TASKS:
        for entry in task.entries:
            config = entry.settings.get("config", entry.settings)
            if task.bar is None:
                continue
            names = {"jaxrl": "total_steps", "rejax": "total_timesteps", "sb3": "total_steps"}
            assert config[names[entry.worker]] == task.steps, (task.id, entry.who)
        ours = task.entries[0].settings.get("config")
        for entry in task.entries[1:]:
            if entry.worker == "rejax" and ours:
                theirs = entry.settings["config"]
                shared = {"num_envs", "batch_size", "buffer_size", "learning_rate"} & set(ours)
                if task.id.startswith("ppo"):
                    shared |= {"num_steps", "num_epochs", "num_minibatches"}
                assert {k: ours[k] for k in shared} == {k: theirs[k] for k in shared}, task.id


def test_what_is_extrapolated_ends_with_whole_rollouts():
    for task in tasks.TASKS:
        for entry in task.entries:
            given = entry.settings
            if given.get("algorithm") == "PPO" and "stop_at" in given:
                rollout = given["num_envs"] * given["kwargs"]["n_steps"]
                assert given["stop_at"] // 2 % rollout == 0, (task.id, entry.who)
