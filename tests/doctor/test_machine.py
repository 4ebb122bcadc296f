"""The doctor on machines that lack something: facts made up, or the world faked where they are gathered."""

import collections
import json
import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from dspark_kernels import native
from dspark_serve.cli import app
from dspark_serve.doctor import command, machine
from dspark_serve.doctor.findings import Finding, as_json, verdict, worst
from dspark_serve.doctor.machine import Machine, judge, look

GOOD = Machine(
    processor="Some Processor, AVX512", architecture="x86_64", capability="AVX512", compiler="/usr/bin/g++",
    isa="avx512", cores=8, physical_cores=8, threads=8, others_busy=0.1, busiest="cron (process 7)", stolen_share=0.0,
    memory_gib=32.0, available_gib=24.0, container_gib=None, cache="/cache", cache_writable=True, disk_gib=100.0,
    torch="2.13.0", torch_cuda=None, gpu=None, gpu_gib=0.0, driver=None, triton=None, triton_obstacle=None,
)  # fmt: skip
CHECKS = ["processor", "kernels", "threads", "load", "memory", "disk", "gpu"]


def test_a_machine_as_it_should_be():
    findings = list(judge(GOOD))
    assert [finding.check for finding in findings] == CHECKS
    assert all(finding.level == "ok" and not finding.advice for finding in findings)
    assert verdict(findings) == "Everything is as it should be."


@pytest.mark.parametrize(
    ("changes", "check", "level", "found", "advice"),
    [
        ({"capability": "DEFAULT", "isa": "portable"}, "processor", "warn", "without AVX2", "virtual machine"),
        ({"isa": None}, "kernels", "warn", "torch serves instead", "build them: pip install"),
        ({"isa": None, "compiler": None}, "kernels", "warn", "torch serves", "install a C++ compiler (g++ or clang)"),
        ({"isa": "portable"}, "kernels", "warn", "nothing of this processor's vector units", "rebuild"),
        ({"isa": "avx2"}, "kernels", "warn", "for avx2, and this processor has avx512", "rebuild"),
        ({"compiler": None}, "kernels", "ok", "none is needed", ""),
        ({"capability": "AVX2", "isa": "avx2"}, "kernels", "ok", "for avx2", ""),
        ({"architecture": "aarch64", "capability": "DEFAULT", "isa": "neon"}, "processor", "ok", "", ""),
        ({"architecture": "aarch64", "capability": "DEFAULT", "isa": "neon"}, "kernels", "ok", "for neon", ""),
        ({"threads": 9}, "threads", "warn", "9 threads have 8 cores: they wait", "--threads 8"),
        ({"threads": 1}, "threads", "warn", "on 1 of 8 usable cores", "--threads 8"),
        ({"cores": 16}, "threads", "ok", "on 8 of 16", ""),  # two threads to a core
        ({"others_busy": 3.0}, "load", "warn", "other processes use 3.0 cores, cron (process 7)", "end them"),
        ({"stolen_share": 0.3}, "load", "warn", "30% of the time", "cores of its own"),
        ({"available_gib": 0.5}, "memory", "warn", "smallest models only", "end other processes"),
        ({"container_gib": 4.0}, "memory", "warn", "container may use 4.0 GiB", "--kv-cache-gib"),
        ({"container_gib": 64.0}, "memory", "ok", "24.0 of 32.0", ""),
        ({"disk_gib": 1.0}, "disk", "warn", "little for models", "DSPARK_CACHE"),
        ({"cache_writable": False}, "disk", "fail", "/cache cannot be written", "DSPARK_CACHE"),
        ({"driver": "580.1"}, "gpu", "warn", "there is a GPU (driver 580.1)", "[gpu]"),
        ({"driver": "580.1", "torch_cuda": "13.0"}, "gpu", "warn", "does not see it", "CUDA_VISIBLE_DEVICES"),
        ({"gpu": "Big", "gpu_gib": 80.0, "driver": "5", "torch_cuda": "13"}, "gpu", "ok", "Big, 80 GiB, driver 5", ""),
        ({"gpu": "Old", "triton_obstacle": "they need 9.0"}, "gpu", "warn", "torch serves instead", "they need 9.0"),
    ],
)
def test_what_is_wrong_is_said(monkeypatch, changes, check, level, found, advice):
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    [finding] = [finding for finding in judge(replace(GOOD, **changes)) if finding.check == check]
    assert finding.level == level
    assert found in finding.found
    assert advice in finding.advice
    assert bool(finding.advice) == (level != "ok")


def test_a_gpu_that_was_asked_for_and_is_not_there():
    levels = {device: list(judge(GOOD, device))[-1].level for device in ("auto", "cpu", "cuda", "cuda:1")}
    assert levels == {"auto": "ok", "cpu": "ok", "cuda": "fail", "cuda:1": "fail"}


def test_a_masked_instruction_set_is_named(monkeypatch):
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "default")
    finding = next(judge(replace(GOOD, capability="DEFAULT")))
    assert finding.advice == "unset ATEN_CPU_CAPABILITY=default"


# ---- gathering


@pytest.fixture
def unwatched(monkeypatch):
    monkeypatch.setattr(machine, "_LOOK_S", 0.02)


