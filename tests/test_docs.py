"""What the pages show runs as it stands there."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_example_of_checkpoints_runs_and_prints_what_it_says(tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs" / "resume.md").read_text()
    (code,) = re.findall("```python\\n(.*?)```", page, re.DOTALL)
    (said,) = re.findall(r"print\(.*\)  # (.*)", code)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "docs/resume.md", "exec"), {})
    assert (
        capsys.readouterr().out
        == said.replace("{'note': ...}", "{'note': 'anything JSON takes'}") + "\n"
    )
