"""README's snippets run as they stand, one after the other."""
import re
from pathlib import Path

README = (Path(__file__).resolve().parent.parent / "README.md").read_text()


def test_the_snippets_run_and_leave_what_they_say(cpu_library):
    names: dict = {}
    snippets = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(snippets) == 3
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), names)
    assert names["out"].color.shape == (1, 480, 640, 3) and names["out"].expected_depth.max() > 1
    assert names["features"].shape == (1000, 64) and names["drawn"].shape == (1, 480, 640, 64) and names["drawn"].max() > 0
    assert names["adam"].steps_taken == 1 and 0 < names["loss"] < 1


def test_every_command_of_the_readme_is_a_verb_or_a_script():
    from splatkit import cli
    root = Path(__file__).resolve().parent.parent
    assert {verb for verb in re.findall(r"^    splatkit (\w+)", README, re.M)} <= set(cli.VERBS)
    assert all((root / script).exists() for script in re.findall(r"python3 (scripts/\w+\.py)", README))
