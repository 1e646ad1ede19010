# shellcheck shell=bash
# shellcheck disable=SC2034 # `container` is for who sources this
# A container by one variable. To be sourced; container_words sets `container`, the words ahead of
# what is to run in it, behind srun's own flags:
#
#     CONTAINER=image.sif              apptainer
#     CONTAINER=image.sqsh or a name   pyxis, which has srun start it with enroot; Slurm only
#     MOUNTS=/data,/scratch            directories to be seen in it, besides the project
#
# Without CONTAINER there is none.

container_words() {
    local root mounts directory
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
    container=()
    if [[ -z ${CONTAINER:-} ]]; then return 0; fi
    local places=("$root")
    if [[ -n ${MOUNTS:-} ]]; then
        local more
        IFS=, read -ra more <<<"$MOUNTS"
        places+=("${more[@]}")
    fi
    mounts=""
    for directory in "${places[@]}"; do mounts+=${mounts:+,}$directory:$directory; done
    case $CONTAINER in
    *.sif)
        # --nv: the driver's libraries are the host's.
        container=(apptainer exec --nv --bind "$mounts" --pwd "$root" "$CONTAINER")
        ;;
    *)
        if [[ -z ${SLURM_JOB_ID:-} ]]; then
            echo "error: CONTAINER=$CONTAINER is for srun with pyxis; without Slurm give a .sif" >&2
            return 2
        fi
        # The home directory would bring packages of the user in front of the image's.
        container=(
            --container-image "$CONTAINER" --container-mounts "$mounts" --container-workdir "$root"
            --no-container-mount-home
        )
        ;;
    esac
}
