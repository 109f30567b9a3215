"""Jobs on this machine: their causes of failure in a line, and the memory that their processes use."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from zoscale.local_job import cause_of, ranks_here, run_here

HUGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_USED = """
import re, zoscale, torch
lies = torch.ones(2**26)
print(sum(map(int, re.findall(r"AnonHugePages: +(\\d+) kB", open("/proc/self/smaps").read()))) * 1024)
"""


def used(**variables: str) -> int:
    """Bytes in huge pages of a process that fills a tensor of 256 MiB."""
    told = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"} | variables
    done = subprocess.run([sys.executable, "-c", _USED], env=told, capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(
    not HUGE.is_file() or not re.search(r"\[(madvise|always)\]", HUGE.read_text()),
    reason="the kernel gives no huge pages",
)
def test_large_tensors_lie_in_huge_pages() -> None:
    """As `import zoscale` has it; the user's own word counts."""
    assert used() >= 2**27
    if "[madvise]" in HUGE.read_text():
        assert used(THP_MEM_ALLOC_ENABLE="0") < 2**26


def test_a_job_that_fails_names_its_cause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error of a rank, not that of its launcher; what launched this process is not heard of."""
    (tmp_path / "failing.py").write_text(
        "import os, sys\n"
        'os.write(1, f\'{os.environ["RANK"]}/{os.environ["WORLD_SIZE"]}\\n\'.encode())\n'  # at once: no rank cuts in
        "sys.argv[1:] and int(sys.argv[1])\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    failed = run_here(1, "failing", "two")
    assert failed.returncode != 0 and cause_of(failed).startswith("ValueError: invalid literal for int")
    done = run_here(2, "failing")
    assert done.returncode == 0 and sorted(done.stdout.split()) == ["0/2", "1/2"]
    (tmp_path / "killed.py").write_text("import os\nos.kill(os.getpid(), 9)\n")
    killed = run_here(1, "killed")
    assert "ChildFailedError" in killed.stderr and cause_of(killed) == f"status {killed.returncode}"


def test_a_rank_has_a_device_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert ranks_here() == 4
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert ranks_here() == len(os.sched_getaffinity(0))
