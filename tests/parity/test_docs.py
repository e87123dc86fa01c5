"""Every Python snippet of README and docs runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from portopt import trace, worker

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SNIPPETS = [
    pytest.param(snippet, id=f"{page.name}-{number}")
    for page in PAGES
    for number, snippet in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.S))
]


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_snippet_runs(snippet, tmp_path):
    for module, framework in (("torch", "torch"), ("keras", "keras"), ("jax", "jax")):
        if f"import {module}" in snippet and worker.missing(framework):
            pytest.skip(f"{framework} is not installed")
    script = tmp_path / "snippet.py"  # a file: a dataclass looks for its module
    script.write_text(snippet)
    done = subprocess.run(
        [sys.executable, script],
        env={**os.environ, "PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_the_readme_shows_what_its_first_snippet_prints():
    readme = (ROOT / "README.md").read_text()
    namespace = {"__name__": __name__}
    snippet = re.search(r"```python\n(.*?)```", readme, re.S)[1]
    exec(compile(snippet, "README.md", "exec", dont_inherit=True), namespace)
    assert f"```\n{trace(namespace['Lion']())}\n```" in readme
