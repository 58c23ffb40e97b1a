"""A TCP proxy whose connections can be cut, for tests of what goes on after that."""

from __future__ import annotations

import contextlib
import random
import socket
import threading


class Proxy:
    """A TCP proxy in front of an agent, whose connections can be cut with RST, and which can refuse new ones."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.addr = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._lock = threading.Lock()
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self.refusing = False
        self.connections = 0
        self.carried = 0  # bytes, about: threads add to it without a lock
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                if self.refusing:
                    self._reset(near)
                    continue
                try:
                    far = socket.create_connection(self._target)
                except OSError:
                    self._reset(near)
                    continue
                with self._lock:
                    self._pairs.append((near, far))
                    self.connections += 1
                for source, target in ((near, far), (far, near)):
                    threading.Thread(target=self._carry, args=(source, target), daemon=True).start()

    def _carry(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError, ValueError):
            while data := source.recv(random.choice((7, 100, 4096, 65536))):
                target.sendall(data)
                self.carried += len(data)
            target.shutdown(socket.SHUT_WR)

    @staticmethod
    def _reset(sock: socket.socket) -> None:
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            sock.shutdown(socket.SHUT_RDWR)  # wakes who is in recv() or sendall()
        with contextlib.suppress(OSError):
            sock.close()

    def cut(self) -> None:
        with self._lock:
            pairs, self._pairs = self._pairs, []
        for pair in pairs:
            for sock in pair:
                self._reset(sock)

    def close(self) -> None:
        self.refusing = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # ends accept(), which close() would not
        self._listener.close()
        self.cut()
