#!/usr/bin/env bash
# The site of docs/, in an environment of its own (.venv-docs):   bash scripts/docs.sh [mkdocs command]
# Without a command it is built into build/site; a link, an anchor or a page that is not there fails.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
# shellcheck source=scripts/environment.sh
source "$root/scripts/environment.sh"
prepare_docs "$root"
cd "$root"
# What the theme's authors say of another major version of mkdocs is none of ours.
export NO_MKDOCS_2_WARNING=1
if (($# == 0)); then set -- build --strict; fi
exec .venv-docs/bin/python -m mkdocs "$@"
