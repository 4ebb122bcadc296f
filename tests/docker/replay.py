"""The Dockerfile without an engine: its instructions in a Debian root of debootstrap's, its server as PID 1 in there.

Stages are layers of an overlay file system, mounted in a name space of each command's own: whatever ends it, no mount
is left behind. What an engine does and this does not: limits, a network of its own, capabilities.
"""

from __future__ import annotations

import ast
import json
import os
import shlex
import shutil
import string
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from dockerfile import ROOT, STAGES, allowed

SUITES = {"13": "trixie"}  # of Debian, as its images' tags name them
TOOLS = ("debootstrap", "chroot", "unshare", "nsenter")
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_APT = """Dir::Cache::pkgcache "";
Dir::Cache::srcpkgcache "";
DPkg::Post-Invoke { "rm -f /var/cache/apt/archives/*.deb"; };
"""
_PIP_FILES = ("cert", "client-cert")
_ISOLATED = ["unshare", "--mount", "--pid", "--fork", "--kill-child"]
_ENTER = """set -e
mount -t overlay overlay -o "$LAYERS" "$ROOT"
mount -t proc proc "$ROOT/proc"
mount --rbind /dev "$ROOT/dev"
mount -t tmpfs tmpfs "$ROOT/run"
mkdir "$ROOT/run/pip" && mount --bind -o ro "$PIP" "$ROOT/run/pip"
while [ "$1" != -- ]; do
    mkdir -p "$ROOT$2" && mount --bind "$1" "$ROOT$2"
    shift 2
done
shift
exec chroot --userspec="$USERSPEC" "$ROOT" /usr/bin/env -i -C "$@"
"""


def missing() -> str | None:
    """What a replay would need and does not find here; None when all is there."""
    if os.name != "posix" or os.geteuid() != 0:
        return "a replay of the Dockerfile needs root, for chroot and mounts"
    if absent := [tool for tool in TOOLS if shutil.which(tool) is None]:
        return f"a replay of the Dockerfile needs {', '.join(absent)} (apt-get install debootstrap util-linux)"
    probe = 'd=$(mktemp -d) && mount -t tmpfs t "$d" && cd "$d" && mkdir l u w m && mount -t overlay o -o '
    probe += "lowerdir=l,upperdir=u,workdir=w m"
    if subprocess.run(["unshare", "--mount", "sh", "-c", probe], capture_output=True, check=False).returncode:
        return "a replay of the Dockerfile needs the right to mount overlay file systems"
    return None


@dataclass
class Image:
    """A stage while it is built, and what it is started with."""

    layers: list[Path]  # the newest first: its own, then those of its base
    scratch: Path
    environment: dict[str, str] = field(default_factory=lambda: {"PATH": _PATH})
    arguments: dict[str, str] = field(default_factory=dict)
    user: str = "root"
    directory: str = "/"
    entrypoint: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    health: list[str] = field(default_factory=list)

    def inside(self, command: list[str], volumes: dict[str, Path] | None = None, **environment: str) -> list[str]:
        """A command line that runs `command` in the image, as its user, in mount and process name spaces of its own."""
        merged, work = self.scratch / "merged", self.scratch / "work"
        for directory in (merged, work):
            directory.mkdir(parents=True, exist_ok=True)
        upper, *lower = self.layers
        settings = {
            "LAYERS": f"lowerdir={':'.join(map(str, lower))},upperdir={upper},workdir={work}",
            "ROOT": str(merged),
            "PIP": str(self.scratch.parent / "pip"),
            "USERSPEC": f"{self.user}:{self.user}",
        }
        binds = [part for target, source in (volumes or {}).items() for part in (str(source), target)]
        home = {"HOME": "/root" if self.user == "root" else f"/home/{self.user}"}
        variables = [f"{name}={value}" for name, value in {**home, **self.environment, **environment}.items()]
        enter = ["env", *(f"{name}={value}" for name, value in settings.items()), "sh", "-c", _ENTER, "sh", *binds]
        return [*_ISOLATED, *enter, "--", self.directory, *variables, *command]

    def run(self, line: str) -> None:
        """RUN in its shell form; pip is set up as it is on this machine. Raises CalledProcessError."""
        pip = {"PIP_CONFIG_FILE": "/run/pip/pip.conf"}
        subprocess.run(self.inside(["/bin/sh", "-c", line], **self.arguments, **pip), check=True)

    def find(self, path: str) -> Path:
        """A path of the image in the newest layer that has it."""
        return next(found for layer in self.layers if (found := layer / path.lstrip("/")).exists())

    def place(self, path: str) -> Path:
        """Where COPY puts `path`, in this stage's own layer."""
        return self.layers[0] / os.path.join(self.directory, path).lstrip("/")


