"""How a CPU is named. Run: pytest tests/common/test_cpu.py"""

import platform
from pathlib import Path

from common.cpu import cpu_name


def test_a_cpu_is_named_by_its_model_where_the_system_says_it(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text("processor\t: 0\nmodel name\t: AMD EPYC 9B14\nflags\t\t: fpu\nmodel name\t: B\n")
    assert cpu_name(file) == "AMD EPYC 9B14"
    file.write_text("processor\t: 0\nBogoMIPS\t: 243.75\n")
    assert cpu_name(file) == cpu_name(tmp_path / "none") == f"{platform.machine()} CPU"
