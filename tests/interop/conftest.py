"""Scripts that import `peft` and know nothing of Veneer, run with HF PEFT, with Veneer in its place, and with Veneer alone."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import pytest

import veneer

collect_ignore_glob = ["*_script.py"]  # programs, with arguments of their own


@pytest.fixture(scope="session")
def packages_without_peft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with links to every installed package but HF PEFT."""
    linked = tmp_path_factory.mktemp("packages")
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if entry.name.split("-")[0] != "peft" and entry.suffix != ".pth":
            (linked / entry.name).symlink_to(entry)
    return linked


@dataclass
class Runner:
    """Runs the scripts beside the tests, which import `peft` and know nothing of Veneer."""

    packages: Path

    def environment(self, *paths: Path) -> dict[str, str]:
        """What a process needs to see this Veneer, and nothing of a hub."""
        source = Path(veneer.__file__).parents[1]
        return os.environ | {"PYTHONPATH": os.pathsep.join(map(str, [*paths, source])), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def hf(self, script: str, *arguments: object) -> str:
        """The script's output with HF PEFT."""
        return self.output([sys.executable, self.path(script), *arguments], self.environment())

    def veneer(self, script: str, *arguments: object) -> str:
        """The script's output with Veneer, HF PEFT being installed."""
        return self.output([sys.executable, "-m", "veneer", "run", self.path(script), *arguments], self.environment())

    def alone(self, script: str, *arguments: object) -> str:
        """The script's output with Veneer, HF PEFT being nowhere on the path."""
        return self.output([sys.executable, "-S", "-m", "veneer", "run", self.path(script), *arguments], self.environment(self.packages))

    def path(self, script: str) -> Path:
        return Path(__file__).with_name(script)

    def output(self, command: list[object], environment: dict[str, str]) -> str:
        done = subprocess.run([str(c) for c in command], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return done.stdout


@pytest.fixture(scope="session")
def run(packages_without_peft: Path) -> Runner:
    """Scripts with HF PEFT, with Veneer in its place, and with Veneer alone."""
    return Runner(packages_without_peft)
