"""Users that ask for digits and check every answer: a fast wrong answer is a failure.

    locust -f bench/locustfile.py --host http://127.0.0.1:8000        from the checkout's root, with models/ served

Each request carries a digit, or several, drawn at random. Requests of many users share a batch in the server, so an
answer that went to the wrong user shows as a wrong digit. Users do not pause: their number is the load. The exit code
is 1 if a request failed, or if there was none.
"""

import random
from typing import Any

from locust import FastHttpUser, events, task
from locust.env import Environment

from bench.samples import (
    CLASSIFY,
    INFER,
    LENGTH_HEADER,
    binary_post,
    classify_fault,
    fault,
    json_post,
    read_binary,
    read_json,
    read_samples,
)

SAMPLES = read_samples()


class Caller(FastHttpUser):
    """One kept-alive connection, one request at a time."""

    network_timeout = 10.0
    connection_timeout = 10.0

    @task(5)
    def infer_json(self) -> None:
        samples = random.choices(SAMPLES)
        post = json_post(samples)
        with self._post(INFER, post.body, post.headers, "infer, JSON") as response:
            if response.status_code == 200:
                judge(response, lambda: fault(read_json(response.content), samples))

    @task(3)
    def infer_binary(self) -> None:
        samples = random.choices(SAMPLES, k=random.randint(1, 8))
        post = binary_post(samples)
        with self._post(INFER, post.body, post.headers, "infer, binary") as response:
            if response.status_code == 200:
                judge(response, lambda: fault(read_binary(response.content, response.headers[LENGTH_HEADER]), samples))

    @task(2)
    def classify(self) -> None:
        sample = random.choice(SAMPLES)
        with self._post(CLASSIFY, sample.picture, {"content-type": sample.content_type}, "classify") as response:
            if response.status_code == 200:
                judge(response, lambda: classify_fault(response.json(), sample))

    def _post(self, path: str, body: bytes, headers: dict[str, str], name: str) -> Any:
        client: Any = self.client  # its annotations know no bodies of bytes
        return client.post(path, data=body, headers=headers, name=name, catch_response=True)


def judge(response: Any, find_fault: Any) -> None:
    """Mark an answer of status 200 as failed if it is wrong; locust itself marks every other one."""
    try:
        wrong = find_fault()
    except (ValueError, KeyError, TypeError, IndexError) as error:
        wrong = f"unreadable: {error!r}"
    if wrong:
        response.failure(f"wrong answer: {wrong}")


def fail_if_idle(environment: Environment, **_: Any) -> None:
    if environment.stats.total.num_requests == 0:
        environment.process_exit_code = 1


quitting: Any = events.quitting  # its methods have no annotations
quitting.add_listener(fail_if_idle)
