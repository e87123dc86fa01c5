"""What the site has beyond the pages of this folder: hooks of MkDocs, run at every build.

The README and the examples become pages; each rule gets one, of its docstring, its traced program
and a trajectory; each module gets its reference, whose docstrings mkdocstrings reads.
"""

from __future__ import annotations

import inspect
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe
import numpy as np
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from portopt import plots, race, trace
from portopt.rules import Rule, registry

ROOT = Path(__file__).parents[1]
PACKAGES = ("portopt", "portopt_torch", "portopt_tf")
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "LICENSE": "license.md",
    "examples/README.md": "examples/index.md",
}
"""The page of each file outside this folder; those of the examples join it."""
PAGES |= {f"examples/{p.name}": f"examples/{p.stem}.md" for p in sorted(ROOT.glob("examples/*.py"))}
STEPS = 300
RATES = (0.5, 0.1, 0.02, 0.005, 0.001)
"""The learning rates that a rule may try on its page; the one that ends nearest is drawn."""

RULES = {name: f"rules/{name.lower()}.md" for name in sorted(registry.own(), key=str.casefold)}


def modules() -> dict[str, list[str]]:
    """The names of each package's public modules; rules have pages of their own."""
    found: dict[str, list[str]] = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            if not name.endswith("__main__") and name not in _rule_modules():
                found.setdefault(package, []).append(name)
    return found


def _rule_modules() -> set[str]:
    return {rule.__module__ for rule in registry.own().values()}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the pages that are made here into the navigation, where it names them."""
    made = {
        "rules": [{name: page} for name, page in RULES.items()],
        "examples": [page for page in PAGES.values() if page.startswith("examples/")],
        "api": [
            {package: [{name: f"api/{name}.md"} for name in names]}
            for package, names in modules().items()
        ],
    }
    config.nav = [
        {title: made.get(place, place) if isinstance(place, str) else place}
        for section in config.nav or []
        for title, place in section.items()
    ]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made here."""
    for place, content in pages():
        files.append(File.generated(config, place, content=content))
    return files


def pages() -> Iterator[tuple[str, str | bytes]]:
    """The place and the content of each."""
    for source, place in PAGES.items():
        path = ROOT / source
        text = path.read_text(encoding="utf-8")
        language = {".md": None, ".py": "python"}.get(path.suffix, "text")
        yield place, f"# {path.stem}\n\n```{language}\n{text}```\n" if language else text
    for name, rule in registry.own().items():
        picture, said = trajectory(name, rule)
        if picture:
            yield RULES[name].replace(".md", ".png"), picture
        yield RULES[name], f"# {name}\n\n{described(rule)}\n\n{programmed(rule)}\n\n{said}\n"
    for names in modules().values():
        for name in names:
            yield f"api/{name}.md", f"# {name}\n\n::: {name}\n"


class Docstrings(griffe.Extension):
    """Makes Markdown of docstrings as they are read, and warns of public names that have none.

    A strict build fails at a warning. Methods are ruff's business, which knows the overridden ones.
    """

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Look at the docstring of one object."""
        if obj.docstring:
            obj.docstring.value = fenced(obj.docstring.value)
        elif obj.is_public and not obj.is_attribute and obj.parent and obj.parent.is_module:
            get_plugin_logger("docstrings").warning(f"{obj.path} has no docstring")


def fenced(docstring: str) -> str:
    """A docstring whose examples are fenced, as Markdown wants them."""
    text = re.sub(r"^( *)>>> .*(?:\n\1\S.*)*", _fence, docstring, flags=re.M)
    return re.sub(r"::$", ":", text, flags=re.M)


def _fence(example: re.Match[str]) -> str:
    return f"{example[1]}```pycon\n{example[0]}\n{example[1]}```"


SECTION = re.compile(
    r"^(Update|Args|State|Cost|Raises|Differs from|Source|Example)([^:\n]*):(?: +|$)", re.M
)


def described(rule: type[Rule]) -> str:
    """A rule's docstring in Markdown: its sections as headings, their entries as lists."""
    first, *parts = SECTION.split(fenced(inspect.getdoc(rule) or ""))
    sections = [first.rstrip()]
    for title, rest, body in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
        if title != "Update":  # which is code, and indented as Markdown wants it
            body = re.sub(r"^ {4}", "", body.strip("\n"), flags=re.M)
        if title in ("Args", "State", "Raises"):
            body = re.sub(r"^([a-zA-Z_][\w, ]*): ", r"- `\1`: ", body, flags=re.M)
        body = body.strip("\n")
        sections.append(f"## {title}{rest}\n\n{body}")
    return "\n\n".join(sections)


def programmed(rule: type[Rule]) -> str:
    """The rule's program as it is printed, with the defaults."""
    return f"## Program\n\nTraced with the defaults:\n\n```text\n{trace(rule(lr=0.01))}\n```"


def trajectory(name: str, rule: type[Rule]) -> tuple[bytes | None, str]:
    """Where the rule goes on Rosenbrock's function, as a PNG, and what to say of it."""
    try:
        ways = {
            f"{name}, lr={lr:g}": race.race({name: rule(lr=lr)}, race.rosenbrock, STEPS)[name]
            for lr in RATES
        }
    except ValueError as error:  # it does not take a vector
        return None, f"## Trajectory\n\nNone in two variables: {error}."
    final = {title: np.nan_to_num(way.distances[-1], nan=np.inf) for title, way in ways.items()}
    best = min(final, key=lambda title: final[title])
    figure = plots.trajectories(race.rosenbrock, {best: ways[best]})
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=100)
    rates = ", ".join(f"{lr:g}" for lr in RATES)
    said = f"The first {STEPS} steps on Rosenbrock's function, with that learning rate of {rates}"
    said += f" that ends nearest to the minimum ({final[best]:.2g} from it)."
    place = f"{name.lower()}.png"
    return picture.getvalue(), f"## Trajectory\n\n{said}\n\n![Trajectory of {name}]({place})"


LINK = re.compile(r"(?<=\]\()(?!https?:)[^)#\s]+")


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between files of the repository into links between pages."""
    here = page.file.src_uri
    sources = {place: source for source, place in PAGES.items()}
    folder = (ROOT / sources.get(here, f"docs/{here}")).parent

    def to_page(link: re.Match[str]) -> str:
        target = (folder / link[0]).resolve()
        if not target.is_file():
            return link[0]  # for MkDocs to complain of, or a page that is made here
        place = target.relative_to(ROOT).as_posix()
        return "../" * here.count("/") + PAGES.get(place, place.removeprefix("docs/"))

    return LINK.sub(to_page, markdown)