def test_looking_at_this_machine(unwatched):
    seen = look()
    assert seen.isa == (None if native.load() is None else native.load().isa)
    assert seen.threads == torch.get_num_threads()
    assert 0 < seen.available_gib <= seen.memory_gib
    assert 1 <= seen.cores <= os.cpu_count()
    assert seen.gpu is None or torch.cuda.is_available()
    assert [finding.check for finding in judge(seen)] == CHECKS


def test_looking_at_a_poor_machine(monkeypatch, tmp_path, unwatched):
    """No compiler, no kernels, no AVX2, little memory, a full disk, a cache below something that is no directory."""
    memory = SimpleNamespace(total=2 << 30, available=1 << 29)
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 29))
    monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(native, "load", lambda: None)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("1073741824\n")
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    monkeypatch.setenv("DSPARK_CACHE", str(tmp_path / "memory.max" / "cache"))
    seen = look()
    assert (seen.compiler, seen.isa, seen.capability, seen.driver) == (None, None, "DEFAULT", None)
    assert (seen.memory_gib, seen.available_gib, seen.container_gib, seen.disk_gib) == (2.0, 0.5, 1.0, 0.5)
    assert seen.cores == min(2, len(os.sched_getaffinity(0)))
    assert not seen.cache_writable
    levels = {finding.check: finding.level for finding in judge(replace(seen, architecture="x86_64"))}
    assert levels["disk"] == "fail"
    assert {levels[check] for check in ("processor", "kernels", "memory")} == {"warn"}


def test_no_quota_is_no_limit(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    assert machine.usable_cores() == len(os.sched_getaffinity(0))
    (tmp_path / "cpu.max").write_text("max 100000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.usable_cores() == len(os.sched_getaffinity(0))
    assert machine._container_gib() is None


def test_other_processes_are_watched(monkeypatch):
    """In a second: another process worked for 0.9 s, this one for 5, and 10 % of the time was stolen."""
    times = collections.namedtuple("times", "user nice system idle steal")
    cpu = iter([times(10, 0, 0, 50, 1), times(10.75, 0.05, 0.1, 50.9, 1.2)])
    processes = iter([{(1, "init"): 5.0, (8, "miner"): 1.0, (os.getpid(), "us"): 1.0},
                      {(1, "init"): 5.1, (8, "miner"): 1.8, (os.getpid(), "us"): 6.0, (9, "new"): 3.0}])  # fmt: skip
    monkeypatch.setattr(machine.psutil, "cpu_times", lambda: next(cpu))
    monkeypatch.setattr(machine, "_process_seconds", lambda: next(processes))
    monkeypatch.setattr(machine.time, "sleep", lambda seconds: None)
    busy, busiest, stolen = machine._watch(1.0)
    assert busy == pytest.approx(0.9)
    assert busiest == "miner (process 8)"
    assert stolen == pytest.approx(0.1)


def test_this_process_is_seen_working():
    (mine,) = [seconds for (pid, _), seconds in machine._process_seconds().items() if pid == os.getpid()]
    assert mine > 0


def test_the_driver_is_asked_of_its_tool(monkeypatch, tmp_path):
    tool = tmp_path / "nvidia-smi"
    monkeypatch.setattr(machine.shutil, "which", lambda name: str(tool))
    assert machine._driver() is None  # gone meanwhile
    for script, driver in (("echo 580.65; echo 580.65", "580.65"), ("exit 9", None)):
        tool.write_text(f"#!/bin/sh\n{script}\n")
        tool.chmod(0o755)
        assert machine._driver() == driver


# ---- what is said, written and returned


def invoke(*arguments):
    return CliRunner().invoke(app, ["doctor", *arguments])


@pytest.mark.parametrize(
    ("changes", "code", "level", "last"),
    [
        ({}, 0, "ok", "Everything is as it should be."),
        ({"isa": None}, 0, "warn", "Everything works; 1 of 7 checks say what could be better."),
        ({"isa": None, "cache_writable": False}, 1, "fail", "1 of 7 checks failed, 1 warned: something will not work."),
    ],
)
def test_exit_code_and_json(monkeypatch, tmp_path, changes, code, level, last):
    monkeypatch.delenv("DSPARK_DEVICE", raising=False)
    monkeypatch.setattr(command, "look", lambda: replace(GOOD, **changes))
    result = invoke("--json", str(tmp_path / "d.json"))
    assert result.exit_code == code, result.output
    assert result.output.splitlines()[-2:] == [last, f"json: {tmp_path / 'd.json'}"]
    written = json.loads((tmp_path / "d.json").read_text())
    assert written.keys() == {"level", "findings"}
    assert written["level"] == level
    assert [finding["check"] for finding in written["findings"]] == CHECKS
    for finding in written["findings"]:
        assert finding.keys() == {"check", "level", "found", "advice"}
        assert finding["level"] in ("ok", "warn", "fail")
        assert finding["found"] in result.output
        assert finding["advice"] in result.output


def test_the_environment_counts_as_for_serve(monkeypatch):
    monkeypatch.setattr(command, "look", lambda: GOOD)
    monkeypatch.setenv("DSPARK_DEVICE", "cuda")
    assert invoke().exit_code == 1
    result = invoke("--config", "/nowhere.yaml")
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)


def test_nothing_examined_is_nothing_wrong():
    assert (worst([]), as_json([])) == ("ok", {"level": "ok", "findings": []})
    assert Finding("disk", "ok", "much").lines() == ["ok    disk        much"]
