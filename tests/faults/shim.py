"""A shim over the calls that change the disk: it counts them, and at the chosen one it fails or kills the process.

It lies over `os` and `io.open`, which is what `classiclm.files`, `pathlib` and `shutil` come down to.
"""

import errno
import io
import os
import stat
from contextlib import contextmanager
from pathlib import Path

KINDS = ("die before", "die after", "ENOSPC", "EIO", "half, then die", "power cut, names kept", "power cut, names lost")
CALLS = ("fsync", "replace", "rename", "mkdir", "unlink", "rmdir")
DEAD = 137  # the exit code of a process that was killed


class Shim:
    """Counts from 0; at call number `fatal` does what `kind` says. With fatal=None it only counts."""

    def __init__(self, kind="die before", fatal=None):
        self.kind, self.fatal, self.count = kind, fatal, 0
        self.dirty = {}  # written and not flushed: (device, inode) -> a descriptor of our own
        self.renamed = []  # folders whose new names are not flushed: (old, new)
        self.real = {name: getattr(os, name) for name in CALLS}

    @contextmanager
    def installed(self):
        """Lay the shim over the calls while the block runs."""
        opens = io.open
        for name in CALLS:
            setattr(os, name, self._over(name))
        io.open = lambda path, mode="r", *a, **k: self._opened(opens, path, mode, *a, **k)
        try:
            yield self
        finally:
            for name in CALLS:
                setattr(os, name, self.real[name])
            io.open = opens

    def _over(self, name):
        def called(first, *rest, **keywords):
            return self._strike(lambda: self._noted(name, first, *rest, **keywords))

        return called

    def _noted(self, name, first, *rest, **keywords):
        answer = self.real[name](first, *rest, **keywords)
        if name == "fsync":
            status = os.fstat(first)
            self.dirty.pop(_identity(status), None)
            if stat.S_ISDIR(status.st_mode):
                self.renamed = [(a, b) for a, b in self.renamed if not os.path.samestat(os.stat(b.parent), status)]
        if name == "rename":
            self.renamed.append((Path(first), Path(rest[0])))
        return answer

    def _opened(self, opens, path, mode, *rest, **keywords):
        if not set(mode) & set("wax+"):
            return opens(path, mode, *rest, **keywords)
        file = self._strike(lambda: opens(path, mode, *rest, **keywords))
        self.dirty[_identity(os.fstat(file.fileno()))] = os.dup(file.fileno())
        return Watched(file, self)

    def write(self, file, data):
        """A write to a watched file; the half that a dying disk takes of it, at the fatal call."""
        is_fatal = self.count == self.fatal
        if is_fatal and self.kind == "half, then die":
            file.write(data[: len(data) // 2])
            file.flush()
            os._exit(DEAD)
        if is_fatal and self.kind in ("ENOSPC", "EIO"):
            file.write(data[: len(data) // 2])
        return self._strike(lambda: file.write(data))

    def _strike(self, call):
        self.count += 1
        if self.count - 1 != self.fatal:
            return call()
        if self.kind in ("ENOSPC", "EIO"):
            number = getattr(errno, self.kind)
            raise OSError(number, os.strerror(number))
        try:
            if self.kind not in ("die before", "half, then die"):
                call()
            if self.kind.startswith("power cut"):
                self._lose_what_is_not_flushed()
        finally:
            os._exit(DEAD)

    def _lose_what_is_not_flushed(self):
        """Half of each file that was not flushed; and the new names of folders, which may reach a disk before the data
        of what is in them, or be lost too."""
        for descriptor in self.dirty.values():
            os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
        for old, new in reversed(self.renamed if self.kind.endswith("lost") else []):
            if new.exists() and not old.exists():
                self.real["rename"](new, old)


class Watched:
    """A file that is open for writing, under a shim."""

    def __init__(self, file, shim):
        self.file, self.shim = file, shim

    def write(self, data):
        return self.shim.write(self.file, data)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()


def _identity(status):
    return status.st_dev, status.st_ino
