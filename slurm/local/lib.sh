# Shared by the commands beside it. A machine of the cluster (`head`, or a node) is a set of namespaces whose
# process 1 is `machine`: it lives as a whole or not at all, and is found by its label: no pid file can be stale.
set -euo pipefail
umask 022
export PATH="$PATH:/usr/sbin:/sbin"

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
STATE=$(realpath -m "${PACKCLI_SLURM_DIR:-/tmp/packcli-slurm}")
PORT=${PACKCLI_SLURM_PORT:-16810}
NODES=(node0 node1 node2 node3)
export SLURM_CONF=$STATE/slurm.conf

say() { echo "$*" >&2; }

# fail EXIT_CODE CAUSE [HINT]
fail() {
    say "error: $2"
    [[ -z ${3-} ]] || say $'\n'"hint: $3"
    exit "$1"
}

only_root() {
    [[ $EUID == 0 ]] || fail 6 "the local cluster needs root: it makes namespaces, device files and daemons" \
        "run it in a container or a virtual machine of your own"
}

# one_machine ARGUMENT...: sets NAME from the only argument, one of "head" and the nodes.
one_machine() {
    local known="head ${NODES[*]}"
    [[ $# == 1 && " $known " == *" $1 "* ]] || fail 2 "usage: ${0##*/} NAME, one of: $known"
    NAME=$1
}

# One command changes the cluster at a time. Machines must not inherit file 9: they would hold the lock for ever.
lock() {
    exec 9>"$STATE/lock"
    flock --wait 180 9 || fail 5 "another command has held $STATE/lock for 180 s"
}

label() { echo "packcli-slurm:$STATE:$1"; }

# The process ids of a machine's process 1 and of the `unshare` that waits for it.
pids() { grep -lszxF --regexp="$(label "$1")" /proc/[0-9]*/cmdline | cut -d/ -f3 || true; }

alive() { [[ -n $(pids "$1") ]]; }

# until_true SECONDS COMMAND...: fails where the command still does after that time.
until_true() {
    local end=$((SECONDS + $1))
    shift
    until "$@"; do
        ((SECONDS < end)) || return 1
        sleep 0.1
    done
}

gone() { ! alive "$1"; }

# kill_all NAME: SIGKILL to process 1, with which the kernel kills every process of the machine. `unshare` is left
# to end by itself, because it does so only after the last of them, when their ports are free again.
kill_all() {
    local pid
    for pid in $(pids "$1"); do
        [[ $(cat "/proc/$pid/comm" 2>/dev/null) == unshare ]] || kill -KILL "$pid" 2>/dev/null || true
    done
    gone "$1"
}

power_off() { until_true 20 kill_all "$1" || fail 7 "$1 cannot be killed" "ps -p $(pids "$1" | xargs)"; }

power_on() {
    alive "$1" && return
    date +%FT%T >"$STATE/$1.booted"
    # A clean environment: what the caller has set is no business of daemons, and would reach jobs.
    env -i PATH="$PATH" HOME=/root SLURM_CONF="$SLURM_CONF" \
        setsid unshare --uts --pid --mount --fork --mount-proc --propagation private \
        "$HERE/machine" "$(label "$1")" </dev/null >"$STATE/log/$1.log" 2>&1 9>&- &
    until_true 10 alive "$1" || died "$1"
}

controller_answers() {
    alive head || died head
    scontrol ping 2>/dev/null | grep -q 'is UP' && accounting_answers
}

# The controller has made itself known to the database.
accounting_answers() { [[ $(sacctmgr -nP show cluster local format=ControlHost 2>/dev/null) == 127.0.0.1 ]]; }

# usable NODE...: the controller may give each of them a job. Where a node was down (SLURM then states a reason),
# it is put back into service, once the slurmd of this boot has registered. `State` may lag: MIXED, though dead.
usable() {
    local node record ready=0
    for node in "$@"; do
        alive "$node" || died "$node"
        record=$(scontrol --oneliner show node "$node" 2>/dev/null) || return 1
        [[ $record =~ SlurmdStartTime=([^ ]+) && ! ${BASH_REMATCH[1]} < $(<"$STATE/$node.booted") ]] || ready=1
        if [[ $ready == 0 && $record == *" Reason="* ]]; then
            scontrol update "nodename=$node" state=resume 2>/dev/null || true
            ready=1
        fi
        [[ $record =~ \ State=(IDLE|MIXED|ALLOCATED|COMPLETING)(\+COMPLETING)?\  ]] || ready=1
    done
    return "$ready"
}

died() {
    grep -hiE 'fatal|error' "$STATE/log/$1.log" | tail -n 3 >&2
    fail 7 "$1 ended while it started" "logs are in $STATE/log; a port taken: set PACKCLI_SLURM_PORT (now $PORT)"
}

wait_for_controller() {
    until_true 90 controller_answers || fail 7 "the controller does not answer" "logs are in $STATE/log"
}

wait_for_nodes() { until_true 60 usable "$@" || fail 7 "not all of $* came up" "sinfo; logs are in $STATE/log"; }

# Ends what this state directory started and nothing else. Jobs are cancelled, or the next start would run them.
shut_down() {
    local name
    if alive head && scontrol ping 2>/dev/null | grep -q 'is UP'; then
        squeue -h -o %A | sort -u | xargs -r scancel || true
        scontrol shutdown slurmctld >/dev/null 2>&1 || true # saves its state, and the head goes down with it
        until_true 10 gone head || true
    fi
    for name in head "${NODES[@]}"; do power_off "$name"; done
}
