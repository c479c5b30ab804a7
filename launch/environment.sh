#!/usr/bin/env bash
# The Python environment of all scripts here: `[EXTRAS="NAME ..."] . launch/environment.sh` (extras of setup.cfg; not as words
# behind it: without such, the file would see those of the script that reads it).
#
# Uses, in this order: the interpreter that DIST_SUBSPACE_PYTHON names; the active virtual environment; `.venv` in the
# repository, made on first use. What is missing is installed with the versions of launch/constraints.txt. A machine
# whose own Python has a torch that sees a GPU keeps that torch: `.venv` is then made on top of it, without torch's pin.
# Afterwards `python` is that interpreter, and ROOT is the repository.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
CONSTRAINTS="$ROOT/launch/constraints.txt"

say() { echo "[environment] $*" >&2; }

has_gpu_torch() { nvidia-smi >/dev/null 2>&1 && "$1" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' 2>/dev/null; }

choose_python() {
    local base="${DIST_SUBSPACE_BASE_PYTHON:-python3}"
    if [ -n "${DIST_SUBSPACE_PYTHON:-}" ]; then
        PYTHON="$DIST_SUBSPACE_PYTHON"
    elif [ -n "${VIRTUAL_ENV:-}" ]; then
        PYTHON="$VIRTUAL_ENV/bin/python"
    else
        PYTHON="$ROOT/.venv/bin/python"
        [ -x "$PYTHON" ] || make_venv "$base" || return 1
    fi
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        { say "$PYTHON is older than Python 3.11 or does not start"; return 1; }
}

make_venv() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
        { say "$1 is not Python 3.11 or newer; name one by DIST_SUBSPACE_BASE_PYTHON"; return 1; }
    local flags=()
    has_gpu_torch "$1" && flags=(--system-site-packages)
    say "making .venv with $("$1" --version 2>&1)"
    "$1" -m venv "${flags[@]}" "$ROOT/.venv" || { say "no virtual environment could be made in $ROOT/.venv"; return 1; }
}

# Whether everything that setup.cfg asks for is there, without asking any index.
satisfied() {
    "$PYTHON" - "$ROOT" "$@" <<'PYTHON'
import configparser, importlib.metadata as metadata, pathlib, sys
try:
    from packaging.requirements import Requirement
except ImportError:
    from pip._vendor.packaging.requirements import Requirement
root, extras = pathlib.Path(sys.argv[1]), sys.argv[2:]
options = configparser.ConfigParser()
options.read(root / "setup.cfg")
lists = [options["options"]["install_requires"], *(options["options.extras_require"][extra] for extra in extras)]
wanted = [Requirement(line) for text in lists for line in text.splitlines() if line and not line.startswith("#")]
missing = []
for requirement in wanted:
    try:
        if not requirement.specifier.contains(metadata.version(requirement.name), prereleases=True):
            missing.append(str(requirement))
    except metadata.PackageNotFoundError:
        missing.append(str(requirement))
if missing:
    print(", ".join(missing))
sys.exit(bool(missing))
PYTHON
}

quiet_pip() {
    "$PYTHON" -m pip install -qq --disable-pip-version-check "$@" || { say "pip could not install: $*"; return 1; }
}

install() {
    local extras constraints="$CONSTRAINTS" missing
    extras="$(IFS=,; echo "$*")"
    if has_gpu_torch "$PYTHON"; then
        constraints="$(mktemp)"
        grep -v '^torch==' "$CONSTRAINTS" > "$constraints"
        "$PYTHON" -c 'from importlib.metadata import version; print("torch==" + version("torch"))' >> "$constraints"
        say "keeping $(tail -n 1 "$constraints"), which sees a GPU"
    fi
    if missing="$(satisfied "$@")"; then
        say "all requirements are met by $PYTHON"
    else
        say "missing: $missing"
        # Before all others: what builds against torch must find this one.
        say "installing torch (the longest part of a first run)"
        quiet_pip --constraint "$constraints" torch || return 1
        say "installing the other packages"
        DS_BUILD_OPS=0 quiet_pip --constraint "$constraints" --editable "$ROOT${extras:+[$extras]}" || return 1
    fi
    [ "$constraints" = "$CONSTRAINTS" ] || rm -f "$constraints"
}

prepare_environment() {
    local stamp key start=$SECONDS
    choose_python || return 1
    key="$(cat "$ROOT/setup.cfg" "$CONSTRAINTS" | cksum | tr -d ' ')-$(echo "$ROOT $*" | cksum | tr -d ' ')"
    stamp="$("$PYTHON" -c 'import sys; print(sys.prefix)')/.dist-subspace-$key"
    if [ ! -e "$stamp" ]; then
        install "$@" || return 1
        touch "$stamp" 2>/dev/null || true
        say "ready after $((SECONDS - start)) s"
    fi
    # The commands beside the interpreter (deepspeed, ruff, ...), and the package from this folder whatever is installed.
    PATH="$(dirname "$PYTHON"):$PATH"
    PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
    export PATH PYTHONPATH TOKENIZERS_PARALLELISM=false
    if ! nvidia-smi >/dev/null 2>&1; then
        export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}"
    fi
}

read -ra extras_wanted <<<"${EXTRAS:-}"
prepare_environment "${extras_wanted[@]}"
