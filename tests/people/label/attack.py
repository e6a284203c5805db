"""Half-sent headers without a token, against one's own server:
`python -m tests.people.label.attack PORT COUNT SECONDS`.

They go to 127.0.0.1 only, from there or each from an address of its own in 127.0.0.0/8, and end by
themselves. A closed connection is opened again after a while.
"""

import argparse
import asyncio
import json
import ssl
from collections import Counter

BEGUN = b"GET /login HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Slow: "
BACK = 5.0  # seconds until a closed connection is opened again


def any_server() -> ssl.SSLContext:
    """Return settings of a client that accepts any certificate."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


class Attack:
    """Slow clients, with counts of their connections."""

    def __init__(self, port: int, tls: bool, many: bool):
        self.port = port
        self.many = many
        self.counts = Counter()
        self.context = any_server() if tls else None

    async def client(self, number: int) -> None:
        """Connect, send a byte a second, come again."""
        address = (
            f"127.{1 + number // 62500}.{number // 250 % 250}.{1 + number % 250}"
            if self.many
            else "127.0.0.1"
        )
        while True:
            try:
                reader, writer = await asyncio.open_connection(
                    "127.0.0.1", self.port, ssl=self.context, local_addr=(address, 0)
                )
                self.counts["connected"] += 1
                try:
                    writer.write(BEGUN)
                    while not await self.closed(reader):
                        writer.write(b"a")
                finally:
                    writer.transport.abort()
                self.counts["closed"] += 1
            except OSError:
                self.counts["errors"] += 1
            await asyncio.sleep(BACK)

    async def closed(self, reader: asyncio.StreamReader) -> bool:
        """Return whether the server closes the connection within a second."""
        try:
            async with asyncio.timeout(1.0):
                return not await reader.read(4096)
        except TimeoutError:
            return False

    async def run(self, count: int, seconds: float) -> None:
        clients = [asyncio.create_task(self.client(number)) for number in range(count)]
        await asyncio.sleep(seconds)
        for client in clients:
            client.cancel()
        await asyncio.gather(*clients, return_exceptions=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("port", type=int)
    parser.add_argument("count", type=int)
    parser.add_argument("seconds", type=float)
    parser.add_argument("--tls", action="store_true")
    parser.add_argument("--many", action="store_true", help="from addresses of their own")
    flags = parser.parse_args()
    attack = Attack(flags.port, flags.tls, flags.many)
    asyncio.run(attack.run(flags.count, flags.seconds))
    print(json.dumps(attack.counts))


if __name__ == "__main__":
    main()
