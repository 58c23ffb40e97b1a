"""A TCP proxy that cuts connections of version 2 at chosen bytes, in many ways, and a count of all cuts."""

from __future__ import annotations

import collections
import contextlib
import ctypes
import dataclasses
import enum
import random
import socket
import threading
from collections.abc import Iterator

LIBC = ctypes.CDLL(None)
NOWHERE = bytes(16)  # struct sockaddr of AF_UNSPEC, see connect(2)
HOLE_TIME = 0.03  # seconds for which a black hole swallows everything
LATE_TIME = 0.3  # seconds that late bytes wait at most for another connection to be in use


class Place(enum.Enum):
    """Where in the stream a connection is cut."""

    HANDSHAKE = "in the handshake"
    HEADER = "in a WebSocket header"
    DATA_HEADER = "in a data frame's stream and id"
    PAYLOAD = "in a payload"
    JSON = "in JSON"
    CONTROL = "in a ping, pong or close"
    BEHIND = "behind a frame"


class How(enum.Enum):
    """What the two ends see of a cut."""

    RST = "RST"  # both at once
    RST_CLIENT = "RST to the client, FIN to the agent"
    RST_AGENT = "RST to the agent, FIN to the client"
    FIN = "FIN"
    HALF = "half-close"  # of the direction that is cut; the other one goes on for a moment
    HOLE = "black hole"  # nothing passes for a moment, then RST
    LATE = "late"  # RST to the client; what it has sent reaches the agent when the next connection is in use


class Direction(enum.Enum):
    UP = "to the agent"
    DOWN = "to the client"


@dataclasses.dataclass(frozen=True)
class Doom:
    """How one connection is to end: at the ``nth`` such place, from 1, and how far in it (0 to 1)."""

    how: How
    place: Place
    direction: Direction
    nth: int = 1
    depth: float = 0.5


COMMON_PLACES = [place for place in Place if place is not Place.CONTROL]  # that any traffic soon comes to


def random_doom(chances: random.Random) -> Doom:
    place = chances.choice(COMMON_PLACES)
    nth = 1 if place is Place.HANDSHAKE else chances.choice((1, 1, 2, 3, 5, 8, 20))
    return Doom(chances.choice(list(How)), place, chances.choice(list(Direction)), nth, chances.random())


class FrameScanner:
    """Follows one direction of a WebSocket connection: which bytes are what (RFC 6455 §5.2, docs/protocol.md)."""

    def __init__(self) -> None:
        self._place = Place.HANDSHAKE
        self._seen = b""  # of the part that is being read, as far as it decides what comes next
        self._left = 0  # bytes of the part, once known
        self._payload = 0  # bytes of the frame behind that part
        self._mask = b""
        self._binary = False

    def scan(self, data: bytes) -> Iterator[tuple[Place, int, bool]]:
        """The parts of ``data``: what it is, its length, and whether a frame ends behind it."""
        while data:
            place, size = self._place, self._take(data)
            yield place, size, self._place is Place.HEADER and not self._seen and place is not Place.HANDSHAKE
            data = data[size:]

    def _take(self, data: bytes) -> int:
        if self._place is Place.HANDSHAKE:
            before = len(self._seen)
            self._seen += data
            end = self._seen.find(b"\r\n\r\n")
            if end < 0:
                return len(data)
            self._become(Place.HEADER)
            return end + 4 - before
        if self._place in (Place.HEADER, Place.DATA_HEADER):
            return self._take_header(data)
        size = min(self._left, len(data))
        self._left -= size
        if not self._left:
            self._become(Place.HEADER)
        return size

    def _take_header(self, data: bytes) -> int:
        before = len(self._seen)
        wanted = self._wanted()
        while len(self._seen) < wanted and len(self._seen) - before < len(data):
            self._seen += data[len(self._seen) - before : wanted - before]
            wanted = self._wanted()
        size = len(self._seen) - before
        if len(self._seen) == wanted:
            self._end_header()
        return size

    def _wanted(self) -> int:
        """The header's length, as far as it can be told; it is told once that much is there."""
        if len(self._seen) < 2:
            return 2
        if self._place is Place.DATA_HEADER:
            return min(2 + (self._seen[1] ^ (self._mask[1] if self._mask else 0)), self._payload)
        extension = {126: 2, 127: 8}.get(self._seen[1] & 0x7F, 0)
        return 2 + extension + (4 if self._seen[1] & 0x80 else 0)

    def _end_header(self) -> None:
        header = self._seen
        if self._place is Place.DATA_HEADER:
            self._become(Place.PAYLOAD, self._payload - len(header))
            return
        self._mask = header[-4:] if header[1] & 0x80 else b""
        short = header[1] & 0x7F
        size = short if short < 126 else int.from_bytes(header[2 : 4 if short == 126 else 10], "big")
        opcode = header[0] & 0x0F
        self._payload = size
        if opcode == 2:
            self._become(Place.DATA_HEADER if size else Place.HEADER)
        else:
            self._become(Place.CONTROL if opcode & 8 else Place.JSON, size)

    def _become(self, place: Place, left: int = 0) -> None:
        empty = not left and place in (Place.PAYLOAD, Place.JSON, Place.CONTROL)
        self._place = Place.HEADER if empty else place
        self._left = left
        self._seen = b""


