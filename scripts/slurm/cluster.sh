#!/usr/bin/env bash
# Disposable Slurm cluster on one machine, for tests and experiments.
#
#   scripts/slurm/cluster.sh start DIR [NODES]   two nodes by default; then: source DIR/env.sh
#   scripts/slurm/cluster.sh unplug DIR NODE     disconnect a node from the network; plug DIR NODE connects it again
#   scripts/slurm/cluster.sh stop DIR            stop all daemons and jobs; the logs in DIR are kept
#
# Exit code 77: a cluster is not possible on this machine (not root, or no packages). Installs missing Debian packages.
# Each node has its own network, host name and /etc/hosts, so a rendezvous on localhost fails as on a real cluster.
# Outside DIR, only network namespaces and one bridge are created; `stop` removes them.
# Partitions: debug (the default); low, whose jobs are preempted by those of high, with a grace time of 30 s.
set -euo pipefail
PACKAGES="slurmctld slurmd slurm-client slurm-wlm-basic-plugins munge iproute2"
usage() { sed -n '2,11s/^# \{0,1\}//p' "$0" >&2; exit 2; }
say() { echo "cluster.sh: $*" >&2; }
skip() { say "$*"; exit 77; }
fail() { say "$*"; tail -n 5 "$D"/log/*.log >&2; exit 1; }
alive() { [ -s "$1" ] && kill -0 "$(cat "$1")" 2>/dev/null; }
[ $# -ge 2 ] || usage
mkdir -p "$2"; D=$(realpath "$2")

install_packages() {
  for program in slurmctld slurmd sbatch munged ip; do
    if ! command -v "$program" >/dev/null; then
      command -v apt-get >/dev/null || skip "no $program, and no apt-get to install it"
      export DEBIAN_FRONTEND=noninteractive
      { apt-get update -qq && apt-get install -y -qq --no-install-recommends $PACKAGES; } >"$D/apt.log" 2>&1 \
        || skip "apt-get cannot install $PACKAGES: see $D/apt.log"
      return
    fi
  done
}

take_number() {  # 1 to 200: part of the names and addresses of this cluster. Creating the bridge reserves it atomically.
  for number in $(shuf -i 1-200); do
    ip link add "sslbr$number" type bridge 2>/dev/null && { echo "$number" >"$D/number"; return; }
  done
  skip "cannot create a network bridge"
}

make_network() {
  ip addr add "10.77.$K.1/24" dev "sslbr$K"; ip link set "sslbr$K" up
  { echo "127.0.0.1 localhost"; echo "10.77.$K.1 $(hostname -s)"
    for i in $(seq "$N"); do echo "10.77.$K.$((10 + i)) node$i"; done; } >"$D/hosts"
  echo "nameserver 127.0.0.1" >"$D/resolv.conf"  # fails immediately; other addresses time out after seconds
  for i in $(seq "$N"); do
    ip netns add "ssl$K-node$i"
    ip link add "ssl$K-h$i" type veth peer name eth0 netns "ssl$K-node$i"
    ip link set "ssl$K-h$i" master "sslbr$K" up
    ip -n "ssl$K-node$i" addr add "10.77.$K.$((10 + i))/24" dev eth0
    ip -n "ssl$K-node$i" link set eth0 up; ip -n "ssl$K-node$i" link set lo up
    ip -n "ssl$K-node$i" route add default via "10.77.$K.1"
  done
}

configure() {
  # Slurm sets CUDA_VISIBLE_DEVICES only if the GPUs are character devices. No process opens these devices.
  local gpus=""
  if mknod "$D/gpu0" c 1 3 2>/dev/null && mknod "$D/gpu1" c 1 3; then
    printf 'Name=gpu File=%s\n' "$D/gpu0" "$D/gpu1" >"$D/gres.conf"; gpus="Gres=gpu:2"
  fi
  # slurmd 22.05 crashes in a namespace when it searches for cgroups, although nothing here uses them.
  if [ "$(printf '%s\n' 23.11 "$(slurmctld -V | grep -oE '[0-9]+\.[0-9]+')" | sort -V | head -1)" = 23.11 ]
  then echo CgroupPlugin=disabled; else echo CgroupPlugin=cgroup/v1; fi >"$D/cgroup.conf"
  # cred_expire is also the delay of a requeued job (default 120 s, minimum 5 s). UnkillableStepTimeout: time that Slurm
  # waits for processes of a lost node.
  cat >"$D/slurm.conf" <<CONF
ClusterName=ssl$K
SlurmctldHost=$(hostname -s)(10.77.$K.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$D/munge/socket,cred_expire=5
SlurmctldPort=$((27000 + 2 * K))
SlurmdPort=$((27001 + 2 * K))
StateSaveLocation=$D/state
SlurmdSpoolDir=$D/spool/%n
SlurmctldPidFile=$D/run/own-slurmctld
SlurmdPidFile=$D/run/own-%n
SlurmctldLogFile=$D/log/slurmctld.log
SlurmdLogFile=$D/log/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout=15
KillWait=10
UnkillableStepTimeout=20
MinJobAge=3600
JobRequeue=1
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,batch_sched_delay=0,bf_interval=1,sched_min_interval=100000
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
${gpus:+GresTypes=gpu}
CONF
  for i in $(seq "$N"); do
    echo "NodeName=node$i NodeAddr=10.77.$K.$((10 + i)) CPUs=8 RealMemory=8000 $gpus State=UNKNOWN" >>"$D/slurm.conf"
  done
  cat >>"$D/slurm.conf" <<CONF
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=5 PreemptMode=OFF
PartitionName=low Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
CONF
}

launch() {  # NAME PROGRAM...: start a program in the foreground of its own session, so that $! is its process id
  setsid "${@:2}" >>"$D/log/$1.out.log" 2>&1 </dev/null & echo $! >"$D/run/$1.pid"
}

start() {
  [ "$(id -u)" = 0 ] || skip "needs root"
  [ ! -e "$D/env.sh" ] || fail "$D already contains a cluster: stop it first"
  mkdir -p "$D"/{run,log,state,spool,munge}; chmod 0755 "$D" "$D/munge"
  install_packages
  take_number; K=$(cat "$D/number")
  trap '[ -e "$D/env.sh" ] || stop' EXIT
  make_network; configure
  (umask 077; head -c 1024 /dev/urandom >"$D/munge/key")
  launch munged munged --foreground --force --num-threads=2 --socket="$D/munge/socket" --key-file="$D/munge/key" \
    --log-file="$D/log/munged.log" --pid-file="$D/run/own-munged" --seed-file="$D/munge/seed"
  for _ in $(seq 50); do [ ! -S "$D/munge/socket" ] || break; sleep 0.1; done
  export SLURM_CONF=$D/slurm.conf
  launch slurmctld slurmctld -D -c -i -f "$D/slurm.conf"
  for i in $(seq "$N"); do
    mkdir -p "$D/spool/node$i"
    launch "node$i" ip netns exec "ssl$K-node$i" unshare --uts --mount bash -c 'hostname "$1"
      mount --make-rprivate /; mount --bind "$2/hosts" /etc/hosts
      mount --bind "$2/resolv.conf" /etc/resolv.conf; exec slurmd -D -c -N "$1" -f "$2/slurm.conf"' _ "node$i" "$D"
  done
  for _ in $(seq 120); do
    alive "$D/run/slurmctld.pid" || fail "slurmctld has exited"
    if [ "$(timeout 5 sinfo -h -N -p debug -o %t 2>/dev/null | grep -c '^idle$')" = "$N" ]; then
      echo "export SLURM_CONF=$D/slurm.conf" >"$D/env.sh"; say "$N nodes are up: source $D/env.sh"; return
    fi
    sleep 0.25
  done
  fail "the nodes did not start"
}

stop() {
  [ -s "$D/number" ] || return 0
  K=$(cat "$D/number")
  for file in "$D"/run/*.pid; do ! alive "$file" || kill "$(cat "$file")" 2>/dev/null || true; done
  for space in $(ip netns list | grep -oE "^ssl$K-node[0-9]+" || true); do
    for pid in $(ip netns pids "$space"); do kill -KILL "$pid" 2>/dev/null || true; done  # jobs outlive slurmd
    ip netns del "$space"
  done
  for _ in $(seq 30); do
    local left=0; for file in "$D"/run/*.pid; do ! alive "$file" || left=1; done
    [ $left = 1 ] || break; sleep 0.1
  done
  for file in "$D"/run/*.pid; do ! alive "$file" || kill -KILL "$(cat "$file")" 2>/dev/null || true; done
  ip link del "sslbr$K" 2>/dev/null || true
  rm -rf "$D"/{run,state,spool,munge,env.sh,number,gpu0,gpu1}
}

case $1 in
  start) N=${3:-2}; start ;;
  unplug) ip link set "ssl$(cat "$D/number")-h${3#node}" down ;;
  plug) ip link set "ssl$(cat "$D/number")-h${3#node}" up ;;
  stop) stop ;;
  *) usage ;;
esac
