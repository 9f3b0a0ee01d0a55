# Sourced by quickstart.sh and test.sh: makes .venv beside this folder's parent and installs avllm with pinned versions.
# Safe to run twice: nothing happens when the pins, the project's dependencies and this file have not changed.

die() { echo "avllm: $*" >&2; exit 1; }

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)" || die "cannot find the project's folder"
VENV="$ROOT/.venv"
STAMP="$VENV/.installed"

find_python() {
  local candidate
  for candidate in "${PYTHON:-}" python3.13 python3.12 python3.11 python3; do
    if [ -n "$candidate" ] && command -v "$candidate" >/dev/null 2>&1 \
      && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return 0
    fi
  done
  return 1
}

install_environment() {
  local wanted python free
  wanted="$(cat "$ROOT/constraints.txt" "$ROOT/pyproject.toml" "$ROOT/scripts/environment.sh" | sha256sum | cut -d' ' -f1)" || die "sha256sum is missing"
  if [ -x "$VENV/bin/avllm" ] && [ "$(cat "$STAMP" 2>/dev/null)" = "$wanted" ]; then
    return 0
  fi
  python="$(find_python)" || die "python >= 3.11 is needed; found: $(python3 --version 2>&1). Install it, or set PYTHON=/its/path"
  "$python" -c 'import venv, ensurepip' 2>/dev/null || die "$python has no venv module; install it (Debian: apt-get install python3-venv)"
  free="$(df -Pk "$ROOT" | awk 'NR == 2 { print int($4 / 1048576) }')"
  [ -x "$VENV/bin/python" ] || [ "$free" -ge 10 ] || die "10 GB of free disk are needed for the packages; $ROOT has $free GB"
  [ -x "$VENV/bin/python" ] || "$python" -m venv "$VENV" || die "could not make $VENV"
  echo "avllm: installing pinned packages into .venv (about 6 GB, a few minutes the first time; Ray is 0.2 GB of it)"
  "$VENV/bin/python" -m pip install --quiet --constraint "$ROOT/constraints.txt" uv 2>/dev/null \
    || "$VENV/bin/python" -m pip install --quiet uv || die "pip could not reach a package index"
  # Compiled once here: where Python may not write bytecode itself, each process would compile its imports for 20 s.
  "$VENV/bin/uv" pip install --quiet --compile-bytecode --python "$VENV/bin/python" --constraint "$ROOT/constraints.txt" \
    --editable "$ROOT[train,serve,test,ray,docs]" || die "the installation failed; the lines above say why"
  echo "$wanted" >"$STAMP"
}
