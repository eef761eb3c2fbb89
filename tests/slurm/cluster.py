"""A Slurm cluster of virtual nodes on this machine, for as long as a test session: as root, without systemd."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path

NODES = ("node1", "node2")
PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")  # Debian's and Ubuntu's
CPUS = 32  # that a node claims; more than there are, so that jobs run side by side
CONFIG = """
ClusterName=tests
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket
CredType=cred/munge
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=20
MinJobAge=86400
JobRequeue=1
NodeName=node1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={node1} CPUs={cpus} RealMemory=2000
NodeName=node2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={node2} CPUs={cpus} RealMemory=2000
PartitionName=tests Nodes=ALL Default=YES MaxTime=60 State=UP
"""


class NoSlurm(Exception):
    """Why there can be none here."""


class Cluster:
    """Two nodes, started by ``with``; the commands of Slurm find them through ``environment``."""

    def __init__(self) -> None:
        install()
        self.root = Path(tempfile.mkdtemp(prefix="slurm", dir="/tmp"))  # a short path: sockets allow 107 characters
        self.config, self.reviving = self.root / "slurm.conf", threading.Lock()
        self.environment = {**os.environ, "SLURM_CONF": str(self.config), "MASTER_ADDR": "127.0.0.1"}
        for name in [name for name in self.environment if name.startswith("SLURM_") and name != "SLURM_CONF"]:
            del self.environment[name]  # of a job that runs these tests

    def __enter__(self) -> Cluster:
        self.root.chmod(0o755)
        for name in ("state", "spool-node1", "spool-node2"):
            (self.root / name).mkdir()
        (self.root / "keys").mkdir(mode=0o700)
        key = self.root / "keys" / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(1024))
        ports = dict(zip(("port", "node1", "node2"), free_ports(3), strict=True))
        self.config.write_text(CONFIG.format(root=self.root, cpus=CPUS, **ports))
        (self.root / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # slurmd asks which, and uses none
        munge = {"key-file": key, "socket": "munge.socket", "pid-file": "munged.pid", "seed-file": "keys/seed"}
        self.call(
            "munged",
            *(f"--{name}={self.root / value}" for name, value in munge.items()),
            f"--log-file={self.root / 'keys' / 'munged.log'}",
        )
        self.call("slurmctld", "-c")
        for node in NODES:
            self.call("slurmd", "-N", node)
        end = time.monotonic() + 30
        while len(self.call("sinfo", "-h", "-N", "-t", "idle", "-o", "%N").split()) < 2:
            if time.monotonic() > end:
                logs = "\n".join(path.read_text()[-1000:] for path in self.root.glob("*.log"))
                raise NoSlurm(f"its nodes do not come up: {logs}")
            time.sleep(0.1)
        return self

    def __exit__(self, *args: object) -> None:
        jobs = self.call("squeue", "-h", "-o", "%A").split()
        if jobs:
            self.call("scancel", "--signal=KILL", *jobs)
            self.call("scancel", *jobs)
            end = time.monotonic() + 30
            while self.call("squeue", "-h") and time.monotonic() < end:
                time.sleep(0.1)
        pids = [int(path.read_text()) for path in sorted(self.root.glob("*.pid"), reverse=True)]
        for pid in pids:  # slurmd, slurmctld, munged
            os.kill(pid, signal.SIGTERM)
        end = time.monotonic() + 10
        while any(is_running(pid) for pid in pids) and time.monotonic() < end:
            time.sleep(0.1)
        shutil.rmtree(self.root, ignore_errors=True)

    def call(self, *command: object, check: bool = True) -> str:
        """Run a command, and return what it prints."""
        words = [str(word) for word in command]
        with tempfile.TemporaryFile("w+") as output:  # no pipe: daemons would hold it open
            done = subprocess.run(words, env=self.environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
            output.seek(0)
            text = output.read()
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(words)}: {text}")
        return text.strip()

    def revive(self) -> None:
        """Start the daemon of a node again if it has died, as systemd does.

        Debian's slurmd 22.05 may, where two steps begin within a millisecond ("double free or corruption").
        """
        with self.reviving:
            for node in NODES:
                file = self.root / f"slurmd-{node}.pid"
                pid = file.read_text()
                if pid.strip() and not is_running(int(pid)):
                    self.call("slurmd", "-N", node)
                    while file.read_text() == pid:
                        time.sleep(0.05)

    def field(self, job: str, name: str) -> str:
        """Return what Slurm says of a job, e.g. of ``JobState``."""
        words = self.call("scontrol", "show", "job", "-o", job).split()
        return next(word.partition("=")[2] for word in words if word.startswith(f"{name}="))


def install() -> None:
    """Have the programs of Slurm here.

    Raises:
        NoSlurm: They are not, and cannot be installed.
    """
    programs = ("munged", "slurmctld", "slurmd", "sbatch")
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    if os.geteuid() != 0:
        raise NoSlurm("virtual nodes are started by root")
    if all(map(shutil.which, programs)):
        return
    if shutil.which("apt-get") is None:
        raise NoSlurm("no slurmd, and no apt-get to install it")
    apt = ["apt-get", "-qq", "-o", "DPkg::Lock::Timeout=300"]
    for words in (["update"], ["install", "-y", "--no-install-recommends", *PACKAGES]):
        done = subprocess.run(
            [*apt, *words], env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"}, capture_output=True, text=True
        )
    if done.returncode or not all(map(shutil.which, programs)):
        raise NoSlurm(f"apt-get cannot install it: {done.stderr.strip()[-300:]}")


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens at."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def is_running(pid: int) -> bool:
    """Whether a process is there, and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except OSError:
        return False
