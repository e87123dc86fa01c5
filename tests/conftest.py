"""What holds for all tests."""

import sys
from pathlib import Path

import pytest

# pytest has put this folder there, in which tests/torch would be a package "torch".
sys.path.remove(str(Path(__file__).parent))


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory):
    """Kernels go to a folder of this run's own, those of child processes too."""
    folder = tmp_path_factory.mktemp("kernels")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PORTOPT_CACHE_DIR", str(folder))
        yield folder
