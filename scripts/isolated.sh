# Sourced by sh or bash, in the shell scripts and in the Makefile. Python then runs the code of this project whatever
# lies in the caller's folder and whatever the caller has set for Python, and reads and writes UTF-8 in any locale. What
# it starts inherits that. Kept are the variables that say how Python writes: bytecode, and output without a buffer.
for name in $(env | sed -n 's/^\(PYTHON[A-Z0-9]\{1,\}\)=.*/\1/p'); do
    case $name in
        PYTHONDONTWRITEBYTECODE | PYTHONPYCACHEPREFIX | PYTHONUNBUFFERED) ;;
        *) unset "$name" ;;
    esac
done
export PYTHONSAFEPATH=1 PYTHONNOUSERSITE=1 PYTHONUTF8=1

# glibc returns large blocks to the system when they are freed and gets them anew, a page fault for every 4 KiB: on a CPU
# that was an eighth of a scoring pass with its gradients. With these two (bytes) it keeps up to 1 GiB. Yours come first.
export MALLOC_MMAP_THRESHOLD_="${MALLOC_MMAP_THRESHOLD_-1073741824}"
export MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_-1073741824}"
