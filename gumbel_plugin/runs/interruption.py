"""Ctrl-C and SIGTERM end a run at any moment, also where a library swallows the exception that they raise."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """Turns SIGINT into KeyboardInterrupt and SIGTERM into ``SystemExit(143)``, and remembers that one came.

    A signal handler's exception appears wherever Python happens to be. In a finalizer (Lightning has some) or the
    callback of a weak reference it is ignored, and a bare ``except`` swallows it: `check` raises it again, and so does
    the end of the ``with`` block, whatever other exception the first one was turned into.

    Signals that the process was started to ignore, as in the background of a shell, stay ignored. Outside of the main
    thread, which alone may handle signals, this does nothing.

    Attributes:
        received: The last signal that came.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._handlers: dict[signal.Signals, Any] = {}
        self._unraisable = sys.unraisablehook

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            self._unraisable, sys.unraisablehook = sys.unraisablehook, self._report_unraisable
            for number in _SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._handlers[number] = signal.signal(number, self._interrupt)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if self._handlers:
            sys.unraisablehook = self._unraisable
        if not isinstance(error, KeyboardInterrupt | SystemExit):
            self.check()

    def check(self) -> None:
        """End the run if a signal has come.

        Raises:
            KeyboardInterrupt: After SIGINT.
            SystemExit: With the exit code 143 after SIGTERM.
        """
        if self.received is signal.SIGINT:
            raise KeyboardInterrupt
        if self.received is not None:
            raise SystemExit(128 + self.received)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        self.check()

    def _report_unraisable(self, unraisable: Any) -> None:
        if self.received is None or not isinstance(unraisable.exc_value, KeyboardInterrupt | SystemExit):
            self._unraisable(unraisable)  # ours is no loss: it is raised again
