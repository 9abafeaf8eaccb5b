#!/usr/bin/env bash
# The first process of the test cluster: the login node, in namespaces of its own (mount, network, pid, host name).
# It hides the host's files under private mounts, so that the host is left as it was. Usage: login_init.sh FOLDER
set -eu
folder=$1
hostname login
mount --make-rprivate /
mount -t proc proc /proc
mount -t tmpfs tmpfs /run
mkdir -p /run/sshd /etc/slurm /etc/ssh/ssh_config.d
mount --bind "$folder/etc/hosts" /etc/hosts
mount --bind "$folder/etc/slurm" /etc/slurm
mount --bind "$folder/etc/ssh" /etc/ssh/ssh_config.d
ip link set lo up
ip link add cluster type bridge
ip addr add 10.77.0.1/24 dev cluster
ip link set cluster up
munged --force --socket=/run/munge.socket --key-file="$folder/munge.key" --pid-file=/run/munge.pid \
  --log-file="$folder/log/munged.log" --seed-file=/run/munge.seed
slurmctld -c
touch "$folder/login.ready"
while :; do sleep 1000 & wait; done # as process 1 bash reaps what is orphaned
