"""Processes of a run: workers that answer in lines of JSON, children with a time limit, and the run's clock."""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time


class Clock:
    """What is left of the run's time."""

    def __init__(self, limit_s):
        self.begun, self.limit_s = time.monotonic(), limit_s

    def spent_s(self):
        return time.monotonic() - self.begun

    def left_s(self):
        return self.limit_s - self.spent_s()


class Skipped(Exception):
    """A step that is left out, and why."""


class Failed(Exception):
    """What makes the rest of the run worthless."""


class NoAnswer(Exception):
    """A worker that said it cannot, died, or took too long."""


def say(text):
    print(f"== {text}", file=sys.stderr, flush=True)


def end(process):
    """Ends a child and its own children: it was started in a session of its own."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            pass
        try:
            process.wait(5)
            return
        except subprocess.TimeoutExpired:
            continue


class Worker:
    """A process that answers each line with a line; started at its first request and again after it died."""

    def __init__(self, name, command, environment, log):
        self.name, self.command, self.environment, self.log = name, command, environment, log
        self.process, self.lines = None, None

    def start(self):
        self.lines = queue.Queue()
        self.process = subprocess.Popen(
            self.command, env=self.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True,
            bufsize=1, start_new_session=True,
        )

        def read(stdout, lines):
            for line in stdout:
                lines.put(line)
            lines.put(None)

        threading.Thread(target=read, args=(self.process.stdout, self.lines), daemon=True).start()

    def ask(self, request, limit_s):
        """The answer; NoAnswer where there is none in time, with the worker ended."""
        if self.process is None:
            self.start()
        end_at = time.monotonic() + limit_s
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except OSError:
            pass  # its last words are in its output
        while True:
            try:
                line = self.lines.get(timeout=max(end_at - time.monotonic(), 0.001))
            except queue.Empty:
                self.stop()
                raise NoAnswer(f"no answer in {limit_s:.0f} s") from None
            if line is None:
                status = self.process.wait()
                self.process = None
                raise NoAnswer(f"{self.name} ended with status {status}")
            try:
                answer = json.loads(line)
            except json.JSONDecodeError:
                continue  # a library that prints
            if "error" in answer:
                raise NoAnswer(answer["error"])
            return answer

    def stop(self):
        if self.process is not None:
            try:
                self.process.stdin.close()  # its input ends, and so does it
                self.process.wait(2)
            except (OSError, subprocess.TimeoutExpired):
                end(self.process)
            self.process = None


def call(command, limit_s, log, environment=None):
    """Runs a child to its end; (exit status or None where it took too long, its output)."""
    process = subprocess.Popen(
        [str(part) for part in command], env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )
    timer = threading.Timer(limit_s, end, [process])
    timer.start()
    try:
        output = process.stdout.read()
        status = process.wait()
    finally:
        is_late = not timer.is_alive()
        timer.cancel()
    log.write(output)
    log.flush()
    return (None if is_late else status), output
