#!/usr/bin/env bash
# A release: the source distribution and the wheel in dist/, and the wheel tested where nothing else of the repository is.
#   launch/release.sh [pytest arguments ...]
#   OUT=...        another folder than dist/, which must not hold distributions already
#   FROM_INDEX=1   the wheel's requirements come from the package index; unset: those of this environment are lent to it
# The tests are those of the unpacked source distribution, whose own copy of the package is taken away first.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
EXTRAS="test release" . launch/environment.sh
unset PYTHONPATH
out="${OUT:-dist}"
if compgen -G "$out/dist_subspace-*" >/dev/null; then
    echo "launch/release.sh: $out holds distributions already; take them away, or name another folder by OUT" >&2
    exit 2
fi
place="$(mktemp -d)" top="$PWD"
trap 'rm -rf "$place" "$top/MANIFEST.in"' EXIT

say "building the source distribution, and the wheel from it"
cp launch/MANIFEST.in .  # setuptools looks for it there alone
python -m build --no-isolation --outdir "$out" . >"$place/build.log" 2>&1 || { tail -n 40 "$place/build.log" >&2; exit 1; }
wheel="$(ls "$out"/dist_subspace-*.whl)"
sdist="$(ls "$out"/dist_subspace-*.tar.gz)"

say "installing $wheel into an environment of its own"
python -m venv ${FROM_INDEX:+--upgrade-deps} "$place/venv"
if [ -n "${FROM_INDEX:-}" ]; then
    "$place/venv/bin/python" -m pip install -qq --constraint launch/constraints.txt "${wheel}[test]"
else
    "$place/venv/bin/python" -m pip install -qq --disable-pip-version-check --no-index --no-deps "$wheel"
    # Behind the environment's own packages: the wheel's copy of this package is found first.
    python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >"$("$place/venv/bin/python" -c \
        'import sysconfig; print(sysconfig.get_path("purelib"))')/lent.pth"
fi

mkdir "$place/source"
tar -xzf "$sdist" -C "$place/source" --strip-components 1
rm -rf "$place/source/dist_subspace"
cd "$place/source"
version="$("$place/venv/bin/python" -c 'import dist_subspace; print(dist_subspace.__version__)')"
home="$("$place/venv/bin/python" -c 'import dist_subspace; print(dist_subspace.__file__)')"
case "$home" in
"$place/venv"/*) ;;
*) echo "launch/release.sh: dist_subspace is imported from $home, not from the wheel" >&2; exit 1 ;;
esac
case "$(basename "$wheel")" in
"dist_subspace-$version-py3-none-any.whl") ;;
*) echo "launch/release.sh: $wheel is not of version $version" >&2; exit 1 ;;
esac
"$place/venv/bin/dist-subspace" schema >/dev/null
say "testing version $version from the wheel"
[ $# -gt 0 ] || set -- tests/test_cli.py tests/config/test_load.py tests/subspace/test_methods.py
"$place/venv/bin/python" -m pytest -q -p no:cacheprovider "$@"
say "$wheel and $sdist are version $version"
