"""Print as JSON what this machine is: card, date, versions, and what w2s requires and this Python lacks.

python tools/machine.py
"""

import json
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, requires, version

import torch
from packaging.requirements import Requirement

PACKAGES = ("w2s", "torch", "triton", "megatron-core", "transformer-engine", "timm", "open_clip_torch")


def missing(requirements: list[str]) -> list[str]:
    """The requirements that are not met, with what is there instead; those of extras are left out."""
    found = []
    for requirement in map(Requirement, requirements):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        installed = _installed(requirement.name)
        if installed is None:
            found.append(f"{requirement} (not installed)")
        elif not requirement.specifier.contains(installed, prereleases=True):
            found.append(f"{requirement} ({installed} is installed)")
    return found


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def machine() -> dict[str, str]:
    """What is told of a measurement."""
    gpu = torch.cuda.is_available()
    return {
        "card": torch.cuda.get_device_name() if gpu else "none",
        "date": datetime.now(UTC).date().isoformat(),
        "Python": platform.python_version(),
        "CUDA": torch.version.cuda or "none",
        **{package: _installed(package) or "not installed" for package in PACKAGES},
        "missing of what w2s requires": "; ".join(missing(requires("w2s") or [])) or "nothing",
    }


if __name__ == "__main__":
    print(json.dumps(machine(), indent=1))
