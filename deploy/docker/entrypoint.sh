#!/bin/sh
# What a process cannot see by itself in a container: how many CPUs it asked for, and where it may
# write. Then the command, as process 1, so that SIGTERM reaches it.
set -eu

# CPU_REQUEST is the pod's request in whole CPUs (downward API); without it the cgroup's quota; without
# that every CPU in sight. XLA would start a thread a CPU of the *node* and be throttled for it.
cpus="${CPU_REQUEST:-}"
if [ -z "$cpus" ]; then
  quota="" period=""
  if [ -r /sys/fs/cgroup/cpu.max ]; then
    read -r quota period </sys/fs/cgroup/cpu.max
  elif [ -r /sys/fs/cgroup/cpu/cpu.cfs_quota_us ]; then
    quota=$(cat /sys/fs/cgroup/cpu/cpu.cfs_quota_us)
    period=$(cat /sys/fs/cgroup/cpu/cpu.cfs_period_us)
  fi
  case "$quota" in
    "" | max | -1) cpus=$(nproc) ;;
    *) cpus=$(((quota + period - 1) / period)) ;;
  esac
fi
export PJRT_NPROC="$cpus" OMP_NUM_THREADS="$cpus" OPENBLAS_NUM_THREADS="$cpus"

# The root file system is read-only, so the compile cache that the build warmed is copied to where JAX
# may add to it.
mkdir -p "$JAX_COMPILATION_CACHE_DIR"
warmed="${WARMED_CACHE:-/app/compile-cache}"
if [ -d "$warmed" ]; then cp -rn "$warmed/." "$JAX_COMPILATION_CACHE_DIR"/; fi

exec "$@"
