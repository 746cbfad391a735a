#!/bin/sh
# Sets what a process in a container cannot see: the number of CPUs that it may use, and a folder that
# it may write to. Then runs the command as process 1, so that SIGTERM reaches it.
set -eu

# CPU_REQUEST is the pod's request in whole CPUs (downward API). Without it the cgroup's quota counts, and
# without a quota every CPU. By itself XLA starts one thread for each CPU of the *node* and is throttled.
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

# The root file system is read-only, so the compile cache of the build is copied to a folder that JAX may
# add to.
mkdir -p "$JAX_COMPILATION_CACHE_DIR"
warmed="${WARMED_CACHE:-/app/compile-cache}"
if [ -d "$warmed" ]; then cp -rn "$warmed/." "$JAX_COMPILATION_CACHE_DIR"/; fi

exec "$@"