class Link:
    """One connection through the proxy: two sockets, and a thread for each direction."""

    def __init__(self, proxy: CuttingProxy, client: socket.socket, agent: socket.socket, doom: Doom | None) -> None:
        self.proxy = proxy
        self.doom = doom
        self._number = proxy.connections
        self._chances = random.Random(proxy.seed * 1_000_003 + self._number)
        self._client, self._agent = client, agent
        self._lock = threading.Lock()  # guards the attributes below
        self._running = 2  # threads; the last one closes both sockets
        self._cut = False
        self._swallowing = False
        self._late = False
        self.passed = 0  # bytes
        for source, target, direction in ((client, agent, Direction.UP), (agent, client, Direction.DOWN)):
            threading.Thread(target=self._run, args=(source, target, direction), daemon=True).start()

    def _run(self, source: socket.socket, target: socket.socket, direction: Direction) -> None:
        try:
            self._carry(source, target, direction)
        finally:
            with self._lock:
                self._running -= 1
                last = not self._running
            for sock in (self._client, self._agent) if last else ():
                end(sock, reset=False)

    def _carry(self, source: socket.socket, target: socket.socket, direction: Direction) -> None:
        scanner = FrameScanner()
        chances = random.Random(self._chances.random())
        count = 0
        with contextlib.suppress(OSError, ValueError):  # cut
            while data := source.recv(chances.choice((1, 7, 100, 1000, 4096, 65536, 65536))):
                if chances.random() < self.proxy.delay_rate:
                    threading.Event().wait(chances.uniform(0, 0.005))
                doom = self.doom if self.doom is not None and self.doom.direction is direction else None
                at = 0
                for place, size, frame_ends in scanner.scan(data):
                    hit = False
                    if doom is not None and doom.place is Place.BEHIND:
                        hit = frame_ends
                    elif doom is not None:
                        hit = place is doom.place
                    count += hit
                    if doom is not None and hit and count == doom.nth:
                        stop = at + size
                        if doom.place is not Place.BEHIND and size > 1:
                            stop = at + 1 + int(doom.depth * (size - 1))
                        self._pass(target, data[:stop])
                        self.cut(doom.how, doom.place, direction)
                        if not self._late:
                            return
                        data = data[stop:]
                        break
                    at += size
                self._pass(target, data)  # whole, or what is late of it
            if not self._cut:
                target.shutdown(socket.SHUT_WR)
        if self._late and target is self._agent:
            end(target, reset=False)

    def _pass(self, target: socket.socket, data: bytes) -> None:
        if self._late and target is self._agent:
            self.proxy.wait_for_use(self._number + 1, LATE_TIME)
        elif self._swallowing:
            return
        target.sendall(data)
        self.passed += len(data)

    def cut(self, how: How, place: Place, direction: Direction) -> None:
        """End the connection."""
        with self._lock:
            if self._cut:
                return
            self._cut = True
        self.proxy.note(self, how, place, direction)
        if how is How.HALF:
            with contextlib.suppress(OSError):
                (self._agent if direction is Direction.UP else self._client).shutdown(socket.SHUT_WR)
            self._later(HOLE_TIME)
        elif how is How.HOLE:
            self._swallowing = True
            self._later(HOLE_TIME)
        elif how is How.LATE:
            # The thread that carries to the agent goes on with what it has, and ends it: nobody
            # else may write there, or the agent would see a stream with a gap in it.
            self._late = self._swallowing = True
            end(self._client)
        else:
            for sock, gentle in ((self._client, how in (How.FIN, How.RST_AGENT)),
                                 (self._agent, how in (How.FIN, How.RST_CLIENT))):  # fmt: skip
                end(sock, reset=not gentle)

    def _later(self, seconds: float) -> None:
        timer = threading.Timer(seconds, lambda: [end(sock) for sock in (self._client, self._agent)])
        timer.daemon = True
        timer.start()


