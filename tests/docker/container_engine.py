"""A container engine of the tests' own: podman with its images, volumes and networks below one directory.

No registry is needed: the base image is debootstrap's, and what compose.yaml starts beside the server are stand-ins.
Of this machine the engine shares the ports that are published, bridges and the rules of its packet filter; `close`
takes away whatever runs, is mounted or was set up, but for chains of rules that are empty then.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import replay
from dockerfile import ROOT, STAGES

TOOLS = ("podman", "podman-compose", "debootstrap")
DNS = Path("/usr/lib/podman/aardvark-dns")  # by which services find each other
STAND_INS = Path(__file__).parent / "stand_ins"
# Of limits podman asks for more than a root without CAP_SYS_RESOURCE may set. Nothing here is systemd's to do. Where
# static_dir is elsewhere, podman does not find a container that ended, and its published port leads nowhere for good.
_CONTAINERS = """[containers]
default_ulimits = ["nofile=4096:4096", "nproc=4096:4096"]
volumes = ["{directory}/pip:/etc/xdg/pip:ro"]
log_driver = "k8s-file"
[engine]
runtime = "{runtime}"
cgroup_manager = "cgroupfs"
events_logger = "file"
lock_type = "file"
static_dir = "{directory}/storage/libpod"
volume_path = "{directory}/volumes"
tmp_dir = "{directory}/tmp"
[network]
network_backend = "netavark"
network_config_dir = "{directory}/networks"
"""
_STORAGE = """[storage]
driver = "overlay"
graphroot = "{directory}/storage"
runroot = "{directory}/run"
"""
_REGISTRIES = 'unqualified-search-registries = ["docker.io"]\n'


def missing() -> str | None:
    """What an engine would need and does not find here; None when all is there."""
    if absent := [tool for tool in TOOLS if shutil.which(tool) is None]:
        packages = "podman runc netavark aardvark-dns podman-compose debootstrap"
        return f"a container engine needs {', '.join(absent)} (apt-get install {packages})"
    if _runtime() is None or not DNS.exists():
        return "podman needs runc or crun, netavark and aardvark-dns (apt-get install runc netavark aardvark-dns)"
    return replay.missing()


def _runtime() -> str | None:
    """runc first: crun refuses control groups of both versions side by side."""
    return next((name for name in ("runc", "crun") if shutil.which(name)), None)


class Engine:
    """Before anything else, `set_up`; at the end, whatever happened, `close`."""

    def __init__(self, directory: Path, torch_index: str) -> None:
        """`directory` is the engine's own; `torch_index`: the build argument TORCH_INDEX."""
        self.directory = directory
        self.environment = {**os.environ, "TMPDIR": str(directory), "TORCH_INDEX": torch_index}
        # Only docker's format of images knows health checks; without systemd nobody asks them but who wants to know.
        self.environment |= {"BUILDAH_FORMAT": "docker", "DISABLE_HC_SYSTEMD": "true"}
        for name, text in (("CONF", _CONTAINERS), ("STORAGE_CONF", _STORAGE), ("REGISTRIES_CONF", _REGISTRIES)):
            file = directory / name.lower()
            file.write_text(text.format(directory=directory, runtime=_runtime()), encoding="utf-8")
            self.environment[f"CONTAINERS_{name}"] = str(file)

    def set_up(self) -> None:
        """The base image of the CPU's stage, and pip in every container as it is on this machine."""
        replay.pip_settings(self.directory / "pip", "/etc/xdg/pip")
        base = STAGES["cpu-base"].base
        root, archive = replay.debian(base, self.directory / "debian"), self.directory / "debian.tar"
        self.run("tar", "--create", "--one-file-system", f"--file={archive}", f"--directory={root}", ".")
        self.run("podman", "import", "--change=CMD=bash", str(archive), f"docker.io/library/{base}")
        shutil.rmtree(root)
        archive.unlink()

    def command(self, line: str) -> list[str]:
        """A documented line of docker's, as podman takes it."""
        words = shlex.split(line)
        return ["podman-compose", *words[2:]] if words[1] == "compose" else ["podman", *words[1:]]

    def run(self, *words: str) -> str:
        """What the command prints. Raises RuntimeError with that when it fails."""
        line = subprocess.run(words, env=self.environment, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
        if line.returncode:
            raise RuntimeError(f"{shlex.join(words)} ended with {line.returncode}: {line.stdout}")
        return line.stdout.strip()

    def execute(self, container: str, *command: str) -> subprocess.CompletedProcess[str]:
        """In a container that runs, as its user."""
        line = ["podman", "exec", container, *command]
        return subprocess.run(line, env=self.environment, capture_output=True, text=True, check=False)

    def inspect(self, *what: str) -> dict[str, Any]:
        """Of a container, an image, or `"network", name`."""
        *kind, name = what
        found: list[dict[str, Any]] = json.loads(self.run("podman", *kind, "inspect", name))
        return found[0]

    def gateway(self, network: str) -> str:
        """This machine's address among a network's containers."""
        return str(self.inspect("network", network)["subnets"][0]["gateway"])

    def stand_in(self, name: str, image: str) -> None:
        """Builds the image that `image`, which is in a registry only, is stood in for by."""
        file = STAND_INS / f"{name}.Dockerfile"
        self.run("podman", "build", "--tag", f"docker.io/{image}", "--file", str(file), str(STAND_INS))

    def close(self) -> None:
        """Whatever state it is in: no process, mount, network or file stays."""
        for words in (["pod", "rm", "--all"], ["rm", "--all", "--time=0"], ["network", "prune"]):
            subprocess.run(["podman", *words, "--force"], env=self.environment, check=False)
        places = [line.split()[1] for line in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines()]
        for place in reversed(places):
            if Path(place).is_relative_to(self.directory):
                subprocess.run(["umount", place], check=True)
        shutil.rmtree(self.directory)
