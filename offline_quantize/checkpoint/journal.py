"""The journal of an unfinished run: which tensors are done, and what was measured on them."""

import json
import os
import threading
from pathlib import Path
from typing import Any

from offline_quantize.checkpoint.atomic_files import lock


class Journal:
    """Finished tensors: one JSON line each, appended after the tensor's bytes were written.

    A line carries the digest of those bytes, so a resumed run can tell a finished tensor from one
    whose bytes were lost with the machine's memory. A torn last line is ignored. The file is
    locked: where several machines see it, a lock on the directory may keep out this one's only.

    Raises OutputError if another process has it open.

    reports: what was measured, by tensor;  digests: sha256 of the written bytes, by tensor.
    """

    def __init__(self, path: Path) -> None:
        self.reports: dict[str, dict[str, Any]] = {}
        self.digests: dict[str, str] = {}
        self._lock = threading.Lock()
        self._file = path.open("ab")
        try:
            lock(self._file.fileno(), path.parent)
            self._file.truncate(self._read(path))
        except BaseException:
            self._file.close()
            raise

    def _read(self, path: Path) -> int:
        """Take up what an earlier run recorded, and return how many bytes of it are whole."""
        whole = 0
        for line in path.read_bytes().splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break
            try:
                record = json.loads(line)
                key, sha256, report = record["tensor"], record["sha256"], record["report"]
                self.reports[key], self.digests[key] = dict(report), sha256
            except (ValueError, KeyError, TypeError, RecursionError):
                break
            whole += len(line)
        return whole

    def add(self, key: str, sha256: str, report: dict[str, Any]) -> None:
        """Record a tensor whose bytes were written; threads may do so at once."""
        line = json.dumps({"tensor": key, "sha256": sha256, "report": report}) + "\n"
        with self._lock:
            self._file.write(line.encode())
            self._file.flush()
            self.reports[key], self.digests[key] = report, sha256

    def sync(self) -> None:
        """Flush to disk, as must happen before a weight file gets its name."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; the journal stays for a later run."""
        self._file.close()
