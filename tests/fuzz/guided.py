"""Fuzz a target, guided by its coverage: python -m tests.fuzz.guided TARGET --seconds N.

Atheris, which is libFuzzer for Python, changes inputs, keeps those that reach code that no other did, and changes them
further. It begins with tests/fuzz/seeds.py, and runs in a process of its own, which a finding ends.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from .seeds import SEEDS, WORDS
from .targets import TARGETS

MAX_LENGTH = 4096
TIMEOUT = 10  # seconds for one input
MEMORY = 2048  # MiB


@dataclass(frozen=True, slots=True)
class Report:
    """What a run found.

    Attributes:
        executed: inputs that were tried; 0 if one of them ended the run.
        finding: the input that ended the run; None if none did.
        log: the end of what was printed: the traceback, or what else was wrong.
    """

    target: str
    executed: int
    finding: bytes | None
    log: str

    def __str__(self) -> str:
        if self.finding is None:
            return f"{self.target}: {self.executed} inputs, no finding"
        code = f"from tests.fuzz.targets import *; attempt({self.target}, {self.finding!r})"
        return (
            f"{self.target}: a finding:\n{self.finding!r}\nTo reproduce it:\npython - <<'END'\n{code}\nEND\n{self.log}"
        )


def fuzz(target: str, seconds: int, folder: Path) -> Report:
    """Fuzz one target for so long, or until there is a finding.

    Args:
        folder: empty; what is needed and what is found goes there.

    Raises:
        RuntimeError: the fuzzing itself failed.
    """
    corpus, words, artifacts = folder / "corpus", folder / "words", folder / "artifacts"
    corpus.mkdir()
    artifacts.mkdir()
    for index, seed in enumerate(SEEDS.get(target, [])):
        (corpus / str(index)).write_bytes(seed)
    # libFuzzer takes no empty dictionary.
    words.write_text("".join(f'"{_escaped(word)}"\n' for word in WORDS.get(target) or ["\0"]))
    arguments = [
        f"-max_total_time={seconds}",
        f"-max_len={MAX_LENGTH}",
        f"-timeout={TIMEOUT}",
        f"-rss_limit_mb={MEMORY}",
        f"-artifact_prefix={artifacts}/",
        f"-dict={words}",
        "-print_final_stats=1",
        str(corpus),
    ]
    command = [sys.executable, "-m", "tests.fuzz.instrumented", target, str(artifacts / "raised"), *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    printed = (ended.stdout + ended.stderr).splitlines()
    log = "\n".join(line for line in printed if not line.startswith(("#", "INFO: ")))  # without each input of interest
    executed = re.search(r"number_of_executed_units: (\d+)", log)
    found = next((file.read_bytes() for file in artifacts.iterdir()), None)
    if found is None and (ended.returncode or executed is None):
        raise RuntimeError(f"fuzzing {target} ended with status {ended.returncode}:\n{log}")
    return Report(target, int(executed[1]) if executed else 0, found, log)


def _escaped(word: str) -> str:
    """As libFuzzer's dictionaries want it: in ASCII, the rest by number."""
    plain = [
        chr(byte) if 32 <= byte < 127 and byte not in b'"\\' else f"\\x{byte:02x}"
        for byte in word.encode("utf-8", "surrogatepass")
    ]
    return "".join(plain)


def main() -> int:
    parser = argparse.ArgumentParser(description="Fuzz a target, guided by its coverage.")
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=60)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        report = fuzz(arguments.target, arguments.seconds, Path(folder))
    print(report)
    return 0 if report.finding is None else 1


if __name__ == "__main__":
    sys.exit(main())
