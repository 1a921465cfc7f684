"""A command that tells of its work, and a watcher that takes notes."""

COUNT = """
import sys
from fisherfold.run.progress import announce, track, track_lines
announce("capture", "begins")
for i in track("capture", "shards", range(3), 3):
    announce("capture", f"shard {i}")
    list(track_lines("capture", "inner", range(2), 2))
sys.exit(7)
"""


class Notes:
    def __init__(self, stop_after: str | None = None) -> None:
        self.lines, self.entries, self.stop_after = [], [], stop_after

    def line(self, text: str) -> None:
        self.lines.append(text)

    def progress(self, entry: dict) -> None:
        self.entries.append(entry)

    def cancelled(self) -> bool:
        return self.stop_after in self.lines
