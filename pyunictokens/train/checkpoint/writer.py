"""When checkpoints are written: at once, or by a thread beside the steps that follow.

At most one is being written at a time. A failure of the thread is raised by the next call from the loop, with the error
that writing at once would have raised. What is written, and where, is the business of run_state.py.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

from torch import Tensor


class Saver:
    """Runs one job after the other, here or (`background`) in a thread."""

    def __init__(self, background: bool = False):
        self.background = background
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def run(self, job: Callable[[], object]) -> None:
        """Do `job`, after the one before. In the background it must hold copies: the loop goes on."""
        self.wait()
        if not self.background:
            job()
            return
        self._thread = threading.Thread(target=self._keep_failure, args=(job,), name="writing a checkpoint")
        self._thread.start()

    def _keep_failure(self, job: Callable[[], object]) -> None:
        try:
            job()
        except BaseException as failure:
            self._failure = failure

    def check(self) -> None:
        """Raise what a job that is over failed with. Once raised, it is forgotten."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def wait(self) -> None:
        """Wait for the job at work; raises as :meth:`check`."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()


def on_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies in the host's memory, which later steps do not change; of a sharded tensor this rank's part."""
    return {name: value.detach().to("cpu", copy=True) for name, value in tensors.items()}