def build(target: str, scratch: Path, arguments: dict[str, str]) -> Image:
    """The stage `target` and those that it needs, below `scratch`. `arguments` are those of `--build-arg`."""
    pip_settings(scratch / "pip", "/run/pip")
    built: dict[str, Image] = {}
    for name in _needed(target):
        stage = STAGES[name]
        lower = built[stage.base].layers if stage.base in built else [debian(stage.base, scratch / "debian")]
        upper = scratch / name / "upper"
        upper.mkdir(parents=True)
        inherited = built[stage.base].environment if stage.base in built else {"PATH": _PATH}
        built[name] = image = Image([upper, *lower], scratch / name, dict(inherited))
        for instruction, rest in stage.steps:
            _step(image, instruction, rest, built, arguments)
    return built[target]


def _needed(target: str) -> list[str]:
    """The stages behind `target`, in the file's order."""
    wanted = {target}
    for name in reversed(STAGES):
        if name in wanted:
            copies = [shlex.split(line)[0] for line in STAGES[name].all("COPY")]
            wanted |= {STAGES[name].base} | {copy.removeprefix("--from=") for copy in copies if copy.startswith("--")}
    return [name for name in STAGES if name in wanted]


def _step(image: Image, instruction: str, rest: str, built: dict[str, Image], arguments: dict[str, str]) -> None:
    print(f"{instruction} {rest}", flush=True)
    match instruction:
        case "RUN":
            image.run(rest)
        case "COPY":
            _copy(image, shlex.split(rest), built)
        case "ARG":
            name, _, default = rest.partition("=")
            image.arguments[name] = arguments.get(name, default)
        case "ENV":
            for item in shlex.split(rest):
                name, _, value = item.partition("=")
                image.environment[name] = string.Template(value).substitute(image.environment)
        case "USER":
            image.user = rest
        case "WORKDIR":
            image.directory = rest
            if not any((layer / rest.lstrip("/")).exists() for layer in image.layers):
                image.place(rest).mkdir(parents=True)
        case "ENTRYPOINT":
            image.entrypoint = json.loads(rest)
        case "CMD":
            image.command = json.loads(rest)
        case "HEALTHCHECK":
            image.health = json.loads(rest[rest.index("CMD ") + 4 :])
        case "VOLUME" | "EXPOSE":
            pass  # whoever starts the image gives it a volume and finds its port
        case _:
            raise NotImplementedError(f"the replay does not know {instruction}: teach it, or leave it out")


def _copy(image: Image, words: list[str], built: dict[str, Image]) -> None:
    """Like an engine, a directory's contents, and a file below a target that ends in a slash."""
    if words[0].startswith("--from="):
        stage, (source, target) = built[words[0].removeprefix("--from=")], words[1:]
        image.place(target).parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["cp", "--archive", "--link", stage.find(source), image.place(target)], check=True)
        return
    *sources, target = words
    for source in sources:
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, image.place(target), ignore=_ignored, dirs_exist_ok=True)
        else:
            place = image.place(target + source if target.endswith("/") else target)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / source, place)


def _ignored(directory: str, names: list[str]) -> set[str]:
    return {name for name in names if not allowed(str((Path(directory) / name).relative_to(ROOT)))}


def debian(base: str, root: Path) -> Path:
    """What `debian:N-slim` is made of: the packages that Debian calls essential, and an apt that keeps nothing."""
    distribution, _, tag = base.partition(":")
    if distribution != "debian":
        raise NotImplementedError(f"only Debian's images can be replayed, not {base}")
    subprocess.run(["debootstrap", "--variant=minbase", SUITES[tag.partition("-")[0]], root], check=True)
    (root / "etc/apt/apt.conf.d/docker-clean").write_text(_APT, encoding="utf-8")
    return root


def pip_settings(directory: Path, inside: str) -> None:
    """pip's settings on this machine, as far as they are not about its own files: index, certificates, patience.

    `inside`: where the image sees `directory`.
    """
    directory.mkdir(parents=True)
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    settings: dict[str, str] = {}
    for line in sorted(listed.stdout.splitlines(), reverse=True):  # :env: comes last and wins, as in pip
        place, _, value = line.partition("=")
        section, _, name = place.rpartition(".")
        if section in ("global", ":env:"):
            settings[name] = ast.literal_eval(value)
    lines = ["[global]"]
    for name, value in settings.items():
        if name in _PIP_FILES:
            shutil.copy(value, directory / name)
            lines.append(f"{name} = {inside}/{name}")
        elif words := [word for word in value.split() if not word.startswith(("/", "file:"))]:
            lines.append(f"{name} = {' '.join(words)}")
    (directory / "pip.conf").write_text("\n".join(lines) + "\n", encoding="utf-8")
