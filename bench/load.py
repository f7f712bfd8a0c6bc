"""Load a server that it starts with locust's users (bench/locustfile.py), and stop the server as an operator would.

Fails, with a code that is not 0, if a request failed or was answered wrongly, if there was no request, or if the server
did not exit with 0 after SIGTERM.
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence

from .servers import LAUNCHER, ROOT, BenchError, die_with_parent, free_port, running, unwind_on_signals


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.load", description=__doc__.partition("\n")[0])
    parser.add_argument("--users", type=int, default=50)
    parser.add_argument("--seconds", type=int, default=15)
    options = parser.parse_args(arguments)
    unwind_on_signals()
    port = free_port()
    locust = [
        *(sys.executable, "-m", "locust", "-f", "bench/locustfile.py", "--host", f"http://127.0.0.1:{port}"),
        *("--headless", "--only-summary", "--users", str(options.users), "--spawn-rate", str(options.users)),
        *("--run-time", f"{options.seconds}s", "--stop-timeout", "10"),
    ]
    try:
        with running((*LAUNCHER, "--port", str(port)), ("127.0.0.1", port), ready="/v2/health/ready") as server:
            done = subprocess.run(
                locust, cwd=ROOT, timeout=options.seconds + 60, check=False, preexec_fn=die_with_parent
            )
            if done.returncode:
                raise BenchError(f"locust ended with {done.returncode}: requests failed, or there were none")
            if code := server.stop():
                raise BenchError(f"the server exited with {code} after SIGTERM")
    except (BenchError, subprocess.TimeoutExpired) as error:
        print(f"bench.load: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
