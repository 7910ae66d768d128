"""Signals: the first is a request, its echo is not a second one, and whoever insists is obeyed."""

from __future__ import annotations

import signal
import time

import pytest

from onestepsr.core import signals
from onestepsr.core.signals import Interruption


def test_a_request_and_its_echo_are_one() -> None:
    with Interruption() as open_one:
        assert not open_one.requested
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert open_one.requested


def test_a_later_signal_acts_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "REPEATED", 0.01)
    with Interruption():
        signal.raise_signal(signal.SIGINT)
        time.sleep(0.02)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Interruption():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before
