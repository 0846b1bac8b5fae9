#!/bin/sh
# Makes the folder dist: expexp.py with its revision, VERSION, a package for Debian, and SHA256SUMS.
# Equal commits give equal bytes: names, dates and owners depend on the commit alone.
#
#   make dist                          # in a clone of the repository, with dpkg-deb
#   cd dist && sha256sum -c SHA256SUMS
set -eu
cd "$(dirname "$0")/.."
umask 022
export LC_ALL=C TZ=UTC PYTHONDONTWRITEBYTECODE=1
python=${PYTHON:-python3}
debian=contrib/debian

for program in git dpkg-deb; do
    if ! command -v "$program" >/dev/null; then
        echo "make dist needs $program, which is not installed" >&2
        exit 1
    fi
done
if ! commit=$(git rev-parse --short=12 HEAD 2>/dev/null) || [ -n "$(git rev-parse --show-prefix)" ]; then
    echo "make dist needs a clone of the repository: it writes the commit into expexp.py" >&2
    exit 1
fi
revision=$commit
export SOURCE_DATE_EPOCH="${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct)}"
version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' expexp.py)
# What no release has yet is newer than the release before, and older than the next one.
if grep -q '^## Unreleased$' CHANGELOG.md; then
    version=$version+git$(date -d "@$SOURCE_DATE_EPOCH" +%Y%m%d%H%M%S).$commit
fi
if [ -n "$(git status --porcelain)" ]; then
    echo "Not all is committed: the revision gets the ending -dirty" >&2
    revision=$commit-dirty
    version=$version.dirty
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
out=$work/dist
root=$work/root
program=$root/usr/share/expexp-py
doc=$root/usr/share/doc/expexp-py

# put MODE FILE PLACE: as install does, with the folders above. Without a FILE: of stdin.
put() {
    mkdir -p "$(dirname "$3")"
    cat "$2" >"$3"
    chmod "$1" "$3"
}

sed "s/^REVISION = \"unknown\"/REVISION = \"$revision\"/" expexp.py |
    put 0755 - "$out/expexp.py"
grep -q "^REVISION = \"$revision\"" "$out/expexp.py"
echo "$version" | put 0644 - "$out/VERSION"

put 0644 "$out/expexp.py" "$program/expexp.py"
put 0644 contrib/expolint.py "$program/expolint.py"
put 0644 contrib/fleet_sd.py "$program/fleet_sd.py"
for command in expexp:expexp expolint:expolint expexp-fleet-sd:fleet_sd; do
    name=${command%:*}
    module=${command#*:}
    sed "s/@MODULE@/$module/" "$debian/command" | put 0755 - "$root/usr/bin/$name"
    if [ "$name" = expexp ]; then set -- $(cat "$debian/conffiles"); else set --; fi
    "$python" contrib/manual.py "$program" "$module" "$name" "${version%%+*}" "$@" >"$work/manual"
    gzip -9n <"$work/manual" | put 0644 - "$root/usr/share/man/man1/$name.1.gz"
done
# The lines with commands at the top of the unit are for an installation by hand.
sed -e '/^#   /d' -e 's|/opt/expexp|/usr/share/expexp-py|' \
    -e 's|^Description=.*|&\nDocumentation=man:expexp(1)|' contrib/expexp.service |
    put 0644 - "$root/usr/lib/systemd/system/expexp.service"
put 0755 "$debian/rtupdate" "$root/usr/share/python3/runtime.d/expexp-py.rtupdate"
put 0640 expexp.yaml.example "$root/etc/expexp/expexp.yaml"
put 0644 "$debian/default" "$root/etc/default/expexp"
put 0644 "$debian/copyright" "$doc/copyright"
for file in README.md CHANGELOG.md docs/* bench/README.md expexp.yaml.example contrib/Dockerfile \
    contrib/*.yml contrib/*.json contrib/expexp.service.d/*.conf; do
    put 0644 "$file" "$doc/$file"
done
# What the documents link to and the package has elsewhere.
ln -s ../../expexp-py/expexp.py "$doc/expexp.py"
ln -s ../../../expexp-py/fleet_sd.py "$doc/contrib/fleet_sd.py"
ln -s ../../../../lib/systemd/system/expexp.service "$doc/contrib/expexp.service"
ln -s ../../common-licenses/Apache-2.0 "$doc/LICENSE"
printf '%s\n' "expexp-py ($version) unstable; urgency=medium" "" \
    "  * CHANGELOG.md has the changes." "" \
    " -- expexp <root@localhost>  $(date -R -d "@$SOURCE_DATE_EPOCH")" |
    gzip -9n | put 0644 - "$doc/changelog.gz"

size=$(find "$root" -type f -printf '%s\n' | awk '{ size += int(($1 + 1023) / 1024) } END { print size }')
sed -e "s/@VERSION@/$version/" -e "s/@SIZE@/$size/" "$debian/control" |
    put 0644 - "$root/DEBIAN/control"
put 0644 "$debian/conffiles" "$root/DEBIAN/conffiles"
for script in postinst prerm postrm; do put 0755 "$debian/$script" "$root/DEBIAN/$script"; done
(cd "$root" && find usr -type f | sort | xargs md5sum) | put 0644 - "$root/DEBIAN/md5sums"
find "$root" -exec touch -h -d "@$SOURCE_DATE_EPOCH" {} +
package=expexp-py_${version}_all.deb
dpkg-deb --root-owner-group -Zgzip --build "$root" "$out/$package" >/dev/null
(cd "$out" && sha256sum expexp.py "$package" | put 0644 - SHA256SUMS)

rm -rf dist
cp -R "$out" dist
cat dist/SHA256SUMS
