"""The README's figures are those of the files."""

import json

import pytest

from benchmarks import readme


def test_the_readme_says_what_the_files_say():
    text = (readme.ROOT / "README.md").read_text()
    assert readme.replace(text, readme.section(readme.peers.RESULTS)) == text, (
        "run python -m benchmarks.readme"
    )


def test_a_new_figure_comes_into_the_readme_and_nothing_else_changes(tmp_path, capsys):
    results = tmp_path / "results"
    results.mkdir()
    numbers = json.loads((readme.peers.RESULTS / "env_steps.json").read_text())
    numbers["rows"][0]["steps_per_second"] = 123_456_789
    (results / "env_steps.json").write_text(json.dumps(numbers))
    path = tmp_path / "README.md"
    path.write_text(f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n")
    options = readme.Options(readme=path, results=results)
    assert readme.main(readme.Options(check=True, readme=path, results=results)) == 1
    assert readme.main(options) == 0
    text = path.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "| 1 | 123,456,789 |" in text
    assert "old" not in text
    assert readme.main(readme.Options(check=True, readme=path, results=results)) == 0
    capsys.readouterr()


def test_a_readme_without_its_comments_is_refused():
    with pytest.raises(ValueError, match="there must be one line"):
        readme.replace("no comments", "new")
    with pytest.raises(ValueError, match="there must be one line"):
        readme.replace(f"{readme.END}{readme.BEGIN}", "new")


def test_seconds_of_a_busy_machine_are_not_shown():
    row = {"who": "other", "kind": "measured", "run_s": 60.0, "times_ours": 0.5}
    row |= {"run_cpu_s": 3.25, "times_ours_cpu": 1.25, "compile_s": 40.0, "compile_cpu_s": 5.5}
    (line,) = readme.training_rows("task", [readme.in_cpu_seconds(row | {"return": 500.0})])
    assert line == "| task | other | 3.25 | 5.5 | 1.25 | 500 |"
