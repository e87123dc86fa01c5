"""Every Python snippet of README, docs and examples runs."""

from __future__ import annotations

import re

import pytest
from scripts import ROOT, run_script

from portopt import trace, worker

PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/*.md")]
SNIPPETS = [
    pytest.param(snippet, id=f"{page.relative_to(ROOT)}-{number}")
    for page in sorted(PAGES)
    for number, snippet in enumerate(re.findall(r"```python.*?\n(.*?)```", page.read_text(), re.S))
]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_snippet_runs(snippet, tmp_path):
    for module, framework in (("torch", "torch"), ("keras", "keras"), ("jax", "jax")):
        if f"import {module}" in snippet and worker.missing(framework):
            pytest.skip(f"{framework} is not installed")
    script = tmp_path / "snippet.py"  # a file: a dataclass looks for its module
    if "init_process_group" not in snippet:
        script.write_text(snippet)
        run_script(script, tmp_path)
    else:  # not to its very end: a thread of PyTorch's gloo may abort what is ending
        script.write_text(f"{snippet}\nimport os\n\nos._exit(0)\n")
        run_script(script, tmp_path, *TORCHRUN)


def test_the_tests_that_behaviours_name_are_there():
    folder, file, named = None, None, 0
    for line in (ROOT / "docs" / "behaviours.md").read_text().splitlines():
        folder = {"## PyTorch": "torch", "## Keras": "tf"}.get(line, folder)
        for path, test in re.findall(r"`(test_\w+\.py)?(?:::(test_\w+))?", line):
            file = ROOT / "tests" / folder / path if path else file
            if path or test:
                assert f"def {test}(" in file.read_text() if test else file.exists(), line
                named += bool(test)
    assert named > 80


def test_the_readme_shows_what_its_first_snippet_prints():
    readme = (ROOT / "README.md").read_text()
    namespace = {"__name__": __name__}
    snippet = re.search(r"```python\n(.*?)```", readme, re.S)[1]
    exec(compile(snippet, "README.md", "exec", dont_inherit=True), namespace)
    assert f"```\n{trace(namespace['Lion']())}\n```" in readme