def end(sock: socket.socket, reset: bool = True) -> None:
    """Close a socket that other threads may be waiting for: with RST, or orderly."""
    with contextlib.suppress(OSError):
        if reset:
            # shutdown(2) would send a FIN first, and close(2) nothing while a thread is in recv(2).
            # A connect(2) to no family disconnects: it sends RST, and wakes who waits.
            LIBC.connect(sock.fileno(), NOWHERE, len(NOWHERE))
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
    with contextlib.suppress(OSError):
        sock.close()


class CuttingProxy:
    """A TCP proxy in front of an agent.

    Attributes:
        refusing: new connections are reset at once.
        delay_rate: the share of pieces that are held up for some milliseconds.
        connections: how many there were.
        cuts: how many, by what they were.
    """

    def __init__(self, target: str, seed: int = 0) -> None:
        self.seed = seed
        self.refusing = False
        self.delay_rate = 0.02
        self.connections = 0
        self.cuts: collections.Counter[tuple[How, Place, Direction]] = collections.Counter()
        host, _, port = target.rpartition(":")
        self.target = (host, int(port))
        self._changed = threading.Condition()  # guards the attributes below, connections and cuts
        self._dooms: collections.deque[Doom] = collections.deque()  # of the connections to come
        self._links: list[Link] = []
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.addr = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                try:
                    if self.refusing:
                        raise OSError
                    agent = socket.create_connection(self.target)
                except OSError:
                    end(client)
                    continue
                for sock in (client, agent):
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                with self._changed:
                    self.connections += 1
                    self._links = [link for link in self._links if not link._cut]
                    doom = self._dooms.popleft() if self._dooms else None
                    self._links.append(Link(self, client, agent, doom))
                    self._changed.notify_all()

    def note(self, link: Link, how: How, place: Place, direction: Direction) -> None:
        with self._changed:
            self.cuts[how, place, direction] += 1
            if link in self._links:
                self._links.remove(link)
            self._changed.notify_all()

    def wait_for_use(self, number: int, timeout: float) -> None:
        """Wait until a connection is there, and has passed more than its handshake."""
        with self._changed:
            self._changed.wait_for(lambda: self.connections > number, timeout)
        threading.Event().wait(0.01)

    def doom(self, *dooms: Doom) -> None:
        """Say how the connection that is there will end, if there is one, and those that come after it."""
        with self._changed:
            waiting = list(dooms)
            possible = [doom for doom in waiting if doom.place is not Place.HANDSHAKE]
            for link in self._links[-1:]:
                if link.doom is None and possible:
                    waiting.remove(possible[0])
                    link.doom = possible[0]
            self._dooms.extend(waiting)

    def forgive(self) -> int:
        """No connection is cut from now on; returns how many were to be."""
        with self._changed:
            count = len(self._dooms)
            self._dooms.clear()
            for link in self._links:
                count += link.doom is not None
                link.doom = None
            return count

    def cut(self, how: How = How.RST) -> None:
        """Cut what there is, wherever it is in its stream."""
        with self._changed:
            links = list(self._links)
        for link in links:
            link.cut(how, Place.BEHIND, Direction.UP)

    def doomed(self) -> int:
        """How many connections are still to be cut."""
        with self._changed:
            return len(self._dooms) + sum(link.doom is not None for link in self._links)

    def total(self) -> int:
        return sum(self.cuts.values())

    def close(self) -> None:
        self.refusing = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
