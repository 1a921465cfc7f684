"""What a machine refuses that is its user's to mend, in a line with the cure: no traceback says more."""

import errno
import os
import sys

from fisherfold.run.errors import first_line, system_number

IN_THE_WAY = "something else lies where a file or a folder belongs ({error}). Move it away and run again."
CURES = {
    errno.ENOTDIR: IN_THE_WAY,
    errno.EISDIR: IN_THE_WAY,
    errno.EEXIST: IN_THE_WAY,
    errno.ELOOP: "links lead in a circle ({error}). Make the name lead to a file.",
    errno.ENAMETOOLONG: "a path is too long for this file system ({error}). Put the project where its path is shorter.",
    errno.ENOLCK: "the file system keeps no locks ({error}). Mount it with locks, or put the project elsewhere: `fisherfold doctor` tries them.",
    errno.ENOSPC: "the disk is full ({error}). Finished units are kept: make room and run again.",
    errno.EDQUOT: "the quota of this user is used up ({error}). Finished units are kept: make room and run again.",
    errno.EACCES: "user {user} may not do that: {error}. Give this user the file or the folder that it lies in, or run as its owner.",
    errno.EPERM: "user {user} may not do that: {error}. Run as the owner of the file.",
    errno.EROFS: "the file system cannot be written ({error}). Put the project where this user can write.",
    errno.EMFILE: "a process may not open more files here ({error}). Raise the limit (`ulimit -n 4096`) and run again.",
    errno.ENOMEM: "the memory of this machine, or what a process may have of it, is used up ({error}). Finished units are kept: `fisherfold plan` says "
    "what each stage needs, docs/how-to/bigger-than-memory.md how to need less.",
    errno.EIO: "the disk or its server failed ({error}). Finished units are kept: see the machine's log, then run again.",
    errno.ESTALE: "the file server has lost a file ({error}). Finished units are kept: mount it again, then run again.",
}


def cure(error: Exception) -> str | None:
    """The line for an error of the machine; None for any other."""
    if isinstance(error, UnicodeEncodeError):
        return _unwritable_name(error)
    number = system_number(error)
    return CURES[number].format(error=first_line(error), user=os.getuid()) if number in CURES else None


def _unwritable_name(error: UnicodeEncodeError) -> str:
    """Our text is UTF-8: what cannot be encoded is the name of a file, in another locale or of other bytes."""
    name = error.object.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return (
        f"the name {name!r} cannot be written in {sys.getfilesystemencoding()}, the encoding of file names here, or is no UTF-8. "
        "Set LC_ALL=C.UTF-8 and leave PYTHONUTF8 unset, or give the file and the folders above it another name."
    )
