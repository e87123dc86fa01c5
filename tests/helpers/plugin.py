"""A package that brings rules, as pip would have installed it."""

PACKAGE = """
from dataclasses import dataclass
from portopt import Rule

@dataclass(frozen=True, kw_only=True)
class Signs(Rule):
    lr: float

    def update(self, xp, t, param, grad, slot):
        return param - self.lr * xp.sign(grad), {}

NO_RULE = 3
"""
ENTRIES = """
[portopt.rules]
signs = signs_for_portopt:Signs
adam = signs_for_portopt:Signs
number = signs_for_portopt:NO_RULE
absent = signs_for_portopt.absent:Rule
"""


def install(folder):
    """Write the package to a folder, which is to be on ``sys.path``."""
    (folder / "signs_for_portopt.py").write_text(PACKAGE)
    info = folder / "signs_for_portopt-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: signs-for-portopt\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRIES)
