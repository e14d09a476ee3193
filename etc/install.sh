#!/bin/sh
# Installs what `cargo build --release` has built: the program without its debug information, the debug information in a
# file of its own, manual pages, completions, documentation, systemd units and a configuration. Run it as root.
#
#     etc/install.sh                          for this machine
#     etc/install.sh --workers                the sockets start dispatcher-workers.service, not dispatcher.service
#     DESTDIR=/tmp/package etc/install.sh     for a package
#
# Existing files that administrators edit are kept: /etc/dispatcher/dispatcher.toml and worker@.service. Changes to the
# other units belong into drop-ins (systemctl edit dispatcher.service), which an update keeps too.
set -eu
cd "$(dirname "$0")/.."
built=${CARGO_TARGET_DIR:-target}/release/dispatcher
root=${DESTDIR:-}
units=$root/etc/systemd/system
case ${1:-} in
'' | --workers) ;;
*) echo "usage: etc/install.sh [--workers]" >&2; exit 64 ;;
esac
temporary=$(mktemp -d)
trap 'rm -rf "$temporary"' EXIT

# Debuggers, systemd-coredump and the program's own backtraces find it in /usr/lib/debug by the name in the program.
objcopy --only-keep-debug "$built" "$temporary/dispatcher.debug"
objcopy --strip-all --add-gnu-debuglink="$temporary/dispatcher.debug" "$built" "$temporary/dispatcher"
install -D -m 755 "$temporary/dispatcher" "$root/usr/bin/dispatcher"
install -D -m 644 "$temporary/dispatcher.debug" "$root/usr/lib/debug/usr/bin/dispatcher.debug"

"$built" man --out "$root/usr/share/man/man1"
for shell in bash zsh fish; do
    "$built" completions "$shell" --program dispatcher > "$temporary/$shell"
done
install -D -m 644 "$temporary/bash" "$root/usr/share/bash-completion/completions/dispatcher"
install -D -m 644 "$temporary/zsh" "$root/usr/share/zsh/vendor-completions/_dispatcher"
install -D -m 644 "$temporary/fish" "$root/usr/share/fish/vendor_completions.d/dispatcher.fish"
for page in README.md CHANGELOG.md SECURITY.md docs/*.md etc/dispatcher.toml; do
    install -D -m 644 "$page" "$root/usr/share/doc/dispatcher/$(basename "$page")"
done

# The directory of the relay, if it was built: cargo build --release -p dispatch-directory
directory=${CARGO_TARGET_DIR:-target}/release/dispatch-directory
if [ -e "$directory" ]; then
    objcopy --strip-all "$directory" "$temporary/dispatch-directory"
    install -D -m 755 "$temporary/dispatch-directory" "$root/usr/bin/dispatch-directory"
    install -D -m 644 etc/dispatch-directory.service "$units/dispatch-directory.service"
    install -D -m 644 etc/directory.toml "$root/usr/share/doc/dispatcher/directory.toml"
fi

for unit in dispatcher.service dispatcher-workers.service dispatcher-steer.service \
    dispatcher.socket dispatcher-dispatch.socket; do
    install -D -m 644 "etc/$unit" "$units/$unit"
done
if [ "${1:-}" = --workers ]; then
    printf '[Socket]\nService=dispatcher-workers.service\n' > "$temporary/workers.conf"
    for unit in dispatcher.socket dispatcher-dispatch.socket; do
        install -D -m 644 "$temporary/workers.conf" "$units/$unit.d/workers.conf"
    done
fi
[ -e "$units/worker@.service" ] || install -D -m 644 etc/worker@.service "$units/worker@.service"
[ -e "$root/etc/dispatcher/dispatcher.toml" ] ||
    install -D -m 644 etc/dispatcher-systemd.toml "$root/etc/dispatcher/dispatcher.toml"
