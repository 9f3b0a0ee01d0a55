#!/usr/bin/env bash
# Make the environment when it is missing, then check style, format and types. Nothing is changed.
set -uo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install_environment
cd "$ROOT" || die "cannot enter $ROOT"
"$VENV/bin/ruff" check . || die "ruff reports errors; 'make format' fixes many of them"
"$VENV/bin/ruff" format --check . || die "files are not formatted; run 'make format'"
"$VENV/bin/mypy" || die "the type checker reports errors"
