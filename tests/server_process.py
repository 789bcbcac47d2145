"""A sampling server (vLLM, SGLang) in processes of its own; shared by the tests that start one."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager, suppress

# vLLM's thread of statistics looks up addresses while the environment changes, which can end in a segfault; a CPU lends
# its cache so many GiB
ENV = {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_SERVER_DEV_MODE": "1"}


@contextmanager
def serving(arguments, log, **environment):
    """The address of ``python -m *arguments``, once it says that it is well; then its end. What it prints is in the
    file ``log``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", *arguments, "--host", "127.0.0.1", "--port", str(port)]
    with open(log, "wb") as out:
        process = subprocess.Popen(
            command, env=os.environ | ENV | environment, stdout=out, stderr=out, start_new_session=True
        )
        try:
            url, end = f"http://127.0.0.1:{port}", time.monotonic() + 300
            while True:
                assert process.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
                try:
                    urllib.request.urlopen(f"{url}/health", timeout=5).close()
                    break
                except OSError:
                    time.sleep(1)
            yield url
        finally:
            process.terminate()
            try:
                process.wait(60)
            finally:
                # its workers, whatever became of it, if any are left
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
