"""What the CPU is, without torch."""

import platform
import re
from pathlib import Path

CPU_FILE = Path("/proc/cpuinfo")


def cpu_name(file: Path = CPU_FILE) -> str:
    """The CPU's model where the system says it, else its architecture."""
    text = file.read_text(errors="replace") if file.is_file() else ""
    found = re.search(r"^model name\s*:\s*(.+?)\s*$", text, re.MULTILINE)
    return found[1] if found else f"{platform.machine()} CPU"
