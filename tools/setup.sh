#!/usr/bin/env bash
# Makes .venv with the pinned dependencies and this package, editable. Run by `make install`; safe to repeat and to interrupt.
#
#   PYTHON=python3.12    use this interpreter (default: the first suitable one on PATH)
#   EXTRAS=dev,data      extras to install (default: dev)
#   UV_TORCH_BACKEND=…   which torch uv fetches: auto (default: what the driver here supports), cpu, cu128, …
#
# uv does the work where there is one, on PATH or from the package index; otherwise pip does, more slowly.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=.venv
stamp=$venv/.installed
pins=constraints/pins.txt
cpu_wheels=https://download.pytorch.org/whl/cpu

fail() { echo "setup: $*" >&2; exit 1; }

# A setting of pip's, from the environment or its configuration files, as one line: uv reads neither.
pip_setting() { # python, name of the environment variable, name in the configuration
    local value=${!2:-}
    [ -n "$value" ] || value=$("$1" -m pip config get "global.$3" 2>/dev/null) || true
    echo "$value" | xargs
}

suitable() { "$1" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

# pip may point at a folder of wheels that holds torch, usually the CPU build and for one version of Python only.
offers_torch() { # python
    local folder tag
    tag=$("$1" -c 'import sys; print("cp%d%d" % sys.version_info[:2])')
    for folder in $(pip_setting "$1" PIP_FIND_LINKS find-links); do
        compgen -G "${folder#file://}/torch-*-$tag-*.whl" >/dev/null && return
    done
    return 1
}

find_python() {
    local candidate first=
    for candidate in ${PYTHON:-python3.13 python3.12 python3.11 python3}; do
        suitable "$candidate" || continue
        if offers_torch "$candidate"; then echo "$candidate"; return; fi
        first=${first:-$candidate}
    done
    echo "$first"
}

rm -f "$stamp"
if ! suitable "$venv/bin/python" || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    python=$(find_python)
    [ -n "$python" ] || fail "found no Python 3.11 or newer with its venv module (python3 is $(python3 --version 2>/dev/null || echo missing));" \
        "install one, or name it: PYTHON=/path/to/python3.11 make install"
    "$python" -m venv --clear "$venv"
fi
python=$venv/bin/python

find_links=$(pip_setting "$python" PIP_FIND_LINKS find-links)
backend=${UV_TORCH_BACKEND:-auto}
[ -n "${UV_TORCH_BACKEND:-}" ] || ! offers_torch "$python" || backend=
packages=(-e ".[${EXTRAS:-dev}]" -c "$pins")

install_with_uv() {
    local uv=uv index extra
    if ! "$uv" --version >/dev/null 2>&1; then
        uv=$venv/bin/uv
        "$uv" --version >/dev/null 2>&1 || "$python" -m pip install -q --disable-pip-version-check uv -c "$pins" || return
    fi
    index=$(pip_setting "$python" PIP_INDEX_URL index-url)
    extra=$(pip_setting "$python" PIP_EXTRA_INDEX_URL extra-index-url)
    [ -z "$find_links" ] || export UV_FIND_LINKS="${find_links// /,}"
    [ -z "$index" ] || export UV_DEFAULT_INDEX="$index"
    [ -z "$extra" ] || export UV_INDEX="$extra" UV_INDEX_STRATEGY=unsafe-best-match # pip's own way with several indexes
    unset UV_TORCH_BACKEND
    "$uv" pip install $([ -t 2 ] || echo -q) --python "$python" ${backend:+--torch-backend "$backend"} "${packages[@]}"
}

install_with_pip() {
    # On Linux the default torch brings gigabytes of CUDA along; without a GPU the CPU build does.
    if [ -n "$backend" ] && [ "$(uname)" = Linux ] && ! command -v nvidia-smi >/dev/null; then
        "$python" -m pip install -q --disable-pip-version-check --no-deps --index-url "$cpu_wheels" -c "$pins" torch || return
    fi
    "$python" -m pip install -q --disable-pip-version-check "${packages[@]}"
}

echo "Installing into $venv ($("$python" --version))"
install_with_uv || { echo "setup: uv did not manage; trying pip" >&2; install_with_pip; } ||
    fail "the installation failed (the reason is above); mend it and run the same command again, which goes on from here"
"$python" -c 'import ncn, torch; print("Ready: torch", torch.__version__, "on", "CUDA" if torch.cuda.is_available() else "CPU")'
touch "$stamp"
