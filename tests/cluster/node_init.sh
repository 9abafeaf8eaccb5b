#!/usr/bin/env bash
# The first process of a node: its own network, host name, /dev/shm and processes. Usage: node_init.sh FOLDER NAME
set -eu
folder=$1
name=$2
hostname "$name"
mount --make-rprivate /
mount -t proc proc /proc
mount -t tmpfs -o size=2g tmpfs /dev/shm
until ip link show eth0 >/dev/null 2>&1; do sleep 0.05; done
ip link set lo up
ip addr add "10.77.0.1${name#node}/24" dev eth0
ip link set eth0 up
/usr/sbin/sshd -f "$folder/sshd_config" -E "$folder/log/sshd.$name.log" -o PidFile=none
slurmd -D -N "$name" >>"$folder/log/slurmd.$name.out" 2>&1 &
while :; do sleep 1000 & wait $!; done
