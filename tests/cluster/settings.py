"""The files of the test cluster: slurm.conf and what ssh, sshd and the resolver read."""

import os
import subprocess
from pathlib import Path

NODES = ("node1", "node2")
CPUS = 4  # promised to SLURM, however many the machine has
GPUS = 2

SLURM_CONF = """\
ClusterName=test
SlurmctldHost=login(10.77.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket=/run/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_min_interval=0,batch_sched_delay=0,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=8
MessageTimeout=5
InactiveLimit=0
KillWait=10
OverTimeLimit=0
UnkillableStepTimeout=20
MinJobAge=300
WaitTime=0
MailProg=/bin/true
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=DEFAULT CPUs={cpus} RealMemory={memory} Gres=gpu:{gpus} State=UNKNOWN
{nodes}
PartitionName=low Nodes={names} Default=YES MaxTime=60 State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=5
PartitionName=high Nodes={names} MaxTime=60 State=UP PriorityTier=10 PreemptMode=OFF
"""
SSHD_CONFIG = """\
Port 22
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
PermitRootLogin yes
PasswordAuthentication no
StrictModes no
UsePAM no
UseDNS no
MaxStartups 100
"""
SSH_CONFIG = """\
Host node* login
  User root
  IdentityFile {folder}/user_key
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
"""


def write_settings(folder: Path) -> None:
    """All files that the cluster's programs read, under ``folder``."""
    for name in ("etc/slurm", "etc/ssh", "state", "log", *(f"spool.{node}" for node in NODES)):
        (folder / name).mkdir(parents=True)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20 // len(NODES)
    addresses = "\n".join(f"NodeName={node} NodeAddr=10.77.0.1{node[-1]}" for node in NODES)
    texts = {
        "etc/slurm/slurm.conf": SLURM_CONF.format(
            folder=folder, cpus=CPUS, gpus=GPUS, memory=memory, nodes=addresses, names=",".join(NODES)
        ),
        # Files that stand for GPUs: SLURM counts them, nobody opens them.
        "etc/slurm/gres.conf": f"NodeName={','.join(NODES)} Name=gpu File=/dev/tty[1-{GPUS}]\n",
        "etc/slurm/cgroup.conf": "CgroupPlugin=cgroup/v1\n",
        "etc/ssh/cluster.conf": SSH_CONFIG.format(folder=folder),
        "etc/hosts": "127.0.0.1 localhost\n10.77.0.1 login\n"
        + "".join(f"10.77.0.1{node[-1]} {node}\n" for node in NODES),
        "sshd_config": SSHD_CONFIG.format(folder=folder),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    for key in ("host_key", "user_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key)], check=True)
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o400)
