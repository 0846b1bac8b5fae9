#!/bin/sh
# The first ten minutes with a clone of expexp on a new Debian, as a transcript. As root:
#
#   bench/first_minutes.sh                        # make run, and some tests, in each case below
#   TESTS= bench/first_minutes.sh                 # all tests, where they can run
#   DEBIAN=/tmp/debian bench/first_minutes.sh     # takes that system, or makes it there
#
# debootstrap makes a Debian of this host's version with python3, make and git, from the mirror that
# apt of this host uses. Each case is an overlay of it, and leaves nothing. Test tools come from this
# host's pip (PYTHON, by default that of .venv), since a new Debian may reach no package registry.
set -eu
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf --one-file-system "$work"' EXIT
tests=${TESTS-"-q -k 'test_main_without_serving or file_alone or property'"}
python=${PYTHON:-.venv/bin/python}
debian=${DEBIAN:-$work/debian}

if [ ! -e "$debian/etc/debian_version" ]; then
    mkdir -p "$debian"
    set -- $(apt-get indextargets --format '$(RELEASE) $(REPO_URI)' 'Component: main' | head -n 1)
    unshare --mount debootstrap --variant=minbase --include=git,make,python3 \
        "$1" "$debian" "$2" >"$work/log" || { cat "$work/log"; exit 1; }
    echo "127.0.0.1 localhost" >"$debian/etc/hosts"
fi
echo "Debian $(cat "$debian/etc/debian_version"), $(du -sm "$debian" | cut -f 1) MiB"
mkdir "$work/share" "$work/place"
git clone -q --bare --no-local . "$work/share/expexp.git"
sed -n '/^dev = \[/,/^\]/s/^ *"\(.*\)",$/\1/p' pyproject.toml >"$work/requirements"
"$python" -m pip download -qqq --disable-pip-version-check --only-binary :all: \
    -d "$work/share/wheels" -r "$work/requirements"

# Runs its stdin in an overlay of the Debian, where the folder `share` is /srv.
inside() {
    cat >"$work/share/script"
    unshare "$@" --mount --pid --fork --kill-child sh -euc '
        mount -t tmpfs tmpfs "$2"
        cd "$2"
        mkdir upper work root
        mount -t overlay -o "lowerdir=$1,upperdir=upper,workdir=work" overlay root
        cd root
        mount -t proc proc proc
        for device in null zero full random urandom; do
            [ -e dev/$device ] || touch dev/$device
            mount --bind /dev/$device dev/$device
        done
        mount --bind -o ro "$3" srv
        cat /etc/resolv.conf >etc/resolv.conf
        ip link set lo up
        exec chroot . env -i HOME=/root PATH=/usr/sbin:/usr/bin:/sbin:/bin DEBIAN_FRONTEND=noninteractive \
            TESTS="$4" sh /srv/script 2>&1
    ' sh "$debian" "$work/place" "$work/share" "$tests" || echo "ended with $?"
}

# The steps of a user; $1 are the packages that he has installed, $2 pip's settings.
steps() {
    cat <<END
ask() { python3 -c 'import sys, urllib.request as u; print(u.urlopen(sys.argv[1]).read().decode())' "\$1"; }
say() { printf '\$ %s\n' "\$*"; }
if [ -n "$1" ]; then
    apt-get update -qq
    apt-get install -qq -y --no-install-recommends $1 >/dev/null 2>&1
fi
cd /root
say git clone expexp
git clone -q /srv/expexp.git expexp
cd expexp
say make run
make run >/tmp/log 2>&1 &
for _ in \$(seq 200); do
    if ask 'http://localhost:9999/-/ready' >/dev/null 2>&1; then break; fi
    sleep 0.1
done
cat /tmp/log
for module in demo_script self; do
    say "curl 'http://localhost:9999/proxy?module=\$module'"
    ask "http://localhost:9999/proxy?module=\$module" | head -n 3
done
export $2
say "make test ARGS=\"\$TESTS\""
start=\$(date +%s)
code=0
make test ARGS="\$TESTS" >/tmp/test 2>&1 || code=\$?
noise='^(SKIPPED|Selecting|Preparing|Unpacking|Setting up|Processing|Updating|Running|[0-9]+ added|done)'
grep -Ev "\$noise" /tmp/test | tail -n 25
echo "make test: exit code \$code, \$((\$(date +%s) - start)) s"
END
}

wheels="PIP_NO_INDEX=1 PIP_FIND_LINKS=/srv/wheels"
for packages in "" python3-yaml python3-venv; do
    echo
    echo "=== python3, make, git ${packages:+and $packages}"
    steps "$packages" "$wheels" | inside --uts
done
echo
echo "=== python3, make, git, without a network"
steps "" A=B | inside --net
echo
echo "=== python3, make, git and python3-venv, without a package registry"
steps python3-venv PIP_INDEX_URL=http://localhost:1/simple | inside --uts
