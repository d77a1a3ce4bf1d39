"""Payload: the data of a request, a WRITE nearly always, that is still arriving.

It is written in pieces, in place, as long as the device takes them without waiting. Once it
does not, the rest is collected and becomes one ordinary operation. The payload of a
refused or failed request is consumed and thrown away, to stay in step with the client.
"""

from nbdbackup.block.device import BlockDevice
from nbdbackup.nbd.requests import Refusal, Request
from nbdbackup.server.buffers import ReceiveBuffer
from nbdbackup.server.operations import explain

WHOLE_BYTES_MAX = 64 << 10
"""A payload up to this length is waited for; it fits the receive buffer with its head."""
PIECE_BYTES_MIN = 128 << 10
"""Pieces are at least this long, except the last: fewer calls, and still in the cache."""
PIECE_ALIGN_BYTES = 4096


class Payload:
    """Set once: `request`. `refusal` is set when the write cannot succeed any more."""

    __slots__ = ("_device", "_used", "collected", "refusal", "request")

    def __init__(
        self, request: Request, device: BlockDevice, refusal: Refusal | None, *, in_pieces: bool
    ) -> None:
        self.request = request
        self.refusal = refusal
        self._device = device
        self._used = 0
        self.collected: bytearray | None = None
        if not in_pieces and refusal is None:
            self.collected = bytearray()

    @property
    def is_complete(self) -> bool:
        """Whether all of it has arrived and was used."""
        return self._used == self.request.length

    @property
    def rest_offset(self) -> int:
        """Where on the device the collected rest begins."""
        assert self.collected is not None
        return self.request.offset + self.request.length - len(self.collected)

    def feed(self, received: ReceiveBuffer) -> bool:
        """Use what has arrived of it; False if more must arrive first."""
        while not self.is_complete:
            length = min(len(received), self.request.length - self._used)
            if self.refusal is None and self.collected is None:
                length = self._piece_bytes(length)
            if not length:
                return False
            if self._use(received.view[received.start : received.start + length]):
                received.consume(length)
                self._used += length
        return True

    def _use(self, piece: memoryview) -> bool:
        """True if `piece` is dealt with; False if it must be looked at again, to be collected."""
        if self.refusal is not None:
            return True
        if self.collected is not None:
            self.collected += piece
            return True
        try:
            if not self._device.write_nowait(self.request.offset + self._used, piece):
                self.collected = bytearray()
                return False
        except OSError as error:
            self.refusal = explain(error, self.request)
        return True

    def _piece_bytes(self, available: int) -> int:
        """How much of the `available` bytes to write now, 0 to wait for more."""
        if self._used + available == self.request.length:
            return available
        if available < PIECE_BYTES_MIN:
            return 0
        position = self.request.offset + self._used
        return (position + available) // PIECE_ALIGN_BYTES * PIECE_ALIGN_BYTES - position
