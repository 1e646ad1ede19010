# shellcheck shell=bash
# To be sourced from the project's root: `run_tool tools/NAME.py FLAGS...` takes the place of the
# shell, in the environment that is active, else in .venv; DRY_RUN=1 prints the command instead.

run_tool() {
    if [[ -n ${DRY_RUN:-} ]]; then
        printf '%q ' python "$@"
        echo
        exit 0
    fi
    if ! command -v torchrun >/dev/null; then PATH=$PWD/.venv/bin:$PATH; fi
    exec python "$@"
}
