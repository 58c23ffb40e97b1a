"""Two network namespaces with a link between them that delays, loses, repeats and reorders packets.

The kernels that this runs on have no netem. So each end of the link is a TUN
device, and a thread of the test carries the IP packets from one to the other.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import heapq
import itertools
import os
import random
import select
import struct
import subprocess
import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000  # <linux/if_tun.h>
CLONE_NEWNET = 0x40000000  # <linux/sched.h>


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


class LossyLink:
    """Needs root.

    Attributes:
        names: of the two namespaces, whose addresses are in ``addresses``.
        loss: the share of packets that vanish; 1.0 is a cable that is cut.
        delay: seconds for a packet, up to half as much again at random: they overtake each other.
        lost, passed: how many packets did.
    """

    addresses = ("10.99.2.1", "10.99.2.2")

    def __init__(self, seed: int, loss: float, delay: float) -> None:
        self.loss, self.delay = loss, delay
        self.lost = self.passed = 0
        self._chances = random.Random(seed)
        self.names = [f"lossy{os.getpid()}{side}" for side in "ab"]
        self._ends: list[int] = []
        self._wake, self._wakener = os.pipe()
        self._thread = threading.Thread(target=self._carry, daemon=True)
        try:
            for name, address in zip(self.names, self.addresses, strict=True):
                end = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
                self._ends.append(end)
                fcntl.ioctl(end, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TUN | IFF_NO_PI))
                ip("netns", "add", name)
                ip("link", "set", name, "netns", name)  # its other end stays here
                ip("-n", name, "addr", "add", f"{address}/24", "dev", name)
                ip("-n", name, "link", "set", name, "mtu", "1400", "up")
                ip("-n", name, "link", "set", "lo", "up")
        except BaseException:
            self.close()
            raise
        self._thread.start()

    def _carry(self) -> None:
        other = dict(zip(self._ends, reversed(self._ends), strict=True))
        on_the_way: list[tuple[float, int, int, bytes]] = []
        numbers = itertools.count()
        while True:
            pause = max(on_the_way[0][0] - time.monotonic(), 0) if on_the_way else None
            ready, _, _ = select.select([*self._ends, self._wake], (), (), pause)
            if self._wake in ready:
                return
            for end in ready:
                with contextlib.suppress(OSError):  # the device is down
                    packet = os.read(end, 65536)
                    if self._chances.random() < self.loss:
                        self.lost += 1
                        continue
                    for _ in range(1 + (self._chances.random() < 0.005)):
                        due = time.monotonic() + self.delay * (1 + self._chances.random() / 2)
                        heapq.heappush(on_the_way, (due, next(numbers), other[end], packet))
            while on_the_way and on_the_way[0][0] <= time.monotonic():
                _, _, end, packet = heapq.heappop(on_the_way)
                with contextlib.suppress(OSError):
                    os.write(end, packet)
                    self.passed += 1

    def take(self, side: int, state: str) -> None:
        """``ip link set`` one side's device ``down`` or ``up``; its address stays."""
        ip("-n", self.names[side], "link", "set", self.names[side], state)

    def reset_connections(self, side: int) -> None:
        """RST, as the kernel of one side would send it: what is under way is gone."""
        subprocess.run(["ip", "netns", "exec", self.names[side], "ss", "-K", "-t", "state", "established"],
                       check=True, capture_output=True)  # fmt: skip

    def call(self, side: int, function: Callable[[], T]) -> T:
        """Call a function within one side's namespace, where sockets that it opens stay."""
        results: list[T] = []
        errors: list[BaseException] = []

        def run() -> None:
            try:
                with open(f"/run/netns/{self.names[side]}", "rb") as file:
                    # Of this thread alone, see setns(2); os.setns() is new in Python 3.12.
                    if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), CLONE_NEWNET):
                        raise OSError(ctypes.get_errno(), "setns")
                results.append(function())
            except BaseException as exc:
                errors.append(exc)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        if errors:
            raise errors[0]
        return results[0]

    def close(self) -> None:
        os.write(self._wakener, b"x")
        if self._thread.ident is not None:
            self._thread.join()
        for fd in (*self._ends, self._wake, self._wakener):
            os.close(fd)
        for name in self.names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
