#!/bin/sh
# engine.sh run|exec|stop ...
#
# What the page uses of a container engine, by namespaces: each container has process and mount namespaces of its own, and
# with `--network none` a network namespace. SITE has the volume, which is /run/dispatcher inside, and the outputs.
set -eu

# The first process in a container, as seen from outside.
first() {
    read -r outer < "$SITE/containers/$1"
    # A list without an end of line.
    inner=$(cat "/proc/$outer/task/$outer/children")
    echo "${inner%% *}"
}

action=$1
shift
case $action in
run)
    network=
    while [ "${1#-}" != "$1" ]; do
        case $1 in
        -d) shift ;;
        --name) name=$2; shift 2 ;;
        --network) [ "$2" = host ] || network=--net; shift 2 ;;
        -v) [ "$2" = dispatcher:/run/dispatcher ]; shift 2 ;;
        -e) export "$2"; shift 2 ;;
        esac
    done
    image=$1
    shift
    case $image in
    dispatcher:*) [ "$1" = dispatcher ] ;;
    my-server:*) set -- "$WORKER" blocking ;;
    esac
    # shellcheck disable=SC2016
    inside='mount -t tmpfs tmpfs /run && mkdir /run/dispatcher && mount --bind "$SITE/volume" /run/dispatcher && exec "$@"'
    # shellcheck disable=SC2086
    unshare --mount --propagation private --pid --fork --kill-child --mount-proc $network \
        sh -c "$inside" sh "$@" > "$SITE/containers/$name.log" 2>&1 &
    echo $! > "$SITE/containers/$name"
    ;;
exec)
    container=$1
    shift
    exec nsenter -t "$(first "$container")" --mount --pid "$@"
    ;;
stop)
    [ "$1" = --time ]
    inner=$(first "$3")
    kill -TERM "$inner"
    tries=0
    until [ ! -e "/proc/$inner" ] || [ "$tries" = "$2" ]; do
        tries=$((tries + 1))
        sleep 0.1
    done
    ;;
esac
