"""The inside of a sandbox: limits this process, then runs the program that arrives on standard input.

Run as a script with a bare interpreter; imports the standard library alone. See :mod:`sandbox`.
"""

import ctypes
import os
import platform
import resource
import signal
import struct
import sys
import sysconfig

PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, SECCOMP_MODE_FILTER = 1, 22, 38, 2
LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446
LANDLOCK_VERSION, LANDLOCK_PATH_BENEATH = 1, 1
READ = 0b1101  # execute (map a library), read a file, read a directory
RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}  # number of file rights by Landlock's version; 16 from 5 on
ENOSYS, EPERM = 38, 1
ALLOW, ERRNO = 0x7FFF0000, 0x00050000
CLONE_THREAD = 0x00010000
# The numbers of calls by machine: the audit architecture, clone, clone3, and what is refused: socket, fork, vfork,
# execve, execveat, ptrace, kill, tkill, tgkill, rt_sigqueueinfo, rt_tgsigqueueinfo, pidfd_send_signal, process_vm_*,
# setns, unshare, mount, io_uring_setup, bpf, keyctl.
CALLS = {
    "x86_64": (0xC000003E, 56, 435, (41, 57, 58, 59, 322, 101, 62, 200, 234, 129, 297, 424, 310, 311, 308, 272, 165,
                                      425, 321, 250)),
    "aarch64": (0xC00000B7, 220, 435, (198, 221, 281, 117, 129, 130, 131, 138, 240, 424, 270, 271, 268, 97, 40, 425,
                                       280, 219)),
}  # fmt: skip


def limit(seconds: float, memory_gb: float, file_mb: float) -> None:
    """Limit time, memory, files and core dumps of this process."""
    memory, size = int(memory_gb * 2**30), int(file_mb * 2**20)
    for kind, value in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, size),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CPU, int(seconds) + 2),
    ):
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))
    signal.setitimer(signal.ITIMER_REAL, seconds)  # SIGALRM ends a process that has no handler for it


def confine(libc: ctypes.CDLL) -> None:
    """Leave this process files to read that Python needs, its directory to write in, and no other process."""
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "no_new_privs")
    _landlock(libc)
    _seccomp(libc)


def _landlock(libc: ctypes.CDLL) -> None:
    version = libc.syscall(LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), LANDLOCK_VERSION)
    if version < 1:
        raise OSError(ctypes.get_errno(), "the kernel has no Landlock")
    everything = (1 << RIGHTS.get(version, 16)) - 1
    handled = struct.pack("=Q", everything)
    rules = libc.syscall(LANDLOCK_CREATE_RULESET, handled, ctypes.c_size_t(len(handled)), 0)
    if rules < 0:
        raise OSError(ctypes.get_errno(), "landlock_create_ruleset")
    readable = {sys.base_prefix, sysconfig.get_path("stdlib"), "/usr/lib", "/lib", "/lib64", "/usr/share/zoneinfo"}
    for directory, rights in [(".", everything), *((path, READ) for path in sorted(readable)), ("/dev/null", 0b110)]:
        if os.path.exists(directory):
            handle = os.open(directory, os.O_PATH | os.O_CLOEXEC)
            rule = struct.pack("=Qi", rights, handle)
            if libc.syscall(LANDLOCK_ADD_RULE, rules, LANDLOCK_PATH_BENEATH, rule, 0):
                raise OSError(ctypes.get_errno(), f"landlock_add_rule for {directory}")
            os.close(handle)
    if libc.syscall(LANDLOCK_RESTRICT_SELF, rules, 0):
        raise OSError(ctypes.get_errno(), "landlock_restrict_self")
    os.close(rules)


def _seccomp(libc: ctypes.CDLL) -> None:
    if platform.machine() not in CALLS:
        raise OSError(0, f"no filter is written for {platform.machine()}")
    architecture, clone, clone3, refused = CALLS[platform.machine()]
    load, equal, at_least, bits, answer = 0x20, 0x15, 0x35, 0x45, 0x06
    program = [
        (load, 0, 0, 4), (equal, 1, 0, architecture), (answer, 0, 0, ERRNO | EPERM),
        (load, 0, 0, 0), (at_least, 0, 1, 0x40000000), (answer, 0, 0, ERRNO | ENOSYS),
        (equal, 0, 1, clone3), (answer, 0, 0, ERRNO | ENOSYS),  # the C library then falls back to clone
    ]  # fmt: skip
    for call in refused:
        program += [(equal, 0, 1, call), (answer, 0, 0, ERRNO | EPERM)]
    program += [  # a clone is a thread, or refused; the flags are its first argument
        (equal, 0, 3, clone), (load, 0, 0, 16), (bits, 1, 0, CLONE_THREAD), (answer, 0, 0, ERRNO | EPERM),
        (answer, 0, 0, ALLOW),
    ]  # fmt: skip
    code = b"".join(struct.pack("=HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    header = struct.pack("@HP", len(program), ctypes.addressof(buffer))
    if libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, header, 0, 0):
        raise OSError(ctypes.get_errno(), "seccomp")


def main() -> None:
    """Read a word and a program from standard input, run the program, and say the word if it came to its end."""
    parent, seconds, memory_gb, file_mb, confined = sys.argv[1:]
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):
        os._exit(1)
    word, _, program = sys.stdin.buffer.read().decode(errors="replace").partition("\n")
    said = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for handle in (0, 1, 2):
        os.dup2(nothing, handle)

    def say(text: str) -> None:
        os.write(said, f"\n{text}\n".encode(errors="replace"))

    del sys.argv[1:]
    try:
        limit(float(seconds), float(memory_gb), float(file_mb))
        if int(confined):
            confine(libc)
    except OSError as error:
        say(f"cannot confine: {error.strerror}")
        return
    try:
        exec(compile(program, "answer.py", "exec"), {"__name__": "__main__"})
    except BaseException as error:
        text = " ".join(str(error).split())
        say(f"raised {type(error).__name__}: {text[:200]}")
        os._exit(1)
    say(word)
    os._exit(0)


if __name__ == "__main__":
    main()
